"""Is an image what it says it is? All of it is fetched, every digest checked, and its papers are compared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.errors import ConfigError, DataError
from tuner.reference import ImageReference, LayoutReference
from tuner.registry.artifacts import LOCK_FILE, parse_lock
from tuner.registry.extract import Limits
from tuner.registry.pull import ImageSource, pull_image
from tuner.runspec import Reporter

_NEEDED = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Verified:
    """`files` are names → sha256; `lock` is run.lock.json, None in an image that tuner did not make."""

    digest: str
    files: Mapping[str, str]
    annotations: Mapping[str, str]
    lock: Mapping[str, Any] | None


def verify_image(
    reference: ImageReference | LayoutReference,
    directory: Path,
    client: ImageSource | None = None,
    *,
    limits: Limits | None = None,
    reporter: Reporter,
) -> Verified:
    """Pulls an adapter image to `directory`, which must be empty or not exist, and checks digests, contents and lock.

    The files stay there, so that the caller can look into the weights. Raises what `pull_image` raises, and DataError
    with everything in which the image contradicts itself.
    """
    pulled = pull_image(reference, directory, client, limits=limits, reporter=reporter)
    problems = [f"there is no {name} in it" for name in _NEEDED if name not in pulled.files]
    config: dict[str, Any] = {}
    lock: dict[str, Any] | None = None
    if "adapter_config.json" in pulled.files:
        config = _adapter_config(directory / "adapter_config.json", problems)
    if LOCK_FILE in pulled.files:
        try:
            lock = parse_lock((directory / LOCK_FILE).read_bytes(), LOCK_FILE)
        except ConfigError as error:
            problems.append(error.message)
    else:
        reporter.warn(f"{reference}: there is no {LOCK_FILE} in it, so it says nothing about how it was made")
    if lock is not None:
        problems += _contradictions(lock, config, pulled.annotations)
    if problems:
        raise DataError(f"{reference}: {'; '.join(problems)}", hint=f"its files are in {directory}")
    return Verified(pulled.digest, pulled.files, pulled.annotations, lock)


def _adapter_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        problems.append(f"{path.name} is not a JSON object")
        return {}
    if str(config.get("base_model_name_or_path") or "").startswith(("/", ".")):
        problems.append(f"{path.name} names a directory of another machine as its base model")
    return config


def _contradictions(lock: Mapping[str, Any], config: Mapping[str, Any], annotations: Mapping[str, str]) -> list[str]:
    """Where the lock says one thing, and the annotations or adapter_config.json another."""
    base = lock.get("base_model") or {}
    datasets = ",".join(f"sha256:{data['sha256']}" for data in lock.get("datasets", []))
    said = [
        ("annotation tuner.run-digest", annotations.get("tuner.run-digest"), lock["run_digest"]),
        ("annotation sh.kaito.model.name", annotations.get("sh.kaito.model.name"), lock.get("preset")),
        ("annotation tuner.base-model.digest", annotations.get("tuner.base-model.digest"), base.get("digest")),
        ("annotation tuner.dataset-digests", annotations.get("tuner.dataset-digests"), datasets),
        ("adapter_config.json's base model", config.get("base_model_name_or_path"), base.get("id")),
        ("adapter_config.json's revision", config.get("revision"), base.get("revision")),
    ]
    return [
        f"{what} is {found!r}, and the lock says {locked!r}"
        for what, found, locked in said
        if found is not None and locked is not None and found != locked
    ]
