"""What was typed → the calls below it. The only place that prints or exits.

stdout is data, stderr is talk. Everything but Typer is imported inside the commands: `tuner --help` is quick.
"""

import errno
import io
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.errors import (
    EXIT_INTERNAL,
    ConfigError,
    InputMissingError,
    InterruptedRunError,
    NotPushedError,
    TunerError,
    UsageError,
)

if TYPE_CHECKING:
    from tuner.registry.push import Pushed
    from tuner.registry.push_state import PushOptions
    from tuner.request import Request, Run
    from tuner.runspec import Destination, Network, Prepared, RunSpec, Source
    from tuner.talk import Talk
    from tuner.workspace import WorkspaceFile

EXIT_SIGINT, EXIT_SIGPIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE

app = typer.Typer(
    name="tuner",
    help="Run the tuning section of a KAITO Workspace: data in, 4-bit QLoRA, a pushed adapter image out.",
    epilog="Example: tuner run workspace.yaml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(
    help="Look at data before it is trained on.",
    epilog="Example: tuner data preview train.parquet",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")

WorkspaceArgument = Annotated[Path | None, typer.Argument(metavar="WORKSPACE", help="a Workspace YAML file")]
Model = Annotated[str | None, typer.Option("--model", help="preset, Hugging Face id or directory, instead of a file")]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="FILE", help="URL, file or directory instead of the file's; repeatable"),
]
Output = Annotated[
    str | None, typer.Option("--output", metavar="DIR|REF", help="directory, registry/name:tag or oci:DIR:TAG")
]
Method = Annotated[str | None, typer.Option("--method", help="qlora or lora, with --model [qlora]")]
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
    Path | None, typer.Option("--docker-config", metavar="F", help="docker config.json with the push credential")
]
SourceHeaders = Annotated[
    Path | None, typer.Option("--source-headers", metavar="F", help="JSON: which URLs get which headers or token")
]
PlainHttp = Annotated[bool, typer.Option("--plain-http", help="speak http to the registry")]
Ca = Annotated[Path | None, typer.Option("--ca", metavar="F", help="CA certificates to trust, PEM")]
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
Compression = Annotated[
    str, typer.Option("--compression", metavar="C", help="of the image's layers: none, zstd or gzip")
]
ChunkSize = Annotated[
    int | None, typer.Option("--chunk-size", metavar="BYTES", min=1, help="upload blobs in pieces [whole]")
]
PushDeadline = Annotated[
    float, typer.Option("--push-deadline", metavar="S", min=1, help="seconds after which a push gives up")
]
ModelPack = Annotated[bool, typer.Option("--modelpack", help="a ModelPack manifest beside the image, at TAG-modelpack")]
Provenance = Annotated[bool, typer.Option("--provenance", help="an unsigned in-toto statement as a referrer")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]


