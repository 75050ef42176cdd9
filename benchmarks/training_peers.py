"""Tuner and what a user could pick instead, as trainers over the same documents: for training_gpu.py.

Each function builds one system from its public API at the defaults its makers document; the docstring says what
differs. A trainer is then run by its own `train()`, loop, callbacks and logging included, and watched from outside.
"""

import random
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from gsm8k_lengths import LENGTHS
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
    PrinterCallback,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from tuner.levers import FUSED_LORA, FUSED_PROJECTIONS, LEARNT_HEAD, PACKING
from tuner.pipeline.kernels import DOCUMENT_ATTENTION, Exact, prove
from tuner.pipeline.levers import Choice, apply, choose
from tuner.pipeline.model import Device
from tuner.pipeline.probe import Pieces
from tuner.pipeline.tiny_model import make_tiny_model, make_tiny_tokenizer
from tuner.pipeline.trainer import PackedTrainer
from tuner.plan import MICRO_BATCH_TOKENS
from tuner.presets import find_preset

PRESET = "phi-3-mini-4k-instruct"
ALL_LINEAR = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
KAITO_TARGETS = ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]  # two of them match
DOCUMENTS_PER_STEP = 64
RANK = 16
WORDS = [f"word{number}x{number % 97}" for number in range(20_000)]


@dataclass(frozen=True)
class Bed:
    """Where it is measured: the device, a folder for the model, and whether everything is made tiny."""

    device: Device
    work: Path
    tiny: bool
    seconds: float  # of each variant
    warm_up_s: float

    @property
    def model_dir(self) -> Path:
        return self.work / ("tiny-model" if self.tiny else "model")


# ── the model and the documents ──────────────────────────────────────────────────────────────────────────────────────


