"""`tuner run`, `tuner check` and `tuner plan`."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tuner.cli import completion
from tuner.cli.common import (
    build,
    check_digest_file,
    make_request,
    open_talk,
    print_result,
    push_options,
    read_workspace_file,
    say,
)
from tuner.cli.flags import command, data, output, scheduling, training
from tuner.cli.options import (
    AsJson,
    BaseModel,
    InstanceType,
    LoginFlags,
    OptionalWorkspace,
    PushFlags,
    RegistryCheckpoints,
    RequestFlags,
    SettingFlags,
    WorkspaceArgument,
)
from tuner.errors import ConfigError, InputMissingError, UsageError, cut
from tuner.gpus import visible_gpus

if TYPE_CHECKING:
    from tuner.request import Request, Run
    from tuner.runspec import Destination, Prepared, RunResult, RunSpec, Source
    from tuner.talk import Talk


@dataclass(frozen=True, kw_only=True)
class BoxFlags(RequestFlags, LoginFlags):
    """What `run` and `check` have in common: a run on this machine."""

    output: Annotated[
        str | None, output("--output", metavar="DIR|REF", help="directory, registry/name:tag or oci:DIR:TAG")
    ]
    work_dir: Annotated[
        Path | None,
        output(
            "--work-dir",
            metavar="D",
            help="data, checkpoints, adapter [tuner-work/NAME]",
            autocompletion=completion.work_directories,
        ),
    ]
    base_model: BaseModel
    as_json: AsJson


@dataclass(frozen=True, kw_only=True)
class RunFlags(BoxFlags, PushFlags):
    """What `run` has beside: all that a Workspace file would say, and the push."""

    model: Annotated[
        str | None,
        training(
            "--model",
            metavar="NAME",
            help="preset, Hugging Face id or directory, instead of a file",
            autocompletion=completion.presets,
        ),
    ]
    method: Annotated[
        str | None,
        training(
            "--method",
            metavar="NAME",
            help="qlora or lora, with --model [qlora]",
            autocompletion=completion.words("qlora", "lora"),
        ),
    ]
    data: Annotated[
        tuple[str, ...],
        data("--data", metavar="FILE", help="URL, file or directory instead of the file's; repeatable"),
    ]
    eval_data: Annotated[
        tuple[str, ...],
        data("--eval-data", metavar="FILE", help="what to evaluate on and not to train on; as --data"),
    ]
    registry_checkpoints: RegistryCheckpoints


@command(
    "run",
    example="tuner run workspace.yaml --set TrainingArguments.num_train_epochs=1",
)
def run(workspace: OptionalWorkspace, flags: RunFlags) -> None:
    """Download, train, package and push: the whole Workspace on this machine."""
    from tuner.pipeline.run import run as run_stages
    from tuner.request import annotated_checkpoints
    from tuner.runspec import ImageDestination

    request = _request(flags)
    file = read_workspace_file(workspace, flags.model, flags.data, flags.method, request, flags.eval_data)
    built, directory = build(file, request, flags.work_dir)
    check_digest_file(flags.digest_file, built.spec.destination)
    pushes = isinstance(built.spec.destination, ImageDestination)
    if flags.registry_checkpoints and not pushes:
        raise UsageError("--registry-checkpoints: no image is pushed, so no registry can keep them")
    keeps = pushes and (flags.registry_checkpoints or annotated_checkpoints(file.workspace))
    with open_talk() as talk:
        _introduce(built, talk)
        result = run_stages(
            built.spec,
            built.secrets,
            directory,
            talk,
            on_stage=talk.stage,
            options=push_options(flags),
            registry_checkpoints=keeps,
        )
        talk.note(
            f"done in {result.seconds:,.0f} s: {result.steps:,} steps, loss {result.train_loss:.4g}" + _held_out(result)
        )
    print_result(result.image, flags.digest_file, result.model_dump(mode="json") if flags.as_json else None)


@command("check", example="tuner check --data workspace.yaml")
def check(
    workspace: WorkspaceArgument,
    with_data: Annotated[bool, data("--data", help="fetch and check every row too")],
    flags: BoxFlags,
    spec_file: Annotated[
        Path | None, output("--write-spec", metavar="FILE", hidden=True, help="RunSpec; FILE.secrets beside it")
    ],
) -> None:
    """Find out now what would go wrong later: Workspace, config, secret, push permission; with --data every row."""
    from tuner.pipeline.run import preflight

    request = replace(_request(flags), only_checks=True, fetches=with_data)
    built, directory = build(read_workspace_file(workspace, None, (), None, request), request, flags.work_dir)
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
    _print_check(built, directory, prepared, flags.as_json)


@command("plan", example="tuner plan workspace.yaml --gpu 24GB")
def plan(
    workspace: WorkspaceArgument,
    gpu: Annotated[
        str | None,
        scheduling("--gpu", metavar="G", help="24GB, H100-80, A10, …", autocompletion=completion.gpus),
    ],
    instance_type: InstanceType,
    price: Annotated[
        float | None, output("--price", metavar="P", min=0, help="of the machine for an hour, in any currency")
    ],
    prepared_file: Annotated[
        Path | None, data("--prepared", metavar="FILE", help="prepared.json of a `tuner check --data`")
    ],
    base_model: BaseModel,
    flags: SettingFlags,
    as_json: AsJson,
) -> int:
    """Estimate whether it fits a GPU, and how long it takes: no GPU and no download needed."""
    import json

    from tuner.plan import choose_machine, describe_plan, make_plan, plan_as_json
    from tuner.request import Request
    from tuner.runspec import Prepared

    request = Request(
        base_model=base_model, config=flags.config, overrides=flags.overrides, output=".", preflight=False
    )
    file = read_workspace_file(workspace, None, (), None, request)
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


def _request(flags: BoxFlags) -> "Request":
    return replace(
        make_request(flags),
        base_model=flags.base_model,
        output=flags.output,
        docker_config=flags.docker_config,
        world_size=max(1, visible_gpus(os.environ)),
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
    return cut(text, 40)
