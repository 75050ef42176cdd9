"""The commands for a cluster: `tuner render`, `tuner submit` and what follows a run there."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.cluster_options import (
    AnonymousPush,
    ClusterWorkspace,
    Deadline,
    DisruptionOk,
    Gpus,
    ImagePullSecret,
    ImageVolume,
    InstanceType,
    Namespace,
    OutputImage,
    Patch,
    PriorityClass,
    PushHold,
    Queue,
    QueuePriority,
    RegistryCheckpoints,
    ResultsVolume,
    Retries,
    RuntimeClass,
    Scheduler,
    ServiceAccount,
    SetImage,
    Spot,
    Ttl,
    Urls,
    WeightsVolume,
    WorkloadIdentity,
    read_cluster_run,
)
from tuner.cli.common import say
from tuner.cli.options import (
    AllowCidr,
    AllowPrivate,
    Ca,
    Config,
    Disable,
    NoOverwrite,
    NoPreflight,
    PlainHttp,
    Require,
    Set,
    Smoke,
    SourceHeaders,
    TrustRemoteCode,
    app,
)
from tuner.errors import UsageError
from tuner.pod import PUSH_HOLD_S

if TYPE_CHECKING:
    from tuner.cluster.job_options import JobOptions
    from tuner.request import Run
    from tuner.workspace import WorkspaceFile


@app.command(epilog="Example: tuner render workspace.yaml --set-image reg.example/tuner:0.1.0")
def render(
    workspace: ClusterWorkspace,
    set_image: SetImage = None,
    namespace: Namespace = None,
    patch: Patch = None,
    shows_diff: Annotated[bool, typer.Option("--diff", help="print only what options and patches change")] = False,
    shows_check: Annotated[
        bool, typer.Option("--check-job", help="the Job that checks all this on a CPU, instead of the one that trains")
    ] = False,
    serving: Annotated[
        str | None,
        typer.Option("--serving", metavar="SERVER", help="print what serves the adapter instead: kaito or vllm"),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", metavar="REF", help="with --serving: the pushed image, by digest")
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", metavar="S", help="with --serving kaito: of the adapter, 0 to 1")
    ] = None,
    vllm_image: Annotated[
        str | None, typer.Option("--vllm-image", metavar="I", help="with --serving vllm [vllm/vllm-openai]")
    ] = None,
    instance_type: InstanceType = None,
    gpus: Gpus = None,
    results_volume: ResultsVolume = None,
    registry_checkpoints: RegistryCheckpoints = False,
    weights_volume: WeightsVolume = None,
    service_account: ServiceAccount = None,
    workload_identity: WorkloadIdentity = False,
    anonymous_push: AnonymousPush = False,
    image_pull_secret: ImagePullSecret = None,
    spot: Spot = False,
    disruption_ok: DisruptionOk = False,
    queue: Queue = None,
    queue_priority: QueuePriority = None,
    priority_class: PriorityClass = None,
    scheduler: Scheduler = None,
    runtime_class: RuntimeClass = None,
    retries: Retries = 3,
    ttl: Ttl = None,
    deadline: Deadline = None,
    push_hold: PushHold = PUSH_HOLD_S,
    image_volume: ImageVolume = False,
    data: Urls = None,
    output: OutputImage = None,
    smoke: Smoke = False,
    config: Config = None,
    set_: Set = None,
    source_headers: SourceHeaders = None,
    plain_http: PlainHttp = False,
    ca: Ca = None,
    allow_private_urls: AllowPrivate = False,
    allow_cidr: AllowCidr = None,
    no_overwrite: NoOverwrite = False,
    no_preflight: NoPreflight = False,
    require: Require = None,
    disable: Disable = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Print the Kubernetes objects of a run, for `kubectl apply -f -`: ConfigMap, Secrets, Job."""
    from tuner.cluster.beside import render_check_job
    from tuner.cluster.job import render_job
    from tuner.cluster.templates import dump_manifests

    given = {"--diff": shows_diff, "--check-job": shows_check, "--serving": serving is not None}
    if len(chosen := [flag for flag, is_given in given.items() if is_given]) > 1:
        raise UsageError(f"{' and '.join(chosen)} are both given", hint="choose one")
    if serving is None and (adapter or vllm_image or strength is not None):
        raise UsageError("--adapter, --strength and --vllm-image are for --serving", hint="--serving kaito or vllm")
    if serving is not None:
        _serve(serving, locals())
        return
    file, run, options = read_cluster_run(locals())
    objects = render_job(file, run, options)
    for line in (*run.notes, *objects.notes):
        say(f"note: {line}")
    if shows_diff:
        print(_diff(file, run, options, dump_manifests(objects.objects)), end="")
        return
    manifests = objects.objects
    if shows_check:
        manifests = (*manifests[:-1], render_check_job(objects.job))
    print(dump_manifests(manifests), end="")


def _serve(server: str, typed: Mapping[str, Any]) -> None:
    from tuner.cluster.serving import SERVERS, ServingOptions, render_serving
    from tuner.cluster.templates import dump_manifests
    from tuner.reference import parse_reference

    known = next((known for known in SERVERS if known == server), None)
    if known is None:
        raise UsageError(f"--serving {server}: must be {' or '.join(SERVERS)}")
    file, run, options = read_cluster_run(typed, needs_image=known == "vllm")
    adapter = parse_reference(typed["adapter"]) if typed["adapter"] else None
    serving = render_serving(known, file, run, options, ServingOptions(adapter, typed["strength"], typed["vllm_image"]))
    for line in serving.notes:
        say(f"note: {line}")
    print(dump_manifests(serving.objects), end="")


def _diff(file: "WorkspaceFile", run: "Run", options: "JobOptions", rendered: str) -> str:
    """Unified, from what the Workspace alone gives."""
    import difflib

    from tuner.cluster.job import render_job
    from tuner.cluster.job_options import JobOptions
    from tuner.cluster.templates import dump_manifests

    alone = JobOptions(
        image=options.image,
        labels_preferred=file.workspace.resource.instance_type is not None,
        image_volume=options.image_volume,
        config_text=options.config_text,
        ca_text=options.ca_text,
    )
    default = dump_manifests(render_job(file, run, alone).objects)
    lines = difflib.unified_diff(default.splitlines(True), rendered.splitlines(True), "default", "rendered")
    return "".join(lines)
