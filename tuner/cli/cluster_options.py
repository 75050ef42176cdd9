"""The options of what goes to a cluster, and what `render` and `submit` make of them and of a Workspace file."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import completion
from tuner.cli.common import build, make_request, read_workspace_file, say
from tuner.cli.flags import cluster, data, output, registry, scheduling, storage
from tuner.cli.options import Context, InstanceType, RegistryCheckpoints, RequestFlags
from tuner.errors import ConfigError, InputMissingError, UsageError
from tuner.pod import PUSH_HOLD_S

if TYPE_CHECKING:
    from tuner.cluster.api import Api
    from tuner.cluster.job_options import JobOptions
    from tuner.request import Run
    from tuner.workspace import WorkspaceFile

IMAGE_VARIABLE = "TUNER_IMAGE"


@dataclass(frozen=True, kw_only=True)
class ClusterFlags:
    """Where a run is that is there already."""

    namespace: Annotated[str | None, cluster("--namespace", "-n", metavar="N", help="where the Job is [the context's]")]
    context: Context


RunName = Annotated[
    str,
    typer.Argument(metavar="NAME", help="of the Workspace, and so of its Job", autocompletion=completion.runs),
]


@dataclass(frozen=True, kw_only=True)
class PodFlags:
    """What is asked of a run's pod, whoever makes its Job."""

    service_account: Annotated[str | None, cluster("--service-account", metavar="NAME", help="the pod's [default]")]
    workload_identity: Annotated[
        bool, cluster("--workload-identity", help="the service account's cloud identity, in all but the trainer")
    ]
    image_pull_secret: Annotated[
        tuple[str, ...],
        cluster("--image-pull-secret", metavar="NAME", help="to pull tuner's own image with; repeatable"),
    ]
    spot: Annotated[bool, scheduling("--spot", help="tolerate spot nodes of Azure, Google and Amazon")]
    priority_class: Annotated[
        str | None, scheduling("--priority-class", metavar="CLASS", help="the pod's priorityClassName")
    ]
    scheduler: Annotated[
        str | None, scheduling("--scheduler", metavar="NAME", help="the pod's schedulerName, as volcano")
    ]
    runtime_class: Annotated[
        str | None, scheduling("--runtime-class", metavar="CLASS", help="the pod's runtimeClassName, as nvidia")
    ]
    retries: Annotated[int, scheduling("--retries", metavar="N", min=0, help="new pods after a passing failure")] = 3


@dataclass(frozen=True, kw_only=True)
class JobFlags(RequestFlags, PodFlags):
    """What `render` and `submit` have in common: all that makes a Job of a Workspace."""

    data: Annotated[tuple[str, ...], data("--data", metavar="URL", help="URL instead of the file's input; repeatable")]
    output: Annotated[str | None, output("--output", metavar="REF", help="another image than tuning.output.image")]
    anonymous_push: Annotated[bool, registry("--anonymous-push", help="the registry takes a push without a secret")]
    set_image: Annotated[
        str | None,
        cluster("--set-image", metavar="I", envvar=IMAGE_VARIABLE, help="the image of tuner that the pod runs"),
    ]
    namespace: Annotated[
        str | None, cluster("--namespace", "-n", metavar="N", help="namespace of the objects [the Workspace's]")
    ]
    patch: Annotated[
        tuple[Path, ...],
        cluster("--patch", metavar="F", help="YAML merged into the Job as kubectl patch does; repeatable"),
    ]
    instance_type: InstanceType
    gpus: Annotated[
        int | None, scheduling("--gpus", metavar="N", min=1, help="GPUs of the pod [the instance type's, or 1]")
    ]
    disruption_ok: Annotated[bool, scheduling("--disruption-ok", help="let autoscalers move the pod to another node")]
    queue: Annotated[str | None, scheduling("--queue", metavar="NAME", help="a LocalQueue of Kueue")]
    queue_priority: Annotated[
        str | None, scheduling("--queue-priority", metavar="CLASS", help="a WorkloadPriorityClass of Kueue")
    ]
    ttl: Annotated[
        int | None, scheduling("--ttl", metavar="S", min=60, help="delete the Job so long after its end [never]")
    ]
    deadline: Annotated[int | None, scheduling("--deadline", metavar="S", min=1, help="fail the Job after so long")]
    results_volume: Annotated[
        str | None,
        storage("--results-volume", metavar="CLAIM", help="keep checkpoints and adapter on this PersistentVolumeClaim"),
    ]
    registry_checkpoints: RegistryCheckpoints
    weights_volume: Annotated[
        str | None, storage("--weights-volume", metavar="CLAIM", help="keep base weights on this PersistentVolumeClaim")
    ]
    image_volume: Annotated[
        bool, storage("--image-volume", help="mount input.image instead of pulling it; Kubernetes 1.35")
    ]
    push_hold: Annotated[
        int,
        registry(
            "--push-hold",
            metavar="S",
            min=0,
            help="how long to try while the registry is down, without --results-volume",
        ),
    ] = PUSH_HOLD_S


