"""What was typed → the calls below it. The only place that prints or exits.

stdout is data, stderr is talk. Everything but Typer is imported inside the commands: `tuner --help` is quick.
"""

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.errors import EXIT_INTERNAL, ConfigError, InterruptedRunError, TunerError, UsageError

if TYPE_CHECKING:
    from tuner.request import Request, Run
    from tuner.talk import Talk
    from tuner.workspace import WorkspaceFile

EXIT_USAGE = UsageError.exit_code
EXIT_SIGINT = 130
EXIT_SIGPIPE = 141

app = typer.Typer(
    name="tuner",
    help="Run the tuning section of a KAITO Workspace: data in, 4-bit QLoRA, a pushed adapter image out.",
    epilog="Example: tuner run workspace.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look at data before it is trained on.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")

WorkspaceArgument = Annotated[Path | None, typer.Argument(metavar="WORKSPACE", help="a Workspace YAML file")]
Model = Annotated[str | None, typer.Option("--model", help="preset, Hugging Face id or directory, instead of a file")]
Data = Annotated[list[str] | None, typer.Option("--data", metavar="FILE", help="URL, file or directory; repeatable")]
Output = Annotated[
    str | None, typer.Option("--output", metavar="DIR|REF", help="directory, registry/name:tag or oci:DIR:TAG")
]
Method = Annotated[str, typer.Option("--method", help="qlora or lora, with --model")]
Smoke = Annotated[bool, typer.Option("--smoke", help="a tiny random model of the same architecture, a few steps")]
BaseModel = Annotated[
    Path | None, typer.Option("--base-model", metavar="DIR", help="the base model's files, instead of a download")
]
Config = Annotated[Path | None, typer.Option("--config", metavar="F", help="training_config.yaml")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="K=V", help="LoraConfig.r=32; repeatable")]
WorkDir = Annotated[
    Path | None, typer.Option("--work-dir", metavar="D", help="data, checkpoints, adapter [tuner-work/NAME]")
]
DockerConfig = Annotated[
    Path | None, typer.Option("--docker-config", metavar="D", help="docker config.json with the push credential")
]
PlainHttp = Annotated[bool, typer.Option("--plain-http", help="speak http to the registry")]
Ca = Annotated[Path | None, typer.Option("--ca", metavar="F", help="CA certificates of the registry, PEM")]
AllowPrivate = Annotated[
    bool, typer.Option("--allow-private-urls", help="fetch from loopback and private addresses too")
]
AllowCidr = Annotated[
    list[str] | None, typer.Option("--allow-cidr", metavar="NET", help="fetch from this range too; repeatable")
]
NoOverwrite = Annotated[bool, typer.Option("--no-overwrite", help="stop at once when the tag is there already")]
NoPreflight = Annotated[bool, typer.Option("--no-preflight", help="do not ask the registry for push permission first")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run Python from the model's repository")]
DigestFile = Annotated[
    Path | None, typer.Option("--digest-file", metavar="F", help="write the pushed digest to this file")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]


def main(argv: Sequence[str]) -> int:
    """The exit code. Nothing below this function prints an error or exits."""
    try:
        app(args=list(argv), prog_name="tuner")
    except SystemExit as stopped:  # Typer has said what is wrong: 2 is its code for usage, 1 for Ctrl-C
        code = stopped.code if isinstance(stopped.code, int) else 0
        return {1: EXIT_SIGINT, 2: EXIT_USAGE}.get(code, code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGPIPE
    except TunerError as error:
        return _explain(error, argv)
    except Exception:
        traceback.print_exc()
        _say("\nerror: this is a bug in tuner; the lines above say where")
        return EXIT_INTERNAL
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _explain(error: TunerError, argv: Sequence[str]) -> int:
    _say(f"error: {error.message}")
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        for problem in error.problems:
            _say(f"  {problem}" + (f"\n      hint: {problem.hint}" if problem.hint else ""))
    hint = error.hint
    if isinstance(error, InterruptedRunError):
        hint = f"go on with: {shlex.join(['tuner', *argv])}"
    if hint:
        _say(f"\nhint: {hint}")
    return error.exit_code


def _version(wanted: bool) -> None:
    if wanted:
        from tuner import __version__

        print(f"tuner {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None: ...


# ── run and check ────────────────────────────────────────────────────────────────────────────────────────────────────


@app.command(epilog="Example: tuner run workspace.yaml --set TrainingArguments.num_train_epochs=1")
def run(
    workspace: WorkspaceArgument = None,
    model: Model = None,
    data: Data = None,
    output: Output = None,
    method: Method = "qlora",
    smoke: Smoke = False,
    base_model: BaseModel = None,
    config: Config = None,
    set_: Set = None,
    work_dir: WorkDir = None,
    docker_config: DockerConfig = None,
    plain_http: PlainHttp = False,
    ca: Ca = None,
    allow_private_urls: AllowPrivate = False,
    allow_cidr: AllowCidr = None,
    no_overwrite: NoOverwrite = False,
    no_preflight: NoPreflight = False,
    trust_remote_code: TrustRemoteCode = False,
    digest_file: DigestFile = None,
    as_json: AsJson = False,
) -> None:
    """Download, train, package and push: the whole Workspace on this machine."""
    from tuner.pipeline.run import run as run_stages

    request = _request(**_typed(locals()))
    built, directory = _build(workspace, model, data, output, method, request, work_dir)
    with _talk() as talk:
        _introduce(built, talk)
        result = run_stages(built.spec, built.secrets, directory, talk, on_stage=talk.stage)
        talk.note(
            f"done in {result.seconds:,.0f} s: {result.steps:,} steps, loss {result.train_loss:.4g}"
            + (
                f", held-out loss {result.eval_loss_before:.4g} → {result.eval_loss:.4g}"
                if result.eval_loss is not None and result.eval_loss_before is not None
                else ""
            )
        )
    _deliver(result.image, digest_file, result.model_dump(mode="json") if as_json else None)


@app.command(epilog="Example: tuner check --data workspace.yaml")
def check(
    workspace: WorkspaceArgument = None,
    with_data: Annotated[bool, typer.Option("--data", help="fetch and check every row too")] = False,
    output: Output = None,
    smoke: Smoke = False,
    base_model: BaseModel = None,
    config: Config = None,
    set_: Set = None,
    work_dir: WorkDir = None,
    docker_config: DockerConfig = None,
    plain_http: PlainHttp = False,
    ca: Ca = None,
    allow_private_urls: AllowPrivate = False,
    allow_cidr: AllowCidr = None,
    no_overwrite: NoOverwrite = False,
    no_preflight: NoPreflight = False,
    trust_remote_code: TrustRemoteCode = False,
    spec_file: Annotated[
        Path | None, typer.Option("--write-spec", metavar="FILE", hidden=True, help="RunSpec; FILE.secrets beside it")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find out now what would go wrong later: Workspace, config, secret, push permission; with --data every row."""
    from tuner.pipeline.run import preflight

    request = _request(**_typed(locals()))
    built, directory = _build(workspace, None, None, output, "qlora", request, work_dir)
    if spec_file:
        built.spec.save(spec_file)
        built.secrets.save(spec_file.with_name(spec_file.name + ".secrets"))
    with _talk() as talk:
        _introduce(built, talk)
        talk.stage("preflight")
        preflight(built.spec, built.secrets, directory, talk, trains=with_data)
        if with_data:
            from tuner.pipeline.fetch import fetch
            from tuner.pipeline.prepare import prepare

            talk.stage("fetch")
            fetched = fetch(built.spec, built.secrets, directory, talk)
            talk.stage("prepare")
            prepare(built.spec, fetched, directory, talk)
    _print_settings(built, as_json)


def _typed(parameters: dict[str, Any]) -> dict[str, Any]:
    """The flags that a Request is made of."""
    names = (
        "smoke base_model config set_ docker_config output plain_http ca allow_private_urls allow_cidr no_overwrite "
        "no_preflight trust_remote_code"
    )
    return {name: parameters[name] for name in names.split()}


def _request(
    *,
    smoke: bool,
    base_model: Path | None,
    config: Path | None,
    set_: list[str] | None,
    docker_config: Path | None,
    output: str | None,
    plain_http: bool,
    ca: Path | None,
    allow_private_urls: bool,
    allow_cidr: list[str] | None,
    no_overwrite: bool,
    no_preflight: bool,
    trust_remote_code: bool,
) -> "Request":
    from tuner.request import Request
    from tuner.runspec import Network

    return Request(
        smoke=smoke,
        base_model=base_model,
        config=config,
        overrides=tuple(set_ or ()),
        output=output,
        docker_config=docker_config,
        network=Network(
            allow_cidrs=tuple(allow_cidr or ()),
            allow_private_urls=allow_private_urls,
            plain_http=plain_http,
            ca_file=str(ca) if ca else None,
        ),
        overwrite=not no_overwrite,
        preflight=not no_preflight,
        trust_remote_code=trust_remote_code,
    )


def _build(
    workspace: Path | None,
    model: str | None,
    data: list[str] | None,
    output: str | None,
    method: str,
    request: "Request",
    work_dir: Path | None,
) -> tuple["Run", Path]:
    from dataclasses import replace

    from tuner.request import build_run

    file = _workspace_file(workspace, model, data, output, method, request)
    directory = work_dir or Path("tuner-work") / file.workspace.metadata.name
    if workspace and data:
        request = replace(request, data=tuple(data))
    return build_run(file, request, directory, os.environ), directory


def _workspace_file(
    workspace: Path | None,
    model: str | None,
    data: list[str] | None,
    output: str | None,
    method: str,
    request: "Request",
) -> "WorkspaceFile":
    from tuner.urls import Allowed
    from tuner.workspace import WorkspaceFile, load_workspace_file, make_workspace

    if workspace and model:
        raise UsageError("a WORKSPACE file and --model are two ways to say the same", hint="give one of them")
    if workspace:
        allowed = Allowed.of(request.network.allow_cidrs, request.network.allow_private_urls)
        return load_workspace_file(workspace, allowed=allowed, output_given=output is not None or request.smoke)
    if not (model and data and (output or request.smoke)):
        raise UsageError(
            "give a WORKSPACE file, or --model, --data and --output",
            hint="tuner run --model phi-3-mini-4k-instruct --data train.jsonl --output ./adapter",
        )
    return WorkspaceFile(workspace=make_workspace(model, data, output, method=method))


def _talk() -> "Talk":
    from tuner.talk import Talk

    return Talk(sys.stderr)


def _introduce(built: "Run", talk: "Talk") -> None:
    from tuner.runspec import HubModel, ImageModel, LocalModel, SmokeModel

    spec = built.spec
    match spec.base_model:
        case SmokeModel():
            what = "a tiny random model of its architecture"
        case HubModel(id=name, revision=revision):
            what = f"{name} at {revision[:12]}"
        case LocalModel(path=path):
            what = path
        case ImageModel(reference=reference):
            what = reference
    talk.note(f"{spec.name}: {spec.method} on {spec.preset.name} ({what}), run {spec.digest[7:19]}")
    for line in built.notes:
        talk.note(line)


def _print_settings(built: "Run", as_json: bool) -> None:
    rows = [
        {"setting": f"{section}.{key}", "value": setting.value, "origin": setting.origin}
        for section, values in built.spec.training.settings.items()
        for key, setting in values.items()
    ]
    if as_json:
        import json

        print(json.dumps({"run_digest": built.spec.digest, "credential": built.credential_source, "settings": rows}))
        return
    width = max(len(row["setting"]) for row in rows)
    for row in rows:
        value = str(row["value"]).replace("\n", "\\n")
        value = value if len(value) <= 60 else value[:57] + "…"
        print(f"{row['setting']:<{width}}  {value:<24}  {row['origin']}")


def _deliver(image: str, digest_file: Path | None, result: dict[str, Any] | None) -> None:
    import json

    if digest_file:
        digest_file.write_text(image.rpartition("@")[2] + "\n", encoding="utf-8")
    print(json.dumps(result) if result is not None else image)


# ── presets, init, data ──────────────────────────────────────────────────────────────────────────────────────────────


@app.command(epilog="Example: tuner presets phi-3-mini-4k-instruct")
def presets(
    name: Annotated[str | None, typer.Argument(help="show one")] = None,
    as_json: AsJson = False,
) -> None:
    """List the models whose facts are known; any other Hugging Face id and any directory works too."""
    import json

    from tuner.presets import find_preset, load_presets

    if name:
        preset = find_preset(name)
        if as_json:
            print(preset.model_dump_json(indent=2))
            return
        import yaml

        shown = preset.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), end="")
        return
    known = load_presets()
    if as_json:
        print(json.dumps([preset.model_dump(mode="json") for preset in known.values()]))
        return
    width = max(len(name) for name in known)
    print(f"{'NAME':<{width}}  {'CONTEXT':>8}  {'WEIGHTS':>8}  {'TOKEN':<5}  {'LICENCE':<12}  MODEL")
    for preset in known.values():
        weights = f"{preset.weights_gib:.1f} GiB" if preset.weights_gib else "–"
        token = "yes" if preset.gated else "no"
        context = f"{preset.context_length:,}" if preset.context_length else "–"
        print(
            f"{preset.name:<{width}}  {context:>8}  {weights:>8}  {token:<5}  {preset.licence or '–':<12}  "
            f"{preset.model_id}"
        )


@app.command(epilog="Example: tuner init --preset qwen3-4b workspace.yaml")
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE")] = Path("workspace.yaml"),
    preset: Annotated[str, typer.Option("--preset", help="see `tuner presets`")] = "phi-3-mini-4k-instruct",
) -> None:
    """Write a commented Workspace to start from."""
    from tuner.presets import find_preset
    from tuner.workspace import template_workspace

    if path.exists():
        raise UsageError(f"{path} is there already", hint="give another file name")
    path.write_text(template_workspace(find_preset(preset).name), encoding="utf-8")
    _say(f"wrote {path}; change what is in CAPITALS, then: tuner check {path}")


@data_app.command("preview", epilog="Example: tuner data preview train.parquet --rows 3")
def data_preview(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…")],
    preset: Annotated[str, typer.Option("--preset", help="whose chat template to use")] = "phi-3-mini-4k-instruct",
    base_model: BaseModel = None,
    config: Config = None,
    rows: Annotated[int, typer.Option("--rows", help="how many rows to show")] = 3,
) -> None:
    """Show rows, token counts and, in colour, which tokens are learnt."""
    from tuner.pipeline.preview import preview

    preview(files, preset, base_model, config, rows, sys.stdout)


# ── one stage, as a pod runs it ──────────────────────────────────────────────────────────────────────────────────────


@app.command(hidden=True, epilog="Example: tuner stage fetch --spec run.json --secrets secrets.json --work-dir work")
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="preflight, fetch, prepare, train or push")],
    spec_file: Annotated[Path, typer.Option("--spec", metavar="FILE", help="the RunSpec")],
    secrets_file: Annotated[Path | None, typer.Option("--secrets", metavar="FILE", help="its secrets")] = None,
    work_dir: Annotated[Path, typer.Option("--work-dir", metavar="D")] = Path("tuner-work"),
) -> None:
    """Run one stage of a RunSpec in this process; its StageResult is the last line of stdout."""
    from tuner.pipeline.run import run_stage
    from tuner.runspec import STAGES, RunSpec, Secrets, StageResult

    known = next((known for known in STAGES if known == name), None)
    if known is None:
        raise UsageError(f"{name!r} is no stage", hint=f"one of {', '.join(STAGES)}")
    try:
        spec = RunSpec.load(spec_file)
        secrets = Secrets.load(secrets_file) if secrets_file else Secrets()
        work_dir.mkdir(parents=True, exist_ok=True)
        with _talk() as talk:
            values = run_stage(known, spec, secrets, work_dir, talk)
    except TunerError as error:
        failed = StageResult(stage=known, exit_code=error.exit_code, reason=type(error).__name__, message=error.message)
        print(failed.to_message(), flush=True)
        raise
    print(StageResult(stage=known, values=values).to_message())


# ── push and pull ────────────────────────────────────────────────────────────────────────────────────────────────────


@app.command(epilog="Example: tuner push tuner-work/my-run/adapter-0123456789ab myregistry.azurecr.io/adapter:1")
def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="an adapter directory")],
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="registry/name:tag or oci:DIR:TAG")],
    docker_config: DockerConfig = None,
    plain_http: PlainHttp = False,
    ca: Ca = None,
    no_overwrite: NoOverwrite = False,
    digest_file: DigestFile = None,
) -> None:
    """Package an adapter directory and push it; equal files give the digest that the run would have pushed."""
    from tuner.pipeline.run import deliver
    from tuner.request import docker_configs_for, parse_output
    from tuner.runspec import DirectoryDestination, Network

    destination = parse_output(image, overwrite=not no_overwrite)
    if isinstance(destination, DirectoryDestination):
        raise UsageError(f"{image} names no registry", hint="registry/name:tag, or oci:DIR:TAG for a layout on disk")
    network = Network(plain_http=plain_http, ca_file=str(ca) if ca else None)
    with _talk() as talk:
        pushed = deliver(directory, destination, network, docker_configs_for(docker_config, os.environ), talk)
        talk.note(f"pushed {pushed.bytes_sent:,} bytes" + (", the rest was there" if pushed.blobs_skipped else ""))
    _deliver(pushed.reference, digest_file, None)


@app.command(epilog="Example: tuner pull myregistry.azurecr.io/adapter:1 ./adapter")
def pull(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="registry/name:tag or oci:DIR:TAG")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="must not be there yet")],
    docker_config: DockerConfig = None,
    plain_http: PlainHttp = False,
    ca: Ca = None,
) -> None:
    """Fetch an adapter or data image and unpack its /data, every digest checked."""
    from tuner.reference import LayoutReference, parse_destination
    from tuner.registry import client_for
    from tuner.registry.pull import pull_image
    from tuner.request import docker_configs_for
    from tuner.runspec import Network

    reference = parse_destination(image)
    network = Network(plain_http=plain_http, ca_file=str(ca) if ca else None)
    with _talk() as talk:
        if isinstance(reference, LayoutReference):
            pulled = pull_image(reference, directory, reporter=talk)
        else:
            with client_for(reference, network, docker_configs_for(docker_config, os.environ)) as client:
                pulled = pull_image(reference, directory, client, reporter=talk)
        talk.note(f"pulled {len(pulled.files)} files to {directory}")
    print(reference.with_digest(pulled.digest))
