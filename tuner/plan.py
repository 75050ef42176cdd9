"""Preset + TrainingConfig + Machine (+ prepared.json) → Plan: does it fit, what would, how long, at what price.

Needs no GPU, no torch and no download. All in a Plan but parameters, weights and steps is an estimate, and says so.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, product
from typing import Any, Literal

from tuner.errors import ConfigError, OutOfGpuMemoryError, UsageError
from tuner.instance_types import GPUS, Machine, find_gpu, find_instance_type, instance_types
from tuner.memory import (
    FILL,
    GIB,
    OPTIMIZER_STATE_BYTES,
    Estimate,
    Parameters,
    Setup,
    Shape,
    adapter_parameters,
    count_parameters,
    estimate_memory,
    flops_per_token,
    largest_micro_batch,
    read_shape,
)
from tuner.presets import Preset
from tuner.runspec import Prepared, Split
from tuner.training_config import foresee_target_modules
from tuner.training_settings import TrainingConfig, TrainingSettings

Verdict = Literal["fits", "does not fit", "cannot run"]

MAX_LENGTH = 8192  # of a document, where max_length is not written
MICRO_BATCH_TOKENS = 16_384  # more gains nothing: every fixed cost of a micro-batch is below 2 % by then
# Without checkpointing a micro-batch must have this many tokens, or decoding the weights costs what recomputing saves.
FEWEST_TOKENS = 2048
ASSUMED_ROWS = 1000
ASSUMED_ROW_TOKENS = 512
# Share of the data sheet's operations that training gets: below what is published for A100 and H100.
UTILISATION = 0.35
SHORTER = (4096, 2048, 1024, 512)

EVALUATIONS = 5  # in a run, unless the user says how often
EVALUATION_STEPS_AT_LEAST = 10  # closer together they would be the most of a short run
# Of what a token costs in training: half, as a frozen weight costs 2 forward and 2 backward, or a third where blocks
# are recomputed.
EVALUATED_TOKEN = 0.4

# What of LoraConfig changes memory and is not counted.
_UNCOUNTED = (
    "exclude_modules",
    "lora_bias",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
)


@dataclass(frozen=True)
class Workload:
    """What is trained on; `longest` decides the smallest micro-batch. `is_known` is False for the assumption."""

    rows: int
    tokens: int
    learnt_tokens: int
    longest: int
    is_known: bool


@dataclass(frozen=True)
class Plan:
    """The answer of `tuner plan`.

    `estimate` is of the micro-batch to use, or of the longest document alone where even that is too much. `changes`:
    each one thing (or the fewest things together) that would make it fit on this GPU; `larger`: the smallest machines
    that hold it unchanged.
    """

    model: str
    method: str
    machine: Machine
    verdict: Verdict
    problem: str | None
    setup: Setup
    parameters: Parameters
    trained_parameters: int
    estimate: Estimate
    changes: tuple[str, ...]
    larger: tuple[Machine, ...]
    workload: Workload
    documents_per_step: int
    epochs: float
    steps: int
    tokens: int
    seconds: float | None
    price_per_hour: float | None
    assumptions: tuple[str, ...]

    @property
    def cost(self) -> float | None:
        """In the price's currency."""
        if self.seconds is None or self.price_per_hour is None:
            return None
        return self.seconds / 3600 * self.price_per_hour

    @property
    def exit_code(self) -> int:
        codes = {"fits": 0, "does not fit": OutOfGpuMemoryError.exit_code, "cannot run": ConfigError.exit_code}
        return codes[self.verdict]


@dataclass(frozen=True)
class _Ask:
    """What must fit: checkpointing None leaves the choice to us."""

    setup: Setup
    longest: int
    checkpointing: bool | None


def choose_machine(gpu: str | None, instance_type: str | None, written: str | None) -> Machine:
    """The machine of --gpu, of --instance-type, or of the Workspace's resource.instanceType (`written`).

    Raises UsageError for both or none, ConfigError for a name that is not in the table.
    """
    if gpu and instance_type:
        raise UsageError("--gpu and --instance-type are both given", hint="choose one")
    if gpu:
        return find_gpu(gpu)
    if instance_type or written:
        return find_instance_type(instance_type or written or "")
    raise UsageError(
        "which GPU? The Workspace names no resource.instanceType",
        hint="--gpu 24GB, --gpu H100-80 or --instance-type Standard_NC24ads_A100_v4",
    )


