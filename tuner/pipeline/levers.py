"""Which short cuts a run takes: each proved beside what it replaces, on the loaded model, and on a GPU measured.

What is measured is a micro-batch of the run's own longest documents through the trainer's own forward and backward.
The decision is a value: a resumed run takes the one that it began with, because another would change last bits.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from tuner.levers import (
    FUSED_LORA,
    FUSED_PROJECTIONS,
    LEARNT_HEAD,
    LIGER,
    MEMORY_PROBE,
    PACKING,
    RESIDENT_WEIGHTS,
    VARLEN_ATTENTION,
)
from tuner.memory import ADAMW_STATE_BYTES, OPTIMIZER_STATE_BYTES
from tuner.pipeline import phi3
from tuner.pipeline.kernels import (
    DOCUMENT_ATTENTION,
    LOOPED_ATTENTION,
    Exact,
    decoded_bytes,
    drop_decoded,
    fuse_lora,
    has_varlen_kernel,
    keep_decoded,
    unfuse_lora,
)
from tuner.pipeline.model import Device
from tuner.pipeline.probe import (
    Pieces,
    Room,
    Sample,
    keep_activations,
    most_tokens,
    most_useful,
    recompute_activations,
    with_decoded_weights,
)
from tuner.pipeline.trainer import Document, PackedTrainer
from tuner.runspec import Contract

TURNED_OFF = "turned off"
NEEDS_GPU = "needs a GPU"
NO_GAIN_ON_CPU = "gains nothing on a CPU"
_NO_NEWS = (NEEDS_GPU, NO_GAIN_ON_CPU)  # true of every run there
PARITY_TOKENS = 96
# Fewer would time a slow CPU queueing kernels, not the GPU: on one H200 machine that was half of 4,096 tokens' time.
TIMED_TOKENS = 8192
CLEARLY_FASTER = 1.1
SMALL_SAMPLE_TOKENS, LARGE_SAMPLE_TOKENS = 1024, 4096
LARGER_STEPS = 4


class Choice(Contract):
    """levers.json beside the checkpoints: what was decided, and for which machine."""

    machine: str
    on: dict[str, float | None]  # lever → how many times as fast as without; None: not timed
    off: dict[str, str]  # lever → why
    tokens: int
    recomputes: bool
    # How many times as many tokens a second steps of LARGER_STEPS times the documents would have; None: not measured.
    larger_steps_gain: float | None = None

    @property
    def pieces(self) -> Pieces:
        return Pieces(self.tokens, self.recomputes)

    @property
    def told(self) -> dict[str, str]:
        """Lever → `on`, with its gain where that was measured, or why it is off."""
        return {name: f"on, ×{gain:.2f}" if gain else "on" for name, gain in self.on.items()} | {
            name: f"off: {why}" for name, why in self.off.items()
        }

    def __str__(self) -> str:
        on = ", ".join(name + (f" ×{gain:.2f}" if gain else "") for name, gain in self.on.items())
        off = ", ".join(f"{name} ({why})" for name, why in self.off.items() if why not in _NO_NEWS)
        kept = "recomputed" if self.recomputes else "kept"
        return (
            f"on: {on or 'nothing'}"
            + (f"; off: {off}" if off else "")
            + f"; {self.tokens:,} tokens at once, activations {kept}"
        )


# ── one lever ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Lever(Protocol):
    """A short cut that can be put on a loaded model with adapters, and taken off again."""

    name: str

    def obstacle(self) -> str | None:
        """Why it cannot be on here; None where it can."""

    def turn_on(self) -> None: ...
    def turn_off(self) -> None: ...


@dataclass
class VarlenAttention:
    """One kernel for all documents of a row; off: torch's own attention, one document after the other."""

    model: Any
    device: Device
    packs: bool
    name: str = VARLEN_ATTENTION

    def obstacle(self) -> str | None:
        if not self.packs:
            return "documents are not packed"
        if not self.device.is_cuda:
            return NEEDS_GPU
        return None if has_varlen_kernel(self.device.device.index or 0) else "needs torch 2.11 and compute capability 8"

    def turn_on(self) -> None:
        self.model.set_attn_implementation(DOCUMENT_ATTENTION)

    def turn_off(self) -> None:
        if self.packs:
            self.model.set_attn_implementation(LOOPED_ATTENTION)


