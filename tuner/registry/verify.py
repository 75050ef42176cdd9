"""Is an adapter what it says it is? Of an image all is fetched and every digest checked; then its records are compared
with its files, with each other and with the annotations."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuner.errors import ConfigError, DataError, InputMissingError, TunerError
from tuner.open_files import OpenDirectory, OpenFile
from tuner.pod import SENTINEL
from tuner.records import CANARY, LOCK, SEAL, Canary, RunLock, lock_format, seal_of
from tuner.reference import ImageReference, LayoutReference
from tuner.registry.artifacts import IN_TOTO_TYPE, contradicts_lock, parse_lock
from tuner.registry.extract import Limits
from tuner.registry.image import sha256_digest
from tuner.registry.pull import ImageSource, pull_image
from tuner.registry.referrers import find_referrers
from tuner.registry.transport import RegistryClient
from tuner.runspec import Reporter

_CONFIG, _WEIGHTS = _NEEDED = ("adapter_config.json", "adapter_model.safetensors")

_SHOWN = 10  # problems of one image
_VOLUMES_OWN = frozenset({"lost+found", SENTINEL})  # at its root

DigestTensors = Callable[[OpenFile], str]  # of a safetensors file; raises TunerError for weights that are damaged


@dataclass(frozen=True)
class Verified:
    """`digest` is the image's, None of a directory; `files` are names → sha256; `lock` is run.lock.json, None in an
    image that tuner did not make. `unchecked`: why the files may be others than those that the run left; None: they are
    those."""

    digest: str | None
    files: Mapping[str, str]
    annotations: Mapping[str, str]
    lock: Mapping[str, Any] | None
    canary: Canary | None
    unchecked: str | None


def verify_image(
    reference: ImageReference | LayoutReference,
    directory: Path,
    client: ImageSource | None = None,
    *,
    limits: Limits | None = None,
    digest_tensors: DigestTensors | None = None,
    reporter: Reporter,
) -> Verified:
    """Pulls an adapter image to `directory`, which must be empty or not exist; checks digests, contents and records.

    `digest_tensors` looks into the weights, too; without it only their file is compared. Raises what `pull_image`
    raises, and DataError with everything in which the image contradicts itself.
    """
    pulled = pull_image(reference, directory, client, limits=limits, reporter=reporter)
    with OpenDirectory.at(directory) as opened:
        adapter = _Adapter(str(reference), opened, pulled.files, pulled.annotations)
        hint = f"tuner pull {reference} DIR to look at its files"
        lock, canary, unchecked = _check(adapter, digest_tensors, reporter, hint=hint)
    if lock is not None and isinstance(client, RegistryClient):
        _check_provenance(client, pulled.digest, lock, str(reference), reporter)
    return Verified(pulled.digest, pulled.files, pulled.annotations, lock, canary, unchecked)


def verify_directory(directory: Path, *, digest_tensors: DigestTensors | None = None, reporter: Reporter) -> Verified:
    """The same of an adapter's directory, whose annotations are not made yet.

    What is hidden there and what a volume's root has of its own is nobody's file. Raises InputMissingError where there
    is no adapter.
    """
    with OpenDirectory.at(directory) as opened:
        if not opened.has(_CONFIG):
            raise InputMissingError(f"{directory}: no adapter, there is no {_CONFIG} in it")
        names = [name for name in opened.names() if not name.startswith(".") and name not in _VOLUMES_OWN]
        directories = opened.directories()
        files = {name: "a directory" if name in directories else opened.file(name).sha256() for name in names}
        adapter = _Adapter(str(directory), opened, files, {})
        lock, canary, unchecked = _check(adapter, digest_tensors, reporter, hint=None)
    return Verified(None, files, {}, lock, canary, unchecked)


@dataclass(frozen=True)
class _Adapter:
    shown: str
    directory: OpenDirectory
    files: Mapping[str, str]  # name → sha256
    annotations: Mapping[str, str]

    def read(self, name: str) -> bytes | None:
        return self.directory.file(name).content() if name in self.files else None


def _check(
    adapter: _Adapter, digest_tensors: DigestTensors | None, reporter: Reporter, *, hint: str | None
) -> tuple[dict[str, Any] | None, Canary | None, str | None]:
    """The lock, the canary, and what could not be checked. Raises DataError with the problems."""
    problems = [f"there is no {name} in it" for name in _NEEDED if name not in adapter.files]
    config = _config(adapter, problems)
    lock, unchecked = _lock(adapter, problems)
    canary = _canary(adapter, problems)
    tensors = None
    if digest_tensors and _WEIGHTS in adapter.files:
        try:
            tensors = digest_tensors(adapter.directory.file(_WEIGHTS))
        except TunerError as error:
            problems.append(error.message)
    if lock is not None:
        try:
            problems += _contradictions(lock, config, adapter.annotations)
        except (KeyError, TypeError, AttributeError):
            problems.append(f"{LOCK}: not the lock of a run")
        if unchecked is None:
            problems += _against_lock(adapter, lock, canary, tensors, reporter)
    base = str(config.get("base_model_name_or_path") or "")
    if base.startswith(("/", ".")):
        said = f"{_CONFIG} names a directory of another machine as its base model"
        if unchecked and lock and _has_nameless_base(lock):
            reporter.warn(f"{adapter.shown}: {said}, as tuner's first format did")
        else:
            problems.append(said)
    if problems:
        more = [f"and {len(problems) - _SHOWN:,} more"] if len(problems) > _SHOWN else []
        raise DataError(f"{adapter.shown}: {'; '.join(problems[:_SHOWN] + more)}", hint=hint)
    if unchecked:
        reporter.warn(f"{adapter.shown}: {unchecked}")
    return lock, canary, unchecked


def _has_nameless_base(lock: Mapping[str, Any]) -> bool:
    base = lock.get("base_model")
    return isinstance(base, dict) and not base.get("id")


def _config(adapter: _Adapter, problems: list[str]) -> dict[str, Any]:
    content = adapter.read(_CONFIG)
    try:
        config = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        config = None
    if isinstance(config, dict):
        return config
    problems.append(f"{_CONFIG} is not a JSON object")
    return {}


def _lock(adapter: _Adapter, problems: list[str]) -> tuple[dict[str, Any] | None, str | None]:
    """The lock, and why it does not say what the files must be."""
    content = adapter.read(LOCK)
    if content is None:
        return None, f"there is no {LOCK} in it, so nothing says what its files must be"
    try:
        lock = parse_lock(content, LOCK)
    except ConfigError as error:
        problems.append(error.message)
        return None, None
    match lock_format(lock):
        case 1:
            return lock, f"its {LOCK} is of the first format, which does not say what its files must be"
        case 2:
            return lock, None
        case other:
            problems.append(f"{LOCK} is of format {other!r}, and this version of tuner knows 1 and 2")
            return None, None


def _canary(adapter: _Adapter, problems: list[str]) -> Canary | None:
    content = adapter.read(CANARY)
    try:
        return None if content is None else Canary.model_validate_json(content)
    except ValidationError as error:
        problems.append(f"{CANARY}: {_first(error)}")
        return None


def _against_lock(
    adapter: _Adapter, lock: Mapping[str, Any], canary: Canary | None, tensors: str | None, reporter: Reporter
) -> Iterator[str]:
    """Where the files are not what a lock of format 2 says; `tensors` is the digest of those in the weights' file."""
    if lock.get(SEAL) != seal_of(lock):
        yield f"{LOCK} was changed: it is not what its own {SEAL} says"
    try:
        locked = RunLock.model_validate(lock)
    except ValidationError as error:
        yield f"{LOCK}: {_first(error)}"
        return
    for name in sorted({*locked.files, *adapter.files} - {LOCK}):
        if name not in adapter.files:
            yield f"there is no {name} in it, which the lock names"
        elif name not in locked.files:
            yield f"there is {name} in it, which the lock does not name"
        elif adapter.files[name] == locked.files[name].sha256:
            continue
        elif name == _WEIGHTS and tensors == locked.tensors_sha256:
            reporter.note(f"{name} was saved anew: its bytes are others, its tensors the same")
        else:
            yield f"{name} is not the file that the lock names"
    if tensors not in (None, locked.tensors_sha256):
        yield f"the tensors in {_WEIGHTS} are not those that the lock names"
    if canary and (canary.run_digest, canary.tensors_sha256) != (locked.run_digest, locked.tensors_sha256):
        yield f"{CANARY} is of another adapter than the lock"


