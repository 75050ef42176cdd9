"""Adapter + base → one model without an adapter, and how far its logits are from the adapter's.

A QLoRA adapter was trained on the base as 4-bit storage gives it back, not on the checkpoint: it also makes up for what
quantization took. Added to the checkpoint's own weights it meets an error that is no longer there; added to the 4-bit
weights and quantized again, most of it is rounded away. So the base is quantized as in training, decoded, and the
adapter added to that. What remains is the rounding of the sum to the checkpoint's type, and that is measured.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tuner import __version__
from tuner.content import model_digest, model_files
from tuner.durable import make_directories, move
from tuner.errors import ConfigError, DataError, InputMissingError
from tuner.open_files import OpenFile
from tuner.pipeline.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TOKENIZER_FILES, check_weights, write_json
from tuner.pipeline.download import format_bytes
from tuner.pipeline.model import Device, load_base_model, pick_device
from tuner.records import LOCK
from tuner.runspec import FETCHED, Fetched, Reporter
from tuner.training_settings import TrainingConfig

MERGE = "merge.json"  # the drift, for programs; the card says it to people
SHARD = "5GB"
_SPARE = 1.05  # of the base's size: config, tokenizer, headers
# What no dense layer of the same model can hold, or what PEFT cannot add to one.
_UNMERGEABLE = {
    "alora_invocation_tokens": "it acts from certain tokens on",
    "arrow_config": "it chooses among adapters for each token",
    "layer_replication": "it makes a model of other layers",
    "trainable_token_indices": "it trains single rows of the embeddings",
    "use_bdlora": "it is laid out for several GPUs",
    "use_qalora": "it groups its inputs",
}
_HEAD_AND_EMBEDDINGS = {"lm_head", "embed_tokens", "embed_in", "wte", "embed_out"}
_PROBES = (
    "What is two and two?",
    "Write one sentence about the sea, and one about the mountains behind it.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))",
    "Grüße aus Zürich: heute 21 °C, morgen Regen.",
)


@dataclass(frozen=True)
class Drift:
    """How far the merged model's logits are from the adapter's on its base, over `tokens` positions."""

    tokens: int
    largest: float
    mean: float
    divergence: float  # mean Kullback-Leibler divergence in nats, of the merged model's answers from the adapter's
    same_answer: float  # share of positions where both think the same token most likely

    def __str__(self) -> str:
        return (
            f"over {self.tokens} tokens logits differ by {self.mean:.2g} on average and {self.largest:.2g} at most, "
            f"divergence {self.divergence:.2g} nats, the same most likely token at {self.same_answer:.1%}"
        )


def merge(adapter: Path, target: Path, base: Path | None, reporter: Reporter) -> Drift:
    """Leave the merged model in `target`: safetensors shards, config without quantization, tokenizer, card.

    Raises ConfigError for what cannot be merged, another base than the adapter's, or too little disk; InputMissingError
    for files that are not there; DataError for a damaged adapter.
    """
    config, lock = _read(adapter / ADAPTER_CONFIG), _read(adapter / LOCK)
    check_weights(OpenFile.at(adapter / ADAPTER_WEIGHTS))
    _check_mergeable(config, lock)
    directory = base or find_base(adapter, config, lock)
    base_config = _read(directory / "config.json")
    _check_tied(config, base_config)
    _check_base(directory, lock)
    partial = target.with_name(target.name + ".partial")
    _check_target(target, directory)
    shutil.rmtree(partial, ignore_errors=True)
    training = _training(lock)
    device = pick_device()
    dtype = _written_dtype(base_config)
    device = Device(device.device, dtype, device.name)
    tokenizer = AutoTokenizer.from_pretrained(adapter, local_files_only=True)
    probes = [torch.tensor([tokenizer(text)["input_ids"]], device=device.device) for text in _PROBES]
    try:
        model = load_base_model(directory, training, device)
        tuned = PeftModel.from_pretrained(model, adapter)
        before = _logits(tuned, probes)
        dense = tuned.unload()
        decoded = _decode(dense, dtype)
        if decoded:
            reporter.note(f"decoded {decoded} 4-bit layers of {directory}")
        merged = PeftModel.from_pretrained(dense, adapter).merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        raise ConfigError(
            f"{adapter}: cannot be merged: {' '.join(str(error).split())[:300]}",
            hint=f"is {directory} the base that it was trained on?",
        ) from error
    _save(merged, partial, adapter)
    del model, tuned, dense, merged
    # Of what is on the disk, not of what was in memory.
    drift = _drift(before, _logits(_load(partial, device, dtype), probes))
    _write_card(partial, lock, dtype, drift)
    move(partial, target)
    reporter.note(f"merged: {drift}")
    return drift


# ── before anything is loaded ────────────────────────────────────────────────────────────────────────────────────────


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = "a directory that tuner wrote has it: it says how the base was quantized" if path.name == LOCK else None
        raise InputMissingError(f"{path}: there is no such file", hint=hint) from error
    except OSError as error:
        raise InputMissingError(f"{path}: cannot be read: {error.strerror}", hint="name a directory") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def _check_mergeable(config: dict[str, Any], lock: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"a {config.get('peft_type')} adapter cannot be merged", hint="only LoRA can")
    for key, why in _UNMERGEABLE.items():
        if config.get(key):
            raise ConfigError(f"an adapter with LoraConfig.{key} cannot be merged: {why}")
    if lock["config"]["QuantizationConfig"].get("load_in_8bit"):
        raise ConfigError(
            "an adapter on an 8-bit base cannot be merged: what it was trained on depends on each input",
            hint="train with load_in_4bit, or serve the adapter",
        )


def _check_tied(config: dict[str, Any], base_config: dict[str, Any]) -> None:
    """A head that shares its matrix with the embeddings cannot hold what was learnt for one of them."""
    targets = config.get("target_modules") or []
    trained = {*(targets if isinstance(targets, list) else []), *(config.get("modules_to_save") or [])}
    found = sorted(trained & _HEAD_AND_EMBEDDINGS)
    if base_config.get("tie_word_embeddings") and found:
        raise ConfigError(f"an adapter on {found[0]} cannot be merged: this base shares it with the embeddings")


def find_base(adapter: Path, config: Mapping[str, Any], lock: Mapping[str, Any]) -> Path:
    """The base that an adapter was trained on: from the hub's cache, or where its work directory says that it lies.

    Raises InputMissingError where it is neither.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    hint = "give --base-model DIR"
    if not name:
        raise InputMissingError(
            "the adapter names no base model", hint=f"{hint}; that of a smoke run is smoke-model in its work directory"
        )
    locked = lock.get("base_model") or {}
    if not locked.get("id"):  # no name of the hub's, whatever it looks like
        directory = _recorded_base(adapter.parent, locked.get("digest")) or Path(name)
        if directory.is_absolute() and directory.is_dir():  # as locks of the first format had it
            return directory
        raise InputMissingError(f"the base model, {Path(name).name}, is none of the hub's", hint=hint)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise InputMissingError(
            f"{name} at {revision or 'main'}: is not in the hub's cache on this machine", hint=hint
        ) from error


