"""What was typed + the Workspace file → RunSpec and Secrets. The same for a box, a Job and a smoke run.

Everything that a file on this machine can tell is decided here; only `hash_*` and `load_*` read the disk.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from tuner.content import hash_file, model_digest
from tuner.errors import ConfigError, InputMissingError, Problem, TunerError
from tuner.presets import Preset, find_preset, preset_from_directory
from tuner.reference import LayoutReference, names_registry, parse_destination
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
)
from tuner.training_config import ConfigSource, Setting, TrainingConfig, resolve_training_config
from tuner.urls import source_name, split_url
from tuner.workspace import (
    ImageInput,
    ImageOutput,
    Tuning,
    UrlInput,
    VolumeInput,
    WorkspaceFile,
    is_local_file,
    require_tuning,
)

T = TypeVar("T")

SMOKE_STEPS = 4
SMOKE_OVERRIDES = (f"TrainingArguments.max_steps={SMOKE_STEPS}", "DatasetConfig.over_length=truncate")


@dataclass(frozen=True)
class Request:
    """The flags of `tuner run` and `tuner check` that decide what a run is. A flag wins over the file."""

    smoke: bool = False
    base_model: Path | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    output: str | None = None
    docker_config: Path | None = None
    network: Network = field(default_factory=Network)
    overwrite: bool = True
    preflight: bool = True
    trust_remote_code: bool = False
    world_size: int = 1


@dataclass(frozen=True)
class Run:
    """A request with nothing left to resolve. `notes` are the lines to print before it starts."""

    spec: RunSpec
    secrets: Secrets
    notes: tuple[str, ...]
    credential_source: str


def build_run(file: WorkspaceFile, request: Request, work_dir: Path, env: Mapping[str, str]) -> Run:
    """The run that a Workspace file and flags stand for. `env`: HF_TOKEN, DOCKER_CONFIG and HOME are read.

    Raises ConfigError with every problem of preset, config, sources, destination and secrets at once.
    """
    tuning = require_tuning(file)
    problems: list[TunerError] = []
    preset = _attempt(problems, lambda: _preset(tuning, request))
    training = _attempt(problems, lambda: _training(file, tuning, preset or _ANY_PRESET, request, work_dir))
    sources, queries = _attempt(problems, lambda: _sources(tuning, request)) or ((), {})
    base_model = (
        _attempt(problems, lambda: _base_model(tuning, preset, training, request)) if preset and training else None
    )
    destination = _attempt(problems, lambda: _destination(tuning, request, work_dir))
    probe = _attempt(problems, lambda: _probe(tuning, request))
    target = probe or (destination if isinstance(destination, ImageDestination) else None)
    docker_configs, credential_source = _attempt(
        problems, lambda: _push_credentials(file, tuning, request, target, env)
    ) or ((), "")
    pull_configs = _attempt(problems, lambda: _pull_credentials(file, tuning, request, env)) or ()
    if problems or not (preset and training and base_model and destination):
        raise _all_at_once(problems)
    notes = list(file.notes) + list(training.notes)
    spec = RunSpec(
        name=file.workspace.metadata.name,
        method=tuning.method,
        preset=preset,
        preset_as_written=tuning.preset.name,
        base_model=base_model,
        training=training,
        sources=sources,
        destination=destination,
        probe=probe,
        network=request.network,
        smoke=request.smoke,
        preflight=request.preflight,
        trust_remote_code=request.trust_remote_code,
    )
    secrets = Secrets(
        queries=queries,
        docker_configs=docker_configs,
        pull_docker_configs=pull_configs,
        hf_token=env.get("HF_TOKEN") or None,
    )
    return Run(spec, secrets, tuple(notes), credential_source)


_ANY_PRESET = Preset(name="unknown", model_id="unknown/unknown")  # so that the config is still checked


def _attempt(problems: list[TunerError], step: Callable[[], T]) -> T | None:
    try:
        return step()
    except TunerError as error:
        problems.append(error)
        return None


def _all_at_once(errors: Sequence[TunerError]) -> TunerError:
    """One error as it is; several of one kind or mixed as one ConfigError that lists all."""
    if len(errors) == 1:
        return errors[0]
    problems: list[Problem] = []
    for error in errors:
        if isinstance(error, ConfigError) and error.problems:
            problems += error.problems
        else:
            problems.append(Problem(error.message, hint=error.hint))
    return ConfigError.of(problems)


def _preset(tuning: Tuning, request: Request) -> Preset:
    as_path = Path(tuning.preset.name)
    if tuning.preset.name.startswith((".", "/", "~")):
        return preset_from_directory(as_path.expanduser())
    preset = find_preset(tuning.preset.name)
    if request.base_model and not preset.config:
        # A hub id we know nothing of, whose files are here: they tell.
        return preset_from_directory(request.base_model).model_copy(
            update={"name": preset.name, "model_id": preset.model_id}
        )
    return preset


def _training(file: WorkspaceFile, tuning: Tuning, preset: Preset, request: Request, work_dir: Path) -> TrainingConfig:
    if request.config:
        try:
            text = request.config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputMissingError(f"--config {request.config}: cannot be read: {error}") from error
        source: ConfigSource | None = ConfigSource(text, str(request.config))
    elif tuning.config and tuning.config in file.config_maps:
        source = ConfigSource(*file.config_maps[tuning.config].training_config())
    elif tuning.config:
        raise ConfigError(
            f"tuning.config: ConfigMap {tuning.config!r} is not in the Workspace's file",
            hint="put it there as another YAML document, or give --config FILE",
        )
    else:
        source = None
    overrides = (*request.overrides, *(SMOKE_OVERRIDES if request.smoke else ()))
    training = resolve_training_config(
        method=tuning.method, preset=preset, config_map=source, overrides=overrides, world_size=request.world_size
    )
    return _with_template_text(training, Path(source.file).parent if source else Path(), work_dir)


def _with_template_text(training: TrainingConfig, beside: Path, work_dir: Path) -> TrainingConfig:
    """KAITO takes a path or a template in ModelConfig.chat_template; a run knows the text."""
    written = training.section("ModelConfig").get("chat_template")
    if not written or "{" in written:
        return training
    path = work_dir / written.removeprefix("/mnt/") if written.startswith("/mnt/") else beside / written
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputMissingError(
            f"ModelConfig.chat_template: {written} is no Jinja template, and no file that can be read",
            hint="write the template itself, or a path relative to the config file",
        ) from error
    setting = Setting(value=text, origin=training.settings["ModelConfig"]["chat_template"].origin)
    model = training.settings["ModelConfig"] | {"chat_template": setting}
    return training.model_copy(update={"settings": training.settings | {"ModelConfig": model}})


def _sources(tuning: Tuning, request: Request) -> tuple[tuple[Source, ...], dict[str, str]]:
    if request.data:
        return _url_sources(request.data)
    match tuning.input:
        case UrlInput(urls=urls):
            return _url_sources(urls)
        case ImageInput(image=image):
            return (ImageSource(reference=str(parse_destination(image))),), {}
        case VolumeInput(volume_source=volume):
            path = volume.get("hostPath", {}).get("path")
            if not path:
                kind = next(iter(volume))
                raise ConfigError(
                    f"tuning.input.volumeSource: a {kind} is there in a cluster only",
                    hint="on a box say where its files are: --data DIR",
                )
            return (VolumeSource(path=path, source=dict(volume)),), {}
    raise AssertionError(tuning.input)


def _url_sources(urls: Sequence[str]) -> tuple[tuple[Source, ...], dict[str, str]]:
    sources: list[Source] = []
    queries: dict[str, str] = {}
    missing: list[Problem] = []
    for index, url in enumerate(urls):
        if is_local_file(url):
            path = Path(unquote(urlsplit(url).path) if url.startswith("file:") else url).expanduser().absolute()
            if path.is_dir():
                sources.append(VolumeSource(path=str(path)))
            elif path.is_file():
                name = source_name(index, f"file://{path}")
                sources.append(FileSource(name=name, path=str(path), sha256=hash_file(path)))
            else:
                missing.append(Problem("there is no such file", path=url))
            continue
        parts = split_url(url)
        name = source_name(index, url)
        sources.append(UrlSource(name=name, url=parts.url, query_sha256=parts.query_sha256, sha256=parts.sha256))
        if parts.query:
            queries[name] = parts.query
    if missing:
        raise InputMissingError("; ".join(str(problem) for problem in missing))
    return tuple(sources), queries


def _base_model(tuning: Tuning, preset: Preset, training: TrainingConfig, request: Request) -> BaseModelSource:
    if request.base_model:
        directory = request.base_model.expanduser().absolute()
        model = LocalModel(path=str(directory), sha256=model_digest(directory))
        if is_weights_of(preset, directory):
            return model.model_copy(update={"id": preset.model_id, "revision": preset.revision})
        return model
    if request.smoke:
        if not preset.config:
            raise ConfigError(
                f"tuning.preset.name: {preset.name} is no preset, so --smoke cannot make its architecture small",
                hint="use one of `tuner presets`, or give --base-model DIR",
            )
        return SmokeModel()
    if tuning.preset.name.startswith((".", "/", "~")):
        directory = Path(tuning.preset.name).expanduser().absolute()
        return LocalModel(path=str(directory), sha256=model_digest(directory))
    image = tuning.preset.preset_options.image
    if image:
        return ImageModel(reference=str(parse_destination(image)), id=preset.model_id, revision=preset.revision)
    written = training.is_written("ModelConfig", "revision")
    revision = training.value("ModelConfig", "revision") if written else preset.hub_revision
    return HubModel(id=preset.model_id, revision=revision)


def _destination(tuning: Tuning, request: Request, work_dir: Path) -> Destination:
    if request.output:
        return parse_output(request.output, overwrite=request.overwrite)
    if request.smoke:
        return LayoutDestination(path=str((work_dir / "image").absolute()), tag="smoke")
    match tuning.output:
        case ImageOutput(image=image):
            return ImageDestination(reference=str(parse_destination(image)), overwrite=request.overwrite)
        case None:
            raise ConfigError("tuning.output: is missing", hint="say where the adapter goes: --output DIR or IMAGE")
        case volume:
            path = volume.volume_source.get("hostPath", {}).get("path")
            if not path:
                raise ConfigError(
                    f"tuning.output.volumeSource: a {next(iter(volume.volume_source))} is there in a cluster only",
                    hint="on a box say where the adapter goes: --output DIR",
                )
            return DirectoryDestination(path=path)


def parse_output(text: str, *, overwrite: bool = True) -> Destination:
    """`oci:DIR:TAG`, an image reference that names its registry host, or else a directory."""
    if text.startswith("oci:") or names_registry(text):
        reference = parse_destination(text)
        if isinstance(reference, LayoutReference):
            path = str(reference.path.expanduser().absolute())
            return LayoutDestination(path=path, tag=reference.tag, overwrite=overwrite)
        return ImageDestination(reference=str(reference), overwrite=overwrite)
    return DirectoryDestination(path=str(Path(text).expanduser().absolute()))


def _probe(tuning: Tuning, request: Request) -> ImageDestination | None:
    """A smoke run pushes elsewhere, but asks whether the real destination would take it."""
    if request.smoke and not request.output and request.preflight and isinstance(tuning.output, ImageOutput):
        return ImageDestination(reference=str(parse_destination(tuning.output.image)), overwrite=request.overwrite)
    return None


def _push_credentials(
    file: WorkspaceFile, tuning: Tuning, request: Request, target: ImageDestination | None, env: Mapping[str, str]
) -> tuple[tuple[str, ...], str]:
    """The docker config to push with and where it came from."""
    if target is None:
        return (), "none needed"
    name = tuning.output.image_push_secret if isinstance(tuning.output, ImageOutput) else None
    if request.docker_config:
        return (_read_docker_config(request.docker_config),), str(request.docker_config)
    if name and name in file.secrets:
        return (file.secrets[name].docker_config(),), f"Secret {name!r}"
    found = _users_docker_config(env)
    if found:
        return (_read_docker_config(found),), str(found)
    if name:
        raise InputMissingError(
            f"tuning.output.imagePushSecret: Secret {name!r} is not in the Workspace's file, "
            "and there is no docker config to push with",
            hint="put the Secret into the file, run docker login, or give --docker-config FILE",
        )
    return (), "anonymous"


def _pull_credentials(file: WorkspaceFile, tuning: Tuning, request: Request, env: Mapping[str, str]) -> tuple[str, ...]:
    names = [*tuning.preset.preset_options.image_pull_secrets]
    if isinstance(tuning.input, ImageInput):
        names += tuning.input.image_pull_secrets
    configs = [_read_docker_config(request.docker_config)] if request.docker_config else []
    configs += [file.secrets[name].docker_config() for name in names if name in file.secrets]
    found = _users_docker_config(env)
    configs += [_read_docker_config(found)] if found else []
    missing = [name for name in names if name not in file.secrets]
    if missing and not configs:
        raise InputMissingError(
            f"imagePullSecrets: Secret {missing[0]!r} is not in the Workspace's file, and there is no docker config",
            hint="put the Secret into the file, run docker login, or give --docker-config FILE",
        )
    return tuple(configs)


def docker_configs_for(docker_config: Path | None, env: Mapping[str, str]) -> tuple[str, ...]:
    """The docker config of `tuner push` and `tuner pull`: the flag's, the docker CLI's, or none."""
    path = docker_config or _users_docker_config(env)
    return (_read_docker_config(path),) if path else ()


def _users_docker_config(env: Mapping[str, str]) -> Path | None:
    """The docker CLI's file, where it would look for it."""
    directory = env.get("DOCKER_CONFIG") or (env.get("HOME") and f"{env['HOME']}/.docker")
    path = Path(directory) / "config.json" if directory else None
    return path if path and path.is_file() else None


def _read_docker_config(path: Path) -> str:
    path = path / "config.json" if path.is_dir() else path
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputMissingError(f"docker config {path}: cannot be read: {reason}") from error


_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def is_weights_of(preset: Preset, directory: Path) -> bool:
    """Whether a model directory has the preset's sizes: then the adapter's base is the preset's hub id, not a path."""
    sizes = preset_from_directory(directory).config
    return bool(preset.config) and all(sizes.get(name) == preset.config.get(name) for name in _SIZES)
