"""Sources and base weights → verified files on disk.

fetch ─┬─ fetch_sources ──── URLs (in parallel, resumable), files, images, volumes ──► FetchedFile each
       └─ fetch_base_model ─ Hugging Face Hub, a directory or an image ──────────────► FetchedModel
"""

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import httpx2
from pydantic import ValidationError

from tuner.content import (
    DUPLICATE_WEIGHTS,
    MODEL_FILES,
    check_has_safetensors,
    check_model_directory,
    check_readable,
    hash_file,
    model_digest,
    plain_name,
)
from tuner.errors import DataError, DeniedError, InputMissingError, ServiceError, TunerError
from tuner.pipeline.download import DEFAULT_TRANSFER, Transfer, disk_errors, download_all, format_bytes, no_space
from tuner.reference import ImageReference, LayoutReference, parse_destination
from tuner.registry import client_for
from tuner.registry.image import TOP_DIRECTORY, sha256_digest
from tuner.registry.layout import Layout
from tuner.registry.pull import pull_image
from tuner.runspec import (
    Contract,
    Fetched,
    FetchedFile,
    FetchedModel,
    FileSource,
    HubModel,
    ImageModel,
    ImageSource,
    LocalModel,
    Progress,
    Reporter,
    RunSpec,
    Secrets,
    SmokeModel,
    UrlSource,
    VolumeSource,
)
from tuner.urls import Allowed

if TYPE_CHECKING:
    from tuner.registry.transport import RegistryClient

T = TypeVar("T")

DATA_DIRECTORY = "data"
WEIGHTS_DIRECTORY = "weights"


# ── the stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def fetch(
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    *,
    cancelled: threading.Event | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
) -> Fetched:
    """Every source and the base weights, on disk and verified. Data come first: they are small and often wrong."""
    started = time.monotonic()
    files = fetch_sources(spec, secrets, work_dir, reporter, cancelled=cancelled, transfer=transfer)
    base_model = fetch_base_model(spec, secrets, work_dir, reporter, transfer=transfer)
    count = f"{len(files)} file" + ("s" if len(files) > 1 else "")
    size = format_bytes(sum(file.size_bytes for file in files))
    weights = ", and the base model" if base_model else ""
    reporter.note(f"fetched {count}, {size}{weights}, {time.monotonic() - started:.1f} s")
    return Fetched(run_digest=spec.digest, files=files, base_model=base_model)


def fetch_sources(
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    *,
    cancelled: threading.Event | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
) -> tuple[FetchedFile, ...]:
    """Every data file, in the order of `spec.sources`; an image or a volume gives its files sorted by path.

    Raises InterruptedRunError when `cancelled` is set; what has arrived is kept. Everything that fails is in one error.
    """
    data_dir = work_dir / DATA_DIRECTORY
    data_dir.mkdir(parents=True, exist_ok=True)
    by_source: dict[int, tuple[FetchedFile, ...]] = {}
    failures: dict[int, TunerError] = {}
    for index, source in enumerate(spec.sources):
        try:
            match source:
                case FileSource():
                    by_source[index] = (_fetch_file(source, work_dir),)
                case VolumeSource():
                    by_source[index] = _data_files(Path(source.path), source.path, work_dir)
                case ImageSource():
                    target = data_dir / f"{index:04d}-image"
                    _pull(source.reference, target, spec, secrets, reporter, only_under=TOP_DIRECTORY)
                    by_source[index] = _data_files(target, source.reference, work_dir)
                case UrlSource():
                    pass  # all at once, below
        except TunerError as error:
            failures[index] = error
    urls = {index: source for index, source in enumerate(spec.sources) if isinstance(source, UrlSource)}
    if urls:
        allowed = Allowed.of(spec.network.allow_cidrs, spec.network.allow_private_urls)
        arrived, failed = download_all(
            urls,
            secrets.queries,
            data_dir,
            allowed,
            spec.network.ca_file,
            reporter,
            cancelled=cancelled,
            transfer=transfer,
        )
        failures |= failed
        for index, file in arrived.items():
            by_source[index] = (file.model_copy(update={"path": _relative(work_dir, Path(file.path))}),)
    if failures:
        raise _all_in_one([failures[index] for index in sorted(failures)])
    return tuple(file for index in sorted(by_source) for file in by_source[index])


def fetch_base_model(
    spec: RunSpec, secrets: Secrets, work_dir: Path, reporter: Reporter, *, transfer: Transfer = DEFAULT_TRANSFER
) -> FetchedModel | None:
    """The base model's directory, complete; None for a smoke run, where prepare makes the model."""
    model = spec.base_model
    model_id, revision = None, None
    match model:
        case SmokeModel():
            return None
        case HubModel():
            repository = _HubRepository(
                model, secrets.hf_token, trust_remote_code=spec.trust_remote_code, reporter=reporter
            )
            directory, revision = repository.fetch(transfer)
            model_id = model.id
        case LocalModel():
            directory, model_id, revision = Path(model.path), model.id, model.revision
        case ImageModel():
            _pull(model.reference, work_dir / WEIGHTS_DIRECTORY, spec, secrets, reporter, only_under="")
            directory = _model_root(work_dir / WEIGHTS_DIRECTORY, model.reference)
            model_id, revision = model.id, model.revision
    shown = model_id or str(directory)
    check_model_directory(directory, shown, trust_remote_code=spec.trust_remote_code)
    digest = model_digest(directory)
    if isinstance(model, LocalModel) and digest != model.sha256:
        raise DataError(f"{model.path}: the model changed since this run was planned", hint="plan the run again")
    return FetchedModel(path=_relative(work_dir, directory), id=model_id, revision=revision, digest=digest)