def make_plan(
    preset: Preset,
    training: TrainingConfig,
    machine: Machine,
    *,
    prepared: Prepared | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """The plan. `training` is resolved with world_size=machine.gpus; `price_per_hour` is the whole machine's.

    Raises ConfigError for a model whose dimensions are not known, and for target modules that it does not have.
    """
    shape = read_shape(preset.name, preset.config)
    setup = read_setup(preset, training, shape, machine.gpus)
    workload = _workload(preset, training, prepared)
    ask = _Ask(setup, workload.longest, training.arguments.activation_checkpointing)
    fitting = _fits(shape, ask, machine.gpu.memory_bytes)
    verdict: Verdict = "cannot run" if machine.gpu.problem else "fits" if fitting else "does not fit"
    estimate = fitting or _smallest(shape, ask)
    trained = adapter_parameters(shape, setup)

    arguments = training.arguments
    documents = documents_per_step(arguments, machine.gpus)
    steps = count_steps(arguments, workload.rows, machine.gpus)
    epochs = steps * documents / workload.rows if arguments.max_steps else arguments.num_train_epochs
    tokens = round(epochs * workload.tokens)
    flops = tokens * flops_per_token(
        shape,
        checkpointing=estimate.checkpointing,
        learnt_share=workload.learnt_tokens / workload.tokens,
        document_tokens=workload.tokens / workload.rows,
        trained=trained,
    )
    seconds = None
    if machine.gpu.tflops and verdict == "fits":
        seconds = flops / (machine.gpus * machine.gpu.tflops * 1e12 * UTILISATION)
    return Plan(
        model=preset.name,
        method=training.method,
        machine=machine,
        verdict=verdict,
        problem=machine.gpu.problem,
        setup=setup,
        parameters=count_parameters(shape),
        trained_parameters=trained,
        estimate=estimate,
        changes=() if verdict != "does not fit" else tuple(_changes(shape, ask, machine.gpu.memory_bytes)),
        larger=() if verdict == "fits" else tuple(_larger(shape, ask)),
        workload=workload,
        documents_per_step=documents,
        epochs=epochs,
        steps=steps,
        tokens=tokens,
        seconds=seconds,
        price_per_hour=price_per_hour,
        assumptions=tuple(_assumptions(training, workload, machine, setup, seconds, prepared)),
    )


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def read_setup(preset: Preset, training: TrainingConfig, shape: Shape, gpus: int) -> Setup:
    """What of the configuration memory depends on."""
    lora = training.lora
    linear_modules = tuple(linear.name for linear in shape.linears)
    targets = foresee_target_modules(lora.target_modules, linear_modules)
    if targets.unmatched:
        raise ConfigError(
            f"LoraConfig.target_modules: no {', '.join(targets.unmatched)} in {preset.name}; "
            f"its linear layers are {', '.join(linear_modules)}"
        )
    compute_bytes = 4 if training.model.dtype == "float32" else 2
    bits = training.quantization.bits
    layers = lora.layers_to_transform
    return Setup(
        weight_bits=8 * compute_bytes if bits == 16 else bits,
        double_quant=bits == 4 and bool(training.quantization.bnb_4bit_use_double_quant),
        compute_bytes=compute_bytes,
        rank=lora.r,
        modules=targets.modules,
        adapted_layers=shape.layers if layers is None else len(layers) if isinstance(layers, tuple) else 1,
        whole_modules=lora.modules_to_save or (),
        optimizer=training.arguments.optim,
        has_dropout=lora.lora_dropout > 0,
        gpus=gpus,
    )


def _workload(preset: Preset, training: TrainingConfig, prepared: Prepared | None) -> Workload:
    if prepared:
        train = prepared.train
        longest = max(train.longest, prepared.evaluation.longest if prepared.evaluation else 0)
        return Workload(train.rows, train.tokens, train.supervised_tokens, longest, is_known=True)
    context = preset.context_length or MAX_LENGTH
    longest = min(training.arguments.max_length or MAX_LENGTH, context)
    tokens = ASSUMED_ROWS * min(ASSUMED_ROW_TOKENS, longest)
    return Workload(ASSUMED_ROWS, tokens, tokens, longest, is_known=False)


def count_steps(arguments: TrainingSettings, rows: int, gpus: int = 1) -> int:
    """Optimizer steps of a whole run, by TrainingArguments."""
    if arguments.max_steps:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * math.ceil(rows / documents_per_step(arguments, gpus)))


