"""What was typed + the Workspace file → RunSpec and Secrets. The same for a box, a Job and a smoke run.

Everything that a file on this machine can tell is decided here, before the network is asked for anything.
"""

import json
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

from tuner import pod
from tuner.content import hash_file, model_digest
from tuner.errors import (
    MOST_PROBLEMS,
    ConfigError,
    DataError,
    InputMissingError,
    Problem,
    TunerError,
    cut,
    did_you_mean,
)
from tuner.gates import Gate, parse_gates, split_gates
from tuner.levers import parse_disabled
from tuner.presets import HUB_ID, Preset, find_preset, preset_from_directory
from tuner.reference import ImageReference, LayoutReference, names_registry, parse_destination
from tuner.runspec import (
    BaseModelSource,
    Destination,
    DirectoryDestination,
    FileSource,
    HubModel,
    ImageDestination,
    ImageModel,
    ImageSource,
    LayoutDestination,
    LocalModel,
    Network,
    RunSpec,
    Secrets,
    SmokeModel,
    Source,
    UrlSource,
    VolumeSource,
    asks_hub,
)
from tuner.source_headers import SOURCES_KEY, parse_source_headers
from tuner.training_config import ConfigSource, resolve_training_config
from tuner.training_settings import TYPED, TrainingConfig
from tuner.urls import Allowed, SourceOptions, redacted, source_name, split_options, split_url
from tuner.workspace import (
    ImageInput,
    ImageOutput,
    Secret,
    Tuning,
    UrlInput,
    VolumeInput,
    VolumeOutput,
    Workspace,
    WorkspaceFile,
    cluster_problems,
    is_local_file,
    make_workspace,
    require_tuning,
)
from tuner.yaml_lines import field_path, read_text

P = ParamSpec("P")
T = TypeVar("T")

SOURCES_ANNOTATION = "tuner/sources-secret"  # names a Secret with the key sources.json
REQUIRE_ANNOTATION = "tuner/require"  # gates, as --require has them
DISABLE_ANNOTATION = "tuner/disable"  # levers that are turned off
CANARY_ANNOTATION = "tuner/canary"  # "false" as --no-canary
JOB_PATCH_ANNOTATION = "tuner/job-patch"  # <ConfigMap>/<key>
RETRY_ANNOTATION = "tuner/retry"  # says nothing: with another value of it the same is run once more
# Claims, as --results-volume and --weights-volume have them.
RESULTS_VOLUME_ANNOTATION, WEIGHTS_VOLUME_ANNOTATION = "tuner/results-volume", "tuner/weights-volume"
CHECKPOINTS_ANNOTATION, IN_REGISTRY = "tuner/checkpoints", "registry"  # as --registry-checkpoints
_ANNOTATIONS = (
    *(SOURCES_ANNOTATION, REQUIRE_ANNOTATION, DISABLE_ANNOTATION, CANARY_ANNOTATION, JOB_PATCH_ANNOTATION),
    RETRY_ANNOTATION,
    *(RESULTS_VOLUME_ANNOTATION, WEIGHTS_VOLUME_ANNOTATION, CHECKPOINTS_ANNOTATION),
)
SMOKE_STEPS = 4
SMOKE_OVERRIDES = (f"TrainingArguments.max_steps={SMOKE_STEPS}", "DatasetConfig.over_length=truncate")
HF_TOKEN = "HF_TOKEN"  # the name of the variable, and KAITO's key in the Secret


@dataclass(frozen=True)
class Request:
    """The flags that decide what a run is. A flag wins over the file.

    In a `pod` there are no files of this machine, volumes are mounted, and credentials are Secrets of the cluster.
    `pushes_without_secret`: the pod has an identity of its own, or the registry takes anybody. `image_volume`: an
    input image is mounted by the kubelet, not pulled by us. `only_checks`: nothing is trained or pushed; `fetches`:
    the data is looked at.
    """

    place: Literal["box", "pod"] = "box"
    smoke: bool = False
    base_model: Path | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    output: str | None = None
    docker_config: Path | None = None
    source_headers: Path | None = None
    network: Network = field(default_factory=Network)
    overwrite: bool = True
    preflight: bool = True
    trust_remote_code: bool = False
    world_size: int = 1
    require: tuple[str, ...] = ()
    pushes_without_secret: bool = False
    image_volume: bool = False
    disable: tuple[str, ...] = ()
    canary: bool = True
    only_checks: bool = False
    fetches: bool = True

    @property
    def in_pod(self) -> bool:
        return self.place == "pod"

    @property
    def needs_push_secret(self) -> bool:
        """A check that leaves the registry out can do without one that is in a cluster only."""
        return not self.only_checks or self.preflight

    @property
    def needs_pull_secret(self) -> bool:
        return self.needs_push_secret or self.fetches


@dataclass(frozen=True)
class Credentials:
    """Where each credential comes from, in words without a secret."""

    push: str = "none needed"
    pull: str = "none needed"
    hub: str = "none needed"


@dataclass(frozen=True)
class Run:
    """A request with nothing left to resolve. `notes` are the lines to print before it starts."""

    spec: RunSpec
    secrets: Secrets
    notes: tuple[str, ...]
    credentials: Credentials