@dataclass
class FusedLora:
    model: nn.Module
    name: str = FUSED_LORA

    def obstacle(self) -> str | None:
        count = fuse_lora(self.model)
        unfuse_lora(self.model)
        return None if count else "no plain LoRA over a 4-bit layer"

    def turn_on(self) -> None:
        fuse_lora(self.model)

    def turn_off(self) -> None:
        unfuse_lora(self.model)


@dataclass
class ResidentWeights:
    model: nn.Module
    device: Device
    name: str = RESIDENT_WEIGHTS

    def obstacle(self) -> str | None:
        if not self.device.is_cuda:
            return NO_GAIN_ON_CPU
        return None if decoded_bytes(self.model) else "no 4-bit layer"

    def turn_on(self) -> None:
        keep_decoded(self.model)

    def turn_off(self) -> None:
        drop_decoded(self.model)


_NONE = object()


def _replaced(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What those names that mean something else now meant before; _NONE: nothing."""
    return {name: before.get(name, _NONE) for name, value in now.items() if value is not before.get(name, _NONE)}


class Liger:
    """Liger's kernels on this instance. Its patch replaces a module's functions and attributes: all are put back."""

    name = LIGER

    def __init__(self, model: Any, device: Device) -> None:
        self._model = model
        self._device = device
        self._replaced: list[tuple[nn.Module, dict[str, Any]]] = []  # a module's attributes before; _NONE: it had none
        self._globals: dict[str, Any] = {}

    def obstacle(self) -> str | None:
        if not self._device.is_cuda:
            return NEEDS_GPU
        missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        kind = self._model.config.model_type
        return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"has nothing for {kind}"

    def _definitions(self) -> dict[str, Any]:
        """The names of the file that defines the architecture: attention looks its rotary embedding up there."""
        return vars(sys.modules[type(self._model).__module__])

    def turn_on(self) -> None:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        definitions = self._definitions()
        self._globals = dict(definitions)
        before = [(module, dict(vars(module))) for module in self._model.modules()]
        # Head and loss are ours; TRL's flag would put Liger's there.
        try:
            _apply_liger_kernel_to_instance(model=self._model, fused_linear_cross_entropy=False, cross_entropy=False)
        finally:  # where it stops half-way, that half is to be put back
            for name, value in self._globals.items():
                if isinstance(value, type):
                    definitions[name] = value  # its classes are for models yet to be made: not this one
            self._replaced = [(module, _replaced(had, vars(module))) for module, had in before]

    def turn_off(self) -> None:
        """What others have set meanwhile stays: recomputed activations, say."""
        self._definitions().update(self._globals)
        for module, attributes in self._replaced:
            for name, value in attributes.items():
                if value is _NONE:
                    del vars(module)[name]
                else:
                    vars(module)[name] = value
        self._replaced = []


@dataclass
class FusedProjections:
    """Phi-3's blocks by phi3.py; over fused LoRA, whose products it is made of."""

    model: Any
    device: Device
    name: str = FUSED_PROJECTIONS

    def obstacle(self) -> str | None:
        if self.device.is_cuda and find_spec("triton") is None:
            return "triton not installed"
        return phi3.why_not(self.model)

    def turn_on(self) -> None:
        phi3.take_parts(self.model)

    def turn_off(self) -> None:
        phi3.give_back(self.model)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Gradients:
    """What one micro-batch gave: its summed loss, and the gradient of everything that is trained, on the CPU."""

    loss: float
    by_name: dict[str, torch.Tensor]


def difference(one: Gradients, other: Gradients, dtype: torch.dtype) -> str | None:
    """In what they differ by more than rounding in `dtype`; None if in nothing.

    Losses to 1e-3 and the gradient's norm to 1 % in 16 bits, 1e-5 and 1e-4 in fp32; and the gradient itself, as an
    equal norm alone would not tell a wrong direction. Over 32 layers in bf16 the plain path itself is 9 % from fp32 on
    an H200, and no lever further, as rounding grows from layer to layer; two right ways are 5 to 8 % apart. A wrong one
    is as far apart as its gradients are long.
    """
    for_loss, for_norm, for_direction = (1e-5, 1e-4, 1e-3) if dtype is torch.float32 else (1e-3, 1e-2, 0.15)
    if not np.isfinite(other.loss) or abs(other.loss - one.loss) > for_loss * abs(one.loss):
        return f"another loss: {other.loss:.6g}, not {one.loss:.6g}"
    if one.by_name.keys() != other.by_name.keys():
        return "gradients of other parameters"
    norms = [_norm(gradients.by_name.values()) for gradients in (one, other)]
    if not np.isfinite(norms[1]) or abs(norms[1] - norms[0]) > for_norm * norms[0]:
        return f"another gradient: its norm is {norms[1]:.4g}, not {norms[0]:.4g}"
    apart = distance(one, other)
    if apart > for_direction:
        return f"another gradient: {apart:.1%} apart"
    return None


def distance(one: Gradients, other: Gradients) -> float:
    """How far apart they are, as a part of the length of the first."""
    apart = _norm(other.by_name[name] - gradient for name, gradient in one.by_name.items())
    length = _norm(one.by_name.values())
    return apart / length if apart else 0.0


def _norm(tensors: Any) -> float:
    return float(sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5)


class Bench:
    """Micro-batches of the run's own longest documents, on its own model. Nothing is trained by it: gradients, random
    state and adapters are as before when it is done."""

    def __init__(self, trainer: PackedTrainer, device: Device) -> None:
        self._trainer = trainer
        self._device = device
        self._lengths, self._longest = _longest_first(trainer.train_dataset)

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again backward, which takes longer."""
        return self._trainer.recomputes

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self._lengths[0])

    def tokens_of(self, documents: int) -> int:
        """Tokens of so many documents, the longest that there are."""
        return int(self._lengths[:documents].sum())

    def usual_tokens_of(self, documents: int) -> int:
        """Tokens of so many documents of the mean length."""
        return int(self._lengths.mean() * documents)

    def documents(self, tokens: int) -> list[Document]:
        """The longest documents, together at least `tokens` tokens; again from the first where there are too few.

        One only for a model that does not pack.
        """
        chosen: list[Document] = []
        total = 0
        while total < tokens and not (chosen and not self._trainer.packs):
            document = self._longest(len(chosen))
            chosen.append(document)
            total += len(document["input_ids"])
        return chosen

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Random state and gradients are afterwards as they were; LoRA's B is not zero meanwhile, as it is at first,
        when no gradient of A could show a fault."""
        trainer, model = self._trainer, self._trainer.model
        devices = [self._device.device] if self._device.device.type == "cuda" else []
        training = model.training
        zeros = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
        before = [parameter.detach().clone() for parameter in zeros]
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            for parameter in zeros:
                if parameter.requires_grad:
                    parameter.data.normal_(0, 0.02)
            model.train()
            try:
                yield
            finally:
                for parameter, values in zip(zeros, before, strict=True):
                    parameter.data.copy_(values)
                model.train(training)
                trainer.model.zero_grad()
                self._collect()

    def gradients(self) -> Gradients:
        """Of the beginnings of a few documents, all learnt."""
        documents = [
            {"input_ids": document["input_ids"][:PARITY_TOKENS], "labels": document["input_ids"][:PARITY_TOKENS]}
            for document in self.documents(2 * PARITY_TOKENS)[:3]
        ]
        self._trainer.model.zero_grad()
        loss = self._pass(documents)
        return Gradients(
            float(loss),
            {
                name: parameter.grad.detach().float().cpu().clone()
                for name, parameter in self._trainer.model.named_parameters()
                if parameter.grad is not None
            },
        )

    def sample(self, tokens: int) -> Sample | None:
        """Forward and backward of about `tokens` tokens, the second time; None: out of memory."""
        documents = self.documents(tokens)
        try:
            self._pass(documents)  # compiles, and makes the gradients that lie there in every later micro-batch
            before = self._allocated()
            self._reset_peak()
            seconds = self._timed(documents)
            return Sample(sum(len(d["input_ids"]) for d in documents), self._peak() - before, seconds)
        except torch.OutOfMemoryError:
            return None
        finally:
            self._collect()

    def _pass(self, documents: Sequence[Document]) -> torch.Tensor:
        torch.manual_seed(1)  # the same dropout each time
        loss = self._trainer.one_micro_batch(documents)
        loss.backward()
        return loss.detach()

    def _timed(self, documents: Sequence[Document]) -> float:
        self._synchronize()
        began = time.perf_counter()
        self._pass(documents)
        self._synchronize()
        return time.perf_counter() - began

    def room(self, optimizer: str, ranks: int) -> Room:
        """What is free beside weights, adapters and gradients."""
        trained = sum(p.numel() for p in self._trainer.model.parameters() if p.requires_grad)
        state = OPTIMIZER_STATE_BYTES.get(optimizer, ADAMW_STATE_BYTES) * trained
        travelling = 4 * trained if ranks > 1 else 0
        return Room(self._free(), int(state) + travelling)

    # ── the GPU's own counts; a CPU has none ──

    def _free(self) -> int:
        torch.cuda.empty_cache()
        free, whole = torch.cuda.mem_get_info(self._device.device)
        allocated = torch.cuda.memory_allocated(self._device.device)
        held = torch.cuda.memory_reserved(self._device.device) - allocated
        allowed = whole  # a process may be held to a part of its GPU
        if hasattr(torch.cuda, "get_per_process_memory_fraction"):
            allowed = int(whole * torch.cuda.get_per_process_memory_fraction(self._device.device))
        return int(min(free + held, allowed - allocated))

    def _allocated(self) -> int:
        return int(torch.cuda.memory_allocated(self._device.device)) if self._device.is_cuda else 0

    def _reset_peak(self) -> None:
        if self._device.is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device.device)

    def _peak(self) -> int:
        return int(torch.cuda.max_memory_allocated(self._device.device)) if self._device.is_cuda else 0

    def _synchronize(self) -> None:
        if self._device.is_cuda:
            torch.cuda.synchronize(self._device.device)

    def _collect(self) -> None:
        gc.collect()
        if self._device.is_cuda:
            torch.cuda.empty_cache()