def main(argv: Sequence[str]) -> int:
    """The exit code. Nothing below this function prints an error or exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without "→" is no reason to stop
    try:
        with _signals():
            code = app(args=list(argv), prog_name="tuner", standalone_mode=False)
            print(end="", flush=True)  # a reader that is gone shows here, and not when Python ends
    except TunerError as error:
        return _explain(error, argv)
    except _TyperError as error:
        return _explain_usage(error)
    except (KeyboardInterrupt, typer.Abort):  # the second Ctrl-C of a training, which has said so
        return EXIT_SIGINT
    except _Stopped as stopped:
        return stopped.exit_code
    except SystemExit:  # Typer's way with a reader of stdout that is gone
        return EXIT_SIGPIPE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGPIPE
    except OSError as error:
        if error.errno not in _ENVIRONMENT:
            return _bug()
        where = f"{error.filename}: " if error.filename else ""
        return _explain(ConfigError(f"{where}{error.strerror}", hint=_ENVIRONMENT[error.errno]), argv)
    except Exception:
        return _bug()
    return int(code or 0)


# Typer has a copy of click in newer releases: its errors are found through one that it exports.
_TyperError: type[Exception] = typer.BadParameter.__mro__[2]

# What is wrong with a machine and not with us, wherever it shows.
_ENVIRONMENT = {
    errno.ENOSPC: "free some space, or give another --work-dir; what is there already is used again",
    errno.EDQUOT: "free some space, or give another --work-dir; what is there already is used again",
    errno.EROFS: "give another --work-dir or --output",
    errno.EACCES: "whose is it? give another --work-dir or --output",
    errno.EPERM: "whose is it? give another --work-dir or --output",
    errno.ENOTDIR: "a part of this path is a file",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: None,
}


_PATIENCE_S = 3.0  # for an orderly end: a connection that says nothing may hold it up


class _Stopped(BaseException):
    """SIGINT or SIGTERM came. A BaseException, so that nobody takes it for a fault."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM are acknowledged and end the block, with uploads taken back and files closed.

    A second one, or some seconds, end the process. The train stage has handlers of its own. Without one for SIGTERM a
    container's first process would not end at all.
    """
    stopping = False

    def end(number: int, _frame: object) -> None:
        nonlocal stopping
        exit_code = 128 + number
        if stopping:
            _leave(exit_code)
        stopping = True
        _say(f"{signal.Signals(number).name}: stopping; what was downloaded and saved so far is kept")
        patience = threading.Timer(_PATIENCE_S, _leave, (exit_code,))
        patience.daemon = True
        patience.start()
        raise _Stopped(exit_code)

    # What is ignored stays ignored: nohup, and jobs in the background of a script.
    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(exit_code: int) -> None:
    """End the process as it stands: all that is kept is on the disk already."""
    if sys.stderr.isatty():
        print(end="\x1b[?25h", file=sys.stderr, flush=True)  # the bars had hidden the cursor
    os._exit(exit_code)


def _say(text: str) -> None:
    from tuner.talk import Lasting, without_queries

    print(without_queries(text), file=Lasting(sys.stderr), flush=True)


def _explain(error: TunerError, argv: Sequence[str]) -> int:
    _say(f"error: {error.message}")
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        for problem in error.problems:
            hint = problem.hint if problem.hint and problem.hint not in problem.message else None
            _say(f"  {problem}" + (f"\n      hint: {hint}" if hint else ""))
    if error.hint and error.hint not in error.message:
        _say(f"hint: {error.hint}")
    if isinstance(error, InterruptedRunError | NotPushedError):
        _say(f"go on with: {shlex.join(['tuner', *argv])}")
    return error.exit_code


def _explain_usage(error: Exception) -> int:
    """Typer's own words, in our form."""
    context = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if message.startswith("Usage:"):  # no arguments at all
        _say(message)
        return UsageError.exit_code
    _say(f"error: {message[0].lower()}{message[1:]}")
    _say(f"hint: {context.command_path if context else 'tuner'} --help")
    return UsageError.exit_code


def _bug() -> int:
    _say(traceback.format_exc())
    _say("error: this is a bug in tuner; the lines above say where")
    return EXIT_INTERNAL


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
    method: Method = None,
    smoke: Smoke = False,
    base_model: BaseModel = None,
    config: Config = None,
    set_: Set = None,
    work_dir: WorkDir = None,
    docker_config: DockerConfig = None,
    source_headers: SourceHeaders = None,
    plain_http: PlainHttp = False,
    ca: Ca = None,
    allow_private_urls: AllowPrivate = False,
    allow_cidr: AllowCidr = None,
    no_overwrite: NoOverwrite = False,
    no_preflight: NoPreflight = False,
    trust_remote_code: TrustRemoteCode = False,
    digest_file: DigestFile = None,
    compression: Compression = "none",
    chunk_size: ChunkSize = None,
    push_deadline: PushDeadline = 1800,
    modelpack: ModelPack = False,
    provenance: Provenance = False,
    as_json: AsJson = False,
) -> None:
    """Download, train, package and push: the whole Workspace on this machine."""
    from tuner.pipeline.run import run as run_stages

    request = _request(locals())
    options = _push_options(compression, chunk_size, push_deadline, modelpack, provenance)
    file = _workspace_file(workspace, model, data, method, request)
    built, directory = _build(file, request, work_dir)
    _check_digest_file(digest_file, built.spec.destination)
    with _talk() as talk:
        _introduce(built, talk)
        result = run_stages(built.spec, built.secrets, directory, talk, on_stage=talk.stage, options=options)
        talk.note(
            f"done in {result.seconds:,.0f} s: {result.steps:,} steps, loss {result.train_loss:.4g}"
            + (
                f", held-out loss {result.eval_loss_before:.4g} → {result.eval_loss:.4g}"
                if result.eval_loss is not None and result.eval_loss_before is not None
                else ""
            )
        )
    _deliver(result.image, digest_file, result.model_dump(mode="json") if as_json else None)