def build_run(file: WorkspaceFile, request: Request, work_dir: Path, env: Mapping[str, str]) -> Run:
    """The run that a Workspace file and flags stand for. `env`: HF_TOKEN, DOCKER_CONFIG and HOME are read.

    Raises ConfigError with every problem of preset, config, sources, destination and secrets at once; where there is
    one only, in its own kind.
    """
    tuning = require_tuning(file)
    errors: list[TunerError] = []
    if request.in_pod:
        _attempt(errors, _check_pod, file, request)
    _attempt(errors, _check_annotations, file)
    preset = _attempt(errors, _preset, tuning, request)
    config = _attempt(errors, _config_source, file, tuning, request)
    training = _attempt(errors, _training, tuning, preset or _ANY_PRESET, config, request, work_dir)
    sources, queries = _attempt(errors, _sources, tuning, request) or ((), {})
    base_model = _attempt(errors, _base_model, tuning, preset, training, request) if preset and training else None
    destination = _attempt(errors, _destination, tuning, training, request, work_dir)
    probe = _probe(tuning, request)
    _attempt(errors, _check_ca, request.network)
    if request.docker_config and not request.in_pod:  # whether or not anything needs it
        _attempt(errors, _read_docker_config, request.docker_config)
    push = _attempt(errors, _push_credentials, file, tuning, request, probe or destination, env)
    pull = _attempt(errors, _pull_credentials, file, tuning, sources, base_model, request, env)
    hub = _attempt(errors, _hub_token, file, tuning, sources, base_model, request, env)
    headers = _attempt(errors, _source_headers, file, request)
    gates = _attempt(errors, _gates, file, request, training, sources) or ()
    disabled = _attempt(errors, _disabled, file, request)
    if errors or not (preset and training and base_model and destination and push and pull and hub and headers):
        raise all_at_once(errors)
    spec = RunSpec(
        name=file.workspace.metadata.name,
        method=tuning.method,
        preset=preset,
        preset_as_written=preset.name if _model_directory(tuning) else tuning.preset.name,
        base_model=base_model,
        training=training,
        sources=sources,
        destination=destination,
        probe=probe,
        network=_network(request),
        smoke=request.smoke,
        preflight=request.preflight,
        trust_remote_code=request.trust_remote_code,
        require=tuple(gate.text for gate in gates),
        disabled=disabled or (),
        canary=request.canary and file.workspace.metadata.annotations.get(CANARY_ANNOTATION) != "false",
    )
    secrets = Secrets(
        queries=queries,
        docker_configs=push.texts,
        pull_docker_configs=pull.texts,
        hf_token="".join(hub.texts) or None,
        source_headers=headers.texts,
        push_docker_config_file=push.file,
    )
    notes = (
        *file.notes,
        *_shortened(sources, queries),
        *training.notes,
        *_notes(tuning, training, request, work_dir),
    )
    return Run(spec, secrets, notes, Credentials(push=push.origin, pull=pull.origin, hub=hub.origin))


def flag_errors(request: Request) -> list[TunerError]:
    """What is wrong with the flags alone: to be said beside the problems of a Workspace that does not parse."""
    errors: list[TunerError] = []
    config = _attempt(errors, _read_config, request.config) if request.config else None
    _attempt(errors, _check_settings, config, request.overrides)
    if request.base_model:
        _attempt(errors, preset_from_directory, request.base_model.expanduser())
    if request.output:
        _attempt(errors, parse_output, request.output)
    if request.docker_config:
        _attempt(errors, _read_docker_config, request.docker_config)
    _attempt(errors, _check_ca, request.network)
    _attempt(errors, parse_gates, request.require, "--require")
    return errors


def all_at_once(errors: Sequence[TunerError]) -> TunerError:
    """One error as it is; several as one ConfigError that lists the problems of all, each once."""
    errors = list({(error.message, error.hint): error for error in reversed(errors)}.values())[::-1]
    if len(errors) == 1:
        return errors[0]
    problems: list[Problem] = []
    for error in errors:
        if isinstance(error, ConfigError) and error.problems:
            problems += error.problems
        else:
            problems.append(Problem(error.message, hint=error.hint))
    return ConfigError.of(list(dict.fromkeys(problems)))


_ANY_PRESET = Preset(name="unknown", model_id="unknown/unknown")  # so that the config is still checked


