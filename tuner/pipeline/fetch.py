"""Sources and base weights → verified files on disk.

fetch ─┬─ fetch_sources ──── URLs and stores (in parallel, resumable), files, images, volumes ──► FetchedFile each
       └─ fetch_base_model ─ Hugging Face Hub, a directory or an image ─────────────────────────► FetchedModel
"""

import fcntl
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tuner.content import (
    check_model_directory,
    check_readable,
    hash_file,
    model_digest,
)
from tuner.durable import make_directories
from tuner.errors import DataError, InputMissingError, InterruptedRunError, ServiceError, TunerError
from tuner.folder import Use, named_split_remark, read_folder
from tuner.pipeline.download import Wanted, download_all, format_bytes, interrupted
from tuner.pipeline.hub import HubRepository, hub_headers, patiently
from tuner.pipeline.stores import check_store, is_store, stored_files
from tuner.pipeline.web import DEFAULT_TRANSFER, Transfer, TransientError, Web, WebFile
from tuner.reference import ImageReference, LayoutReference
from tuner.registry import client_for
from tuner.registry.image import TOP_DIRECTORY, sha256_digest
from tuner.registry.layout import Layout
from tuner.registry.pull import image_bytes, pull_image
from tuner.runspec import (
    Contract,
    Fetched,
    FetchedFile,
    FetchedModel,
    FileSource,
    HubModel,
    ImageLocation,
    ImageModel,
    ImageSource,
    LocalModel,
    Progress,
    Reporter,
    RunSpec,
    Secrets,
    Silent,
    SmokeModel,
    Source,
    UrlSource,
    VolumeSource,
)
from tuner.source_headers import SourceHeaders, parse_source_headers

if TYPE_CHECKING:
    from tuner.registry.transport import RegistryClient

DATA_DIRECTORY = "data"
WEIGHTS_DIRECTORY = "weights"


