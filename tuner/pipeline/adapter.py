"""Adapter directory: config for every reader, card, lock, tokenizer, and the checks before it is packaged.

Nothing in here differs between two equal runs: no time, no host, no path of the machine.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tuner import __version__
from tuner.durable import write_text
from tuner.errors import DataError, GateError
from tuner.open_files import OpenFile
from tuner.records import LOCK, Figures, LockedBase, LockedData, LockedFile, LockedRows, Quantization, RunLock
from tuner.runspec import Fetched, FetchedFile, FetchedModel, Prepared, RunSpec, perplexity

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

# KAITO's transformers runtime pins peft 0.11.1, whose LoraConfig refuses keys it does not know.
# https://github.com/huggingface/peft/blob/v0.11.1/src/peft/tuners/lora/config.py
_PEFT_0_11_KEYS = frozenset(
    """peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules lora_alpha
    lora_dropout fan_in_fan_out bias use_rslora modules_to_save init_lora_weights layers_to_transform layers_pattern
    rank_pattern alpha_pattern megatron_config megatron_core loftq_config use_dora layer_replication""".split()
)

# Layers of the image that all adapters of one base share.
TOKENIZER_FILES = frozenset(
    {
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        CHAT_TEMPLATE,
    }
)

# Settings that say where files lie.
_PLACES = frozenset({"TrainingArguments.output_dir"})
_DATASET_PATH = "dataset_path"

_MAX_SAFETENSORS_HEADER_BYTES = 100_000_000  # what the safetensors library itself accepts
_PIECE_BYTES = 4 << 20  # a multiple of every word's size


def adapter_config(
    lora: Mapping[str, Any], defaults: Mapping[str, Any], base: FetchedModel | None
) -> tuple[dict[str, Any], list[str]]:
    """What adapter_config.json says, and the keys in it that KAITO's transformers runtime will refuse.

    The base is the hub id and revision, of one that is only a directory its name: never a path of the machine.
    """
    config: dict[str, Any] = {}
    newer: list[str] = []
    for key, value in lora.items():
        if isinstance(value, (set, frozenset)):
            value = sorted(value)
        if key in _PEFT_0_11_KEYS:
            config[key] = value
        elif value != defaults.get(key):
            config[key] = value
            newer.append(key)
    config |= {
        "base_model_name_or_path": base and base.title,
        "revision": base and base.revision,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted(config.items())), newer


VLLM_MAX_LORA_RANK = 16  # unless it is started with --max-lora-rank


def vllm_problems(lora: Mapping[str, Any]) -> list[str]:
    """Why vLLM does not serve an adapter with this LoraConfig, or serves it wrongly.

    https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py: it refuses some features, reads r and
    lora_alpha, and knows nothing of other keys.
    """
    problems = []
    refused = [key for key in ("modules_to_save", "use_dora", "lora_bias", "trainable_token_indices") if lora.get(key)]
    refused += ["bias"] if lora.get("bias", "none") != "none" else []
    refused += ["layer_replication"] if lora.get("layer_replication") else []
    if refused:
        problems.append(f"vLLM serves no adapter with LoraConfig.{' or '.join(refused)} (`tuner merge` makes a model)")
    ignored = [key for key in ("rank_pattern", "alpha_pattern") if lora.get(key)]
    if ignored:
        problems.append(f"vLLM ignores LoraConfig.{' and '.join(ignored)}, so it scales those layers wrongly")
    rank = max([lora["r"], *(lora.get("rank_pattern") or {}).values()])
    if rank > VLLM_MAX_LORA_RANK:
        problems.append(
            f"vLLM must be started with --max-lora-rank {rank} or more (its default is {VLLM_MAX_LORA_RANK})"
        )
    return problems


def check_weights(weights: OpenFile) -> str:
    """The sha256 of the tensors, in hexadecimal digits, whatever the order and metadata of the file that holds them.

    Over each tensor in the order of their names: its name, dtype and shape as one line of JSON, then its bytes as they
    are in the file. Raises DataError for a file that is damaged, GateError for NaN, Inf or a lora_B that was nowhere
    updated.
    """
    file_name = weights.path.name
    digest = hashlib.sha256()
    updated = False
    for name, tensor in sorted(_safetensors_header(weights).items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape], separators=(",", ":")).encode() + b"\n")
        for words in _words(weights, tensor):
            digest.update(words.data)
            if not _is_finite(words, tensor.dtype):
                raise GateError(
                    f"{file_name}: {name} has NaN or infinite values", hint="lower TrainingArguments.learning_rate"
                )
            # The sign bit alone is a negative zero.
            updated = updated or ("lora_B" in name and bool((words << 1).any()))
    if not updated:
        raise GateError(
            f"{file_name}: every lora_B is zero, so the adapter changes nothing",
            hint="raise TrainingArguments.learning_rate, or train for more steps",
        )
    return digest.hexdigest()


class _Tensor(NamedTuple):
    dtype: str
    shape: list[int]
    begin: int  # in the file
    end: int


def _safetensors_header(weights: OpenFile) -> dict[str, _Tensor]:
    """Where each tensor stands. https://github.com/huggingface/safetensors#format"""
    name = weights.path.name
    header_bytes = int.from_bytes(_read(weights, 0, min(8, weights.size_bytes)), "little")
    if not 2 <= header_bytes <= min(weights.size_bytes - 8, _MAX_SAFETENSORS_HEADER_BYTES):
        raise DataError(f"{name} is not a safetensors file, or it is cut short")
    first = 8 + header_bytes
    try:
        header = json.loads(_read(weights, 8, header_bytes))
        tensors = {
            key: _Tensor(value["dtype"], value["shape"], *(first + offset for offset in value["data_offsets"]))
            for key, value in header.items()
            if key != "__metadata__"
        }
        sizes = {key: math.prod(tensor.shape) for key, tensor in tensors.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{name} has no safetensors header") from error
    unknown = sorted({str(tensor.dtype) for tensor in tensors.values()} - set(_EXPONENTS))
    if unknown:
        raise DataError(f"{name}: adapter weights in {', '.join(unknown)} cannot be checked")
    end = first
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
        if tensor.begin != end or tensor.end < end:
            raise DataError(f"{name}: its tensors overlap or leave gaps")
        if tensor.end - tensor.begin != sizes[key] * np.dtype(_EXPONENTS[tensor.dtype][0]).itemsize:
            raise DataError(f"{name}: {key} is not as long as its shape says")
        end = tensor.end
    if end != weights.size_bytes:
        raise DataError(f"{name} is cut short or too long: its tensors do not cover the file")
    return tensors


# The word of a value and its exponent bits (IEEE 754: all set is NaN or infinity).
_EXPONENTS: Mapping[str, tuple[type[np.unsignedinteger[Any]], int]] = MappingProxyType(
    {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}
)


def _words(weights: OpenFile, tensor: _Tensor) -> Iterator[npt.NDArray[Any]]:
    """A tensor's values as words, some MB at a time: a pusher has less memory than a large tensor takes."""
    for begin in range(tensor.begin, tensor.end, _PIECE_BYTES):
        yield np.frombuffer(_read(weights, begin, min(_PIECE_BYTES, tensor.end - begin)), _EXPONENTS[tensor.dtype][0])


def _is_finite(words: npt.NDArray[Any], dtype: str) -> bool:
    word, mask = _EXPONENTS[dtype]
    return not bool(np.any((words & word(mask)) == word(mask)))


def _read(weights: OpenFile, offset: int, size_bytes: int) -> bytearray:
    content = bytearray(size_bytes)
    weights.read_into(memoryview(content), offset)
    return content


def source_label(file: FetchedFile) -> str:
    """How a data file is named in the image: by its URL (without query) or image reference; a local one by its name."""
    return Path(file.path).name if Path(file.source).is_absolute() else file.source


def run_lock(
    spec: RunSpec,
    fetched: Fetched,
    prepared: Prepared,
    *,
    figures: Figures,
    quantization: Quantization,
    versions: Mapping[str, str],
    tensors_sha256: str,
    files: Mapping[str, LockedFile],
) -> RunLock:
    """run.lock.json: all that is needed to make the same adapter again, and to know this one by.

    `files` are all that it is packaged with.
    """
    base = fetched.base_model
    return RunLock(
        name=spec.name,
        run_digest=spec.digest,
        smoke=spec.smoke,
        method=spec.method,
        preset=spec.preset_as_written,
        base_model=base and LockedBase(title=base.title, id=base.id, revision=base.revision, digest=base.digest),
        quantization=quantization,
        datasets=tuple(
            LockedData(source=source_label(file), sha256=file.sha256, size_bytes=file.size_bytes)
            for file in fetched.files
        ),
        rows=LockedRows(
            read=prepared.rows_read,
            train=prepared.train.rows,
            evaluation=prepared.eval_rows,
            smoke_unused=prepared.smoke_unused_rows,
            bad=prepared.bad_rows,
            over_length=prepared.over_length_rows,
            truncated=prepared.truncated_rows,
            unsupervised=prepared.unsupervised_rows,
            train_order_sha256=prepared.train.order_sha256,
        ),
        row_formats=prepared.row_formats,
        chat_template_sha256=files[CHAT_TEMPLATE].sha256 if "messages" in prepared.row_formats else None,
        max_length=prepared.max_length,
        seed=spec.training.arguments.seed,
        config={section: _without_places(section, values) for section, values in spec.training.sections().items()},
        figures=figures,
        versions={"tuner": __version__, **versions},
        tensors_sha256=tensors_sha256,
        files=dict(files),
    )


def _without_places(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The section's values, without where files lie: that is no part of the run, and names directories of somebody."""
    kept = {key: value for key, value in values.items() if f"{section}.{key}" not in _PLACES}
    path = kept.get(_DATASET_PATH) if section == "DatasetConfig" else None
    return kept | ({_DATASET_PATH: Path(path).name} if path and Path(path).is_absolute() else {})


def model_card(
    spec: RunSpec,
    fetched: Fetched,
    prepared: Prepared,
    *,
    figures: Figures,
    quantization: Quantization,
    coverage: str,
) -> str:
    """README.md of the adapter, with the front matter that PEFT and the Hub read."""
    base = fetched.base_model
    name = base.id if base and base.id else None
    lora, arguments = spec.training.lora, spec.training.arguments
    front = ["---", "library_name: peft", "pipeline_tag: text-generation", f"license: {spec.preset.licence or 'other'}"]
    front += [f"base_model: {name}", "base_model_relation: adapter"] if name else []
    front += ["tags:", "- lora", f"- {spec.method}", "- tuner", "---", ""]
    lines = [
        f"# {spec.name}",
        "",
        f"A LoRA adapter for {_base_in_words(base)}"
        + (f" at revision `{base.revision}`" if base and base.revision else "")
        + f", trained with {spec.method}."
        + (" **Smoke run: a tiny random model; this adapter is good for nothing but tests.**" if spec.smoke else ""),
        "",
        "| | |",
        "|---|---|",
        f"| LoRA | r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout} |",
        f"| covers | {coverage} |",
        f"| base in training | {quantization} |",
        f"| learning rate | {arguments.learning_rate}, {arguments.lr_scheduler_type} |",
        f"| steps | {figures.steps}, {_figure(figures.epochs)} epochs; the adapter is of step {figures.kept_step} |",
        f"| rows | {prepared.train.rows:,} trained on, {prepared.eval_rows:,} held out |",
        f"| tokens | {prepared.train.tokens:,} in the training rows, {prepared.train.supervised_tokens:,} learnt |",
        f"| training loss | {_figure(figures.first_train_loss)} → {_figure(figures.last_train_loss)} |",
        f"| held-out loss | {_figure(figures.eval_loss_before)} → {_figure(figures.eval_loss_after)} |",
        f"| held-out perplexity | {_perplexity(figures.eval_loss_before)} → {_perplexity(figures.eval_loss_after)} |",
        f"| row order | `{prepared.train.order_sha256}` |",
        f"| run | `{spec.digest}` |",
        "",
        "## Data",
        "",
        *(f"- `{source_label(file)}` sha256 `{file.sha256}`" for file in fetched.files),
        "",
        "Every value of the configuration is in `run.lock.json`, every logged step in `metrics.jsonl`.",
        "",
        "`canary.json` has what base and adapter make of six fixed sentences: a server that makes something else of",
        "them does not serve this adapter.",
        "",
    ]
    return "\n".join(front + lines)


def _base_in_words(base: FetchedModel | None) -> str:
    if base is None:
        return "a made-up base model"
    return f"`{base.title}`" if base.id else f"`{base.title}`, a base model without a hub id"


def _figure(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _perplexity(loss: float | None) -> str:
    return "–" if loss is None else _figure(perplexity(loss))


def file_digests(directory: Path) -> dict[str, str]:
    """Name → sha256 of every file directly in the directory, sorted."""
    digests = {}
    for path in sorted(directory.iterdir()):
        if path.is_file():
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def locked_files(directory: Path) -> dict[str, LockedFile]:
    """As the run lock has them: every file directly in the directory but that lock."""
    return {
        name: LockedFile(sha256=sha256, size_bytes=(directory / name).stat().st_size)
        for name, sha256 in file_digests(directory).items()
        if name != LOCK
    }


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    write_text(path, json.dumps(value, indent=indent, sort_keys=True, ensure_ascii=False) + "\n")
