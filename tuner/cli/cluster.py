"""The commands for a cluster: `tuner render`, `tuner submit` and what follows a run there."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tuner.cli.cluster_options import JobFlags, read_cluster_run
from tuner.cli.common import say
from tuner.cli.flags import command, output
from tuner.cli.options import WorkspaceArgument
from tuner.errors import UsageError

if TYPE_CHECKING:
    from tuner.cluster.job_options import JobOptions
    from tuner.cluster.serving import Server
    from tuner.request import Run
    from tuner.workspace import WorkspaceFile


@dataclass(frozen=True, kw_only=True)
class ServingFlags:
    """What is to serve the adapter, instead of the run."""

    serving: Annotated[
        Literal["kaito", "vllm"] | None,
        output("--serving", metavar="SERVER", help="print what serves the adapter instead: kaito or vllm"),
    ]
    adapter: Annotated[
        str | None, output("--adapter", metavar="REF", help="with --serving: the pushed image, by digest")
    ]
    strength: Annotated[
        float | None, output("--strength", metavar="S", help="with --serving kaito: of the adapter, 0 to 1")
    ]
    vllm_image: Annotated[
        str | None, output("--vllm-image", metavar="I", help="with --serving vllm [vllm/vllm-openai]")
    ]


@command(
    "render",
    example="tuner render workspace.yaml --set-image reg.example/tuner:0.1.0",
)
def render(
    workspace: WorkspaceArgument,
    flags: JobFlags,
    shows_diff: Annotated[bool, output("--diff", help="print only what options and patches change")],
    shows_check: Annotated[
        bool, output("--check-job", help="the Job that checks all this on a CPU, instead of the one that trains")
    ],
    serving: ServingFlags,
) -> None:
    """Print the Kubernetes objects of a run, for `kubectl apply -f -`: ConfigMap, Secrets, Job."""
    from tuner.cluster.beside import render_check_job
    from tuner.cluster.job import render_job
    from tuner.cluster.templates import dump_manifests

    given = {"--diff": shows_diff, "--check-job": shows_check, "--serving": serving.serving is not None}
    if len(chosen := [flag for flag, is_given in given.items() if is_given]) > 1:
        raise UsageError(f"{' and '.join(chosen)} are both given", hint="choose one")
    if serving.serving is not None:
        _serve(serving.serving, serving, workspace, flags)
        return
    if serving.adapter or serving.vllm_image or serving.strength is not None:
        raise UsageError("--adapter, --strength and --vllm-image are for --serving", hint="--serving kaito or vllm")
    file, run, options = read_cluster_run(workspace, flags)
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


def _serve(server: "Server", asked: ServingFlags, workspace: Path, flags: JobFlags) -> None:
    from tuner.cluster.serving import ServingOptions, render_serving
    from tuner.cluster.templates import dump_manifests
    from tuner.reference import parse_reference

    file, run, options = read_cluster_run(workspace, flags, needs_image=server == "vllm")
    adapter = parse_reference(asked.adapter) if asked.adapter else None
    wanted = ServingOptions(adapter, asked.strength, asked.vllm_image)
    serving = render_serving(server, file, run, options, wanted)
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