def _push_options(
    compression: str, chunk_size: int | None, deadline_s: float, modelpack: bool, provenance: bool
) -> "PushOptions":
    from tuner.registry.push_state import PushOptions

    if compression not in ("none", "zstd", "gzip"):
        raise UsageError(f"--compression {compression}: there is none, zstd and gzip")
    return PushOptions.model_validate(
        {
            "compression": compression,
            "chunk_bytes": chunk_size,
            "deadline_s": deadline_s,
            "modelpack": modelpack,
            "provenance": provenance,
        }
    )


@app.command(epilog="Example: tuner check --data workspace.yaml")
def check(
    workspace: Annotated[Path, typer.Argument(metavar="WORKSPACE", help="a Workspace YAML file")],
    with_data: Annotated[bool, typer.Option("--data", help="fetch and check every row too")] = False,
    output: Output = None,
    smoke: Smoke = False,
    base_model: BaseModel = None,
    config: Config = None,
    set_: Set = None,
    work_dir: WorkDir = None,
    docker_config: DockerConfig = None,
    source_headers: SourceHeaders = None,
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

    request = _request(locals())
    built, directory = _build(_workspace_file(workspace, None, None, None, request), request, work_dir)
    if spec_file:
        built.spec.save(spec_file)
        built.secrets.save(spec_file.with_name(spec_file.name + ".secrets"))
    prepared = None
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
            prepared = prepare(built.spec, fetched, directory, talk)
    _print_check(built, directory, prepared, as_json)


@app.command(epilog="Example: tuner plan workspace.yaml --gpu 24GB")
def plan(
    workspace: Annotated[Path, typer.Argument(metavar="WORKSPACE", help="a Workspace YAML file")],
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="G", help="24GB, H100-80, A10, …")] = None,
    instance_type: Annotated[
        str | None, typer.Option("--instance-type", metavar="T", help="Standard_NC24ads_A100_v4 [the Workspace's]")
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", metavar="P", min=0, help="of the machine for an hour, in any currency")
    ] = None,
    prepared_file: Annotated[
        Path | None, typer.Option("--prepared", metavar="FILE", help="prepared.json of a `tuner check --data`")
    ] = None,
    base_model: BaseModel = None,
    config: Config = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> int:
    """Estimate whether it fits a GPU, and how long it takes: no GPU and no download needed."""
    import json
    from dataclasses import replace

    from tuner.plan import choose_machine, describe_plan, make_plan, plan_as_json
    from tuner.request import Request
    from tuner.runspec import Prepared

    request = Request(base_model=base_model, config=config, overrides=tuple(set_ or ()), output=".", preflight=False)
    file = _workspace_file(workspace, None, None, None, request)
    machine = choose_machine(gpu, instance_type, file.workspace.resource.instance_type)
    built, _ = _build(file, replace(request, world_size=machine.gpus), None)
    prepared = Prepared.load(prepared_file) if prepared_file else None
    made = make_plan(built.spec.preset, built.spec.training, machine, prepared=prepared, price_per_hour=price or None)
    print(json.dumps(plan_as_json(made)) if as_json else describe_plan(made))
    if made.exit_code:
        _say(f"error: {made.verdict}")
    return made.exit_code


def _request(typed: Mapping[str, Any]) -> "Request":
    """The flags that run and check have in common, from their parameters."""
    from tuner.request import Request

    return Request(
        smoke=typed["smoke"],
        base_model=typed["base_model"],
        config=typed["config"],
        overrides=tuple(typed["set_"] or ()),
        output=typed["output"],
        docker_config=typed["docker_config"],
        source_headers=typed["source_headers"],
        network=_network(
            typed["plain_http"], typed["ca"], tuple(typed["allow_cidr"] or ()), typed["allow_private_urls"]
        ),
        overwrite=not typed["no_overwrite"],
        preflight=not typed["no_preflight"],
        trust_remote_code=typed["trust_remote_code"],
        world_size=_gpu_count(),
    )


def _network(
    plain_http: bool, ca: Path | None, allow_cidrs: tuple[str, ...] = (), allow_private_urls: bool = False
) -> "Network":
    from tuner.runspec import Network

    return Network(
        allow_cidrs=allow_cidrs,
        allow_private_urls=allow_private_urls,
        plain_http=plain_http,
        ca_file=str(ca.expanduser().absolute()) if ca else None,
    )


