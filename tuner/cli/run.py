"""`tuner run`, `tuner check` and `tuner plan`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tuner.cli.common import (
    build,
    check_digest_file,
    make_network,
    open_talk,
    parse_push_options,
    print_result,
    read_workspace_file,
    say,
)
from tuner.cli.options import (
    AllowCidr,
    AllowPrivate,
    AsJson,
    BaseModel,
    Ca,
    ChunkSize,
    Compression,
    Config,
    Data,
    DigestFile,
    Disable,
    DockerConfig,
    Method,
    Model,
    ModelPack,
    NoOverwrite,
    NoPreflight,
    Output,
    PlainHttp,
    Provenance,
    PushDeadline,
    Require,
    Set,
    Smoke,
    SourceHeaders,
    TrustRemoteCode,
    WorkDir,
    WorkspaceArgument,
    app,
)
from tuner.errors import ConfigError, InputMissingError, UsageError

if TYPE_CHECKING:
    from tuner.request import Request, Run
    from tuner.runspec import Destination, Prepared, RunResult, RunSpec, Source
    from tuner.talk import Talk


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
    require: Require = None,
    trust_remote_code: TrustRemoteCode = False,
    disable: Disable = None,
    digest_file: DigestFile = None,
    compression: Compression = "none",
    chunk_size: ChunkSize = None,
    push_deadline: PushDeadline = 1800,
    modelpack: ModelPack = False,
    provenance: Provenance = False,
    registry_checkpoints: Annotated[
        bool,
        typer.Option(
            "--registry-checkpoints",
            help="keep the last checkpoint in the output's repository: another machine goes on from it",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Download, train, package and push: the whole Workspace on this machine."""
    from tuner.pipeline.run import run as run_stages
    from tuner.request import annotated_checkpoints
    from tuner.runspec import ImageDestination

    request = _request(locals())
    options = parse_push_options(compression, chunk_size, push_deadline, modelpack, provenance)
    file = read_workspace_file(workspace, model, data, method, request)
    built, directory = build(file, request, work_dir)
    check_digest_file(digest_file, built.spec.destination)
    pushes = isinstance(built.spec.destination, ImageDestination)
    if registry_checkpoints and not pushes:
        raise UsageError("--registry-checkpoints: no image is pushed, so no registry can keep them")
    keeps = pushes and (registry_checkpoints or annotated_checkpoints(file.workspace))
    with open_talk() as talk:
        _introduce(built, talk)
        result = run_stages(
            built.spec,
            built.secrets,
            directory,
            talk,
            on_stage=talk.stage,
            options=options,
            registry_checkpoints=keeps,
        )
        talk.note(
            f"done in {result.seconds:,.0f} s: {result.steps:,} steps, loss {result.train_loss:.4g}" + _held_out(result)
        )
    print_result(result.image, digest_file, result.model_dump(mode="json") if as_json else None)


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
    require: Require = None,
    trust_remote_code: TrustRemoteCode = False,
    disable: Disable = None,
    spec_file: Annotated[
        Path | None, typer.Option("--write-spec", metavar="FILE", hidden=True, help="RunSpec; FILE.secrets beside it")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find out now what would go wrong later: Workspace, config, secret, push permission; with --data every row."""
    from dataclasses import replace

    from tuner.pipeline.run import preflight

    request = replace(_request(locals()), only_checks=True, fetches=with_data)
    built, directory = build(read_workspace_file(workspace, None, None, None, request), request, work_dir)
    if spec_file:
        built.spec.save(spec_file)
        built.secrets.save(spec_file.with_name(spec_file.name + ".secrets"))
    prepared = None
    with open_talk() as talk:
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
    file = read_workspace_file(workspace, None, None, None, request)
    machine = choose_machine(gpu, instance_type, file.workspace.resource.instance_type)
    built, _ = build(file, replace(request, world_size=machine.gpus), None)
    try:
        prepared = Prepared.load(prepared_file) if prepared_file else None
    except (ConfigError, InputMissingError) as error:
        error.hint = "tuner check --data leaves one in its work directory, tuner-work/NAME/prepared.json"
        raise
    made = make_plan(built.spec.preset, built.spec.training, machine, prepared=prepared, price_per_hour=price or None)
    print(json.dumps(plan_as_json(made)) if as_json else describe_plan(made))
    if made.exit_code:
        say(f"error: {made.verdict}")
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
        network=make_network(
            typed["plain_http"], typed["ca"], tuple(typed["allow_cidr"] or ()), typed["allow_private_urls"]
        ),
        overwrite=not typed["no_overwrite"],
        preflight=not typed["no_preflight"],
        trust_remote_code=typed["trust_remote_code"],
        world_size=_gpu_count(),
        require=tuple(typed["require"] or ()),
        disable=tuple(typed["disable"] or ()),
    )


def _held_out(result: "RunResult") -> str:
    """`, held-out loss 5.845 → 3.884 (perplexity 345 → 48.6)`"""
    from tuner.runspec import perplexity

    before, after = result.eval_loss_before, result.eval_loss
    if before is None or after is None:
        return ""
    return f", held-out loss {before:.4g} → {after:.4g} (perplexity {perplexity(before):.3g} → {perplexity(after):.3g})"


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
        case LocalModel(path=place, id=name) | ImageModel(reference=place, id=name):
            return f"{name} from {place}"


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
            return f"{reference}" if overwrite else f"{reference}, unless it is there already"
        case LayoutDestination(reference=layout):
            return str(layout)
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
    arguments, bits = spec.training.arguments, spec.training.quantization.bits
    length = f"{arguments.max_steps:,} steps" if arguments.max_steps else f"{arguments.num_train_epochs:g} epochs"
    return (
        f"{length}, {arguments.documents_per_process:,} documents a step, {bits}-bit base model, "
        f"LoRA rank {spec.training.lora.r}"
    )


def _print_check(built: "Run", work_dir: Path, prepared: "Prepared | None", as_json: bool) -> None:
    spec = built.spec
    if as_json:
        import json
        from dataclasses import asdict

        about = spec.model_dump(
            mode="json", include={"name", "method", "base_model", "sources", "destination", "probe", "smoke", "require"}
        )
        settings = [
            {"setting": name, "value": value, "origin": origin} for name, value, origin in spec.training.explained()
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
        *(("gate", gate) for gate in spec.require),
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
    rows = [(name, _shown(name, value), origin) for name, value, origin in spec.training.explained()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    print(f"\n{'SETTING':<{widths[0]}}  {'VALUE':<{widths[1]}}  ORIGIN")
    for name, value, origin in rows:
        print(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}")


def _shown(name: str, value: object) -> str:
    """A setting's value on one line; – is what the run finds out for itself."""
    from tuner.training_settings import UNSET

    if value is None:
        return f"({UNSET[name]})" if name in UNSET else "–"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= 40 else text[:39] + "…"