def _all_in_one(errors: Sequence[TunerError]) -> TunerError:
    """One error that lists them all; its kind, and so its exit code, is the first one's."""
    if len(errors) == 1:
        return errors[0]
    lines = "".join(f"\n  {error.message}" for error in errors)
    hints = "; ".join(dict.fromkeys(error.hint for error in errors if error.hint))
    return type(errors[0])(f"{len(errors)} inputs failed:{lines}", hint=hints or None)


def _relative(work_dir: Path, path: Path) -> str:
    """As `Fetched` holds it: relative to the work directory when inside, else absolute."""
    absolute = path.absolute()
    root = work_dir.absolute()
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)


# ── files, volumes, images ───────────────────────────────────────────────────────────────────────────────────────────

_DATA_ENDINGS = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow", ".feather", ".txt", ".text")
_SIDECARS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})


def _fetch_file(source: FileSource, work_dir: Path) -> FetchedFile:
    path = Path(source.path)
    if path.is_dir():
        raise InputMissingError(f"{source.path}: a directory, not a file", hint="name the files in it")
    file = _checked_file(path, source.path, work_dir)
    if file.sha256 != source.sha256:
        raise DataError(f"{source.path}: the file changed since this run was planned", hint="plan the run again")
    return file


def _data_files(directory: Path, source: str, work_dir: Path) -> tuple[FetchedFile, ...]:
    """Every data file below, sorted; by name where names tell, else all of them."""
    if not directory.is_dir():
        raise InputMissingError(f"{source}: no directory at {directory}")
    visible = [
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
        and path.name not in _SIDECARS
        and not any(part.startswith((".", "_")) for part in path.relative_to(directory).parts)
        and not path.name.lower().startswith(("readme", "license", "licence"))
    ]
    named = [path for path in visible if plain_name(path.name).endswith(_DATA_ENDINGS)]
    if not visible:
        raise InputMissingError(f"{source}: no data file in it")
    return tuple(_checked_file(path, source, work_dir) for path in named or visible)


def _checked_file(path: Path, source: str, work_dir: Path) -> FetchedFile:
    try:
        size = path.stat().st_size
        check_readable(path, path.name, str(path))
        digest = hash_file(path)
    except FileNotFoundError as error:
        raise InputMissingError(f"{path}: not there") from error
    except OSError as error:
        raise InputMissingError(f"{path}: cannot be read: {error.strerror}") from error
    return FetchedFile(source=source, path=_relative(work_dir, path), sha256=digest, size_bytes=size)


class _PulledRecord(Contract):
    """NAME.pulled.json: which image NAME holds."""

    reference: str
    digest: str


def _pull(
    reference: str, target: Path, spec: RunSpec, secrets: Secrets, reporter: Reporter, *, only_under: str
) -> None:
    """The image's files below `only_under`, in `target`; not again when the reference still names what is there."""
    parsed = parse_destination(reference)
    if isinstance(parsed, LayoutReference):
        _pull_from(Layout(parsed.path), None, parsed, target, reporter, only_under)
        return
    with client_for(parsed, spec.network, secrets.pull_docker_configs, reporter=reporter) as client:
        _pull_from(client, client, parsed, target, reporter, only_under)


def _pull_from(
    manifests: "Layout | RegistryClient",
    client: "RegistryClient | None",
    reference: ImageReference | LayoutReference,
    target: Path,
    reporter: Reporter,
    only_under: str,
) -> None:
    record_path = target.with_name(f"{target.name}.pulled.json")
    content, _ = manifests.get_manifest(reference.digest or str(reference.tag))
    wanted = _PulledRecord(reference=str(reference), digest=sha256_digest(content))
    with suppress(FileNotFoundError, ValidationError):
        if target.is_dir() and _PulledRecord.model_validate_json(record_path.read_bytes()) == wanted:
            reporter.note(f"{reference}: already there")
            return
    shutil.rmtree(target, ignore_errors=True)
    pulled = pull_image(reference, target, client, only_under=only_under, reporter=reporter)
    _PulledRecord(reference=str(reference), digest=pulled.digest).save(record_path)


# ── base weights ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _model_root(directory: Path, reference: str) -> Path:
    """Where in an image's files the model is: the shallowest directory with a config.json."""
    configs = sorted(directory.rglob("config.json"), key=lambda path: (len(path.parts), path))
    if not configs:
        raise InputMissingError(f"{reference}: no config.json in the image, so it is no model")
    return configs[0].parent