def _recorded_base(work_dir: Path, digest: str | None) -> Path | None:
    """Where the run in this work directory had the base of this digest."""
    try:
        base = Fetched.load(work_dir / FETCHED).base_model
    except (InputMissingError, ConfigError):
        return None
    return (work_dir / base.path).absolute() if base and base.digest == digest else None


def _check_base(directory: Path, lock: dict[str, Any]) -> None:
    trained_on = (lock["base_model"] or {}).get("digest")
    if trained_on and trained_on not in (model_digest(directory), model_digest(directory, with_code=True)):
        raise ConfigError(
            f"{directory}: its files are not those that the adapter was trained on ({LOCK} has their digest)",
            hint="give --base-model DIR with the revision that adapter_config.json names",
        )


def _check_target(target: Path, base: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: is not empty", hint="give a new directory")
    make_directories(target.parent)
    weights = sum(path.stat().st_size for path in model_files(base) if path.suffix == ".safetensors")
    need, free = int(weights * _SPARE), shutil.disk_usage(target.parent).free
    if free < need:
        raise ConfigError(
            f"{target}: {format_bytes(free)} free, and the merged model needs about {format_bytes(need)}",
            hint="free some space, or give a directory on another disk",
        )


def _training(lock: dict[str, Any]) -> TrainingConfig:
    """How the base was loaded in training; computing follows this machine, as it did there."""
    training = TrainingConfig.of(lock["method"], lock["config"])
    return training.model_copy(
        update={
            "model": training.model.model_copy(update={"dtype": None}),
            "quantization": training.quantization.model_copy(update={"bnb_4bit_compute_dtype": None}),
        }
    )


def _written_dtype(base_config: dict[str, Any]) -> torch.dtype:
    """fp32 for a checkpoint in fp32, bf16 for any other: what training decodes to."""
    name = str(base_config.get("dtype") or base_config.get("torch_dtype") or "bfloat16")
    return torch.float32 if name.endswith("float32") else torch.bfloat16


# ── the models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _decode(model: nn.Module, dtype: torch.dtype) -> int:
    """Put a dense layer in the place of each 4-bit one; how many."""
    quantized = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    for name, module in quantized:
        state = module.weight.quant_state
        weight = dequantize_4bit(module.weight.data, state).to(dtype)
        dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(weight.reshape(module.out_features, module.in_features), requires_grad=False)
        dense.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, dense)
    for attribute in ("hf_quantizer", "is_loaded_in_4bit", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return len(quantized)


def _load(directory: Path, device: Device, dtype: torch.dtype) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={"": device.device}, local_files_only=True
    )