def _workspace_file(
    workspace: Path | None, model: str | None, data: list[str] | None, method: str | None, request: "Request"
) -> "WorkspaceFile":
    """The file that was named, or the one that --model and its fellows stand for."""
    from tuner.request import all_at_once, flag_errors, with_data
    from tuner.urls import Allowed
    from tuner.workspace import WorkspaceFile, load_workspace_file, make_workspace

    if workspace and str(workspace).lower().startswith(("http:/", "https:/")):
        raise UsageError("a WORKSPACE is a file on this machine, not a URL", hint="download it first")
    if workspace and (model or method):
        flag = "--model" if model else "--method"
        raise UsageError(
            f"{flag} and a WORKSPACE are two ways to say the same", hint=f"leave out {flag}, or change the file"
        )
    output_given = bool(request.output) or request.smoke
    if not workspace and not (model and data and output_given):
        missing = [
            flag for flag, given in (("--model", model), ("--data", data), ("--output", output_given)) if not given
        ]
        raise UsageError(
            "give a WORKSPACE file, or --model, --data and --output"
            + (f"; missing: {', '.join(missing)}" if len(missing) < 3 else ""),
            hint="tuner run --model phi-3-mini-4k-instruct --data train.jsonl --output ./adapter",
        )
    try:
        allowed = Allowed.of(request.network.allow_cidrs, request.network.allow_private_urls)
        if workspace:
            file = load_workspace_file(workspace, allowed=allowed, output_given=output_given)
            return with_data(file, data, allowed) if data else file
        return WorkspaceFile(make_workspace(str(model), data or (), None, method or "qlora", allowed=allowed))
    except (ConfigError, InputMissingError) as error:
        raise all_at_once([error, *flag_errors(request)]) from error


def _build(file: "WorkspaceFile", request: "Request", work_dir: Path | None) -> tuple["Run", Path]:
    from tuner.request import build_run

    directory = work_dir.expanduser() if work_dir else Path("tuner-work") / file.workspace.metadata.name
    return build_run(file, request, directory, os.environ), directory


def _check_digest_file(digest_file: Path | None, destination: "Destination") -> None:
    """Before hours of training, not after them."""
    if digest_file is None:
        return
    if destination.kind == "directory":
        raise UsageError("--digest-file: a directory has no digest", hint="--output oci:DIR:TAG makes an image on disk")
    was_there = digest_file.exists()
    try:
        digest_file.open("a").close()
        if not was_there:
            digest_file.unlink()  # who waits for it must not find an empty one
    except OSError as error:
        raise ConfigError(f"--digest-file {digest_file}: cannot be written: {error.strerror}") from error


def _talk() -> "Talk":
    from tuner.talk import Talk

    return Talk(sys.stderr)


def _introduce(built: "Run", talk: "Talk") -> None:
    spec = built.spec
    talk.note(f"{spec.name}: {spec.method} on {_base_model(spec)}, run {spec.digest[7:19]}")
    for line in built.notes:
        talk.note(line)


def _base_model(spec: "RunSpec") -> str:
    from tuner.runspec import HubModel, ImageModel, LocalModel, SmokeModel

    match spec.base_model:
        case SmokeModel():
            return f"a tiny random model like {spec.preset.name}"
        case HubModel(id=name, revision=revision):
            return f"{name} at {revision[:12]}"
        case LocalModel(path=path, id=None):
            return path
        case LocalModel(path=path, id=name) | ImageModel(reference=path, id=name):
            return f"{name} from {path}"


def _source(source: "Source") -> str:
    from tuner.runspec import FileSource, ImageSource, UrlSource, VolumeSource

    match source:
        case UrlSource(url=url):
            return url
        case FileSource(path=path):
            return path
        case ImageSource(reference=reference):
            return f"image {reference}"
        case VolumeSource(path=path):
            return f"the files in {path}"


def _destination(destination: "Destination") -> str:
    from tuner.runspec import DirectoryDestination, ImageDestination, LayoutDestination

    match destination:
        case ImageDestination(reference=reference, overwrite=overwrite):
            return reference if overwrite else f"{reference}, unless it is there already"
        case LayoutDestination(path=path, tag=tag):
            return f"oci:{path}:{tag}"
        case DirectoryDestination(path=path):
            return path