def documents_per_step(arguments: TrainingSettings, gpus: int = 1) -> int:
    return gpus * arguments.documents_per_process


def steps_between_evaluations(arguments: TrainingSettings, steps: int) -> int:
    """`eval_steps` as written (below 1 a share of the run), else a fifth of the run and no less than ten."""
    written = arguments.eval_steps or max(EVALUATION_STEPS_AT_LEAST, math.ceil(steps / EVALUATIONS))
    return max(1, math.ceil(written * steps if written < 1 else written))


def count_evaluations(arguments: TrainingSettings, rows: int) -> int:
    """How often the held-out rows are evaluated: before the first step, in the run, at its end."""
    steps = count_steps(arguments, rows)
    match arguments.eval_strategy:
        case "no":
            between = steps
        case "epoch":
            between = math.ceil(rows / documents_per_step(arguments))
        case _:
            between = steps_between_evaluations(arguments, steps)
    return 1 + math.ceil(steps / between)


def evaluation_share(arguments: TrainingSettings, train: Split, held_out: Split) -> float:
    """About how much all evaluations cost, of what training costs."""
    epochs = arguments.num_train_epochs
    if arguments.max_steps:
        epochs = arguments.max_steps * documents_per_step(arguments) / train.rows
    return EVALUATED_TOKEN * count_evaluations(arguments, train.rows) * held_out.tokens / (epochs * train.tokens)


# ── does it fit ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _fits(shape: Shape, ask: _Ask, memory_bytes: int) -> Estimate | None:
    return choose_micro_batch(
        shape, ask.setup, longest=ask.longest, checkpointing=ask.checkpointing, memory_bytes=memory_bytes
    )


def choose_micro_batch(
    shape: Shape, setup: Setup, *, longest: int, checkpointing: bool | None, memory_bytes: int
) -> Estimate | None:
    """The micro-batch to use, without checkpointing where that leaves it large enough; None if nothing fits.

    `longest` is the longest document's tokens, `checkpointing` what the user wrote (None: nothing).
    """
    longest = _rounded(longest)
    wanted = {None: (False, True), True: (True,), False: (False,)}[checkpointing]
    for checkpoints in wanted:
        found = largest_micro_batch(
            shape,
            setup,
            checkpointing=checkpoints,
            memory_bytes=memory_bytes,
            most=max(MICRO_BATCH_TOKENS, longest),
        )
        enough = longest if len(wanted) == 1 or checkpoints else max(longest, FEWEST_TOKENS)
        if found and found.tokens >= enough:
            return found
    return None


def _smallest(shape: Shape, ask: _Ask) -> Estimate:
    """What the longest document alone needs."""
    checkpointing = ask.checkpointing is not False
    return estimate_memory(shape, ask.setup, tokens=_rounded(ask.longest), checkpointing=checkpointing)


def _rounded(tokens: int) -> int:
    return 64 * math.ceil(tokens / 64)


_Change = tuple[str, Callable[[_Ask], _Ask]]


def _changes(shape: Shape, ask: _Ask, memory_bytes: int) -> Iterator[str]:
    """Each smallest set of changes after which it fits, in words, the least harmful first."""
    kinds = [kind for kind in _possible(ask) if kind]
    for count in range(1, len(kinds) + 1):
        answers = []
        for chosen in combinations(kinds, count):
            for together in product(*chosen):
                changed = ask
                for _, change in together:
                    changed = change(changed)
                if _fits(shape, changed, memory_bytes):
                    answers.append(" and ".join(words for words, _ in together))
                    break
        if answers:
            yield from answers
            return


