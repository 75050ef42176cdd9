"""`tuner controller`: what the Deployment of `tuner install` runs."""

import os
import signal
import socket
import uuid
from typing import Annotated

import typer

from tuner.cli.common import make_network
from tuner.cli.options import app
from tuner.errors import UsageError


@app.command(epilog="Example: tuner controller --image registry.example.com/tuner:0.1.0 --namespace team-a")
def controller(
    image: Annotated[
        str, typer.Option("--image", metavar="REF", envvar="TUNER_IMAGE", help="the image that the Jobs' pods run")
    ],
    namespace: Annotated[
        list[str] | None, typer.Option("--namespace", "-n", metavar="N", help="only there; repeatable [everywhere]")
    ] = None,
    selector: Annotated[
        str, typer.Option("--selector", metavar="LABELS", help="only Workspaces with these labels")
    ] = "",
    allow_cidr: Annotated[
        list[str] | None,
        typer.Option("--allow-cidr", metavar="CIDR", help="private addresses that input.urls may be at; repeatable"),
    ] = None,
    check_job: Annotated[
        str, typer.Option("--check-job", help="before the GPU's Job: auto (where a node would boot), always, never")
    ] = "auto",
    progress: Annotated[str, typer.Option("--progress", help="logs or off")] = "logs",
    service_account: Annotated[
        str | None, typer.Option("--service-account", metavar="NAME", help="of the Jobs' pods [default]")
    ] = None,
    workload_identity: Annotated[
        bool, typer.Option("--workload-identity", help="the service account's cloud identity, in all but the trainer")
    ] = False,
    image_pull_secret: Annotated[
        list[str] | None,
        typer.Option("--image-pull-secret", metavar="NAME", help="to pull the pods' image with; repeatable"),
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="tolerate spot nodes of Azure, Google and Amazon")] = False,
    priority_class: Annotated[str | None, typer.Option("--priority-class", metavar="CLASS", help="of the pods")] = None,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", metavar="NAME", help="instead of Kubernetes' own")
    ] = None,
    runtime_class: Annotated[str | None, typer.Option("--runtime-class", metavar="CLASS", help="of the pods")] = None,
    retries: Annotated[int, typer.Option("--retries", min=0, help="of a pod that failed for a passing reason")] = 3,
    ttl: Annotated[
        int | None,
        typer.Option("--ttl", metavar="S", min=3600, help="delete a Job so long after its end [never]"),
    ] = None,
    leader_elect: Annotated[
        bool, typer.Option("--leader-elect/--no-leader-elect", help="by a Lease, so that several may run")
    ] = True,
    metrics_port: Annotated[int, typer.Option("--metrics-port", min=0)] = 8080,
    health_port: Annotated[int, typer.Option("--health-port", min=0)] = 8081,
    context: Annotated[str | None, typer.Option("--context", help="of the kubeconfig, outside a cluster")] = None,
) -> None:
    """Run the controller: every Workspace with a tuning section becomes a Job, and its status tells the truth."""
    from typing import Literal, cast

    from tuner.cluster.api import Api
    from tuner.cluster.controller import Controller, ControllerOptions, log_json
    from tuner.cluster.job_options import JobOptions
    from tuner.cluster.reconcile import CheckJob, Settings
    from tuner.cluster.revision import RevisionRenderer
    from tuner.request import Request

    if check_job not in ("auto", "always", "never"):
        raise UsageError(f"--check-job {check_job}: must be auto, always or never")
    if progress not in ("logs", "off"):
        raise UsageError(f"--progress {progress}: must be logs or off")
    request = Request(
        place="pod",
        network=make_network(False, None, tuple(allow_cidr or ())),
        pushes_without_secret=workload_identity,
    )
    options = JobOptions(
        image=image,
        service_account=service_account,
        workload_identity=workload_identity,
        image_pull_secrets=tuple(image_pull_secret or ()),
        spot=spot,
        priority_class=priority_class,
        scheduler=scheduler,
        runtime_class=runtime_class,
        backoff_limit=retries,
    )
    api = Api.from_config(context, patience_s=2.0, warn=lambda line: log_json("warning", "the API server", said=line))
    process = Controller(
        api,
        Settings(RevisionRenderer(request, options), check_job=cast(CheckJob, check_job), ttl_s=ttl),
        ControllerOptions(
            home=os.environ.get("POD_NAMESPACE") or api.namespace,
            identity=f"{os.environ.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}",
            namespaces=tuple(namespace or ()),
            selector=selector,
            progress=cast(Literal["logs", "off"], progress),
            metrics_port=metrics_port,
            health_port=health_port,
            leader_election=leader_elect,
        ),
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.stop())
    process.run()
