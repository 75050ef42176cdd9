"""Training throughput on a CPU: Tuner beside what a user could pick instead, in one process.

    python benchmarks/training_cpu.py [--seconds 20] [--write benchmarks/results/training_cpu.md]

Figure: learnt tokens per CPU-second. A tiny Phi-3 in NF4 (bitsandbytes' real 4-bit path), the same documents for
all: log-normal lengths, median 75 tokens of prompt and 115 of answer. The variants take turns, always the one with the
least CPU time so far, because wall time on shared cores says little. Every variant is its library's public API at the
defaults its makers document; the rows name what differs.
"""

import argparse
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForLanguageModeling
from trl import SFTConfig, SFTTrainer

from tuner.pipeline import phi3
from tuner.pipeline.kernels import DOCUMENT_ATTENTION, Exact, fuse_lora
from tuner.pipeline.libraries import quiet
from tuner.pipeline.tiny_model import make_tiny_model, make_tiny_tokenizer
from tuner.pipeline.trainer import PackedTrainer
from tuner.presets import find_preset

PRESET = "phi-3-mini-4k-instruct"
ALL_LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
KAITO_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # matches two of Phi-3's
DOCUMENTS_PER_STEP = 16
WARM_UP_STEPS = 3
LEAST_SECONDS = 1.0  # of CPU time for a sample


@dataclass
class Variant:
    """`step` makes one optimizer step's worth of work and says how many learnt tokens it had."""

    name: str
    step: Callable[[], int]
    cpu_seconds: float = 0.0
    samples: list[float] = field(default_factory=list)  # learnt tokens per CPU-second
    _tokens: int = 0
    _since: float = 0.0

    def run_once(self) -> None:
        began = time.process_time()
        self._tokens += self.step()
        took = time.process_time() - began
        self.cpu_seconds += took
        self._since += took
        if self._since >= LEAST_SECONDS:
            self.samples.append(self._tokens / self._since)
            self._tokens, self._since = 0, 0.0