def _possible(ask: _Ask) -> Iterator[Sequence[_Change]]:
    """Kinds of change, each with its steps from mild to strong."""
    setup = ask.setup
    if ask.checkpointing is False:
        yield [("TrainingArguments.activation_checkpointing: true", partial(replace, checkpointing=None))]
    if setup.weight_bits > 4:
        words = "QuantizationConfig.load_in_4bit: true" if setup.weight_bits == 8 else "method: qlora (4-bit weights)"
        yield [(words, partial(_with_setup, weight_bits=4, double_quant=True))]
    elif not setup.double_quant:
        yield [("QuantizationConfig.bnb_4bit_use_double_quant: true", partial(_with_setup, double_quant=True))]
    if setup.whole_modules:
        yield [("no LoraConfig.modules_to_save", partial(_with_setup, whole_modules=()))]
    yield [
        (f"TrainingArguments.max_length: {length}", partial(replace, longest=length))
        for length in SHORTER
        if length < ask.longest
    ]
    yield [(f"LoraConfig.r: {rank}", partial(_with_setup, rank=rank)) for rank in (64, 32, 16, 8) if rank < setup.rank]


def _with_setup(ask: _Ask, **values: Any) -> _Ask:
    return replace(ask, setup=replace(ask.setup, **values))


def _larger(shape: Shape, ask: _Ask) -> Iterator[Machine]:
    """The smallest GPU that holds it, and the smallest instance type of each cloud that does."""
    fits = {
        gpu.name
        for gpu in GPUS.values()
        if gpu.problem is None and _fits(shape, _with_setup(ask, gpus=1), gpu.memory_bytes)
    }
    if not fits:
        return
    smallest = min((GPUS[name] for name in fits), key=lambda gpu: gpu.memory_bytes)
    yield Machine(smallest.name, smallest)
    machines = [machine for machine in instance_types().values() if machine.gpu.name in fits]
    for is_azure in (True, False):
        of_cloud = [machine for machine in machines if machine.name.startswith("Standard_") is is_azure]
        if of_cloud:
            yield min(of_cloud, key=lambda machine: (machine.gpus * machine.gpu.memory_bytes, machine.gpus))


def _assumptions(
    training: TrainingConfig,
    workload: Workload,
    machine: Machine,
    setup: Setup,
    seconds: float | None,
    prepared: Prepared | None,
) -> Iterator[str]:
    """What the figures rest on, one sentence each."""
    yield (
        "activations are reckoned for eager kernels, every token learnt, at most "
        f"{FILL:.0%} of free memory filled; CUDA itself gets an allowance"
    )
    if not workload.is_known:
        mean = workload.tokens // workload.rows
        yield f"no prepared.json: {ASSUMED_ROWS:,} rows of {mean} tokens, all of them learnt"
        written = training.arguments.max_length
        why = "max_length" if written else "max_length is not written"
        yield f"the longest document has {workload.longest:,} tokens ({why})"
    if seconds is not None:
        yield (
            f"time is training alone, at {UTILISATION:.0%} of the {machine.gpu.tflops:,.0f} TFLOP/s of the data sheet, "
            "on every GPU: no download, start-up or evaluation"
        )
    if prepared and prepared.evaluation:
        arguments = training.arguments
        share = evaluation_share(arguments, prepared.train, prepared.evaluation)
        times = count_evaluations(arguments, prepared.train.rows)
        yield f"evaluating {prepared.eval_rows:,} held-out rows {times} times costs about {share:.0%} of training"
    elif machine.gpu.tflops is None and not machine.gpu.problem:
        yield "no time: a plain memory size does not say how quick the GPU is"
    if setup.optimizer not in OPTIMIZER_STATE_BYTES and "adamw" not in setup.optimizer:
        yield f"the optimizer {setup.optimizer} is counted as AdamW"
    for key in _UNCOUNTED:
        if training.lora.passthrough.get(key):
            yield f"LoraConfig.{key} is not counted"


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe_plan(plan: Plan) -> str:
    """The plan as people read it, several lines without a line end."""
    estimate, gpu = plan.estimate, plan.machine.gpu
    data = f"{'' if plan.workload.is_known else 'for each '}{plan.workload.rows:,} rows,"
    trained = f"{plan.trained_parameters / 1e6:,.1f} M of {plan.parameters.total / 1e9:,.2f} B parameters trained"
    lines = [
        f"{plan.model}, {plan.method}, {_weights_words(plan.setup)}, LoRA r {plan.setup.rank} on "
        f"{', '.join(plan.setup.modules)}: {trained}",
        f"{_machine_words(plan.machine)}, {gpu.memory_gib:.1f} GiB each",
        "",
        _verdict_words(plan),
        "",
        *(f"  {words:<50}{count / GIB:>8.2f} GiB" for words, count in memory_parts(plan)),
        f"  {'together, on each GPU':<50}{estimate.total / GIB:>8.2f} GiB of {gpu.memory_gib:.1f}",
        "",
        f"{data} of {plan.workload.tokens:,} tokens: {plan.steps:,} steps of {plan.documents_per_step} documents, "
        f"{plan.tokens:,} tokens in {plan.epochs:g} epochs",
    ]
    if plan.seconds is not None:
        cost = f", about {plan.cost:,.2f} at {plan.price_per_hour:g} an hour" if plan.cost is not None else ""
        lines.append(f"estimated time: about {_duration(plan.seconds)}{cost}")
    return "\n".join([*lines, "", "Estimates, not measurements:", *(f"  - {line}" for line in plan.assumptions)])