def _longest_first(dataset: Any) -> tuple[Any, Callable[[int], Document]]:
    """All lengths, descending, and the n-th longest row, beginning again after the last. No row is read for that."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(dataset.data.column("input_ids")).to_numpy()
    order = np.argsort(-lengths, kind="stable")
    return lengths[order], lambda number: dataset[int(order[number % len(order)])]


# ── deciding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Levers:
    """The levers of one model, in the order in which they are tried."""

    varlen: VarlenAttention
    fused: FusedLora
    liger: Liger
    projections: FusedProjections
    resident: ResidentWeights

    def __iter__(self) -> Iterator[Lever]:
        return iter((self.varlen, self.fused, self.liger, self.projections, self.resident))


def levers_of(trainer: PackedTrainer, exact: Exact, device: Device) -> Levers:
    """All of them off."""
    base = trainer.base_model
    found = Levers(
        VarlenAttention(base, device, exact.packs),
        FusedLora(base),
        Liger(base, device),
        FusedProjections(base, device),
        ResidentWeights(base, device),
    )
    found.varlen.turn_off()  # the model was loaded with it
    return found


def choose(
    trainer: PackedTrainer,
    exact: Exact,
    device: Device,
    *,
    disabled: Sequence[str],
    estimated: Pieces,
    checkpointing: bool | None,
    machine: str,
    bench: Bench | None = None,
) -> Choice:
    """Try every lever that is not `disabled`; all of them are off again afterwards.

    `estimated` is what plan.py would take, `checkpointing` what the user wrote (None: nothing). On a CPU nothing is
    timed: what is proved is on.
    """
    bench = bench or Bench(trainer, device)
    levers = levers_of(trainer, exact, device)
    trial = Trial(bench, device, disabled)
    trial.note(PACKING, exact.packs)
    trial.note(LEARNT_HEAD, exact.learnt_head)
    gain = None
    with bench.undisturbed():
        trainer.recompute(estimated.recomputes)
        for lever in (levers.varlen, levers.fused, levers.liger, levers.projections):
            trial.offer(lever, estimated.tokens)
        if not device.is_cuda:
            pieces = estimated
            trial.leave(levers.resident)
            trial.off[MEMORY_PROBE] = TURNED_OFF if MEMORY_PROBE in disabled else NEEDS_GPU
        elif MEMORY_PROBE in disabled:
            pieces = estimated
            trial.leave(levers.resident, "needs memory-probe")
            trial.off[MEMORY_PROBE] = TURNED_OFF
        else:
            pieces = _probe_memory(trainer, trial, levers.resident, checkpointing)
            trial.on[MEMORY_PROBE] = None
            gain = None if pieces.recomputes else _gain_of_larger_steps(trainer, bench)
        trial.undo()
        trainer.recompute(False)
    return Choice(
        machine=machine,
        on=trial.on,
        off=trial.off,
        tokens=pieces.tokens,
        recomputes=pieces.recomputes,
        larger_steps_gain=gain,
    )


_TOO_LARGE = "does not fit the memory"
_NOTHING_FITS = "not timed: without it the longest row does not fit the memory either"
_NOT_EXACT = {
    PACKING: "the model's layers do not keep documents apart",
    LEARNT_HEAD: "the head is trained, or the model changes its logits in its own way",
}


class Trial:
    """What was tried so far: `on` and `off` as in Choice.

    Each lever is proved beside the path without any, so that small differences do not add up, and timed beside all
    that were taken before it.
    """

    def __init__(self, bench: Bench, device: Device, disabled: Sequence[str]) -> None:
        self.bench = bench
        self._device = device
        self._disabled = disabled
        self.on: dict[str, float | None] = {}
        self.off: dict[str, str] = {}
        self._taken: list[Lever] = []
        self._plain: Gradients | None = None
        # (tokens asked for, whether activations are recomputed), and how long the levers that are on take
        self._timed: tuple[tuple[int, bool], Sample | None] | None = None

    def note(self, name: str, is_on: bool) -> None:
        """What was proved before there were adapters."""
        if is_on:
            self.on[name] = None
        else:
            self.off[name] = TURNED_OFF if name in self._disabled else _NOT_EXACT[name]

    def leave(self, lever: Lever, why: str = "") -> None:
        """Do not try it: it is off for `why`, unless something else forbids it anyway."""
        self.off[lever.name] = TURNED_OFF if lever.name in self._disabled else lever.obstacle() or why

    def offer(self, lever: Lever, tokens: int) -> None:
        """Turn it on, and leave it on where it gives the same gradients and, on a GPU, takes less time."""
        obstacle = TURNED_OFF if lever.name in self._disabled else lever.obstacle()
        if obstacle:
            self.off[lever.name] = obstacle
            return
        self._plain = self._plain or self.bench.gradients()
        timed = self._size_that_fits(min(TIMED_TOKENS, tokens)) if self._device.is_cuda else 0
        before = self._time(timed) if timed else None
        problem = self._fault(lever, self._plain)
        gain, after = None, None
        if problem is None and timed:
            after = self.bench.sample(timed)
            if after is None:
                problem = _TOO_LARGE if before else _NOTHING_FITS
            elif before:  # else the longest row fits with it alone, which is worth more than any speed
                if before.seconds < CLEARLY_FASTER * after.seconds:  # or the machine was busy for a moment
                    after = min(after, self.bench.sample(timed) or after, key=lambda sample: sample.seconds)
                gain = before.seconds / after.seconds
                if gain <= 1:
                    problem = f"not faster: {gain:.2f} times the speed without"
        if problem:
            lever.turn_off()
            self.off[lever.name] = problem
        else:
            self.on[lever.name] = gain
            self._taken.append(lever)
            self._timed = ((timed, self.bench.recomputes), after)

    def _size_that_fits(self, tokens: int) -> int:
        """As many tokens or, where the levers that are on have no memory for them, half as many, as often as it takes;
        the longest row where not even that fits. `tokens` is an estimate, and no lever is taken unmeasured for that."""
        while self._time(tokens) is None and tokens > self.bench.longest:
            tokens //= 2
        return tokens

    def _time(self, tokens: int) -> Sample | None:
        """What the levers that are on take: known already if the last one was timed on as many tokens."""
        asked = (tokens, self.bench.recomputes)
        if self._timed is None or self._timed[0] != asked:
            self._timed = (asked, self.bench.sample(tokens))
        return self._timed[1]

    def _fault(self, lever: Lever, plain: Gradients) -> str | None:
        """Turn it on; what is wrong with it then."""
        try:
            lever.turn_on()
            return difference(plain, self.bench.gradients(), self._device.dtype)
        except torch.OutOfMemoryError:
            return _TOO_LARGE
        except Exception as error:  # a kernel that does not compile here costs the kernel, not the run
            return f"fails: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def undo(self) -> None:
        for lever in reversed(self._taken):
            lever.turn_off()


def _probe_memory(
    trainer: PackedTrainer, trial: Trial, resident: ResidentWeights, checkpointing: bool | None
) -> Pieces:
    """The longest documents at two sizes, with activations kept and, where too few fit, recomputed."""
    bench = trial.bench
    ranks = trainer.accelerator.num_processes
    longest = bench.longest
    useful = most_useful(bench.tokens_of(trainer.args.per_device_train_batch_size), longest)

    def samples(recomputes: bool) -> list[Sample]:
        trainer.recompute(recomputes)
        sizes = (max(longest, min(SMALL_SAMPLE_TOKENS, useful // 2)), max(longest, min(LARGE_SAMPLE_TOKENS, useful)))
        return [sample for tokens in sizes if (sample := bench.sample(tokens))]

    kept = [] if checkpointing else samples(recomputes=False)
    room = bench.room(_optimizer(trainer), ranks)
    pieces = keep_activations(kept, room, longest=longest, useful=useful)
    if pieces is None and checkpointing is False:
        pieces = Pieces(max(longest, most_tokens(kept, room)), recomputes=False)
    if pieces is None:
        trial.leave(resident, "the memory is needed for activations")
        return recompute_activations(samples(recomputes=True), room, longest=longest, useful=useful)
    beside = with_decoded_weights(
        kept, room, decoded_bytes=decoded_bytes(trainer.base_model), longest=longest, useful=useful
    )
    if beside is None:
        trial.leave(resident, "the memory is needed for activations")
        return pieces
    trial.offer(resident, beside.tokens)
    return beside if resident.name in trial.on else pieces


def _gain_of_larger_steps(trainer: PackedTrainer, bench: Bench) -> float | None:
    """As Choice has it. A small step is over before the CPU has queued it: the GPU, which is paid for, waits."""
    tokens = bench.usual_tokens_of(trainer.args.per_device_train_batch_size)
    if not trainer.packs or tokens >= LARGE_SAMPLE_TOKENS:
        return None
    step, larger = bench.sample(tokens), bench.sample(LARGER_STEPS * tokens)
    if step is None or larger is None:
        return None
    return larger.tokens / larger.seconds / (step.tokens / step.seconds)


def _optimizer(trainer: PackedTrainer) -> str:
    return str(getattr(trainer.args.optim, "value", trainer.args.optim))


def apply(choice: Choice, trainer: PackedTrainer, exact: Exact, device: Device) -> list[Lever]:
    """Put on the model what was chosen; which levers that were."""
    taken = [lever for lever in levers_of(trainer, exact, device) if lever.name in choice.on]
    for lever in taken:
        lever.turn_on()
    trainer.recompute(choice.recomputes)
    trainer.micro_batch_tokens = choice.tokens if exact.packs else 1
    return taken