def make_documents(count: int, vocabulary: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = random.Random(seed)
    documents = []
    for _ in range(count):
        prompt = min(600, max(8, round(generator.lognormvariate(np.log(75), 0.5))))
        answer = min(900, max(4, round(generator.lognormvariate(np.log(115), 0.5))))
        ids = [generator.randrange(20, vocabulary) for _ in range(prompt + answer)]
        mask = [0] * prompt + [1] * answer
        labels = [token if learnt else -100 for token, learnt in zip(ids, mask, strict=True)]
        documents.append({"input_ids": ids, "labels": labels, "completion_mask": mask})
    return documents


def learnt(documents: list[dict[str, list[int]]]) -> int:
    return sum(sum(document["completion_mask"]) for document in documents)


def four_bit_model(directory: Path, attention: str = "sdpa") -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        quantization_config=quantization,
        dtype=torch.float32,
        device_map="cpu",
        attn_implementation=attention,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def adapted(model: Any, targets: list[str], rank: int) -> Any:
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def drive(trainer: SFTTrainer, tokens_of: Callable[[Any], int], batches_per_step: int) -> Callable[[], int]:
    """One optimizer step of a Trainer: its own batches, training_step and optimizer, without logging."""
    model = trainer.model
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.create_optimizer()
    batches: Iterator[Any] = cycle(trainer.get_train_dataloader())

    def step() -> int:
        tokens = 0
        for _ in range(batches_per_step):
            batch = next(batches)
            count = (batch["labels"] != -100).sum()
            trainer.training_step(model, dict(batch), count * batches_per_step)
            tokens += tokens_of(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        model.zero_grad()
        return tokens

    return step


def sft_config(output: Path, **options: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(output),
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )


def kaito(model_dir: Path, tokenizer: Any, documents: list[dict[str, list[int]]], output: Path) -> Callable[[], int]:
    """One document at a time, checkpointing, fp32 norms, its two matching modules, every token in the loss."""
    model = adapted(prepare_model_for_kbit_training(four_bit_model(model_dir)), KAITO_TARGETS, 8)
    share = learnt(documents) / sum(len(document["input_ids"]) for document in documents)
    rows = Dataset.from_list([{"input_ids": document["input_ids"]} for document in documents])
    trainer = SFTTrainer(
        model=model,
        args=sft_config(output, per_device_train_batch_size=1, max_length=1024),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    return drive(trainer, lambda batch: round(share * batch["input_ids"].numel()), DOCUMENTS_PER_STEP)


def trl(
    model_dir: Path, tokenizer: Any, documents: list[dict[str, list[int]]], output: Path, **options: Any
) -> Callable[[], int]:
    """SFTTrainer at its defaults (batch 8, padded, activation checkpointing) but for `options`."""
    model = adapted(four_bit_model(model_dir), ALL_LINEAR, 16)
    rows = Dataset.from_list([{key: document[key] for key in ("input_ids", "labels")} for document in documents])
    if options.get("packing"):
        from trl.data_utils import pack_dataset

        rows = pack_dataset(rows, options["max_length"], "bfd")
        per_step = max(1, round(DOCUMENTS_PER_STEP / (len(documents) / len(rows))))
        options = {"per_device_train_batch_size": 1, **options}
    else:
        per_step = DOCUMENTS_PER_STEP // 8
    trainer = SFTTrainer(
        model=model, args=sft_config(output, **options), train_dataset=rows, processing_class=tokenizer
    )
    return drive(trainer, lambda batch: int((batch["labels"] != -100).sum()), per_step)


def ours(
    model_dir: Path,
    tokenizer: Any,
    documents: list[dict[str, list[int]]],
    output: Path,
    *,
    fused: bool = True,
    joined: bool = True,
) -> Callable[[], int]:
    """Packed micro-batches, attention within documents, the head where it is learnt, no checkpointing."""
    model = adapted(four_bit_model(model_dir, DOCUMENT_ATTENTION), ALL_LINEAR, 16)
    if fused:
        fuse_lora(model)
    if joined:
        phi3.take_parts(model.get_base_model())
    rows = [{key: np.array(document[key]) for key in ("input_ids", "labels")} for document in documents]
    trainer = PackedTrainer(
        micro_batch_tokens=2048,
        exact=Exact(packs=True, learnt_head=True),
        say=print,
        model=model,
        args=sft_config(output, per_device_train_batch_size=DOCUMENTS_PER_STEP, gradient_checkpointing=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer.create_optimizer()
    batches = cycle([rows[at : at + DOCUMENTS_PER_STEP] for at in range(0, len(rows), DOCUMENTS_PER_STEP)])

    def step() -> int:
        batch = next(batches)
        count = torch.tensor(sum(int((row["labels"][1:] != -100).sum()) for row in batch))
        trainer.training_step(model, batch, count)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        trainer.optimizer.step()
        model.zero_grad()
        return int(count)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="CPU time for each variant")
    parser.add_argument("--write", type=Path, help="write the table to this file too")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    vocabulary = 4096
    preset = find_preset(PRESET)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        words = [f"word{number}x{number % 97}" for number in range(20000)]
        make_tiny_model(preset, words, root / "model", vocabulary=vocabulary, hidden_size=256, layers=4)
        tokenizer = make_tiny_tokenizer(preset, words, vocabulary=vocabulary)
        documents = make_documents(512, len(tokenizer))
        made = (root / "model", tokenizer, documents, root / "out")
        variants = [
            Variant("KAITO's script and ConfigMap (batch 1)", kaito(*made)),
            Variant("TRL defaults (batch 8, padded)", trl(*made)),
            Variant("TRL packing 2048", trl(*made, packing=True, max_length=2048)),
            Variant(
                "TRL packing 2048, no checkpointing",
                trl(*made, packing=True, max_length=2048, gradient_checkpointing=False),
            ),
            Variant("Tuner, LoRA not fused", ours(*made, fused=False, joined=False)),
            Variant("Tuner, joined projections by transformers", ours(*made, joined=False)),
            Variant("Tuner", ours(*made)),
        ]
        for variant in variants:
            for _ in range(WARM_UP_STEPS):
                variant.step()
        while any(variant.cpu_seconds < options.seconds for variant in variants):
            min(variants, key=lambda variant: variant.cpu_seconds).run_once()
    table = report(variants, options.seconds)
    print(table)
    if options.write:
        options.write.write_text(table, encoding="utf-8")
    best = {variant.name: statistics.median(variant.samples) for variant in variants}
    kaito_gate = best["Tuner"] / best["KAITO's script and ConfigMap (batch 1)"]
    trl_gate = best["Tuner"] / best["TRL defaults (batch 8, padded)"]
    if kaito_gate < 1.7 or trl_gate < 2.3:
        sys.exit(f"below the mark: {kaito_gate:.2f}x KAITO (1.7), {trl_gate:.2f}x TRL (2.3)")


def report(variants: list[Variant], seconds: float) -> str:
    medians = [statistics.median(variant.samples) for variant in variants]
    kaito_rate, trl_rate = medians[0], medians[1]
    lines = [
        "# Training on a CPU, learnt tokens per CPU-second",
        "",
        "Tiny Phi-3 (hidden 256, 4 layers, vocabulary 4,096), NF4 with double quantization, one thread;",
        f"{seconds:.0f} s of CPU time for each variant, in turns in one process. Median of samples of a CPU-second,",
        "and their spread. The KAITO row trains two of Phi-3's four modules, as its default does; the others all four.",
        "",
        "| variant | tokens/CPU-s | min – max | × KAITO | × TRL |",
        "|---|---|---|---|---|",
    ]
    for variant, median in zip(variants, medians, strict=True):
        spread = f"{min(variant.samples):,.0f} – {max(variant.samples):,.0f}"
        lines.append(
            f"| {variant.name} | {median:,.0f} | {spread} | {median / kaito_rate:.2f} | {median / trl_rate:.2f} |"
        )
    libraries = ("torch", "transformers", "peft", "trl", "bitsandbytes")
    lines += [
        "",
        f"{cpu_name()}, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in libraries),
        "",
    ]
    return "\n".join(lines)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