class _HubRepository:
    """A model on the Hugging Face Hub, or what an earlier run left of it in the cache.

    HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE mean what they always mean. A partly fetched file is gone on with.
    """

    def __init__(self, model: HubModel, token: str | None, *, trust_remote_code: bool, reporter: Reporter) -> None:
        from huggingface_hub import constants
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity_error()  # its warnings name signed addresses
        self._model = model
        self._token = token or False  # False: never the token of whoever once logged in here
        self._patterns = (*MODEL_FILES, "*.tiktoken", *(("*.py",) if trust_remote_code else ()))
        self._reporter = reporter
        self._cache = Path(constants.HF_HUB_CACHE)

    def fetch(self, transfer: Transfer) -> tuple[Path, str]:
        """The model's directory in the cache, complete, and its commit."""
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            with disk_errors(self._cache):
                directory = _patiently(self._fetch_online, transfer)
        except OfflineModeIsEnabled:
            directory = self._from_cache("HF_HUB_OFFLINE is set")
        except (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError) as error:
            if not _may_pass(error):
                # None: the Hub's own text may name signed addresses
                raise _hub_error(self._model, error.response.status_code, error, self._token) from None
            reason = "the Hub cannot be reached"
            if isinstance(error, HfHubHTTPError):
                reason = f"the Hub answered {error.response.status_code}"
            try:
                directory = self._from_cache(reason)
            except InputMissingError as missing:
                raise ServiceError(missing.message, hint="run again: it goes on from here") from None
            self._reporter.warn(f"{self._model.id}: {reason}; what the cache holds is used")
        return directory, directory.name  # the cache names it by its commit

    def _fetch_online(self) -> Path:
        from huggingface_hub import HfApi, try_to_load_from_cache

        name = self._model.id
        info = HfApi(token=self._token).model_info(name, revision=self._model.revision, files_metadata=True)
        siblings = info.siblings or ()
        check_has_safetensors([file.rfilename for file in siblings], name)
        sizes = {file.rfilename: file.size or 0 for file in siblings if self._is_wanted(file.rfilename)}
        missing = sum(
            size
            for file, size in sizes.items()
            if not isinstance(try_to_load_from_cache(name, file, revision=info.sha), str)
        )
        self._cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._cache).free
        if missing > free:
            raise no_space(self._cache, missing, free)
        return self._snapshot(total=sum(sizes.values()))

    def _from_cache(self, reason: str) -> Path:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return self._snapshot(local_files_only=True)
        except LocalEntryNotFoundError:
            raise InputMissingError(
                f"{self._model.id}@{self._model.revision}: {reason}, and the cache at {self._cache} has not all of it",
                hint="fetch it where the Hub can be reached and set HF_HOME to that cache, or give --base-model DIR",
            ) from None

    def _snapshot(self, *, total: int | None = None, local_files_only: bool = False) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self._model.id,
                revision=self._model.revision,  # not the commit: by this name an offline run looks for it
                token=self._token,
                allow_patterns=list(self._patterns),
                ignore_patterns=["*/*", DUPLICATE_WEIGHTS],
                local_files_only=local_files_only,
                tqdm_class=_reporting_bar(self._reporter, self._model.id, total),
            )
        )

    def _is_wanted(self, name: str) -> bool:
        return (
            "/" not in name
            and not fnmatch(name, DUPLICATE_WEIGHTS)
            and any(fnmatch(name, pattern) for pattern in self._patterns)
        )


def _patiently(action: Callable[[], T], transfer: Transfer) -> T:
    """Again after failures of the wire, of a busy or of a broken Hub."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for failures in range(1, transfer.attempts):
        try:
            return action()
        except (HfHubHTTPError, httpx2.TransportError, LocalEntryNotFoundError) as error:
            if not _may_pass(error):
                raise
        time.sleep(transfer.backoff_s * 2 ** (failures - 1))
    return action()


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return True
    return bool(error.response.status_code == 429 or error.response.status_code >= 500)


def _hub_error(model: HubModel, status: int, error: Exception, token: str | bool) -> TunerError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name = model.id
    if isinstance(error, GatedRepoError):
        return DeniedError(
            f"{name}: this model is gated, and {'the token has no access' if token else 'there is no token'}",
            hint=f"accept the licence at https://huggingface.co/{name} and set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputMissingError(f"{name}: it has no revision {model.revision}")
    if isinstance(error, RepositoryNotFoundError):
        hint = "is the id right?" if token else "is the id right? A private model needs HF_TOKEN"
        return InputMissingError(f"{name}: not found on the Hub", hint=hint)
    if status in (401, 403):
        return DeniedError(f"{name}: the Hub answered {status}", hint="is HF_TOKEN valid, and may it read this model?")
    return InputMissingError(f"{name}: the Hub answered {status}")


def _reporting_bar(reporter: Reporter, task: str, total: int | None) -> type:
    """A tqdm class that draws nothing and tells the reporter how many bytes have come."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    done = 0

    class ReportingBar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            self.n += n or 0
            if self._counts_bytes and self.n > done:  # several bars count the same bytes at different points
                done = int(self.n)
                reporter.progress(Progress(stage="fetch", task=task, done=done, total=total, unit="B"))

    return ReportingBar
