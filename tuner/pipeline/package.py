"""Adapter directory → the image that KAITO, vLLM and PEFT users pull."""

import json
from pathlib import Path
from typing import Any

from tuner.errors import ConfigError, InputMissingError
from tuner.pipeline.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_FILES, check_weights
from tuner.registry.compression import Compression
from tuner.registry.image import Image, build_image

LOCK = "run.lock.json"

# An allow-list: optimizer states, data, environment files and docker configs can never be in an image.
PACKAGED_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md", "metrics.jsonl", LOCK}) | (TOKENIZER_FILES)


_ADAPTERS = "a run leaves its adapter in adapter-… of its work directory, tuner-work/NAME"


def adapter_image(directory: Path, compression: Compression = "none") -> Image:
    """The image of an adapter directory; equal files give equal bytes, whoever packages them.

    Raises InputMissingError when the two files that every reader needs are not there.
    """
    if directory.is_file():
        raise InputMissingError(f"{directory}: is a file", hint=f"name its directory: {directory.parent}")
    if not directory.is_dir():
        raise InputMissingError(f"{directory}: there is no such directory", hint=_ADAPTERS)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            inside = sorted(str(path.parent) for path in directory.glob(f"*/{name}"))
            hint = f"below it: {', '.join(inside[:3])}" if inside else _ADAPTERS
            raise InputMissingError(f"{directory}: no adapter, there is no {name} in it", hint=hint)
    check_weights(directory / ADAPTER_WEIGHTS)
    files = {path.name: path for path in sorted(directory.iterdir()) if path.name in PACKAGED_FILES}
    return build_image(files, annotations=annotations(directory), compression=compression)


def annotations(directory: Path) -> dict[str, str]:
    """The manifest's annotations, from what the directory itself says: `tuner push` needs no RunSpec."""
    config = _read(directory / ADAPTER_CONFIG)
    described = {
        "org.opencontainers.image.title": str(config.get("base_model_name_or_path") or "LoRA adapter"),
        "tuner.lora.r": config.get("r"),
        "tuner.lora.alpha": config.get("lora_alpha"),
        "tuner.base-model.id": config.get("base_model_name_or_path"),
        "tuner.base-model.revision": config.get("revision"),
    }
    if (directory / LOCK).is_file():
        try:
            described |= _of_lock(_read(directory / LOCK))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{directory / LOCK}: not the lock of a run of tuner") from error
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
        "tuner.base-model.digest": base.get("digest"),
        "tuner.dataset-digests": ",".join(f"sha256:{data['sha256']}" for data in lock["datasets"]),
        "tuner.eval-loss": lock["figures"]["eval_loss_after"],
        "tuner.smoke": "true" if lock["smoke"] else None,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return value