def _logits(model: nn.Module, probes: list[torch.Tensor]) -> torch.Tensor:
    """(positions, vocabulary) in fp32, on the CPU."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float().cpu() for ids in probes])


def _drift(adapter: torch.Tensor, merged: torch.Tensor) -> Drift:
    difference = (adapter - merged).abs()
    one, two = (torch.log_softmax(logits.double(), -1) for logits in (adapter, merged))
    return Drift(
        tokens=len(adapter),
        largest=float(difference.max()),
        mean=float(difference.mean()),
        divergence=max(0.0, float((one.exp() * (one - two)).sum(-1).mean())),
        same_answer=float((adapter.argmax(-1) == merged.argmax(-1)).double().mean()),
    )


# ── what is left ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _save(model: Any, directory: Path, adapter: Path) -> None:
    model.config.use_cache = True  # off for training only
    model.save_pretrained(directory, max_shard_size=SHARD)
    for name in sorted(TOKENIZER_FILES):
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, directory / name)
    shutil.copyfile(adapter / LOCK, directory / LOCK)


def _write_card(directory: Path, lock: dict[str, Any], dtype: torch.dtype, drift: Drift) -> None:
    base = (lock["base_model"] or {}).get("id")
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    front += [f"base_model: {base}", "base_model_relation: finetune"] if base else []
    front += ["tags:", "- tuner", "---", ""]
    how = "as its 4-bit form is decoded, which is what it was trained on" if lock["method"] == "qlora" else "as it is"
    lines = [
        f"# {lock['name']}, merged",
        "",
        f"{f'`{base}`' if base else 'A base model without a hub id'} with the LoRA adapter of run "
        f"`{lock['run_digest']}` added to its weights, in {str(dtype).removeprefix('torch.')}."
        + (" **Smoke run: a tiny random model.**" if lock["smoke"] else ""),
        "",
        f"The adapter was added to the base {how}. Compared with the adapter on that base, {drift}.",
        "",
        f"Held-out loss of the adapter: {lock['figures']['eval_loss_after']}. All settings are in `{LOCK}`.",
        "",
    ]
    (directory / "README.md").write_text("\n".join(front + lines), encoding="utf-8")
    write_json(directory / MERGE, {"version": 1, "tuner": __version__, "drift": vars(drift)})
