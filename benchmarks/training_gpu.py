"""Training on one NVIDIA GPU: Tuner beside what a user could pick instead. No network is used.

    PYTHONPATH=. python benchmarks/training_gpu.py ceilings     what the GPU can do, each kernel alone, parity
    PYTHONPATH=. python benchmarks/training_gpu.py throughput   each system, and Tuner with each lever removed
    PYTHONPATH=. python benchmarks/training_gpu.py end-to-end   from the start of a process to a pushed image

Each takes at most 8 minutes and prints a table; `--write FILE` keeps it. `--memory-cap 24GB` shows what the owner of
such a card gets. The model is phi-3-mini's architecture with random weights, made on the GPU and kept in `--work`
(8 GB); documents have GSM8K's lengths. Speeds are real, losses mean nothing. `--dry-run-cpu` runs every line with a
tiny model on a CPU: its figures mean nothing either.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from training_peers import (
    ALL_LINEAR,
    DOCUMENTS_PER_STEP,
    PRESET,
    WORDS,
    Bed,
    Documents,
    Measured,
    Tuner,
    four_bit_model,
    kaito,
    long_documents,
    lora,
    make_model,
    packed_trainer,
    short_documents,
    trl,
    unsloth,
)

from tuner.levers import (
    FUSED_LORA,
    FUSED_PROJECTIONS,
    LEARNT_HEAD,
    LIGER,
    PACKING,
    RESIDENT_WEIGHTS,
    VARLEN_ATTENTION,
)
from tuner.memory import count_parameters, read_shape
from tuner.pipeline.kernels import (
    DOCUMENT_ATTENTION,
    document_attention,
    has_varlen_kernel,
    looped_attention,
)
from tuner.pipeline.levers import Bench, Gradients, Lever, difference, distance, levers_of
from tuner.pipeline.libraries import quiet
from tuner.pipeline.model import pick_device
from tuner.pipeline.trainer import micro_batch

PART_S = 480
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets", "liger-kernel", "triton",
             "unsloth", "flash-attn")  # fmt: skip


# ── part 1: ceilings, kernels, parity ────────────────────────────────────────────────────────────────────────────────


def ceilings(bed: Bed) -> list[str]:
    make_model(bed)
    lines = ["## Ceilings", "", "| | |", "|---|---|"]
    lines.append(f"| matrix product, bf16 | {matmul_flops(bed) / 1e12:,.1f} TFLOP/s |")
    lines.append(f"| copy, read and write | {copy_bytes(bed) / 1e9:,.0f} GB/s |")
    lines += ["", "## Kernels, forward and backward, milliseconds", "", "| | without | with | × |", "|---|---|---|---|"]
    lines += [*_decoding(bed), *_attention(bed), *_layers(bed)]
    return [*lines, "", *_parity(bed), "", *_where_time_goes(bed)]


def matmul_flops(bed: Bed) -> float:
    """Floating-point operations a second of a large product in the type that is trained in."""
    size = 128 if bed.tiny else 8192
    a, b = (torch.randn(size, size, device=bed.device.device, dtype=bed.device.dtype) for _ in range(2))
    return 2 * size**3 / timed(lambda: a @ b, bed)


def copy_bytes(bed: Bed) -> float:
    """Bytes a second that are read and written in a large copy."""
    source = torch.empty(2**20 if bed.tiny else 2**32, dtype=torch.uint8, device=bed.device.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), bed)


def timed(work: Callable[[], Any], bed: Bed) -> float:
    """Seconds that `work` takes: the best of three rounds of as many as take a tenth of a second, after a warm-up."""

    def rounds(count: int) -> float:
        synchronize(bed)
        began = time.perf_counter()
        for _ in range(count):
            work()
        synchronize(bed)
        return (time.perf_counter() - began) / count

    rounds(1)
    once = rounds(2)
    count = max(1, int((0.01 if bed.tiny else 0.1) / max(once, 1e-6)))
    return min(rounds(count) for _ in range(3))


def synchronize(bed: Bed) -> None:
    if bed.device.is_cuda:
        torch.cuda.synchronize()


def _row(name: str, without: float, with_: float) -> str:
    return f"| {name} | {without * 1e3:,.2f} | {with_ * 1e3:,.2f} | {without / with_:.2f} |"


def _decoding(bed: Bed) -> Iterator[str]:
    """NF4 to numbers, with double quantization and without."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    shape = (256, 128) if bed.tiny else (16_384, 3072)
    weights = torch.randn(shape, device=bed.device.device, dtype=bed.device.dtype)
    seconds = []
    for nested in (True, False):
        packed, state = quantize_4bit(weights, quant_type="nf4", compress_statistics=nested)
        seconds.append(timed(lambda packed=packed, state=state: dequantize_4bit(packed, state), bed))
    moved = weights.numel() * (0.5 + 4 / 64 + weights.element_size())
    yield _row(f"decode NF4 {shape[0]}×{shape[1]}, nested scales → plain scales", *seconds)
    speeds = " | ".join(f"{moved / one / 1e9:,.1f} GB/s" for one in seconds)
    yield f"| decoding speed, nested → plain | {speeds} | |"