def _attempt(errors: list[TunerError], step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    try:
        return step(*args, **kwargs)
    except TunerError as error:
        errors.append(error)
        return None


def _check_annotations(file: WorkspaceFile) -> None:
    """A misspelt gate would let every adapter pass, and a place that keeps no checkpoints lose a run."""
    written = file.workspace.metadata.annotations
    unknown = (name for name in written if name.startswith("tuner/") and name not in _ANNOTATIONS)
    problems = [
        Problem(
            "unknown annotation",
            path=field_path(("metadata", "annotations", name)),
            hint=did_you_mean(name, _ANNOTATIONS) or f"known here: {', '.join(_ANNOTATIONS)}",
        )
        for name in islice(unknown, MOST_PROBLEMS + 1)
    ]
    if (place := written.get(CHECKPOINTS_ANNOTATION, IN_REGISTRY)) != IN_REGISTRY:
        path = f"metadata.annotations[{CHECKPOINTS_ANNOTATION}]"
        said = f"{cut(place, 60)!r} keeps no checkpoints"
        problems.append(Problem(said, path=path, hint=f"{IN_REGISTRY}, or leave it out"))
    if (whether := written.get(CANARY_ANNOTATION, "true")) not in ("true", "false"):
        path = f"metadata.annotations[{CANARY_ANNOTATION}]"
        said = f"{cut(whether, 60)!r} is neither true nor false"
        problems.append(Problem(said, path=path, hint='"false" as --no-canary'))
    if problems:
        raise ConfigError.of(problems)


# ── preset and config ────────────────────────────────────────────────────────────────────────────────────────────────


def _model_directory(tuning: Tuning) -> Path | None:
    """The base model's directory, when the preset is written as a path."""
    name = tuning.preset.name
    return Path(name).expanduser().resolve() if name.startswith((".", "/", "~")) else None


def _preset(tuning: Tuning, request: Request) -> Preset:
    directory = _model_directory(tuning)
    if directory and request.in_pod:
        raise ConfigError(
            f"tuning.preset.name: {tuning.preset.name} is a directory of one machine, which a pod cannot read",
            hint="write a preset or Hugging Face id, or put the weights into an image (presetOptions.image)",
        )
    if directory:
        return preset_from_directory(directory)
    name = tuning.preset.name
    try:
        preset = find_preset(name)
    except ConfigError as error:
        is_directory = not request.in_pod and len(name) < 256 and Path(name).is_dir()  # longer ones raise
        hint = f"a directory is written as a path: ./{name}" if is_directory else error.hint
        raise ConfigError.of([Problem(error.message, path="tuning.preset.name", hint=hint)]) from error
    if request.base_model and not preset.config:
        # A hub id we know nothing of, whose files are here: they tell.
        facts = preset_from_directory(request.base_model.expanduser())
        return facts.model_copy(update={"name": preset.name, "model_id": preset.model_id})
    return preset


def _training(
    tuning: Tuning, preset: Preset, source: ConfigSource | None, request: Request, work_dir: Path
) -> TrainingConfig:
    overrides = (*(SMOKE_OVERRIDES if request.smoke else ()), *request.overrides)  # what was typed wins
    resolve = partial(
        resolve_training_config,
        method=tuning.method,
        preset=preset,
        overrides=overrides,
        world_size=request.world_size,
    )
    training = resolve(config_map=source)
    rank, width = training.lora.r, preset.hidden_size
    if width and rank > width:
        raise ConfigError(
            f"LoraConfig.r ({training.origin('LoraConfig.r')}): {rank:,} is more than the model is wide, {width:,}: "
            "such an adapter is larger than what it adapts",
            hint="16 to 64 is usual",
        )
    if request.in_pod and source:
        # Once more, for origins as the pod has them: the same run wherever its file lies, no path of this machine.
        training = resolve(config_map=ConfigSource(source.text, pod.TRAINING_CONFIG))
    if request.smoke:
        training = _with_smoke_origin(training, request.overrides)
    if training.model.trust_remote_code and not request.trust_remote_code:
        raise ConfigError(
            f"ModelConfig.trust_remote_code ({training.origin('ModelConfig.trust_remote_code')}): "
            "code of a model's repository is not run because a file says so",
            hint="read that code first, then give --trust-remote-code; most models need none",
        )
    if request.in_pod:
        _check_template_is_text(training, request)
    return with_template_text(training, Path(source.file).parent if source else Path(), work_dir)


def _with_smoke_origin(training: TrainingConfig, typed: Sequence[str]) -> TrainingConfig:
    """The smoke run's own settings named as such: nobody typed them."""
    written = {override.partition("=")[0].strip() for override in typed}
    ours = {override.partition("=")[0] for override in SMOKE_OVERRIDES} - written
    return training.model_copy(update={"origins": training.origins | dict.fromkeys(sorted(ours), "--smoke")})


def _config_source(file: WorkspaceFile, tuning: Tuning, request: Request) -> ConfigSource | None:
    """`--config`, or the ConfigMap in the Workspace's file; None where neither is named."""
    if request.config:
        return _read_config(request.config)
    if tuning.config is None:
        return None
    if tuning.config not in file.config_maps:
        there = f"; there is {', '.join(sorted(file.config_maps))}" if file.config_maps else ""
        raise ConfigError(
            f"tuning.config: ConfigMap {tuning.config!r} is not in the Workspace's file{there}",
            hint="put it there as another YAML document, or give --config FILE",
        )
    return ConfigSource(*file.config_maps[tuning.config].training_config())


def _read_config(path: Path) -> ConfigSource:
    return ConfigSource(read_text(path, f"--config {path}"), str(path))


def _check_settings(source: ConfigSource | None, overrides: Sequence[str]) -> None:
    """What is wrong in --config and --set whatever the Workspace says: not what depends on its method."""
    try:
        resolve_training_config(method="qlora", preset=_ANY_PRESET, config_map=source, overrides=overrides)
    except ConfigError as error:
        problems = [problem for problem in error.problems if problem.path != "QuantizationConfig"]
        if problems:
            raise ConfigError.of(problems) from error


_CHAT_TEMPLATE = "ModelConfig.chat_template"


def _check_template_is_text(training: TrainingConfig, request: Request) -> None:
    """A ConfigMap's path would be read where its author has no right to: from the controller's own files."""
    written, origin = training.model.chat_template, training.origin(_CHAT_TEMPLATE)
    if written and "{" not in written and origin != TYPED and not request.config:
        raise ConfigError(
            f"{_CHAT_TEMPLATE} ({origin}): {written!r} names a file, which is not in the pod",
            hint="write the template itself, or give --set ModelConfig.chat_template=FILE",
        )


def with_template_text(training: TrainingConfig, beside: Path, work_dir: Path) -> TrainingConfig:
    """KAITO takes a path or a template in ModelConfig.chat_template; a run knows the text."""
    written, origin = training.model.chat_template, training.origin(_CHAT_TEMPLATE)
    if not written or "{" in written:
        return training
    if written.startswith("/mnt/"):
        path = work_dir / written.removeprefix("/mnt/")
    else:
        path = (Path() if origin == TYPED else beside) / Path(written).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputMissingError(
            f"{_CHAT_TEMPLATE} ({origin}): {written!r} is no Jinja template, "
            f"and {path} cannot be read: {_reason(error)}",
            hint="write the template itself, or a path relative to the config file",
        ) from error
    return training.model_copy(update={"model": training.model.model_copy(update={"chat_template": text})})


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_data(file: WorkspaceFile, data: Sequence[str], allowed: Allowed, *, local_files: bool = True) -> WorkspaceFile:
    """The file with `--data` in the place of its input; without a source to train on, beside it.

    Raises ConfigError as for a Workspace's urls, and where a volume or image has nothing beside it.
    """
    tuning = require_tuning(file)
    if all(split_options(each)[1].use == "validation" for each in data):
        if not isinstance(tuning.input, UrlInput):
            raise ConfigError(
                "--eval-data: the Workspace's input is no urls, beside which it could stand",
                hint="give --data, too, or put the rows into a folder validation/ of the volume or image",
            )
        data = [*tuning.input.urls, *map(evaluated_on, tuning.input.validation), *data]
    workspace = make_workspace(tuning.preset.name, data, None, allowed=allowed, local_files=local_files)
    typed = require_tuning(WorkspaceFile(workspace))
    workspace = file.workspace.model_copy(update={"tuning": tuning.model_copy(update={"input": typed.input})})
    return replace(file, workspace=workspace)


def _sources(tuning: Tuning, request: Request) -> tuple[tuple[Source, ...], dict[str, str]]:
    """What to fetch, and the secret queries by the sources' names."""
    match tuning.input:
        case UrlInput(urls=urls, validation=validation):
            return _url_sources([*urls, *(evaluated_on(url) for url in validation)])
        case ImageInput(image=image) if request.image_volume:
            volume = {"image": {"reference": str(image)}}
            return (VolumeSource(path=str(pod.DATA_DIR / "data"), source=volume),), {}
        case ImageInput(image=image):
            return (ImageSource(reference=image),), {}
        case VolumeInput(volume_source=volume) if request.in_pod:
            return (VolumeSource(path=str(pod.DATA_DIR), source=dict(volume)),), {}
        case VolumeInput(volume_source=volume):
            path = _host_path(volume, "tuning.input", "on a box say where its files are: --data DIR")
            return (VolumeSource(path=path, source=dict(volume)),), {}


def _url_sources(urls: Sequence[str]) -> tuple[tuple[Source, ...], dict[str, str]]:
    sources: list[Source] = []
    queries: dict[str, str] = {}
    errors: list[TunerError] = []
    for index, url in enumerate(urls):
        if is_local_file(url):
            source = _attempt(errors, _local_source, index, url)
            sources += [source] if source else []
            continue
        parts = split_url(url)
        name = source_name(index, url)
        sources.append(
            UrlSource(
                name=name,
                url=parts.url,
                query_sha256=parts.query_sha256,
                sha256=parts.options.sha256,
                **_sampling(parts.options),
            )
        )
        if parts.query:
            queries[name] = parts.query
    if errors:
        raise _missing(errors)
    if sources and all(source.use == "validation" for source in sources):
        raise ConfigError("tuning.input: every source is for validation, and none is trained on")
    return tuple(sources), queries


def evaluated_on(url: str) -> str:
    """The source as one that is for validation."""
    return f"{url}{'&' if '#' in url else '#'}use=validation"


def _sampling(options: SourceOptions) -> dict[str, Any]:
    return {"use": options.use, "rows": options.rows, "weight": options.weight}


def _shortened(sources: Sequence[Source], queries: Mapping[str, str]) -> Iterator[str]:
    """What somebody has copied as documentation shows it: no signature has … in it."""
    for source in sources:
        if isinstance(source, UrlSource) and "…" in unquote(queries.get(source.name, "")):
            yield f"{source.url}: … stands in its query; the whole signed URL is needed"


def _missing(errors: Sequence[TunerError]) -> TunerError:
    """All the files that are not there, in one error of that kind."""
    if len(errors) == 1 or not all(isinstance(error, InputMissingError) for error in errors):
        return all_at_once(errors)
    return InputMissingError("; ".join(error.message for error in errors), hint=errors[0].hint)


def _local_source(index: int, url: str) -> FileSource | VolumeSource:
    """A path or file:// URL, known by its content; a directory stands for the files in it."""
    written, options = split_options(url)
    path, pinned = Path(written), options.sha256
    if url.lower().startswith("file:"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise InputMissingError(f"{url}: names a file of the machine {parts.netloc}", hint="write file:///path")
        path = Path(unquote(parts.path))
    path = path.expanduser().absolute()
    try:
        if path.is_dir():
            return VolumeSource(path=str(path), **_sampling(options))
        if not path.is_file():
            raise _no_such_file(written, path)
        sha256 = hash_file(path)
    except OSError as error:
        raise InputMissingError(f"{path}: cannot be read: {error.strerror}") from error
    if pinned and pinned != sha256:
        raise DataError(f"{path}: its sha256 is {sha256}, not {pinned} as pinned")
    name = source_name(index, f"file://{path}")
    return FileSource(name=name, path=str(path), sha256=sha256, **_sampling(options))


def _no_such_file(written: str, path: Path) -> InputMissingError:
    shown = redacted(written)
    where = "" if str(path) == written or shown != written else f" at {path}"  # which has the query of a URL, too
    near = did_you_mean(path.name, [each.name for each in path.parent.glob("*")])
    hint = _meant_elsewhere(shown) or near or "a path begins where the command is run"
    return InputMissingError(f"{shown}: there is no such file{where}", hint=hint)


def _meant_elsewhere(text: str) -> str | None:
    """For what is no path here and looks like an address without its scheme or like a data set of the Hub."""
    host, slash, rest = text.partition("/")
    if slash and rest and re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", host, re.IGNORECASE):
        return f"for a URL write https://{text}"
    if HUB_ID.fullmatch(text) and "." not in text and not Path(text).parent.is_dir():
        return f"for a data set of the Hugging Face Hub write hf://datasets/{text}"
    return None


def _host_path(volume: Mapping[str, Any], field_path: str, hint: str) -> str:
    """The directory that a volume is on this machine: only a hostPath is one."""
    if "hostPath" not in volume:
        raise ConfigError(f"{field_path}.volumeSource: a {next(iter(volume))} is there in a cluster only", hint=hint)
    return str(Path(volume["hostPath"]["path"]).expanduser().absolute())


# ── base model ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _base_model(tuning: Tuning, preset: Preset, training: TrainingConfig, request: Request) -> BaseModelSource:
    revision = training.model.revision
    directory = _model_directory(tuning)
    if request.base_model:
        given = request.base_model.expanduser().resolve()  # its own name is what the adapter calls it
        model = LocalModel(path=str(given), sha256=model_digest(given, with_code=request.trust_remote_code))
        if directory is None and is_weights_of(preset, given):
            return model.model_copy(update={"id": preset.model_id, "revision": revision})
        return model
    if request.smoke:
        if not preset.config:
            problem = Problem(
                f"{preset.name} is no preset, so --smoke cannot make its architecture small",
                path="tuning.preset.name",
                hint="use one of `tuner presets`, or give --base-model DIR",
            )
            raise ConfigError.of([problem])
        return SmokeModel()
    if directory:
        return LocalModel(path=str(directory), sha256=model_digest(directory, with_code=request.trust_remote_code))
    image = tuning.preset.preset_options.image
    if image:
        return ImageModel(reference=image, id=preset.model_id, revision=revision)
    return HubModel(id=preset.model_id, revision=revision or preset.hub_revision)


_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def is_weights_of(preset: Preset, directory: Path) -> bool:
    """Whether a model directory has the preset's sizes: then the adapter's base is the preset's hub id, not a path."""
    there, known = _language_part(preset_from_directory(directory).config), _language_part(preset.config)
    return bool(known) and all(there.get(name) == known.get(name) for name in _SIZES)


def _language_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The numbers of a model that also sees are one level down."""
    return {**config, **config.get("text_config", {})}


# ── destination ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _destination(
    tuning: Tuning, training: TrainingConfig | None, request: Request, work_dir: Path
) -> Destination | None:
    """Where the adapter goes; None where the configuration that says so is itself in doubt."""
    if request.in_pod and training is None:
        return None
    # Hidden, as a volume of the user's may be mounted there.
    results = pod.results_dir_of(training) if request.in_pod and training else None
    images = results / ".tuner" if results else work_dir.absolute()
    if request.output:
        destination = parse_output(request.output, overwrite=request.overwrite)
        own = tuning.output.image if isinstance(tuning.output, ImageOutput) else None
        if request.smoke and isinstance(destination, ImageDestination) and destination.reference == own:
            raise ConfigError(
                f"--output {request.output}: is the Workspace's own image, and this is a smoke run",
                hint="give another tag: a tiny random model's adapter must not be served",
            )
        return destination
    if request.smoke:
        if isinstance(tuning.output, ImageOutput):
            check_names_registry(tuning.output.image, "tuning.output.image")
        return LayoutDestination(path=str(images / "image"), tag="smoke")
    match tuning.output:
        case ImageOutput(image=image):
            check_names_registry(image, "tuning.output.image")
            return ImageDestination(reference=image, overwrite=request.overwrite)
        case VolumeOutput() if results:
            return DirectoryDestination(path=str(results))
        case VolumeOutput(volume_source=volume):
            hint = "on a box say where the adapter goes: --output DIR"
            return DirectoryDestination(path=_host_path(volume, "tuning.output", hint))
        case None:
            raise ConfigError("tuning.output: is missing", hint="say where the adapter goes: --output DIR or IMAGE")


def check_names_registry(image: ImageReference | LayoutReference, field_path: str) -> None:
    """`adapter:1` means Docker Hub's own images, as for docker pull: no adapter is among them."""
    if isinstance(image, ImageReference) and image.is_docker_official:
        raise ConfigError(
            f"{field_path}: {image.short!r} names no registry, which means {image}, one of Docker Hub's own images",
            hint=f"write yours in front: myregistry.azurecr.io/{image.short}; a layout on disk is oci:DIR:TAG",
        )


def parse_output(text: str, *, overwrite: bool = True) -> Destination:
    """`oci:DIR:TAG`, an image reference that names its registry host, or else a directory."""
    if not text.strip():
        raise ConfigError("--output: is empty", hint="a directory, registry/name:tag or oci:DIR:TAG")
    if not text.startswith("oci:") and not names_registry(text):
        if not text.startswith((".", "/", "~")) and re.search(r":[\w.-]+$|@sha256:", text):
            raise ConfigError(
                f"{text}: an image without its registry, or a directory?",
                hint=f"registry/name:tag, as myregistry.azurecr.io/{text}, or a path, as ./{text}",
            )
        return DirectoryDestination(path=str(Path(text).expanduser().absolute()))
    reference = parse_destination(text)
    if reference.digest:
        raise ConfigError(f"{text}: names a digest, which only a push can know", hint="leave out @sha256:…, give a tag")
    if isinstance(reference, LayoutReference):
        return LayoutDestination(path=str(reference.path.absolute()), tag=reference.tag, overwrite=overwrite)
    return ImageDestination(reference=reference, overwrite=overwrite)


def _probe(tuning: Tuning, request: Request) -> ImageDestination | None:
    """A smoke run pushes elsewhere, but asks whether the real destination would take it."""
    if request.smoke and not request.output and request.preflight and isinstance(tuning.output, ImageOutput):
        return ImageDestination(reference=tuning.output.image, overwrite=request.overwrite)
    return None


# ── credentials ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Found:
    """Secret texts, best first, and where they are from."""

    texts: tuple[str, ...] = field(default=(), repr=False)
    origin: str = "none needed"
    file: str | None = None  # to be read again when they are needed


def _push_credentials(
    file: WorkspaceFile, tuning: Tuning, request: Request, target: Destination | None, env: Mapping[str, str]
) -> _Found:
    """One docker config: --docker-config, the Secret in the file, or the docker CLI's own."""
    name = tuning.output.image_push_secret if isinstance(tuning.output, ImageOutput) else None
    if not isinstance(target, ImageDestination):
        return _Found()
    if request.in_pod:
        return _in_cluster(file, [name] if name else [], lambda secret: secret.docker_config())
    if request.docker_config:
        origin = f"--docker-config {request.docker_config}"
        return _Found(
            (_read_docker_config(request.docker_config),), origin, str(_config_file(request.docker_config).absolute())
        )
    if name and name in file.secrets:
        return _Found((file.secrets[name].docker_config(),), f"Secret {name!r} in the Workspace's file")
    found = _users_docker_config(env)
    if found:
        return _Found((_read_docker_config(found),), str(found), str(found.absolute()))
    if name and not request.needs_push_secret:
        return _Found(origin=_elsewhere(name))
    if name:
        raise _no_push_secret(name, target.reference.registry, request, env)
    return _Found(origin="anonymous")


def _pull_credentials(
    file: WorkspaceFile,
    tuning: Tuning,
    sources: Sequence[Source],
    base_model: BaseModelSource | None,
    request: Request,
    env: Mapping[str, str],
) -> _Found:
    """Every docker config that may help, in the same order: a registry takes the first that serves."""
    names: list[str] = []
    if isinstance(base_model, ImageModel):
        names += tuning.preset.preset_options.image_pull_secrets
    if isinstance(tuning.input, ImageInput):
        names += tuning.input.image_pull_secrets
    if not isinstance(base_model, ImageModel) and not any(isinstance(source, ImageSource) for source in sources):
        return _Found()
    if request.in_pod:
        return _in_cluster(file, names, lambda secret: secret.docker_config())
    found: list[_Found] = []
    if request.docker_config:
        found.append(_Found((_read_docker_config(request.docker_config),), f"--docker-config {request.docker_config}"))
    found += [
        _Found((file.secrets[name].docker_config(),), f"Secret {name!r}") for name in names if name in file.secrets
    ]
    users = _users_docker_config(env)
    if users:
        found.append(_Found((_read_docker_config(users),), str(users)))
    if names and not found and not request.needs_pull_secret:
        return _Found(origin=_elsewhere(names[0]))
    if names and not found:
        raise _no_secret("imagePullSecrets", names[0], env, _WAYS.format(registry=""))
    texts = tuple(text for each in found for text in each.texts)
    return _Found(texts, ", ".join(each.origin for each in found) or "anonymous")


def _hub_token(
    file: WorkspaceFile,
    tuning: Tuning,
    sources: Sequence[Source],
    base_model: BaseModelSource | None,
    request: Request,
    env: Mapping[str, str],
) -> _Found:
    """The token of the Secret that the Workspace names, else of the environment."""
    if not asks_hub(base_model, sources):
        return _Found()
    name = tuning.preset.preset_options.model_access_secret
    if request.in_pod:
        return _in_cluster(file, [name] if name else [], lambda secret: secret.value(HF_TOKEN))
    if name and name in file.secrets:
        token, origin = file.secrets[name].value(HF_TOKEN), f"Secret {name!r} in the Workspace's file"
    elif env.get(HF_TOKEN):
        token, origin = env[HF_TOKEN], f"${HF_TOKEN}"
    elif name and not request.needs_pull_secret:
        return _Found(origin=_elsewhere(name))
    elif name:
        raise InputMissingError(
            f"tuning.preset.presetOptions.modelAccessSecret: Secret {name!r} is not in the Workspace's file, "
            f"and {HF_TOKEN} is not set",
            hint=f"put the Secret into the file, or set {HF_TOKEN}",
        )
    else:
        return _Found(origin="anonymous")
    token = token.strip()  # `echo token | base64` ends it with a line break
    if not re.fullmatch(r"[!-~]+", token):
        raise ConfigError(f"{HF_TOKEN} ({origin}): is empty, or has characters that no token has")
    return _Found((token,), origin)


def _disabled(file: WorkspaceFile, request: Request) -> tuple[str, ...]:
    """The levers that a flag or the annotation turns off."""
    return parse_disabled([*request.disable, file.workspace.metadata.annotations.get(DISABLE_ANNOTATION, "")])


def _source_headers(file: WorkspaceFile, request: Request) -> _Found:
    """What private sources are sent: --source-headers, and the Secret that the Workspace's annotation names."""
    found: list[_Found] = []
    if request.source_headers:
        try:
            text = request.source_headers.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputMissingError(
                f"--source-headers {request.source_headers}: cannot be read: {_reason(error)}"
            ) from None
        found.append(_Found((text,), f"--source-headers {request.source_headers}"))
    name = file.workspace.metadata.annotations.get(SOURCES_ANNOTATION)
    if request.in_pod and name:
        mounted = _in_cluster(file, [name], lambda secret: parse_source_headers(secret.value(SOURCES_KEY), name))
        found.append(mounted)
    elif name and name in file.secrets:
        found.append(_Found((file.secrets[name].value(SOURCES_KEY),), f"Secret {name!r} in the Workspace's file"))
    elif name and not found:
        raise InputMissingError(
            f"metadata.annotations[{SOURCES_ANNOTATION}]: Secret {name!r} is not in the Workspace's file",
            hint="put the Secret into the file, or give --source-headers FILE",
        )
    texts = [(text, each.origin) for each in found for text in each.texts]
    for text, origin in texts:
        parse_source_headers(text, origin)
    return _Found(tuple(text for text, _ in texts), ", ".join(each.origin for each in found) or "none needed")


def _in_cluster(file: WorkspaceFile, names: Sequence[str], check: Callable[[Secret], object]) -> _Found:
    """Secrets that the pod mounts: what of them is in the file is checked, and its text goes nowhere."""
    for name in names:
        if name in file.secrets:
            check(file.secrets[name])
    return _Found(origin=", ".join(f"Secret {name!r} of the cluster" for name in names) or "anonymous")


_WAYS = "put the Secret into the file, run docker login{registry}, or give --docker-config FILE"


def _no_push_secret(name: str, registry: str, request: Request, env: Mapping[str, str]) -> InputMissingError:
    """With the way to go on for who has the Secret in a cluster only."""
    ways = _WAYS.format(registry=f" {registry}")
    if request.only_checks:
        other = "--no-preflight checks the rest, tuner submit --dry-run asks the cluster for the Secret"
    elif request.smoke and request.preflight:
        other = "--no-preflight leaves the registry out"
    else:
        other = "--output DIR keeps the adapter here, tuner submit runs where the cluster has the Secret"
    return _no_secret("tuning.output.imagePushSecret", name, env, f"{ways}; {other}")


def _no_secret(field_path: str, name: str, env: Mapping[str, str], hint: str) -> InputMissingError:
    looked_for = _users_docker_config_path(env) or "docker config"
    return InputMissingError(
        f"{field_path}: Secret {name!r} is not in the Workspace's file, and there is no {looked_for}", hint=hint
    )


def _elsewhere(name: str) -> str:
    return f"Secret {name!r}, which is not here"


def docker_configs_for(docker_config: Path | None, env: Mapping[str, str]) -> tuple[str, ...]:
    """The docker config of `tuner push` and `tuner pull`: the flag's, the docker CLI's, or none."""
    path = docker_config or _users_docker_config(env)
    return (_read_docker_config(path),) if path else ()


def _users_docker_config(env: Mapping[str, str]) -> Path | None:
    """The docker CLI's file, if there is one."""
    path = _users_docker_config_path(env)
    return path if path and path.is_file() else None


def _users_docker_config_path(env: Mapping[str, str]) -> Path | None:
    """Where the docker CLI would look for it."""
    directory = env.get("DOCKER_CONFIG") or (env.get("HOME") and f"{env['HOME']}/.docker")
    return Path(directory) / "config.json" if directory else None


def _config_file(path: Path) -> Path:
    """The docker config that a flag means: the file itself, or the one in a directory, such as a mounted Secret."""
    path = path.expanduser()
    if not path.is_dir():
        return path
    return next((path / key for key in pod.DOCKER_CONFIG_KEYS if (path / key).is_file()), path / "config.json")


def _read_docker_config(given: Path) -> str:
    """The text of a config.json, or of the one in a directory. No message has a word of it."""
    path = _config_file(given)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputMissingError(f"docker config {path}: cannot be read: {_reason(error)}") from None
    try:
        is_object = isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise ConfigError(f"docker config {path}: not a JSON object", hint="docker login writes one")
    return text


def _network(request: Request) -> Network:
    """As the run sees it: in a pod the CA's certificate is in the ConfigMap."""
    if request.in_pod and request.network.ca_file:
        return request.network.model_copy(update={"ca_file": str(pod.CA_FILE)})
    return request.network


def _check_ca(network: Network) -> None:
    if not network.ca_file:
        return
    if not Path(network.ca_file).is_file():
        raise InputMissingError(f"--ca {network.ca_file}: there is no such file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=network.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"--ca {network.ca_file}: not a readable file of CA certificates", hint="one or more, in PEM"
        ) from error


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else "it is not UTF-8 text"


# ── gates ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _gates(
    file: WorkspaceFile, request: Request, training: TrainingConfig | None, sources: Sequence[Source]
) -> tuple[Gate, ...]:
    """What `--require` says, else the Workspace's annotation."""
    written = file.workspace.metadata.annotations.get(REQUIRE_ANNOTATION, "")
    texts, origin = split_gates(written), f"metadata.annotations[{REQUIRE_ANNOTATION}]"
    if request.require:
        texts, origin = request.require, "--require"
    gates = parse_gates(texts, origin)
    needing = next((gate for gate in gates if gate.needs_held_out_rows), None)
    has_validation = any(source.use == "validation" for source in sources)
    if needing and training and training.dataset.train_fraction == 1 and not has_validation:
        raise ConfigError(
            f"{origin}: {needing.text!r} needs held-out rows, and DatasetConfig.train_test_split holds none out",
            hint="leave train_test_split out, or write less than 1",
        )
    if training and not request.smoke:  # which takes few steps, and only says its gates
        most, limit = _most_of_run(training)
        problems = [
            Problem(
                f"{gate.text!r}: {'it holds whatever the run does' if outcome else 'no run can pass it'}, as {limit}",
                path=origin,
                hint="change the gate, or that",
            )
            for gate in gates
            if (outcome := gate.foregone(most)) is not None
        ]
        if problems:
            raise ConfigError.of(problems)
    return gates


def _most_of_run(training: TrainingConfig) -> tuple[dict[str, float], str]:
    """How far a run goes at most, by metric, and the setting that says so."""
    if steps := training.arguments.max_steps:
        return {"steps": steps}, f"TrainingArguments.max_steps is {steps:,}"
    epochs = training.arguments.num_train_epochs
    return {"epochs": epochs}, f"TrainingArguments.num_train_epochs is {epochs:g}"


# ── a pod ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check_pod(file: WorkspaceFile, request: Request) -> None:
    """What a box can do without or with, and a pod or its names in Kubernetes cannot."""
    name = file.workspace.metadata.name
    problems = []
    if name in pod.CONTAINERS:
        problems.append(
            Problem(
                f"{name!r} is the name of one of the pod's own containers, and the trainer is named as the Workspace",
                path="metadata.name",
                hint=f"for example {name}-run",
            )
        )
    for end in (pod.CHECK_JOB, pod.PUSH_JOB):
        if name.endswith(end):
            other = name.removesuffix(end).rstrip("-")
            problems.append(
                Problem(
                    f"{name!r} is how a Job beside {other!r} is called",
                    path="metadata.name",
                    hint=f"for example {other}-{end.strip('-')}",
                )
            )
    needs_secret = not request.pushes_without_secret and (request.output or not request.smoke)
    problems += [
        problem
        for problem in cluster_problems(file.workspace)
        if needs_secret or problem.path != "tuning.output.imagePushSecret"
    ]
    for path in ("base_model", "docker_config"):
        if getattr(request, path):
            flag = f"--{path.replace('_', '-')}"
            problems.append(Problem("names something of this machine, which a pod cannot read", path=flag))
    output = require_tuning(file).output
    if request.output and needs_secret and not isinstance(output, ImageOutput):
        problems.append(
            Problem(
                "a pod pushes with the Secret that tuning.output.imagePushSecret names, and there is none",
                path=f"--output {request.output}",
                hint="write tuning.output with an image and its imagePushSecret",
            )
        )
    if request.output and not names_registry(request.output):
        problems.append(
            Problem(
                "a pod pushes to a registry; a directory there is tuning.output.volumeSource",
                path=f"--output {request.output}",
            )
        )
    problems += islice(_label_problems(file), MOST_PROBLEMS + 1)
    if problems:
        raise ConfigError.of(problems)


_LABEL_PART = r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL_PART}")
_LABEL_VALUE = re.compile(rf"({_LABEL_PART})?")