def make_model(bed: Bed) -> Path:
    """phi-3-mini's architecture with random weights in bf16, made on the GPU and written once: 7.6 GB."""
    directory = bed.model_dir
    if (directory / "config.json").exists():
        return directory
    preset = find_preset(PRESET)
    if bed.tiny:
        make_tiny_model(preset, WORDS, directory, vocabulary=1024)
        return directory
    tokenizer = make_tiny_tokenizer(preset, WORDS, vocabulary=16_384)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with torch.device(bed.device.device):
        config = AutoConfig.for_model(**(deepcopy(preset.config) | ids))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator(bed.device.device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # zeros would make every product easy
            parameter.data.normal_(0, 0.02, generator=generator)
    half = directory.with_name("half-written")
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    half.rename(directory)
    return directory


@dataclass(frozen=True)
class Documents:
    """Rows of random tokens; `learnt` says which of them the user asked to learn."""

    rows: list[dict[str, list[int]]]

    @property
    def learnt_share(self) -> float:
        learnt = sum(sum(label != -100 for label in row["labels"]) for row in self.rows)
        return learnt / sum(len(row["input_ids"]) for row in self.rows)


def make_documents(lengths: Sequence[tuple[int, int]], count: int, words: int) -> Documents:
    """`count` documents of those lengths in a random order, of token ids below `words`."""
    chance = random.Random(0)
    rows = []
    for number in range(count):
        prompt, answer = lengths[number % len(lengths)]
        ids = [chance.randrange(20, words) for _ in range(prompt + answer)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    chance.shuffle(rows)
    return Documents(rows)


def short_documents(bed: Bed) -> Documents:
    """Of GSM8K's lengths."""
    count, words = (96, 600) if bed.tiny else (8192, 16_000)
    return make_documents(LENGTHS, count, words)


def long_documents(bed: Bed) -> Documents:
    """1,000 to 4,000 tokens, half of them learnt."""
    chance = random.Random(1)
    scale = 50 if bed.tiny else 1
    totals = [chance.randrange(1000, 4000) // scale for _ in range(499)]
    count, words = (32, 600) if bed.tiny else (1024, 16_000)
    return make_documents([(total // 2, total - total // 2) for total in totals], count, words)


# ── watching a trainer ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Measured:
    """Rates of one variant, samples of at least a second each."""

    learnt_per_s: list[float] = field(default_factory=list)
    real_per_s: list[float] = field(default_factory=list)
    positions_per_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    loss: float = float("nan")
    note: str = ""


Work = tuple[Any, Any, Any]  # learnt tokens, real tokens, positions with padding: numbers, or tensors of one number


class Clock:
    """Counts work in samples of a second or more. The GPU is waited for at their ends only."""

    def __init__(self, bed: Bed) -> None:
        self._bed = bed
        self._sample_s = 0.05 if bed.tiny else 1.0
        self._work: list[Work] = []
        self._began = self._since = 0.0
        self._warm = False
        self.measured = Measured()
        self.done = False

    def add(self, work: Work) -> None:
        now = time.perf_counter()
        if not self._began:
            self._began = now
        if not self._warm:
            if now - self._began >= self._bed.warm_up_s:
                self._warm = True
                self._began = self._since = self._now()
            return
        self._work.append(work)
        if now - self._since >= self._sample_s:
            now = self._now()
            learnt, real, positions = (float(sum(int(one) for one in kind)) for kind in zip(*self._work, strict=True))
            took = now - self._since
            self.measured.learnt_per_s.append(learnt / took)
            self.measured.real_per_s.append(real / took)
            self.measured.positions_per_s.append(positions / took)
            self._work, self._since = [], now
        self.done = now - self._began >= self._bed.seconds and bool(self.measured.learnt_per_s)

    def _now(self) -> float:
        if self._bed.device.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class _StopWhenDone(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = control.should_training_stop or self._clock.done
        return control

    on_step_end = on_substep_end


def watch(trainer: Any, bed: Bed, work_of: Callable[[Any], Work]) -> Measured:
    """Let a trainer train for the bed's seconds, and count."""
    clock = Clock(bed)
    plain = trainer.training_step

    def training_step(model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        work = work_of(inputs)
        loss = plain(model, inputs, *rest, **named)
        clock.add(work)
        clock.measured.loss = loss
        return loss

    trainer.training_step = training_step
    trainer.add_callback(_StopWhenDone(clock))
    trainer.remove_callback(PrinterCallback)
    if bed.device.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    clock.measured.peak_bytes = torch.cuda.max_memory_allocated() if bed.device.is_cuda else 0
    clock.measured.loss = float(clock.measured.loss)
    if not np.isfinite(clock.measured.loss):
        raise ValueError("the loss is not finite")
    return clock.measured


def padded_work(batch: dict[str, torch.Tensor]) -> Work:
    """What a padded or flattened batch of TRL's has."""
    mask = batch.get("attention_mask")
    positions = batch["input_ids"].numel()
    return (batch["labels"] != -100).sum(), positions if mask is None else mask.sum(), positions


# ── the systems ──────────────────────────────────────────────────────────────────────────────────────────────────────


def four_bit_model(bed: Bed, attention: str = "sdpa") -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=bed.device.dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        bed.model_dir,
        quantization_config=quantization,
        dtype=bed.device.dtype,
        device_map={"": bed.device.device},
        attn_implementation=attention,
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def lora(targets: list[str], rank: int = RANK, alpha: int = 2 * RANK) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")


def sft_config(bed: Bed, **options: Any) -> SFTConfig:
    """Documented defaults but for `options`; no report, no checkpoint, rows that are tokens already."""
    cpu = {"use_cpu": True, "bf16": False} if not bed.device.is_cuda else {}
    return SFTConfig(
        output_dir=str(bed.work / "output"),
        report_to="none",
        save_strategy="no",
        num_train_epochs=1000,
        disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True},
        **(cpu | options),
    )


class EmptyCache(TrainerCallback):
    """KAITO's, after each step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.cuda.empty_cache()


def kaito(bed: Bed, documents: Documents, *, as_shipped: bool) -> Measured:
    """fine_tuning.py with qlora-params.yaml: batch 1, fp32 residual stream, activation checkpointing, every token in
    the loss, the cache emptied each step. As shipped: rank 8, the two modules that its names match, a step for each
    document; else everybody's rank and modules, and 64 documents a step."""
    model = prepare_model_for_kbit_training(four_bit_model(bed))
    model = get_peft_model(model, lora(KAITO_TARGETS, 8, 8) if as_shipped else lora(ALL_LINEAR))
    tokenizer = AutoTokenizer.from_pretrained(bed.model_dir)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(
            bed,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1 if as_shipped else DOCUMENTS_PER_STEP,
            ddp_find_unused_parameters=False,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in documents.rows]),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[EmptyCache()],
    )
    share = documents.learnt_share

    def work_of(batch: dict[str, torch.Tensor]) -> Work:
        count = batch["input_ids"].numel()
        return round(share * count), count, count

    return watch(trainer, bed, work_of)


def trl(bed: Bed, documents: Documents, *, attention: str = "sdpa", **options: Any) -> Measured:
    """SFTTrainer over a 4-bit model with LoRA on all linear layers, at its defaults but for `options`."""
    model = four_bit_model(bed, attention)
    rows = Dataset.from_list(documents.rows)
    if options.get("packing"):
        from trl.data_utils import pack_dataset

        count = len(rows)
        rows = pack_dataset(rows, options["max_length"], "bfd")
        options = {"per_device_train_batch_size": max(1, round(DOCUMENTS_PER_STEP * len(rows) / count)), **options}
    else:
        batch = options.setdefault("per_device_train_batch_size", 8)
        options = {"gradient_accumulation_steps": DOCUMENTS_PER_STEP // batch, "max_length": None, **options}
    trainer = SFTTrainer(
        model=get_peft_model(model, lora(ALL_LINEAR)),
        args=sft_config(bed, **options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(bed.model_dir),
    )
    return watch(trainer, bed, padded_work)


def unsloth(bed: Bed, documents: Documents) -> Measured:
    """Unsloth's own loader, adapters and patched SFTTrainer. In a process of its own: importing it changes others."""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(bed.model_dir), max_seq_length=4096, load_in_4bit=True, dtype=None
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0,
        use_gradient_checkpointing="unsloth",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    trainer = SFTTrainer(
        model=model,
        args=sft_config(bed, per_device_train_batch_size=8, gradient_accumulation_steps=8, packing=True),
        train_dataset=Dataset.from_list(documents.rows),
        processing_class=tokenizer,
    )
    return watch(trainer, bed, padded_work)


def packed_trainer(
    bed: Bed, documents: Documents, disabled: tuple[str, ...] = (), per_step: int = DOCUMENTS_PER_STEP
) -> tuple[PackedTrainer, Exact]:
    """Tuner's trainer as pipeline/train.py makes it, and what of it is exact; no lever is taken yet."""
    base = four_bit_model(bed, DOCUMENT_ATTENTION)
    base.requires_grad_(False)
    base.config.use_cache = False
    with torch.autocast(bed.device.device.type, bed.device.dtype, enabled=bed.device.is_cuda):
        proved = prove(base)
    exact = Exact(
        packs=proved.packs and PACKING not in disabled, learnt_head=proved.learnt_head and LEARNT_HEAD not in disabled
    )
    model = get_peft_model(base, lora(ALL_LINEAR))
    trainer = PackedTrainer(
        micro_batch_tokens=2048,
        exact=exact,
        say=print,
        model=model,
        args=sft_config(
            bed,
            per_device_train_batch_size=per_step,
            gradient_checkpointing=False,
            logging_nan_inf_filter=False,
            max_length=None,
        ),
        train_dataset=Dataset.from_list(documents.rows).with_format("numpy"),
        processing_class=AutoTokenizer.from_pretrained(bed.model_dir),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer, exact


class Tuner:
    """Tuner, with what its own gate takes; the variants of it take the same but for what they name."""

    def __init__(self) -> None:
        self._choice: Choice | None = None

    def measure(self, bed: Bed, documents: Documents) -> Measured:
        trainer, exact = packed_trainer(bed, documents)
        return self._watch(self._chosen(trainer, exact, bed), trainer, exact, bed)

    def changed(
        self,
        bed: Bed,
        documents: Documents,
        *,
        without: str | None = None,
        recomputes: bool | None = None,
        per_step: int = DOCUMENTS_PER_STEP,
    ) -> Measured:
        """`without` a lever, and what stands on it; activations recomputed; other steps, each in as few pieces as the
        most tokens allow."""
        gone = {without} | ({FUSED_PROJECTIONS} if without == FUSED_LORA else set())
        trainer, exact = packed_trainer(bed, documents, tuple(name for name in gone if name), per_step)
        choice = self._chosen(trainer, exact, bed)
        choice = choice.model_copy(
            update={
                "on": {name: gain for name, gain in choice.on.items() if name not in gone},
                "recomputes": choice.recomputes if recomputes is None else recomputes,
                "tokens": choice.tokens if per_step == DOCUMENTS_PER_STEP else MICRO_BATCH_TOKENS,
            }
        )
        return self._watch(choice, trainer, exact, bed)

    def _chosen(self, trainer: PackedTrainer, exact: Exact, bed: Bed) -> Choice:
        if self._choice is None:
            estimated = Pieces(MICRO_BATCH_TOKENS, recomputes=False)
            self._choice = choose(
                trainer, exact, bed.device, disabled=(), estimated=estimated, checkpointing=None, machine=""
            )
        return self._choice

    def _watch(self, choice: Choice, trainer: PackedTrainer, exact: Exact, bed: Bed) -> Measured:
        taken = apply(choice, trainer, exact, bed.device)

        def work_of(batch: list[dict[str, Any]]) -> Work:
            learnt = sum(int((row["labels"][1:] != -100).sum()) for row in batch)
            real = sum(len(row["input_ids"]) for row in batch)
            return learnt, real, real

        try:
            measured = watch(trainer, bed, work_of)
        finally:
            for lever in reversed(taken):
                lever.turn_off()  # Liger's rotary embedding is the whole process's
        measured.note = str(choice)
        return measured