# ── the stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def fetch(
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    *,
    data_dir: Path | None = None,
    weights_dir: Path | None = None,
    tokenizer_only: bool = False,
    cancelled: threading.Event | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
) -> Fetched:
    """Every source and the base weights, side by side, on disk and verified. What fails first stops the other.

    `data_dir` and `weights_dir` are for those whom the work directory does not suit; several runs may share the second.
    `tokenizer_only` leaves the weights where they are: enough to prepare. Raises InterruptedRunError soon after
    `cancelled` is set; what has arrived is kept.
    """
    started = time.monotonic()
    cancelled = cancelled or threading.Event()
    stop = threading.Event()
    make_directories(work_dir)
    with _alone(work_dir, reporter, cancelled), ThreadPoolExecutor(2, "fetch") as pool:
        sources = pool.submit(
            fetch_sources, spec, secrets, work_dir, reporter, data_dir=data_dir, cancelled=stop, transfer=transfer
        )
        weights = pool.submit(
            fetch_base_model,
            spec,
            secrets,
            work_dir,
            reporter,
            weights_dir=weights_dir,
            tokenizer_only=tokenizer_only,
            cancelled=stop,
            transfer=transfer,
        )
        try:
            running: set[Future[Any]] = {sources, weights}
            while running:
                if cancelled.is_set():
                    raise interrupted()
                done, running = wait(running, timeout=0.1, return_when=FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            stop.set()
        files, base_model = sources.result(), weights.result()
    count = f"{len(files)} file" + ("s" if len(files) > 1 else "")
    size = format_bytes(sum(file.size_bytes for file in files))
    what = "tokenizer" if tokenizer_only else "base model"
    words = f", and the {what}" if base_model else ""
    reporter.note(f"fetched {count}, {size}{words}, {time.monotonic() - started:.1f} s")
    return Fetched(run_digest=spec.digest, files=files, base_model=base_model)


@contextmanager
def wait_until_alone(lock: Path, doing: str, reporter: Reporter, cancelled: threading.Event) -> Iterator[None]:
    """Hold the lock, once no other process does: what that did is then there. Freed however we die.

    `doing` is for the line that says what is waited for. Raises InterruptedRunError when `cancelled` is set meanwhile.
    """
    with lock.open("a") as file:
        is_said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_said:
                    reporter.note(f"{lock.parent}: another process is {doing}; waiting for that to end")
                    is_said = True
            except OSError as error:  # some network file systems have no locks
                reporter.warn(f"{lock.parent}: cannot be locked ({error.strerror}): let no other run use it meanwhile")
                break
            if cancelled.wait(0.1):
                raise interrupted()
        yield


def _alone(directory: Path, reporter: Reporter, cancelled: threading.Event) -> AbstractContextManager[None]:
    return wait_until_alone(directory / ".fetch.lock", "fetching into it", reporter, cancelled)


def fetch_sources(
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    *,
    data_dir: Path | None = None,
    cancelled: threading.Event | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
) -> tuple[FetchedFile, ...]:
    """Every data file, in the order of `spec.sources`; images, volumes and stores give theirs sorted by path.

    Raises InterruptedRunError when `cancelled` is set; what has arrived is kept. Everything that fails is in one error.
    """
    cancelled = cancelled or threading.Event()
    reporter = _Stoppable(reporter, cancelled)
    data_dir = data_dir or work_dir / DATA_DIRECTORY
    make_directories(data_dir)
    by_source: dict[int, tuple[FetchedFile, ...]] = {}
    failures: dict[int, TunerError] = {}
    check_stores(spec.sources)
    for index, source in enumerate(spec.sources):
        try:
            match source:
                case FileSource():
                    by_source[index] = (_fetch_file(source, work_dir, reporter),)
                case VolumeSource():
                    by_source[index] = _data_files(Path(source.path), source.path, source.use, work_dir, reporter)
                case ImageSource():
                    target = data_dir / f"{index:04d}-image"
                    _pull(source.reference, target, spec, secrets, reporter, only_under=TOP_DIRECTORY)
                    by_source[index] = _data_files(target, str(source.reference), source.use, work_dir, reporter)
                case UrlSource():
                    pass  # all at once, below
        except InterruptedRunError:
            raise
        except TunerError as error:
            failures[index] = error
    urls = {index: source for index, source in enumerate(spec.sources) if isinstance(source, UrlSource)}
    if urls:
        arrived, failed = _fetch_urls(urls, spec, secrets, data_dir, reporter, cancelled, transfer)
        failures |= failed
        for index, files in arrived.items():
            by_source[index] = tuple(
                file.model_copy(update={"path": _relative(work_dir, Path(file.path))}) for file in files
            )
    if failures:
        raise _all_in_one([failures[index] for index in sorted(failures)])
    return tuple(
        file.model_copy(update={"source_index": index}) for index in sorted(by_source) for file in by_source[index]
    )


def announced_bytes(
    spec: RunSpec, secrets: Secrets, reporter: Reporter, *, transfer: Transfer = DEFAULT_TRANSFER
) -> int | None:
    """How large the sources say the data are, without reading them; None where one of them does not say.

    Raises what fetching would raise for a source that is denied, missing or no data.
    """
    sizes: list[int | None] = []
    errors: list[TunerError] = []
    stop = threading.Event()
    with Web(spec.network, transfer, reporter, source_headers=_all_headers(secrets), stop=stop) as web:
        for index, source in enumerate(spec.sources):
            try:
                match source:
                    case FileSource(path=path):
                        sizes.append(Path(path).stat().st_size)
                    case VolumeSource(path=path, use=use):
                        sizes += [
                            Path(path, name).stat().st_size for name, _ in read_folder(Path(path), path, use=use).files
                        ]
                    case ImageSource(reference=reference):
                        with _image_source(reference, spec, secrets, reporter) as image:
                            sizes.append(image_bytes(reference, image))
                    case UrlSource():
                        for wanted in _wanted_of(index, source, secrets, web, transfer, stop, Silent()):
                            sizes.append(patiently(partial(_announced, wanted), transfer, stop))
            except TransientError as error:
                errors.append(ServiceError(f"{_shown(source)}: {error.reason}"))
            except TunerError as error:
                errors.append(error)
    if errors:
        raise _all_in_one(errors)
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _announced(wanted: Wanted) -> int | None:
    with wanted.origin.open() as answer:  # closed before a byte of the body is read
        return answer.size_bytes


def _shown(source: Source) -> str:
    match source:
        case UrlSource(url=url):
            return url
        case ImageSource(reference=reference):
            return str(reference)
        case FileSource(path=path) | VolumeSource(path=path):
            return path


def check_stores(sources: Sequence[Source]) -> None:
    """ConfigError when a package that some source needs is not installed."""
    errors: list[TunerError] = []
    for source in sources:
        if isinstance(source, UrlSource) and is_store(source):
            try:
                check_store(source)
            except TunerError as error:
                errors.append(error)
    if errors:
        raise _all_in_one(errors)


def _fetch_urls(
    urls: Mapping[int, UrlSource],
    spec: RunSpec,
    secrets: Secrets,
    data_dir: Path,
    reporter: Reporter,
    cancelled: threading.Event,
    transfer: Transfer,
) -> tuple[dict[int, tuple[FetchedFile, ...]], dict[int, TunerError]]:
    """What arrived and what failed, by the sources' numbers."""
    stop = threading.Event()
    wanted: dict[int, list[Wanted]] = {}
    failures: dict[int, TunerError] = {}
    with Web(spec.network, transfer, reporter, source_headers=_all_headers(secrets), stop=stop) as web:
        for index, source in urls.items():
            try:
                wanted[index] = _wanted_of(index, source, secrets, web, transfer, cancelled, reporter)
            except InterruptedRunError:
                raise
            except TunerError as error:
                failures[index] = error
        every = [file for files in wanted.values() for file in files]
        arrived, failed = download_all(every, data_dir, reporter, cancelled=cancelled, stop=stop, transfer=transfer)
    for index, files in list(wanted.items()):
        errors = [failed[file.name] for file in files if file.name in failed]
        if errors:
            failures[index] = _all_in_one(errors)
            del wanted[index]
    return {
        index: tuple(arrived[file.name].model_copy(update={"use": file.use, "is_part": file.is_part}) for file in files)
        for index, files in wanted.items()
    }, failures


def _all_headers(secrets: Secrets) -> list[SourceHeaders]:
    headers = [entry for text in secrets.source_headers for entry in parse_source_headers(text, "source headers")]
    return [*headers, *hub_headers(secrets.hf_token)]


def _wanted_of(
    index: int,
    source: UrlSource,
    secrets: Secrets,
    web: Web,
    transfer: Transfer,
    cancelled: threading.Event,
    reporter: Reporter,
) -> list[Wanted]:
    """The files that a URL stands for: itself, or what a store has there."""
    if is_store(source):
        return stored_files(index, source, web, secrets.hf_token, transfer, cancelled, reporter)
    if source.use == "training" and (remark := named_split_remark(source.url.rpartition("/")[2])):
        reporter.warn(f"{source.url}: {remark}")
    origin = WebFile(web, source.url, secrets.queries.get(source.name, ""))
    return [Wanted(source.name, source.url, source.query_sha256, source.sha256, origin, source.use)]


class _Stoppable:
    """A Reporter that ends whoever reports progress once `stop` is set: pulls and the Hub's client ask nobody else."""

    def __init__(self, reporter: Reporter, stop: threading.Event) -> None:
        self._stop = stop
        self._reporter = reporter
        self.note = reporter.note
        self.warn = reporter.warn

    def progress(self, progress: Progress) -> None:
        if self._stop.is_set():
            raise interrupted()
        self._reporter.progress(progress)


def fetch_base_model(
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    *,
    weights_dir: Path | None = None,
    tokenizer_only: bool = False,
    cancelled: threading.Event | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
) -> FetchedModel | None:
    """The base model's directory, complete; None for a smoke run, where prepare makes the model.

    With `tokenizer_only` it has what prepare reads. An image comes whole or not at all, so of one that is None too.
    """
    cancelled = cancelled or threading.Event()
    reporter = _Stoppable(reporter, cancelled)
    model = spec.base_model
    model_id, revision = None, None
    match model:
        case SmokeModel():
            return None
        case HubModel():
            repository = HubRepository(
                model,
                secrets.hf_token,
                trust_remote_code=spec.trust_remote_code,
                tokenizer_only=tokenizer_only,
                reporter=reporter,
            )
            directory, revision = repository.fetch(transfer, cancelled)
            model_id = model.id
        case LocalModel():
            directory, model_id, revision = Path(model.path), model.id, model.revision
        case ImageModel() if tokenizer_only:
            return None
        case ImageModel():
            if weights_dir:
                target = _pull_shared(model.reference, weights_dir, spec, secrets, reporter, cancelled)
            else:
                target = work_dir / WEIGHTS_DIRECTORY
                _pull(model.reference, target, spec, secrets, reporter, only_under="")
            directory = _model_root(target, str(model.reference))
            model_id, revision = model.id, model.revision
    shown = model_id or str(directory)
    if tokenizer_only:
        return FetchedModel(path=_relative(work_dir, directory), id=model_id, revision=revision, digest="")
    check_model_directory(directory, shown, trust_remote_code=spec.trust_remote_code)
    digest = model_digest(directory, with_code=spec.trust_remote_code)
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


def _fetch_file(source: FileSource, work_dir: Path, reporter: Reporter) -> FetchedFile:
    path = Path(source.path)
    if path.is_dir():
        raise InputMissingError(f"{source.path}: a directory, not a file", hint="name the files in it")
    file = _checked_file(path, source.path, work_dir)
    if file.sha256 != source.sha256:
        raise DataError(f"{source.path}: the file changed since this run was planned", hint="plan the run again")
    if source.use == "training" and (remark := named_split_remark(path.name)):
        reporter.warn(f"{source.path}: {remark}")
    return file.model_copy(update={"use": source.use})


def _data_files(directory: Path, source: str, use: Use, work_dir: Path, reporter: Reporter) -> tuple[FetchedFile, ...]:
    """Every data file below, sorted by path; what is no data or not trained on is said."""
    folder = read_folder(directory, source, work_dir, use)
    for remark in folder.remarks():
        reporter.note(f"{source}: {remark}")
    return tuple(
        _checked_file(directory / name, f"{source}/{name}", work_dir, may_be_empty=True).model_copy(
            update={"use": use, "is_part": True}
        )
        for name, use in folder.files
    )


def _checked_file(path: Path, source: str, work_dir: Path, *, may_be_empty: bool = False) -> FetchedFile:
    try:
        size = path.stat().st_size
        check_readable(path, path.name, source, may_be_empty=may_be_empty)
        digest = hash_file(path)
    except FileNotFoundError as error:
        raise InputMissingError(f"{path}: not there") from error
    except OSError as error:
        raise InputMissingError(f"{path}: cannot be read: {error.strerror}") from error
    return FetchedFile(source=source, path=_relative(work_dir, path), sha256=digest, size_bytes=size)


class _PulledRecord(Contract):
    """NAME.pulled.json: which image NAME holds."""

    reference: ImageLocation
    digest: str


def _pull(
    reference: ImageReference | LayoutReference,
    target: Path,
    spec: RunSpec,
    secrets: Secrets,
    reporter: Reporter,
    *,
    only_under: str,
) -> None:
    """The image's files below `only_under`, in `target`; not again when the reference still names what is there."""
    if isinstance(reference, LayoutReference):
        _pull_from(Layout(reference.path), None, reference, target, reporter, only_under)
        return
    with client_for(reference, spec.network, secrets.pull_docker_configs, reporter=reporter) as client:
        _pull_from(client, client, reference, target, reporter, only_under)


def _pull_shared(
    reference: ImageReference | LayoutReference,
    weights_dir: Path,
    spec: RunSpec,
    secrets: Secrets,
    reporter: Reporter,
    cancelled: threading.Event,
) -> Path:
    """A directory that is named by the image's digest: another run may read from it when the tag has moved on."""
    with _image_source(reference, spec, secrets, reporter) as source:
        content, _ = source.get_manifest(reference.digest or str(reference.tag))
    digest = sha256_digest(content)
    target = weights_dir / f"image-{digest.removeprefix('sha256:')[:12]}"
    make_directories(weights_dir)
    with _alone(weights_dir, reporter, cancelled):
        _pull(reference.with_digest(digest), target, spec, secrets, reporter, only_under="")
    return target


@contextmanager
def _image_source(
    reference: ImageReference | LayoutReference, spec: RunSpec, secrets: Secrets, reporter: Reporter
) -> Iterator["Layout | RegistryClient"]:
    if isinstance(reference, LayoutReference):
        yield Layout(reference.path)
        return
    with client_for(reference, spec.network, secrets.pull_docker_configs, reporter=reporter) as client:
        yield client


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
    wanted = _PulledRecord(reference=reference, digest=sha256_digest(content))
    with suppress(FileNotFoundError, ValidationError):
        if target.is_dir() and _PulledRecord.model_validate_json(record_path.read_bytes()) == wanted:
            reporter.note(f"{reference}: already there")
            return
    shutil.rmtree(target, ignore_errors=True)
    pulled = pull_image(reference, target, client, only_under=only_under, reporter=reporter)
    _PulledRecord(reference=reference, digest=pulled.digest).save(record_path)


# ── base weights ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _model_root(directory: Path, reference: str) -> Path:
    """Where in an image's files the model is: the shallowest directory with a config.json."""
    configs = sorted(directory.rglob("config.json"), key=lambda path: (len(path.parts), path))
    if not configs:
        raise InputMissingError(f"{reference}: no config.json in the image, so it is no model")
    return configs[0].parent
