"""The first step of Tuner beside that of plain TRL and PEFT, on the same rows, adapters and 4-bit base.

    PYTHONPATH=. python benchmarks/parity.py [--base-model DIR] [--preset NAME]

prints loss and norm of the adapters' gradients of both, in bf16 and, on a CPU, in fp32. Without --base-model it is the
preset's architecture made small. Plain is what TRL's documentation shows: SFTTrainer with a quantization_config and a
peft_config, padded batches, its own collator, its loss and its gradient checkpointing.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tuner.pipeline.kernels import fuse_lora, prove
from tuner.pipeline.libraries import quiet
from tuner.pipeline.model import Device, attach_lora, load_base_model, pick_device
from tuner.pipeline.trainer import PackedTrainer
from tuner.presets import find_preset
from tuner.training_config import resolve_training_config

ROWS = 8
Rows = Sequence[Mapping[str, Sequence[int]]]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class FirstStep:
    """Mean loss of a step's learnt tokens, and the norm of all adapters' gradients."""

    loss: float
    norm: float

    def differs(self, other: "FirstStep") -> tuple[float, float]:
        """Relative differences of loss and norm."""
        return abs(self.loss / other.loss - 1), abs(self.norm / other.norm - 1)


def make_rows(vocabulary: int, count: int = ROWS, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents of unlike lengths whose first part is not learnt."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        prompt, answer = (int(generator.integers(4, 60)) for _ in range(2))
        ids = generator.integers(5, vocabulary, prompt + answer).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


class _SameAdapters(TrainerCallback):  # type: ignore[misc]
    """Fills the adapters with numbers that depend on their names alone. B is not zero: A must get gradients too.

    `dtype` is for fp32, where plain TRL would round the adapters of a 4-bit model to bf16.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        adapters = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
        for _name, parameter in adapters:
            values = torch.randn(parameter.shape, generator=generator).mul_(0.02).bfloat16()
            parameter.data = values.to(parameter.device, self._dtype or parameter.dtype)


def _arguments(device: Device, count: int, output: str, **options: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=output,
        report_to="none",
        max_steps=1,
        logging_steps=1,
        per_device_train_batch_size=count,
        max_grad_norm=1e9,  # so that the norm is measured and nothing is clipped
        max_length=None,
        bf16=device.dtype is torch.bfloat16,
        use_cpu=not device.is_cuda,
        disable_tqdm=True,
        save_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )


def _first_step(trainer: SFTTrainer) -> FirstStep:
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return FirstStep(logged["loss"], logged["grad_norm"])


def plain(model_dir: Path, rows: Rows, device: Device, targets: Sequence[str]) -> FirstStep:
    """SFTTrainer and PEFT as anybody would write them."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=device.dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, quantization_config=quantization, dtype=device.dtype, device_map={"": device.device}
    )
    fp32 = torch.float32 if device.dtype is torch.float32 else None
    with tempfile.TemporaryDirectory() as output:
        trainer = SFTTrainer(
            model=model,
            args=_arguments(device, len(rows), output),
            train_dataset=Dataset.from_list([dict(row) for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=list(targets), task_type="CAUSAL_LM"),
            callbacks=[_SameAdapters(fp32)],
        )
        return _first_step(trainer)


def ours(model_dir: Path, rows: Rows, device: Device, preset_name: str) -> FirstStep:
    """The path of pipeline/train.py: packed rows, attention within documents, head where it is learnt, fused LoRA."""
    preset = find_preset(preset_name)
    training = resolve_training_config(method="qlora", preset=preset)
    base = load_base_model(model_dir, training, device)
    with torch.autocast(device.device.type, torch.bfloat16, enabled=device.dtype is torch.bfloat16):
        exact = prove(base)
    assert exact.packs
    assert exact.learnt_head
    model, _, _ = attach_lora(base, training)
    documents = [{name: np.array(values) for name, values in row.items()} for row in rows]
    with tempfile.TemporaryDirectory() as output:
        trainer = PackedTrainer(
            micro_batch_tokens=256,  # several of them in the step
            exact=exact,
            say=print,
            model=model,
            args=_arguments(device, len(rows), output, gradient_checkpointing=False, logging_nan_inf_filter=False),
            train_dataset=Dataset.from_list(documents).with_format("numpy"),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
            callbacks=[_SameAdapters(torch.float32)],
        )
        fuse_lora(model)
        return _first_step(trainer)


def measure(model_dir: Path, preset_name: str, device: Device, rows: Rows | None = None) -> tuple[FirstStep, FirstStep]:
    """The first step of plain TRL and of Tuner."""
    quiet()
    if rows is None:
        rows = make_rows(len(AutoTokenizer.from_pretrained(model_dir)))
    targets = find_preset(preset_name).linear_modules
    return plain(model_dir, rows, device, targets), ours(model_dir, rows, device, preset_name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="phi-3-mini-4k-instruct")
    parser.add_argument("--base-model", type=Path)
    typed = parser.parse_args()
    found = pick_device()
    dtypes = [torch.bfloat16] if found.is_cuda else [torch.float32, torch.bfloat16]
    with tempfile.TemporaryDirectory() as made:
        model_dir = typed.base_model
        if model_dir is None:
            from tuner.pipeline.tiny_model import make_tiny_model

            model_dir = Path(made)
            make_tiny_model(find_preset(typed.preset), ["What is two and two? It is four."] * 50, model_dir)
        print(f"{'':<10}{'loss, plain':>14}{'ours':>12}{'apart':>10}{'norm, plain':>14}{'ours':>12}{'apart':>10}")
        for dtype in dtypes:
            one, two = measure(model_dir, typed.preset, Device(found.device, dtype, found.name))
            loss, norm = two.differs(one)
            name = str(dtype).removeprefix("torch.")
            losses, norms = f"{one.loss:>14.6f}{two.loss:>12.6f}", f"{one.norm:>14.6f}{two.norm:>12.6f}"
            print(f"{name:<10}{losses}{loss:>10.1e}{norms}{norm:>10.1e}")


if __name__ == "__main__":
    main()