def _attention(bed: Bed) -> Iterator[str]:
    """One layer's attention over packed documents: a dense mask as transformers makes it, our loop, the kernel."""
    from torch.nn.functional import scaled_dot_product_attention

    heads, size = (4, 16) if bed.tiny else (32, 96)
    device, dtype = bed.device.device, bed.device.dtype
    lengths = [len(row["input_ids"]) for row in short_documents(bed).rows]
    for tokens in (256, 512) if bed.tiny else (2048, 8192, 16_384):
        chosen, total = [], 0
        for length in lengths * 20:
            if total + length > tokens:
                break
            chosen.append(length)
            total += length
        edges = torch.tensor([0, *chosen], device=device).cumsum(0).to(torch.int32)
        states = [torch.randn(1, heads, total, size, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        document = torch.repeat_interleave(torch.arange(len(chosen), device=device), edges.diff().long())
        mask = (document[:, None] == document[None, :]).tril()[None, None]
        boundaries = {
            "cu_seq_lens_q": edges,
            "max_length_q": max(chosen),
            "document_edges": tuple(edges.tolist()),
        }
        module = torch.nn.Identity()

        def dense(states: Any = states, mask: Any = mask) -> None:
            scaled_dot_product_attention(*states, attn_mask=mask).sum().backward()

        def looped(states: Any = states, boundaries: Any = boundaries, module: Any = module) -> None:
            looped_attention(module, *states, None, **boundaries)[0].sum().backward()

        def kernel(states: Any = states, boundaries: Any = boundaries, module: Any = module) -> None:
            document_attention(module, *states, None, **boundaries)[0].sum().backward()

        seconds = timed(looped, bed)
        yield _row(f"attention, {total:,} tokens: dense mask → document by document", timed(dense, bed), seconds)
        if bed.device.is_cuda and has_varlen_kernel(bed.device.device.index or 0):
            yield _row(f"attention, {total:,} tokens: document by document → one kernel", seconds, timed(kernel, bed))


def _layers(bed: Bed) -> Iterator[str]:
    """A whole micro-batch with and without each lever, all others off but for what it stands on."""
    documents = short_documents(bed)
    trainer, exact = packed_trainer(bed, documents)
    bench = Bench(trainer, bed.device)
    levers = levers_of(trainer, exact, bed.device)
    with bench.undisturbed():
        for lever in levers:
            over = lever.name == FUSED_PROJECTIONS
            if over:
                levers.fused.turn_on()
            yield from _lever_rows(lever, f"{lever.name} over {FUSED_LORA}" if over else lever.name, bench, bed)
            if over:
                levers.fused.turn_off()


def _lever_rows(lever: Lever, name: str, bench: Bench, bed: Bed) -> Iterator[str]:
    why = lever.obstacle()
    if why:
        yield f"| {name} | {why} | | |"
        return
    for tokens in (128,) if bed.tiny else (2048, 8192):
        without = bench.sample(tokens)
        lever.turn_on()
        with_ = bench.sample(tokens)
        lever.turn_off()
        if without and with_:
            saved = (without.peak_bytes - with_.peak_bytes) / without.tokens
            told = f"{name}, {without.tokens:,} tokens ({saved:+,.0f} bytes a token freed)"
            yield _row(told, without.seconds, with_.seconds)
        else:
            yield f"| {name}, {tokens:,} tokens | out of memory | | |"


def _parity(bed: Bed) -> Iterator[str]:
    """Every lever beside the plain path, both beside fp32, and packed beside one by one, on the same few documents."""
    yield "## Parity: the same loss (1e-3) and gradients (norm 1 %, direction 15 %) as the plain path in bf16"
    yield ""
    yield "In fp32: the same 4-bit weights and adapters, everything computed in fp32, the plain path."
    yield ""
    yield "| | beside the plain path | gradients apart from it | and from fp32 |"
    yield "|---|---|---|---|"
    documents = short_documents(bed)
    trainer, exact = packed_trainer(bed, documents)
    bench = Bench(trainer, bed.device)
    found: dict[str, Gradients | str] = {}
    with bench.undisturbed():
        adapters = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        levers = levers_of(trainer, exact, bed.device)
        plain = bench.gradients()
        for lever in levers:
            over = lever.name == FUSED_PROJECTIONS
            if over:
                levers.fused.turn_on()
            found[lever.name] = lever.obstacle() or ""
            if not found[lever.name]:
                lever.turn_on()
                found[lever.name] = bench.gradients()
                lever.turn_off()
            if over:
                levers.fused.turn_off()
        taken = [lever for lever in levers if isinstance(found[lever.name], Gradients)]
        for lever in taken:
            lever.turn_on()
        found["all of these"] = bench.gradients()
        for lever in reversed(taken):
            lever.turn_off()
        rows = bench.documents(512)[:6]
        together = _gradients(trainer, [rows])
        apart = _gradients(trainer, [[row] for row in rows])
    dtype = bed.device.dtype
    del trainer, bench, levers, lever, taken
    gc.collect()
    exactly = _in_fp32(bed, documents, adapters)
    yield f"| the plain path | | | {distance(exactly, plain):.1%} |"
    for name, one in found.items():
        if isinstance(one, str):
            yield f"| {name} | {one} | | |"
            continue
        verdict = difference(plain, one, dtype) or "equal"
        yield f"| {name} | {verdict} | {distance(plain, one):.1%} | {distance(exactly, one):.1%} |"
    verdict = difference(apart, together, dtype) or "equal"
    yield f"| packed beside one by one | {verdict} | {distance(apart, together):.1%} | |"
    yield f"| documents can be packed, head at learnt tokens | {exact.packs}, {exact.learnt_head} | | |"


def _in_fp32(bed: Bed, documents: Documents, adapters: dict[str, torch.Tensor]) -> Gradients:
    """The gradients of the same model and adapters without rounding to 16 bits anywhere."""
    trainer, _ = packed_trainer(replace(bed, device=replace(bed.device, dtype=torch.float32)), documents)
    trainer.one_micro_batch = lambda rows: trainer.model(**micro_batch(rows, trainer.args.device, packed=trainer.packs))
    bench = Bench(trainer, bed.device)
    with bench.undisturbed():
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(adapters[name])
        return bench.gradients()


def _where_time_goes(bed: Bed) -> Iterator[str]:
    """One micro-batch of a step's documents with every lever that is there: the GPU's time by kind of kernel."""
    from torch.profiler import ProfilerActivity, profile

    documents = short_documents(bed)
    trainer, exact = packed_trainer(bed, documents)
    bench = Bench(trainer, bed.device)
    rows = [trainer.train_dataset[number] for number in range(8 if bed.tiny else DOCUMENTS_PER_STEP)]
    taken = []
    with bench.undisturbed():
        for lever in levers_of(trainer, exact, bed.device):
            if not lever.obstacle():
                lever.turn_on()
                taken.append(lever)
        for _ in range(2):
            trainer.one_micro_batch(rows).backward()
        synchronize(bed)
        kind = ProfilerActivity.CUDA if bed.device.is_cuda else ProfilerActivity.CPU
        with profile(activities=[kind]) as seen:
            trainer.one_micro_batch(rows).backward()
            synchronize(bed)
        for lever in reversed(taken):
            lever.turn_off()
    spent: dict[str, float] = {}
    for event in seen.key_averages():
        if event.device_type.name != kind.name:
            continue
        took = event.self_device_time_total if bed.device.is_cuda else event.self_cpu_time_total
        name = next((name for name, marks in KERNELS.items() if any(mark in event.key for mark in marks)), "the rest")
        spent[name] = spent.get(name, 0) + took / 1e3
    whole = sum(spent.values())
    yield f"## Where the time of {sum(len(row['input_ids']) for row in rows):,} tokens goes, forward and backward"
    yield ""
    yield "| kernels | ms | |"
    yield "|---|---|---|"
    for name, milliseconds in sorted(spent.items(), key=lambda item: -item[1]):
        yield f"| {name} | {milliseconds:.1f} | {milliseconds / whole:.0%} |"
    yield f"| together | {whole:.1f} | |"


KERNELS = {
    "LoRA, added to the products": ("_add_low_rank", "_badd_"),
    "attention": ("flash", "attention"),
    "LoRA's narrow products": ("splitK", "tst_16x", "tst_32x", "tst_64x32_"),
    "products with frozen weights": ("nvjet", "gemm", "cutlass", "aten::mm", "aten::addmm", "aten::linear"),
    "norms": ("rms_norm",),
    "gate and up": ("swiglu",),
    "rotary embedding": ("rotate", "rope"),
    "decoding 4-bit weights": ("Dequantize", "dequantize"),
    "copies": ("copy", "Memcpy", "CatArray"),
    "additions": ("CUDAFunctor_add",),
}  # kind → marks in a kernel's name; the first that fits


def _gradients(trainer: Any, micro_batches: Sequence[Any]) -> Gradients:
    trainer.model.zero_grad()
    loss = 0.0
    for rows in micro_batches:
        one = trainer.one_micro_batch(rows)
        one.backward()
        loss += float(one.detach())
    named = trainer.model.named_parameters()
    return Gradients(loss, {name: p.grad.float().cpu().clone() for name, p in named if p.grad is not None})


# ── part 2: throughput ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Variant:
    name: str
    run: Callable[[Bed, Documents], Measured]
    alone: bool = False  # in a process of its own


def variants(capped: bool) -> list[Variant]:
    """What is measured, the most telling first: what does not fit the time is left out from the end. `capped`: what an
    owner of a small card could take, and no levers one by one."""
    best = {"gradient_checkpointing": False, "packing": True, "max_length": 2048}
    tuner = Tuner()
    found = [
        Variant("Tuner", tuner.measure),
        Variant("KAITO as shipped (a step a document)", lambda b, d: kaito(b, d, as_shipped=True)),
        Variant("TRL defaults (batch 8, padded)", lambda b, d: trl(b, d)),
        Variant(
            "TRL, no checkpointing, batch 32 by length",
            lambda b, d: trl(
                b,
                d,
                gradient_checkpointing=False,
                per_device_train_batch_size=32,
                train_sampling_strategy="group_by_length",
            ),
        ),
        Variant("TRL packing, no checkpointing", lambda b, d: trl(b, d, **best)),
        Variant("TRL packing 2048", lambda b, d: trl(b, d, packing=True, max_length=2048)),
        Variant("KAITO's script, all modules", lambda b, d: kaito(b, d, as_shipped=False)),
    ]
    if find_spec("flash_attn"):
        found.append(Variant("TRL packing + flash-attn", lambda b, d: trl(b, d, attention="flash_attention_2", **best)))
    if find_spec("unsloth"):
        found.append(Variant("Unsloth", unsloth, alone=True))
    if capped:
        return found
    found.append(Variant("Tuner, 104 documents a step: 16,000 tokens at once", partial(tuner.changed, per_step=104)))
    for lever in (RESIDENT_WEIGHTS, LIGER, FUSED_PROJECTIONS, FUSED_LORA, VARLEN_ATTENTION, LEARNT_HEAD, PACKING):
        found.append(Variant(f"Tuner less {lever}", partial(tuner.changed, without=lever)))
    found.append(Variant("Tuner, activations recomputed", partial(tuner.changed, recomputes=True)))
    found.append(
        Variant("TRL packing + our attention", lambda b, d: trl(b, d, attention=DOCUMENT_ATTENTION, **best)),
    )
    return found


def throughput(bed: Bed, only: str | None, mix: str, limit_s: float, capped: bool) -> list[str]:
    began = time.monotonic()
    make_model(bed)
    flops = matmul_flops(bed)
    config = json.loads((bed.model_dir / "config.json").read_text())
    parameters = count_parameters(read_shape(PRESET, config))
    floor = flops / (4 * (parameters.linear + parameters.head))
    documents = short_documents(bed) if mix == "short" else long_documents(bed)
    measured: dict[str, Measured] = {}
    for variant in variants(capped):
        if only and variant.name != only:
            continue
        if time.monotonic() - began > limit_s - 2 * bed.seconds - 10 and not bed.tiny:
            measured[variant.name] = Measured(note="left out: no time")
            continue
        print(f"{time.monotonic() - began:5.0f} s  {variant.name}", file=sys.stderr, flush=True)
        measured[variant.name] = (
            _alone(variant, bed, mix) if variant.alone and not only else _run(variant, bed, documents)
        )
        told = {key: value for key, value in asdict(measured[variant.name]).items() if key != "positions_per_s"}
        print(json.dumps(told), file=sys.stderr, flush=True)  # should the table not come
    if only:
        print(json.dumps(asdict(measured[only])))
        return []
    return _throughput_table(measured, documents, floor, flops)


def _run(variant: Variant, bed: Bed, documents: Documents) -> Measured:
    try:
        return variant.run(bed, documents)
    except torch.OutOfMemoryError:
        return Measured(note="out of memory")
    except Exception as error:  # one system that fails must not cost the others' figures
        if bed.tiny:
            raise
        return Measured(note=f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    finally:
        gc.collect()
        if bed.device.is_cuda:
            torch.cuda.empty_cache()


def _alone(variant: Variant, bed: Bed, mix: str) -> Measured:
    command = [sys.executable, __file__, "throughput", "--only", variant.name, "--work", str(bed.work), "--mix", mix]
    done = subprocess.run(
        [*command, "--seconds", str(bed.seconds)], capture_output=True, text=True, timeout=PART_S, check=False
    )
    try:
        return Measured(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError, TypeError):
        return Measured(note=f"failed: {' '.join(done.stderr.split())[-200:]}")


def _throughput_table(measured: dict[str, Measured], documents: Documents, floor: float, flops: float) -> list[str]:
    def middle(values: Sequence[float]) -> float:
        return statistics.median(values) if values else float("nan")

    base = {
        key: middle(measured[name].learnt_per_s)
        for key, name in (("KAITO", "KAITO as shipped (a step a document)"), ("TRL", "TRL defaults (batch 8, padded)"))
    }
    lines = [
        f"{DOCUMENTS_PER_STEP} documents a step but for KAITO as shipped; {documents.learnt_share:.0%} of tokens",
        "are learnt.",
        f"Matrix product {flops / 1e12:,.0f} TFLOP/s: at that speed 4 operations for each weight a token, without "
        f"recomputing anything, are {floor:,.0f} tokens/s (the floor).",
        "",
        "| variant | learnt tokens/s | min – max | × KAITO | × TRL | real tokens/s | of floor | padded/s | peak GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for name, one in measured.items():
        if not one.learnt_per_s:
            lines.append(f"| {name} | {one.note} | | | | | | | |")
            continue
        learnt, real, positions = (middle(rates) for rates in (one.learnt_per_s, one.real_per_s, one.positions_per_s))
        lines.append(
            f"| {name} | {learnt:,.0f} | {min(one.learnt_per_s):,.0f} – {max(one.learnt_per_s):,.0f} "
            f"| {learnt / base['KAITO']:.2f} | {learnt / base['TRL']:.2f} | {real:,.0f} | {real / floor:.0%} "
            f"| {positions:,.0f} | {one.peak_bytes / 1e9:.1f} |"
        )
        if one.note:
            notes.append(f"- {name}: {one.note}")
    return [*lines, "", *notes]


# ── part 3: end to end ───────────────────────────────────────────────────────────────────────────────────────────────


def end_to_end(bed: Bed) -> list[str]:
    """Start of a process to pushed image, with weights cold and warm, beside KAITO's chain of the same documents."""
    import tuner.registry.push  # noqa: F401  what is missing here is to be said before anything is trained
    from tests.fake_registry import fake_registry

    make_model(bed)
    documents = 96 if bed.tiny else 128
    data = _parquet(bed, documents)
    lines = [
        f"{documents} documents, {DOCUMENTS_PER_STEP} a step; from the start of the process, seconds.",
        "",
        "| | first step done after | its parts | trained after | then packaged and pushed in |",
        "|---|---|---|---|---|",
    ]
    with fake_registry() as registry:
        for name in ("cold", "warm"):
            if name == "cold":
                _forget_pages(bed.model_dir)
            lines.append(_tuner_run(bed, data, registry.host, name))
            print(lines[-1], file=sys.stderr, flush=True)
        lines.append(_kaito_chain(bed, data, documents, registry.host))
    return lines


def _parquet(bed: Bed, documents: int) -> Path:
    """Rows of words whose lengths are about the documents'."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for number, row in enumerate(short_documents(bed).rows[:documents]):
        prompt = sum(label == -100 for label in row["labels"])
        words = [WORDS[(number * 31 + at) % len(WORDS)] for at in range(max(2, len(row["labels"]) // 4))]
        cut = max(1, len(words) * prompt // len(row["labels"]))
        rows.append({"prompt": " ".join(words[:cut]), "completion": " " + " ".join(words[cut:])})
    path = bed.work / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _forget_pages(directory: Path) -> None:
    """Let the next reader of these files go to the disk."""
    os.sync()
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _tuner_run(bed: Bed, data: Path, host: str, name: str) -> str:
    work = bed.work / f"run-{name}"
    shutil.rmtree(work, ignore_errors=True)
    settings = [
        f"TrainingArguments.per_device_train_batch_size={16 if bed.tiny else DOCUMENTS_PER_STEP}",
        "TrainingArguments.num_train_epochs=1",
        "TrainingArguments.logging_steps=1",
    ]
    command = [sys.executable, "-m", "tuner", "run", "--model", PRESET, "--base-model", str(bed.model_dir)]
    command += ["--data", str(data), "--output", f"{host}/bench/tuner:{name}", "--plain-http", "--work-dir", str(work)]
    began = time.time()
    done = subprocess.run(
        [*command, *(part for one in settings for part in ("--set", one))],
        capture_output=True,
        text=True,
        check=False,
        timeout=PART_S,
    )
    ended = time.time()
    if done.returncode:
        return (
            f"| Tuner, weights {name} | failed with {done.returncode}: {' '.join(done.stderr.split())[-300:]} | | | |"
        )
    startup = json.loads((work / "trained.json").read_text()).get("startup", {})
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in startup.items() if part != "total")
    trained = (work / "trained.json").stat().st_mtime
    return (
        f"| Tuner, weights {name} | {startup.get('total', float('nan')):.1f} | {parts} | {trained - began:.1f} "
        f"| {ended - trained:.1f} |"
    )


def _kaito_chain(bed: Bed, data: Path, documents: int, host: str) -> str:
    """fine_tuning.py under accelerate, then pusher.sh's steps: copy, tar, digest, gzip -9, push."""
    out = bed.work / "kaito-adapter"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    began = time.time()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", *(["--cpu"] if bed.tiny else [])]
    command += [__file__, "kaito-script", "--work", str(bed.work), "--data", str(data), "--documents", str(documents)]
    done = subprocess.run(
        [*command, *(["--dry-run-cpu"] if bed.tiny else []), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PART_S,
    )
    if done.returncode:
        return f"| KAITO's chain | failed with {done.returncode}: {' '.join(done.stderr.split())[-300:]} | | | |"
    trained = time.time()
    first_step = json.loads((out / "times.json").read_text())["first_step"]
    _pusher(out, bed.work / "kaito-image", host)
    parts = (first_step - began, trained - began, time.time() - trained)
    return "| KAITO's chain, weights warm | {:.1f} | | {:.1f} | {:.1f} |".format(*parts)


def _pusher(adapter: Path, image: Path, host: str) -> None:
    """What pusher.sh does, with Tuner's client in place of oras, which may not be there."""
    from tuner.open_files import OpenFile
    from tuner.reference import ImageReference
    from tuner.registry import client_for
    from tuner.registry.image import build_image
    from tuner.registry.push import push_image
    from tuner.runspec import Network, Silent

    shutil.rmtree(image, ignore_errors=True)
    (image / "data").mkdir(parents=True)
    for path in adapter.iterdir():
        shutil.copy2(path, image / "data")
    subprocess.run(["tar", "-cf", "layer.tar", "data"], cwd=image, check=True)
    subprocess.run(["sha256sum", "layer.tar"], cwd=image, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["gzip", "-9", "layer.tar"], cwd=image, check=True)
    reference = ImageReference(host, "bench/kaito", "v1")
    with client_for(reference, Network(plain_http=True), []) as client:
        push_image(
            build_image({"layer.tar.gz": OpenFile.at(image / "layer.tar.gz")}), reference, client, reporter=Silent()
        )


def kaito_script(bed: Bed, data: Path, documents: int, out: Path) -> None:
    """The process that KAITO's container is: load, map the rows, train one document a step, save."""
    from datasets import load_dataset
    from peft import get_peft_model, prepare_model_for_kbit_training
    from training_peers import EmptyCache, sft_config
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling, TrainerCallback
    from trl import SFTTrainer

    first: list[float] = []

    class First(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if not first:
                first.append(time.time())

    model = get_peft_model(prepare_model_for_kbit_training(four_bit_model(bed)), lora(ALL_LINEAR))
    tokenizer = AutoTokenizer.from_pretrained(bed.model_dir)
    rows = load_dataset("parquet", data_files=str(data), split="train", cache_dir=str(bed.work / "datasets"))
    rows = rows.map(lambda row: tokenizer(row["prompt"] + row["completion"]), remove_columns=rows.column_names)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(bed, per_device_train_batch_size=1, max_steps=documents),
        train_dataset=rows.select_columns(["input_ids"]),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[EmptyCache(), First()],
    )
    trainer.train()
    model.save_pretrained(out)
    (out / "times.json").write_text(json.dumps({"first_step": first[0]}))


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def machine(bed: Bed) -> str:
    """GPU, driver, processor and versions, one line."""
    parts = [bed.device.name]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
        parts.append(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0])
    parts += [f"{os.cpu_count()} CPUs", f"Python {platform.python_version()}"]
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            parts.append(f"{name} {version(name)}")
    return ", ".join(parts)


def parse_size(text: str) -> int:
    """Bytes of 24GB or 24GiB."""
    for unit, factor in (("GiB", 2**30), ("GB", 10**9)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    raise argparse.ArgumentTypeError("a size like 24GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["ceilings", "throughput", "end-to-end", "kaito-script"])
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tuner-training-gpu")
    parser.add_argument("--seconds", type=float, default=16, help="that are counted of each variant")
    parser.add_argument("--warm-up", type=float, default=4, metavar="SECONDS", help="before they are counted")
    parser.add_argument("--limit", type=float, default=PART_S, metavar="SECONDS", help="of the whole throughput part")
    parser.add_argument("--mix", choices=["short", "long"], default="short", help="GSM8K's lengths, or 1,000 to 4,000")
    parser.add_argument("--memory-cap", type=parse_size, metavar="24GB", help="take no more of the GPU than this")
    parser.add_argument("--dry-run-cpu", action="store_true", help="every line, a tiny model, no meaning")
    parser.add_argument("--write", type=Path, help="append the table to this file")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    for name in ("--data", "--out"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--documents", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if not options.dry_run_cpu and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU here; --dry-run-cpu runs every line without one")
    device = pick_device()
    tiny = options.dry_run_cpu
    bed = Bed(
        device, options.work, tiny, seconds=0.3 if tiny else options.seconds, warm_up_s=0.1 if tiny else options.warm_up
    )
    bed.work.mkdir(parents=True, exist_ok=True)
    if options.memory_cap and device.is_cuda:
        whole = torch.cuda.get_device_properties(device.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_cap / whole), device.device)
    began = time.monotonic()
    match options.part:
        case "ceilings":
            lines = ceilings(bed)
        case "throughput":
            lines = throughput(bed, options.only, options.mix, options.limit, bool(options.memory_cap))
        case "end-to-end":
            lines = end_to_end(bed)
        case "kaito-script":
            return kaito_script(bed, options.data, options.documents, options.out)
    if not lines:
        return None
    cap = f", held to {options.memory_cap / 1e9:.0f} GB" if options.memory_cap else ""
    mix = f", {options.mix} documents" if options.part == "throughput" else ""
    title = f"# Training on a GPU: {options.part}{mix}{cap}"
    warning = ["**A dry run on a CPU with a tiny model: these figures mean nothing.**", ""] if tiny else []
    took = f"{machine(bed)}; {time.monotonic() - began:.0f} s."
    table = "\n".join([title, "", *warning, *lines, "", took, ""])
    print(table)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        with options.write.open("a", encoding="utf-8") as file:
            file.write(table + "\n")
    return None


if __name__ == "__main__":
    main()