def _gpu_count() -> int:
    """GPUs that a run here would use, without asking torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    if visible is not None and present:
        return max(1, min(present, len([name for name in visible.split(",") if name.strip()])))
    return max(1, present)


def _plan(spec: "RunSpec") -> str:
    """`3 epochs, 16 documents a step, 4-bit base model, LoRA rank 16`"""
    arguments = spec.training.section("TrainingArguments")
    steps = arguments.get("max_steps") or -1
    length = f"{steps:,} steps" if steps > 0 else f"{arguments['num_train_epochs']:g} epochs"
    documents = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    quantization = spec.training.section("QuantizationConfig")
    bits = 4 if quantization["load_in_4bit"] else 8 if quantization["load_in_8bit"] else 16
    rank = spec.training.value("LoraConfig", "r")
    return f"{length}, {documents:,} documents a step, {bits}-bit base model, LoRA rank {rank}"


def _print_check(built: "Run", work_dir: Path, prepared: "Prepared | None", as_json: bool) -> None:
    spec = built.spec
    if as_json:
        import json
        from dataclasses import asdict

        about = spec.model_dump(
            mode="json", include={"name", "method", "base_model", "sources", "destination", "probe", "smoke"}
        )
        settings = [
            {"setting": name, "value": value, "origin": origin} for name, value, origin in spec.training.origins()
        ]
        found = {
            "run_digest": spec.digest,
            **about,
            "preset": spec.preset.name,
            "work_dir": str(work_dir.absolute()),
            "credentials": asdict(built.credentials),
            "notes": built.notes,
            "data": prepared and prepared.model_dump(mode="json"),
            "settings": settings,
        }
        print(json.dumps(found))
        return
    facts = [
        ("run", f"{spec.name}, {spec.digest[7:19]}"),
        ("base model", _base_model(spec)),
        *(("data", _source(source)) for source in spec.sources),
        ("training", _plan(spec)),
        ("destination", _destination(spec.destination)),
        ("to push", built.credentials.push),
        ("to pull", built.credentials.pull),
        ("to download", built.credentials.hub),
        ("work dir", str(work_dir.absolute())),
    ]
    said = ""
    for name, value in facts:
        print(f"{name if name != said else '':<12} {value}".rstrip())
        said = name
    rows = [(name, _shown(value), origin) for name, value, origin in spec.training.origins()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    print(f"\n{'SETTING':<{widths[0]}}  {'VALUE':<{widths[1]}}  ORIGIN")
    for name, value, origin in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}")


def _shown(value: object) -> str:
    """A setting's value on one line; – is what the run finds out for itself."""
    if value is None:
        return "–"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 40 else text[:39] + "…"


def _deliver(image: str, digest_file: Path | None, result: dict[str, Any] | None) -> None:
    import json

    print(json.dumps(result) if result is not None else image)
    if digest_file:
        digest_file.write_text(image.rpartition("@")[2] + "\n", encoding="utf-8")


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

    text = template_workspace(find_preset(preset).name)
    if not path.absolute().parent.is_dir():
        raise InputMissingError(f"{path.parent}: there is no such directory")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} is there already", hint="give another file name") from None
    _say(f"wrote {path}; replace what says example.com, then: tuner check {path}")


