"""`tuner controller`: what the Deployment of `tuner install` runs."""

import os
import socket
import uuid
from dataclasses import dataclass
from typing import Annotated, Literal

from tuner.cli.cluster_options import IMAGE_VARIABLE, PodFlags, pod_options
from tuner.cli.flags import cluster, command, other, scheduling
from tuner.cli.options import AllowCidr, Context
from tuner.signals import handling


@dataclass(frozen=True, kw_only=True)
class ControllerFlags(PodFlags):
    """What the controller watches, and how it runs."""

    image: Annotated[
        str, cluster("--image", metavar="REF", envvar=IMAGE_VARIABLE, help="the image that the Jobs' pods run")
    ]
    namespace: Annotated[
        tuple[str, ...], cluster("--namespace", "-n", metavar="N", help="only there; repeatable [everywhere]")
    ]
    selector: Annotated[str, cluster("--selector", metavar="LABELS", help="only Workspaces with these labels")] = ""
    context: Context
    check_job: Annotated[
        Literal["auto", "always", "never"],
        scheduling(
            "--check-job",
            metavar="WHEN",
            help="before the GPU's Job: auto (where a node would boot), always, never",
        ),
    ] = "auto"
    ttl: Annotated[
        int | None,
        scheduling("--ttl", metavar="S", min=3600, help="delete a Job so long after its end [never]"),
    ]
    allow_cidr: AllowCidr
    progress: Annotated[
        Literal["logs", "off"], other("--progress", metavar="FROM", help="of a run in its status: logs or off")
    ] = "logs"
    leader_elect: Annotated[
        bool, other("--leader-elect/--no-leader-elect", help="by a Lease, so that several may run")
    ] = True
    metrics_port: Annotated[int, other("--metrics-port", metavar="PORT", min=0, help="of /metrics")] = 8080
    health_port: Annotated[int, other("--health-port", metavar="PORT", min=0, help="of /healthz and /readyz")] = 8081


@command(
    "controller",
    example="tuner controller --image registry.example.com/tuner:0.1.0 --namespace team-a",
)
def controller(flags: ControllerFlags) -> None:
    """Run the controller: every Workspace with a tuning section becomes a Job, and its status tells the truth."""
    from tuner.cluster.api import Api
    from tuner.cluster.controller import Controller, ControllerOptions, log_json
    from tuner.cluster.reconcile import Settings
    from tuner.cluster.revision import RevisionRenderer
    from tuner.request import Request
    from tuner.runspec import Network

    request = Request(
        place="pod", network=Network(allow_cidrs=flags.allow_cidr), pushes_without_secret=flags.workload_identity
    )
    api = Api.from_config(
        flags.context, patience_s=2.0, warn=lambda line: log_json("warning", "the API server", said=line)
    )
    process = Controller(
        api,
        Settings(
            RevisionRenderer(request, pod_options(flags, flags.image)), check_job=flags.check_job, ttl_s=flags.ttl
        ),
        ControllerOptions(
            home=os.environ.get("POD_NAMESPACE") or api.namespace,
            identity=f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}",
            namespaces=flags.namespace,
            selector=flags.selector,
            progress=flags.progress,
            metrics_port=flags.metrics_port,
            health_port=flags.health_port,
            leader_election=flags.leader_elect,
        ),
    )
    with handling(lambda *_: process.stop()):
        process.run()