def memory_parts(plan: Plan) -> list[tuple[str, int]]:
    """Words and bytes of what adds up to the estimate's total."""
    estimate = plan.estimate
    backward = estimate.decoded_weight + estimate.block_gradients
    worst = ("one chunk of logits", estimate.logits)
    if backward > estimate.logits:
        worst = ("decoded weight, block's gradients", backward)
    return [
        (f"linear layers, {_weights_words(plan.setup)}", estimate.linear_weights),
        ("embeddings, head, norms", estimate.other_weights),
        ("adapters", estimate.adapters),
        ("gradients", estimate.gradients),
        (f"optimizer ({plan.setup.optimizer})", estimate.optimizer),
        (f"activations of {estimate.tokens:,} tokens", estimate.activations),
        worst,
        ("allocator, at most", estimate.waste),
        ("CUDA, allowance", estimate.context),
    ]


def _weights_words(setup: Setup) -> str:
    return f"{setup.weight_bits}-bit" + (" with double quantization" if setup.double_quant else "")


def _machine_words(machine: Machine) -> str:
    kind = f"{machine.gpus} × {machine.gpu.name}"
    return kind if machine.name in kind else f"{machine.name} ({kind})"


def _verdict_words(plan: Plan) -> str:
    estimate, longest = plan.estimate, plan.workload.longest
    recomputing = "with activation checkpointing" if estimate.checkpointing else "without activation checkpointing"
    if plan.verdict == "fits":
        return f"fits: micro-batches of {estimate.tokens:,} tokens {recomputing}; the longest document has {longest:,}"
    if plan.verdict == "cannot run":
        words = f"cannot run: {plan.problem}"
    else:
        words = f"does not fit: one document of {longest:,} tokens {recomputing} needs {estimate.total / GIB:.1f} GiB"
        changes = "\n               or ".join(plan.changes)
        words += f"\n  it would fit with {changes}" if changes else "\n  nothing in the configuration makes it fit"
    larger = ", ".join(_machine_words(machine) for machine in plan.larger)
    return words + (f"\n  unchanged it fits {larger}" if larger else "\n  no GPU of the table holds it unchanged")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{math.ceil(seconds)} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan for `--json`: plain values, units in the names."""
    estimate, machine = plan.estimate, plan.machine
    return {
        "model": plan.model,
        "method": plan.method,
        "machine": {
            "name": machine.name,
            "gpu": machine.gpu.name,
            "gpus": machine.gpus,
            "gpu_memory_bytes": machine.gpu.memory_bytes,
        },
        "verdict": plan.verdict,
        "problem": plan.problem,
        "changes": list(plan.changes),
        "larger": [machine.name for machine in plan.larger],
        "parameters": plan.parameters.total,
        "trained_parameters": plan.trained_parameters,
        "micro_batch_tokens": estimate.tokens,
        "longest_document_tokens": plan.workload.longest,
        "activation_checkpointing": estimate.checkpointing,
        "memory_bytes": dict(memory_parts(plan)) | {"total": estimate.total},
        "data_is_known": plan.workload.is_known,
        "rows": plan.workload.rows,
        "steps": plan.steps,
        "documents_per_step": plan.documents_per_step,
        "epochs": plan.epochs,
        "tokens": plan.tokens,
        "estimated_seconds": plan.seconds,
        "price_per_hour": plan.price_per_hour,
        "estimated_cost": plan.cost,
        "assumptions": list(plan.assumptions),
    }