def open_api(context: str | None, namespace: str | None) -> "Api":
    """The cluster of the kubeconfig; its warnings, and that it does not answer, are said on stderr."""
    from tuner.cluster.api import Api

    return Api.from_config(
        context,
        namespace,
        warn=lambda line: say(f"warning: the cluster says: {line}"),
        tell=lambda line: say(f"warning: {line}"),
    )


def pod_options(flags: PodFlags, image: str) -> "JobOptions":
    from tuner.cluster.job_options import JobOptions

    return JobOptions(
        image=image,
        service_account=flags.service_account,
        workload_identity=flags.workload_identity,
        image_pull_secrets=flags.image_pull_secret,
        spot=flags.spot,
        priority_class=flags.priority_class,
        scheduler=flags.scheduler,
        runtime_class=flags.runtime_class,
        backoff_limit=flags.retries,
    )


def read_cluster_run(
    workspace: Path,
    flags: JobFlags,
    *,
    needs_image: bool = True,
    decide: "Callable[[WorkspaceFile, JobOptions], tuple[WorkspaceFile, JobOptions]] | None" = None,
) -> "tuple[WorkspaceFile, Run, JobOptions]":
    """The Workspace, its run in a pod and the options of its Job.

    `decide` completes file and options with what only the cluster knows. Raises the TunerError of what is wrong.
    """
    from tuner.cluster.job_options import count_gpus, written_instance_type
    from tuner.cluster.patch import load_patches
    from tuner.yaml_lines import read_text

    if needs_image and not flags.set_image:
        raise UsageError(
            "which image is the pod to run? --set-image is missing",
            hint=f"build the target `run` of the Dockerfile, push it, and give --set-image REF or set {IMAGE_VARIABLE}",
        )
    request = replace(
        make_request(flags),
        place="pod",
        output=flags.output,
        pushes_without_secret=flags.anonymous_push or flags.workload_identity,
        image_volume=flags.image_volume,
    )
    file = read_workspace_file(workspace, None, flags.data, None, request)
    options = replace(
        pod_options(flags, flags.set_image or ""),
        namespace=flags.namespace,
        gpus=flags.gpus,
        instance_type=flags.instance_type,
        queue=flags.queue,
        queue_priority=flags.queue_priority,
        results_volume=flags.results_volume,
        registry_checkpoints=flags.registry_checkpoints,
        weights_volume=flags.weights_volume,
        push_hold_s=flags.push_hold,
        ttl_s=flags.ttl,
        deadline_s=flags.deadline,
        image_volume=flags.image_volume,
        disruption_ok=flags.disruption_ok,
        patches=load_patches(flags.patch),
        patch_annotation=True,  # who gave the file may create Jobs as well
        config_text=read_text(flags.config.expanduser(), f"--config {flags.config}") if flags.config else None,
        ca_text=_text(flags.ca, "--ca"),
    )
    # Whoever sees no nodes cannot know whether any has the labels.
    options = replace(options, labels_preferred=written_instance_type(file.workspace, options) is not None)
    if decide:
        file, options = decide(file, options)
    gpus = count_gpus(file.workspace, options, smoke=request.smoke)
    run, _ = build(file, replace(request, world_size=max(1, gpus)), None)
    return file, run, options


def _text(path: Path | None, flag: str) -> str | None:
    if path is None:
        return None
    try:
        return path.expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputMissingError(f"{flag} {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{flag} {path}: is not text") from None