def _label_problems(file: WorkspaceFile) -> Iterator[Problem]:
    """Labels to choose a node by that no node can have: the API server would refuse the Job."""
    selector = file.workspace.resource.label_selector
    if selector is None:
        return
    path = "resource.labelSelector"
    written: list[tuple[str, str, tuple[str, ...]]] = []
    written += [(f"{path}.matchLabels[{cut(key, 80)}]", key, (value,)) for key, value in selector.match_labels.items()]
    for index, each in enumerate(selector.match_expressions):
        where = f"{path}.matchExpressions[{index}]"
        written.append((where, each.key, each.values))
        if bool(each.values) != (each.operator in ("In", "NotIn")):
            wants = "needs values" if not each.values else "takes no values"
            yield Problem(f"the operator {each.operator} {wants}", path=where)
    for where, key, values in written:
        if not _LABEL_KEY.fullmatch(key):
            yield Problem("is no key that a label can have", path=where)
        for value in values:
            if not _LABEL_VALUE.fullmatch(value):
                yield Problem(
                    f"{cut(value, 80)!r} is no value that a label can have: at most 63 letters, digits, -, _ and .",
                    path=where,
                )


# ── what is worth a line ─────────────────────────────────────────────────────────────────────────────────────────────


def _notes(tuning: Tuning, training: TrainingConfig, request: Request, work_dir: Path) -> Iterator[str]:
    if request.smoke and request.output:
        yield f"--smoke with --output: an adapter of a tiny random model goes to {request.output}"
    directory = training.arguments.output_dir
    if directory and not request.in_pod:
        yield f"TrainingArguments.output_dir {directory}: on this machine checkpoints and adapter are in {work_dir}"
    if isinstance(tuning.output, ImageOutput) and not request.output and tuning.output.image.tag_is_implied:
        yield f"tuning.output.image {tuning.output.image.name}: has no tag, so it is pushed as latest"
    name = tuning.preset.name
    if request.in_pod:
        return
    if _model_directory(tuning) is None and not request.base_model and Path(name).is_dir():
        yield f"{name} is taken for the preset or Hugging Face id; the directory here would be ./{name}"


def annotated_checkpoints(workspace: Workspace) -> bool:
    """Whether the Workspace has the registry keep the newest checkpoint."""
    return CHECKPOINTS_ANNOTATION in workspace.metadata.annotations
