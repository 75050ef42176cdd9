"""Adapter directory → the image that KAITO, vLLM and PEFT users pull."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tuner.errors import ConfigError, InputMissingError, TunerError
from tuner.open_files import OpenDirectory
from tuner.pipeline.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_FILES, check_weights
from tuner.records import CANARY, LOCK, lock_format
from tuner.registry.compression import Compression
from tuner.registry.image import Image, build_image

# An allow-list: optimizer states, data, environment files and docker configs can never be in an image.
PACKAGED_FILES = (
    frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md", "metrics.jsonl", LOCK, CANARY}) | TOKENIZER_FILES
)


_ADAPTERS = "a run leaves its adapter in adapter-… of its work directory, tuner-work/NAME"


def open_adapter(path: Path) -> OpenDirectory:
    """The directory that a user named. Raises InputMissingError for none."""
    if path.is_file():
        raise InputMissingError(f"{path}: is a file", hint=f"name its directory: {path.parent}")
    if not path.is_dir():
        raise InputMissingError(f"{path}: there is no such directory", hint=_ADAPTERS)
    # What finishes the push later finds it from its parent, by its own name.
    return OpenDirectory.at(path.resolve() if path.is_symlink() or path.name == ".." else path)


def adapter_image(adapter: OpenDirectory, compression: Compression = "none") -> Image:
    """The image of an adapter directory; equal files give equal bytes, whoever packages them.

    Raises InputMissingError when the two files that every reader needs are not there, DataError for a link.
    """
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not adapter.has(name):
            inside = _directories_with(name, adapter)
            hint = f"below it: {', '.join(inside[:3])}" if inside else _ADAPTERS
            raise InputMissingError(f"{adapter.path}: no adapter, there is no {name} in it", hint=hint)
    check_weights(adapter.file(ADAPTER_WEIGHTS))
    files = {name: adapter.file(name) for name in adapter.names() if name in PACKAGED_FILES}
    return build_image(files, annotations=annotations(adapter), compression=compression)


def _directories_with(name: str, adapter: OpenDirectory) -> list[str]:
    found = []
    for each in adapter.names():
        with suppress(TunerError), adapter.below(each) as inside:
            if inside.has(name):
                found.append(str(inside.path))
    return found


def changed_files(adapter: OpenDirectory) -> list[str]:
    """Names of what is packaged and is not, or no more, as run.lock.json says; none without a lock that says it."""
    lock = _read(adapter, LOCK) if adapter.has(LOCK) else {}
    locked = lock.get("files", {})
    if lock_format(lock) != 2 or not isinstance(locked, dict):
        return []
    there = {name: adapter.file(name).sha256() for name in adapter.names() if name in PACKAGED_FILES - {LOCK}}
    return sorted(
        name
        for name in {*there, *locked}
        if not isinstance(locked.get(name), dict) or there.get(name) != locked[name].get("sha256")
    )


def annotations(adapter: OpenDirectory) -> dict[str, str]:
    """The manifest's annotations, from what the directory itself says: `tuner push` needs no RunSpec."""
    config = _read(adapter, ADAPTER_CONFIG)
    described = {
        "org.opencontainers.image.title": str(config.get("base_model_name_or_path") or "LoRA adapter"),
        "tuner.lora.r": config.get("r"),
        "tuner.lora.alpha": config.get("lora_alpha"),
        "tuner.base-model.id": config.get("base_model_name_or_path"),
        "tuner.base-model.revision": config.get("revision"),
    }
    if adapter.has(LOCK):
        try:
            described |= _of_lock(_read(adapter, LOCK))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{adapter.path / LOCK}: not the lock of a run of tuner") from error
    return {key: str(value) for key, value in described.items() if value is not None}


def _of_lock(lock: dict[str, Any]) -> dict[str, Any]:
    base = lock["base_model"] or {}
    return {
        "org.opencontainers.image.title": lock["name"],
        "org.opencontainers.image.description": f"LoRA adapter for {lock['preset']}, trained with {lock['method']}"
        + (" (smoke run on a tiny random model)" if lock["smoke"] else ""),
        "sh.kaito.model.name": lock["preset"],
        "tuner.method": lock["method"],
        "tuner.run-digest": lock["run_digest"],
        "tuner.base-model.id": base.get("id"),
        "tuner.base-model.title": None if base.get("id") else base.get("title"),
        "tuner.base-model.digest": base.get("digest"),
        "tuner.dataset-digests": ",".join(f"sha256:{data['sha256']}" for data in lock["datasets"]),
        "tuner.eval-loss": lock["figures"]["eval_loss_after"],
        "tuner.smoke": "true" if lock["smoke"] else None,
    }


def _read(adapter: OpenDirectory, name: str) -> dict[str, Any]:
    path = adapter.path / name
    try:
        value = json.loads(adapter.file(name).content())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value