_STATEMENT_BYTES = 4 << 20


def _check_provenance(
    client: RegistryClient, digest: str, lock: Mapping[str, Any], shown: str, reporter: Reporter
) -> None:
    """Compare tuner's statements beside the image with its lock. Raises DataError; a registry that tells of none is
    none of the image's faults."""
    try:
        statements = list(_statements(client, digest))
    except TunerError as error:
        reporter.note(f"{shown}: what was said beside it could not be read: {error.message}")
        return
    if any(contradicts_lock(statement, digest, lock) for statement in statements):
        raise DataError(f"{shown}: its provenance statement says other things than its {LOCK}")


def _statements(client: RegistryClient, digest: str) -> Iterator[object]:
    for referrer in find_referrers(client, digest):
        if referrer.get("artifactType") != IN_TOTO_TYPE:
            continue
        content, _ = client.get_manifest(referrer["digest"])
        try:
            layer = json.loads(content)["layers"][0]
            size_bytes, layer_digest = int(layer["size"]), str(layer["digest"])
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise DataError(f"{referrer['digest']} is no statement") from error
        if size_bytes > _STATEMENT_BYTES:
            raise DataError(f"{referrer['digest']}: a statement of {size_bytes:,} bytes")
        statement = b"".join(client.download_blob(layer_digest, size_bytes))
        if sha256_digest(content) != referrer["digest"] or sha256_digest(statement) != layer_digest:
            raise DataError(f"{referrer['digest']} is not what its digest says")
        try:
            yield json.loads(statement)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{referrer['digest']} is not JSON") from error


def _first(error: ValidationError) -> str:
    """`rows.train: Input should be a valid integer`"""
    first = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def _contradictions(lock: Mapping[str, Any], config: Mapping[str, Any], annotations: Mapping[str, str]) -> list[str]:
    """Where the lock says one thing, and the annotations or adapter_config.json another."""
    base = lock.get("base_model") or {}
    datasets = ",".join(f"sha256:{data['sha256']}" for data in lock.get("datasets", []))
    said = [
        ("annotation tuner.run-digest", annotations.get("tuner.run-digest"), lock["run_digest"]),
        ("annotation sh.kaito.model.name", annotations.get("sh.kaito.model.name"), lock.get("preset")),
        ("annotation tuner.base-model.digest", annotations.get("tuner.base-model.digest"), base.get("digest")),
        ("annotation tuner.dataset-digests", annotations.get("tuner.dataset-digests"), datasets),
        (
            "adapter_config.json's base model",
            config.get("base_model_name_or_path"),
            base.get("title") or base.get("id"),
        ),
        ("adapter_config.json's revision", config.get("revision"), base.get("revision")),
    ]
    return [
        f"{what} is {found!r}, and the lock says {locked!r}"
        for what, found, locked in said
        if found is not None and locked is not None and found != locked
    ]
