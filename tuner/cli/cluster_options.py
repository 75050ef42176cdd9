"""The options that `tuner render` and `tuner submit` have in common, and what they make of a Workspace file."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.common import build, make_network, read_workspace_file, say
from tuner.errors import ConfigError, InputMissingError, UsageError

if TYPE_CHECKING:
    from tuner.cluster.api import Api
    from tuner.cluster.job_options import JobOptions
    from tuner.request import Run
    from tuner.workspace import WorkspaceFile

ClusterWorkspace = Annotated[Path, typer.Argument(metavar="WORKSPACE", help="a Workspace YAML file")]
Urls = Annotated[
    list[str] | None, typer.Option("--data", metavar="URL", help="URL instead of the file's input; repeatable")
]
OutputImage = Annotated[
    str | None, typer.Option("--output", metavar="REF", help="another image than tuning.output.image")
]
SetImage = Annotated[
    str | None,
    typer.Option("--set-image", metavar="I", envvar="TUNER_IMAGE", help="the image of tuner that the pod runs"),
]
Namespace = Annotated[
    str | None, typer.Option("--namespace", "-n", metavar="N", help="namespace of the objects [the Workspace's]")
]
Context = Annotated[str | None, typer.Option("--context", metavar="C", help="of the kubeconfig [the current one]")]
Patch = Annotated[
    list[Path] | None,
    typer.Option("--patch", metavar="F", help="YAML merged into the Job as kubectl patch does; repeatable"),
]
InstanceType = Annotated[
    str | None, typer.Option("--instance-type", metavar="T", help="the nodes to run on [the Workspace's instanceType]")
]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, help="GPUs of the pod [the instance type's, or 1]")]
ResultsVolume = Annotated[
    str | None,
    typer.Option(
        "--results-volume", metavar="CLAIM", help="keep checkpoints and adapter on this PersistentVolumeClaim"
    ),
]
RegistryCheckpoints = Annotated[
    bool,
    typer.Option(
        "--registry-checkpoints",
        help="keep the last checkpoint in the output's repository: a pod on another node goes on from it",
    ),
]
WeightsVolume = Annotated[
    str | None,
    typer.Option("--weights-volume", metavar="CLAIM", help="keep base weights on this PersistentVolumeClaim"),
]
ServiceAccount = Annotated[str | None, typer.Option("--service-account", metavar="NAME", help="the pod's [default]")]
WorkloadIdentity = Annotated[
    bool, typer.Option("--workload-identity", help="the service account's cloud identity, in all but the trainer")
]
AnonymousPush = Annotated[bool, typer.Option("--anonymous-push", help="the registry takes a push without a secret")]
ImagePullSecret = Annotated[
    list[str] | None,
    typer.Option("--image-pull-secret", metavar="NAME", help="to pull tuner's own image with; repeatable"),
]
Spot = Annotated[bool, typer.Option("--spot", help="tolerate spot nodes of Azure, Google and Amazon")]
DisruptionOk = Annotated[bool, typer.Option("--disruption-ok", help="let autoscalers move the pod to another node")]
Queue = Annotated[str | None, typer.Option("--queue", metavar="NAME", help="a LocalQueue of Kueue")]
QueuePriority = Annotated[
    str | None, typer.Option("--queue-priority", metavar="CLASS", help="a WorkloadPriorityClass of Kueue")
]
PriorityClass = Annotated[
    str | None, typer.Option("--priority-class", metavar="CLASS", help="the pod's priorityClassName")
]
Scheduler = Annotated[
    str | None, typer.Option("--scheduler", metavar="NAME", help="the pod's schedulerName, as volcano")
]
RuntimeClass = Annotated[
    str | None, typer.Option("--runtime-class", metavar="CLASS", help="the pod's runtimeClassName, as nvidia")
]
Retries = Annotated[int, typer.Option("--retries", min=0, help="new pods after a passing failure")]
Ttl = Annotated[
    int | None, typer.Option("--ttl", metavar="S", min=60, help="delete the Job so long after its end [never]")
]
Deadline = Annotated[int | None, typer.Option("--deadline", metavar="S", min=1, help="fail the Job after so long")]
PushHold = Annotated[
    int,
    typer.Option(
        "--push-hold", metavar="S", min=0, help="how long to try while the registry is down, without --results-volume"
    ),
]
ImageVolume = Annotated[
    bool, typer.Option("--image-volume", help="mount input.image instead of pulling it; Kubernetes 1.35")
]


def open_api(context: str | None, namespace: str | None) -> "Api":
    """The cluster of the kubeconfig; its warnings, and that it does not answer, are said on stderr."""
    from tuner.cluster.api import Api

    return Api.from_config(
        context,
        namespace,
        warn=lambda line: say(f"warning: the cluster says: {line}"),
        tell=lambda line: say(f"warning: {line}"),
    )


def read_cluster_run(
    typed: Mapping[str, Any],
    *,
    needs_image: bool = True,
    decide: "Callable[[WorkspaceFile, JobOptions], tuple[WorkspaceFile, JobOptions]] | None" = None,
) -> "tuple[WorkspaceFile, Run, JobOptions]":
    """The Workspace, its run in a pod and the options of its Job, from the parameters of `render` or `submit`.

    `decide` completes file and options with what only the cluster knows. Raises the TunerError of what is wrong.
    """
    from tuner.cluster.job_options import JobOptions, count_gpus, written_instance_type
    from tuner.cluster.patch import load_patches
    from tuner.request import Request

    if needs_image and not typed["set_image"]:
        raise UsageError(
            "which image is the pod to run? --set-image is missing",
            hint="build the target `run` of the Dockerfile, push it, and give --set-image REF or set TUNER_IMAGE",
        )
    request = Request(
        place="pod",
        smoke=typed["smoke"],
        config=typed["config"],
        overrides=tuple(typed["set_"] or ()),
        output=typed["output"],
        source_headers=typed["source_headers"],
        network=make_network(
            typed["plain_http"], typed["ca"], tuple(typed["allow_cidr"] or ()), typed["allow_private_urls"]
        ),
        overwrite=not typed["no_overwrite"],
        preflight=not typed["no_preflight"],
        require=tuple(typed["require"] or ()),
        disable=tuple(typed["disable"] or ()),
        trust_remote_code=typed["trust_remote_code"],
        pushes_without_secret=typed["anonymous_push"] or typed["workload_identity"],
        image_volume=typed["image_volume"],
    )
    file = read_workspace_file(typed["workspace"], None, typed["data"], None, request)
    options = JobOptions(
        image=typed["set_image"] or "",
        namespace=typed["namespace"],
        gpus=typed["gpus"],
        instance_type=typed["instance_type"],
        service_account=typed["service_account"],
        workload_identity=typed["workload_identity"],
        spot=typed["spot"],
        queue=typed["queue"],
        queue_priority=typed["queue_priority"],
        priority_class=typed["priority_class"],
        scheduler=typed["scheduler"],
        runtime_class=typed["runtime_class"],
        image_pull_secrets=tuple(typed["image_pull_secret"] or ()),
        results_volume=typed["results_volume"],
        registry_checkpoints=typed["registry_checkpoints"],
        weights_volume=typed["weights_volume"],
        push_hold_s=typed["push_hold"],
        backoff_limit=typed["retries"],
        ttl_s=typed["ttl"],
        deadline_s=typed["deadline"],
        image_volume=typed["image_volume"],
        disruption_ok=typed["disruption_ok"],
        patches=load_patches(typed["patch"] or ()),
        patch_annotation=True,  # who gave the file may create Jobs as well
        config_text=_text(typed["config"], "--config"),
        ca_text=_text(typed["ca"], "--ca"),
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