@data_app.command("preview", epilog="Example: tuner data preview train.parquet --rows 3")
def data_preview(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="data files of any format")],
    preset: Annotated[
        str | None, typer.Option("--preset", help="whose chat template to use [the base model's]")
    ] = None,
    base_model: Annotated[
        Path | None, typer.Option("--base-model", metavar="DIR", help="a model's files, whose tokenizer counts exactly")
    ] = None,
    config: Config = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="how many rows to show")] = 3,
) -> None:
    """Show rows, token counts and, in colour, which tokens are learnt."""
    from tuner.pipeline.preview import load_preview, print_preview

    with _talk() as talk:
        preview = load_preview(files, preset, base_model, config, rows, talk)
    print_preview(preview, sys.stdout)


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
    directory: Annotated[Path | None, typer.Argument(metavar="DIR", help="an adapter directory")] = None,
    image: Annotated[str | None, typer.Argument(metavar="IMAGE", help="registry/name:tag or oci:DIR:TAG")] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="finish the push that push-state.json there began")
    ] = None,
    docker_config: DockerConfig = None,
    plain_http: PlainHttp = False,
    ca: Ca = None,
    no_overwrite: NoOverwrite = False,
    digest_file: DigestFile = None,
    compression: Compression = "none",
    chunk_size: ChunkSize = None,
    push_deadline: PushDeadline = 1800,
    modelpack: ModelPack = False,
    provenance: Provenance = False,
) -> None:
    """Package an adapter directory and push it; equal files give the digest that the run would have pushed."""
    from tuner.pipeline.run import deliver, resume_push
    from tuner.request import docker_configs_for, parse_output
    from tuner.runspec import DirectoryDestination

    if resume:
        if directory or image:
            raise UsageError("--resume DIR knows what to push and where", hint=f"tuner push --resume {resume}")
        with _talk() as talk:
            pushed = resume_push(resume, docker_configs_for(docker_config, os.environ), talk)
            _say_pushed(pushed, talk)
        _deliver(pushed.reference, digest_file, None)
        return
    if directory is None or image is None:
        raise UsageError("give DIR and IMAGE, or --resume DIR", hint="tuner push ./adapter myregistry.azurecr.io/a:1")
    options = _push_options(compression, chunk_size, push_deadline, modelpack, provenance)
    destination = parse_output(image, overwrite=not no_overwrite)
    if isinstance(destination, DirectoryDestination):
        raise UsageError(f"{image} names no registry", hint="registry/name:tag, or oci:DIR:TAG for a layout on disk")
    _check_digest_file(digest_file, destination)
    with _talk() as talk:
        credentials = docker_configs_for(docker_config, os.environ)
        pushed = deliver(directory, destination, _network(plain_http, ca), credentials, talk, options=options)
        _say_pushed(pushed, talk)
    _deliver(pushed.reference, digest_file, None)


def _say_pushed(pushed: "Pushed", talk: "Talk") -> None:
    talk.note(f"pushed {pushed.bytes_sent:,} bytes" + (", the rest was there" if pushed.blobs_skipped else ""))


@app.command(epilog="Example: tuner verify myregistry.azurecr.io/adapter:1")
def verify(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="registry/name:tag or oci:DIR:TAG")],
    load: Annotated[
        Path | None, typer.Option("--load", metavar="DIR", help="load it with PEFT on the base model in DIR too")
    ] = None,
    docker_config: DockerConfig = None,
    plain_http: PlainHttp = False,
    ca: Ca = None,
) -> None:
    """Check an adapter image: every digest, what must be in it, that it agrees with its lock, and its weights."""
    from tempfile import TemporaryDirectory

    from tuner.pipeline.adapter import ADAPTER_WEIGHTS, check_weights
    from tuner.reference import LayoutReference, parse_destination
    from tuner.registry import client_for
    from tuner.registry.verify import verify_image
    from tuner.request import docker_configs_for

    reference = parse_destination(image)
    with _talk() as talk, TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        if isinstance(reference, LayoutReference):
            verified = verify_image(reference, directory, reporter=talk)
        else:
            credentials = docker_configs_for(docker_config, os.environ)
            with client_for(reference, _network(plain_http, ca), credentials, reporter=talk) as client:
                verified = verify_image(reference, directory, client, reporter=talk)
        check_weights(directory / ADAPTER_WEIGHTS)
        if load:
            _load_with_peft(directory, load)
        talk.note(f"{len(verified.files)} files are what they say" + (", and PEFT loads them" if load else ""))
    print(reference.with_digest(verified.digest))


def _load_with_peft(adapter: Path, base: Path) -> None:
    from tuner.pipeline.libraries import check_packages, quiet

    check_packages()
    quiet()
    from tuner.pipeline.model import load_adapter

    load_adapter(base, adapter)


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

    reference = parse_destination(image)
    with _talk() as talk:
        if isinstance(reference, LayoutReference):
            pulled = pull_image(reference, directory, reporter=talk)
        else:
            credentials = docker_configs_for(docker_config, os.environ)
            with client_for(reference, _network(plain_http, ca), credentials, reporter=talk) as client:
                pulled = pull_image(reference, directory, client, reporter=talk)
        talk.note(f"pulled {len(pulled.files)} files to {directory}")
    print(reference.with_digest(pulled.digest))
