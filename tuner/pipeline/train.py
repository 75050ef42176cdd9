"""The optimisation: model, trainer, checkpoints and signals, over token rows whose labels are already decided."""

import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig

from tuner.durable import make_directories
from tuner.errors import ConfigError, InputMissingError, InterruptedRunError, OutOfGpuMemoryError, TunerError
from tuner.levers import LEARNT_HEAD, PACKING
from tuner.memory import read_shape
from tuner.pipeline.adapter import ADAPTER_WEIGHTS, vllm_problems
from tuner.pipeline.best import KeepBest, Rule, held_out_losses
from tuner.pipeline.checkpoints import LEVERS, newest_checkpoint, read_seal, room_for, seal
from tuner.pipeline.kernels import Exact, has_plain_head, prove
from tuner.pipeline.launch import is_worker, rank, world_size
from tuner.pipeline.levers import LARGER_STEPS, Choice, apply, choose
from tuner.pipeline.libraries import versions
from tuner.pipeline.model import Coverage, Device, attach_lora, load_base_model, pick_device
from tuner.pipeline.probe import Pieces
from tuner.pipeline.startup import StartUp, describe
from tuner.pipeline.trainer import PackedTrainer
from tuner.pipeline.watchdog import Watchdog, check_finite
from tuner.plan import choose_micro_batch, count_steps, read_setup, steps_between_evaluations
from tuner.runspec import Prepared, Progress, Reporter, RunSpec, Split
from tuner.signals import handling
from tuner.training_config import OWN_TYPES
from tuner.training_settings import DEFAULT_WARMUP_SHARE, TrainingConfig

CPU_MICRO_BATCH_TOKENS = 2048  # more only costs memory
# For an architecture whose memory cannot be reckoned: so many that decoding 4-bit weights is a tenth of the work.
# A step that does not fit takes fewer.
UNKNOWN_MICRO_BATCH_TOKENS = 2048
CHECKPOINT_INTERVAL_S = 600  # the most work that a lost machine costs
KEPT_CHECKPOINTS = 2  # the one before is there when the newest was not written whole
METRICS = "metrics.jsonl"
WORTH_SAYING = 1.3  # times as fast
_BEST_IS_OURS = frozenset({"load_best_model_at_end", "metric_for_best_model"})  # best.py, not the Trainer


@dataclass(frozen=True)
class Outcome:
    """A finished optimisation: the adapter's raw files are in `directory`, the figures here."""

    coverage: Coverage
    lora_config: dict[str, Any]
    lora_defaults: dict[str, Any]
    device: Device
    steps: int
    epochs: float
    examples: int
    tokens: int
    seconds: float
    first_train_loss: float
    last_train_loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    kept_step: int
    versions: dict[str, str]
    levers: dict[str, str]
    startup: dict[str, float]


class Stop:
    """Whether somebody asked to stop. The first SIGINT or SIGTERM is acknowledged, the second ends the process."""

    def __init__(self, acknowledge: Callable[[str], None]) -> None:
        self._acknowledge = acknowledge
        self.requested = False

    def _handle(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if self.requested:
            self._acknowledge(f"{name} again: stopping without a checkpoint")
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.requested = True
        self._acknowledge(f"{name}: finishing this step, then saving a checkpoint (again to stop at once)")

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Signals come here while the block runs."""
        with handling(self._handle):
            yield self


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Reports each log, keeps metrics.jsonl, asks for recovery checkpoints, obeys Stop."""

    def __init__(
        self, stop: Stop, reporter: Reporter, metrics_file: Path, *, watchdog: Watchdog | None, evaluates: bool
    ) -> None:
        self._stop = stop
        self._watchdog = watchdog
        self._evaluates = evaluates
        self._reporter = reporter
        self._metrics_file = metrics_file
        self._recorded = 0
        self._last_checkpoint = 0.0
        self._last_log = (0.0, 0, 0)  # when, after how many tokens and steps
        self._saved_step: int | None = None
        self._saves_at_epoch_end = False  # as the user's save_steps asked for at the step before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last_checkpoint = time.monotonic()
        self._last_log = (self._last_checkpoint, state.num_input_tokens_seen, state.global_step)
        warm_up = args.get_warmup_steps(state.max_steps)
        if warm_up >= state.max_steps:
            self._reporter.warn(
                f"the learning rate rises for {warm_up} steps and the run has {state.max_steps}: it never gets to "
                f"{args.learning_rate:g}, see TrainingArguments.warmup_steps"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        ends_training = state.global_step >= state.max_steps
        if ends_training and self._evaluates and args.eval_strategy == "no":
            control.should_evaluate = True  # while those who are reported to still listen
        if ends_training or control.should_evaluate:  # which may be the end
            control.should_log = True  # the last loss, however seldom the user wants to hear
        if ends_training or float(state.epoch).is_integer():
            # on_epoch_end is next, where an evaluation may follow that must be in the checkpoint. Saving here, too,
            # would let it write over a checkpoint that nothing else may stand in for.
            self._saves_at_epoch_end, control.should_save = control.should_save, False
        elif self._is_checkpoint_due(state):
            control.should_save = True
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if control.should_evaluate:
            control.should_log = True
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_save = False  # an evaluation has ended the run, and was saved with that
        elif self._is_checkpoint_due(state) or self._saves_at_epoch_end:
            control.should_save = True
        return control

    def _is_checkpoint_due(self, state: TrainerState) -> bool:
        self._stop.requested = _any_rank(self._stop.requested)
        return (
            self._stop.requested
            or state.global_step >= state.max_steps  # the last evaluation may still fail
            or _any_rank(time.monotonic() - self._last_checkpoint >= CHECKPOINT_INTERVAL_S)
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_checkpoint, self._saved_step = time.monotonic(), state.global_step
        if self._stop.requested and state.global_step < state.max_steps and not control.should_training_stop:
            # Not should_training_stop: the Trainer would then evaluate and log what an unbroken run does not.
            raise InterruptedRunError(f"stopped after step {state.global_step} of {state.max_steps}; checkpoint saved")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Its time is none of training's, whose loss has just been logged."""
        self._last_log = (time.monotonic(), state.num_input_tokens_seen, state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        newest = self.record(state.log_history)
        check_finite(newest)
        if self._watchdog:
            self._watchdog.check(newest, state.max_steps)
        if "loss" not in kwargs["logs"]:
            return  # an evaluation, or the summary at the end
        now, tokens = time.monotonic(), state.num_input_tokens_seen
        before, tokens_before, step_before = self._last_log
        seconds = max(now - before, 1e-9)
        samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        values = {
            "loss": newest[-1]["loss"],
            "tokens_per_s": (tokens - tokens_before) / seconds,
            "samples_per_s": (state.global_step - step_before) * samples / seconds,
        }
        if self._saved_step is not None:
            values["checkpoint_step"] = self._saved_step
        self._last_log = (now, tokens, state.global_step)
        self._reporter.progress(
            Progress("train", "training", state.global_step, state.max_steps, "steps", values=values)
        )

    def record(self, log_history: list[dict[str, float]]) -> list[dict[str, float]]:
        """Bring metrics.jsonl up to date; what was new."""
        newest = metrics(log_history[self._recorded :])
        self._recorded = len(log_history)
        with self._metrics_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in newest)
        return newest


def _any_rank(flag: bool) -> bool:
    """Whether any of the training processes says so: all must save at one and the same step."""
    if not torch.distributed.is_initialized():
        return flag
    said = torch.tensor(int(flag))
    torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, group=_cpu_group())
    return bool(said)


@cache
def _cpu_group() -> Any:
    """All ranks, talking over the CPU: what is read back from a GPU waits for everything that is queued on it."""
    return torch.distributed.new_group(backend="gloo")


class _FirstStep(TrainerCallback):  # type: ignore[misc]
    """Ends the start-up: says how long it took, and what of it."""

    def __init__(self, startup: StartUp, device: Device, reporter: Reporter) -> None:
        self._startup = startup
        self._device = device
        self._reporter = reporter
        self._since = 0.0
        self.seconds: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = time.monotonic()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.seconds:
            self._end("evaluation")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.seconds:
            return
        if self._device.is_cuda:
            torch.cuda.synchronize()  # once: the step has been queued, not made
        self._end("step")
        self.seconds = self._startup.first_step()
        self._reporter.note(describe(self.seconds))

    def _end(self, part: str) -> None:
        now = time.monotonic()
        self._startup.add(part, now - self._since)
        self._since = now


class _Carry(TrainerCallback):  # type: ignore[misc]
    """Puts back the losses since the last log, which the Trainer forgets at a checkpoint: the next log counts them."""

    def __init__(self, trainer: "_Trainer", checkpoint: Path) -> None:
        self._trainer = trainer
        self._seal = read_seal(checkpoint)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer._tr_loss += self._seal["unlogged_loss"]
        self._trainer._globalstep_last_logged = self._seal["last_logged_step"]


def metrics(log_history: list[dict[str, float]]) -> list[dict[str, float]]:
    """What metrics.jsonl holds of Trainer's log: no times, nothing that differs between equal runs."""
    names = {
        "step": "step",
        "epoch": "epoch",
        "loss": "loss",
        "learning_rate": "learning_rate",
        "grad_norm": "grad_norm",
        "num_input_tokens_seen": "tokens",
        "eval_loss": "eval_loss",
    }
    return [
        # fp16 skips a step whose gradient overflows: its norm is no number, and no JSON
        {names[key]: entry[key] for key in names if key in entry and (key != "grad_norm" or math.isfinite(entry[key]))}
        for entry in log_history
        if "loss" in entry or "eval_loss" in entry
    ]


class _EvaluationLeftError(Exception):
    """Somebody asked to stop, and the evaluation was not finished."""


class _OverError(Exception):
    """What a resumed run evaluated first has ended it before another step."""


class _Trainer(PackedTrainer):
    """PackedTrainer whose checkpoints are sealed, and can be gone on from in every respect.

    `evaluation_due`: the step of its state is still to be evaluated, as the run was stopped in the middle of that.
    """

    chosen: Choice | None = None
    keep_best: KeepBest
    stop: Stop
    evaluation_due = False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with room_for(checkpoint):
            super()._save_checkpoint(model, trial)
            unlogged_loss = float(self.accelerator.reduce(self._tr_loss, "mean"))
            self.accelerator.wait_for_everyone()  # each rank writes its random state
            if self.args.should_save:
                self._keep_pieces()
                self.keep_best.copy_into(checkpoint)
                seal(
                    checkpoint,
                    unlogged_loss=unlogged_loss,
                    last_logged_step=self._globalstep_last_logged,
                    evaluation_due=self.evaluation_due,
                )

    def _keep_pieces(self) -> None:
        """A run that had to make its steps smaller goes on with those after a stop."""
        if self.chosen and self.packs:
            now = {"tokens": self.micro_batch_tokens, "recomputes": self.recomputes}
            self.chosen = self.chosen.model_copy(update=now)
            self.chosen.save(Path(self.args.output_dir) / LEVERS)

    # ── stopped in an evaluation, which may take longer than whoever stops it waits ──────────────────────────────────

    def is_stopping(self) -> bool:
        return self.stop.requested

    def after_evaluation_batch(self) -> None:
        self.stop.requested = _any_rank(self.stop.requested)
        if self.stop.requested:
            raise _EvaluationLeftError

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)
        except _EvaluationLeftError:
            step = self.state.global_step
            if step == 0:
                raise InterruptedRunError("stopped before the first step") from None
            if self.is_in_train and not self.evaluation_due:  # else the run has begun with its checkpoint
                self.evaluation_due = True
                self._save_checkpoint(self.model, None)
            raise InterruptedRunError(
                f"stopped in the evaluation after step {step} of {self.state.max_steps}; checkpoint saved"
            ) from None

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Of a resumed run the first evaluation may be the one that it was stopped in: as if it came at its step."""
        was_due = self.evaluation_due
        figures: dict[str, float] = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not was_due)
        self.evaluation_due = False
        if was_due and self.control.should_training_stop:
            raise _OverError
        return figures

    def finish_from(self, checkpoint: Path) -> None:
        """Be as train() leaves it, from the checkpoint of the last step."""
        self.accelerator.prepare_model(self.model, evaluation_mode=True)  # autocast, as train() would have put on it
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


# ── the stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _load_split(split: Split, work_dir: Path) -> Dataset:
    dataset = Dataset.from_file(str(work_dir / split.path))
    return dataset.select_columns(["input_ids", "labels"]).with_format("numpy")


def _longest(prepared: Prepared) -> int:
    """Tokens of the longest row, learnt or held out."""
    return max(split.longest for split in (prepared.train, prepared.evaluation) if split)


def choose_pieces(spec: RunSpec, prepared: Prepared, base_dir: Path, device: Device) -> Pieces:
    """As many tokens as the GPU's free memory holds by the estimate of `tuner plan`, kept activations before recomputed
    ones. An estimate: on a GPU the probe measures it, and PackedTrainer gives way where both are wrong."""
    written = spec.training.arguments.activation_checkpointing
    if not device.is_cuda:
        return Pieces(CPU_MICRO_BATCH_TOKENS, bool(written))
    longest = _longest(prepared)
    try:
        shape = read_shape(spec.preset.name, json.loads((base_dir / "config.json").read_text(encoding="utf-8")))
        setup = read_setup(spec.preset, spec.training, shape, torch.cuda.device_count())
        free_bytes = torch.cuda.mem_get_info(device.device)[0]
        found = choose_micro_batch(shape, setup, longest=longest, checkpointing=written, memory_bytes=free_bytes)
    except ConfigError:  # an architecture that memory.py does not know
        found = None
    if found is None:
        return Pieces(max(longest, UNKNOWN_MICRO_BATCH_TOKENS), written is not False)
    return Pieces(found.tokens, found.checkpointing)


def training_arguments(
    spec: RunSpec, prepared: Prepared, device: Device, pieces: Pieces, output_dir: Path, *, evaluate_first: bool
) -> SFTConfig:
    """SFTConfig from TrainingArguments, with what only the machine decides: precision and activation checkpointing.

    Raises ConfigError in SFTConfig's own words.
    """
    asked = spec.training.arguments
    own = OWN_TYPES["TrainingArguments"].keys() | _BEST_IS_OURS
    written = {key: value for key, value in asked.keywords().items() if key not in own}
    written["activation_checkpointing"] = pieces.recomputes
    if "activation_checkpointing" not in SFTConfig.__dataclass_fields__:  # before transformers 5.20
        for key in ("checkpointing", "checkpointing_kwargs"):
            written[f"gradient_{key}"] = written.pop(f"activation_{key}", None)
    if not device.is_cuda:
        written |= {"bf16": False, "fp16": False, "tf32": None, "dataloader_pin_memory": False}
        written["optim"] = asked.optim.removeprefix("paged_")  # there is nothing to page out of
    elif asked.bf16 is None and asked.fp16 is None:
        written |= {"bf16": device.dtype is torch.bfloat16, "fp16": device.dtype is torch.float16}
    if asked.report_to:
        written["run_name"] = asked.run_name or spec.name
    # Recovery checkpoints come by the clock, and the best adapter is kept anyway.
    if asked.save_strategy in (None, "best"):
        written["save_strategy"] = "no" if asked.save_steps is None else "steps"
    if prepared.evaluation is None:
        written["eval_strategy"] = "no"
    steps = count_steps(asked, prepared.train.rows, world_size())
    if asked.eval_steps is None:
        written["eval_steps"] = steps_between_evaluations(asked, steps)
    if asked.warmup_steps is None:
        # The first step of a warm-up has a learning rate of 0: rounded up, a run of one step would learn nothing.
        written["warmup_steps"] = int(DEFAULT_WARMUP_SHARE * steps)
    if asked.logging_steps is None:
        written["logging_steps"] = max(1, min(10, steps // 20))
    if asked.train_sampling_strategy != "sequential":
        written.pop("train_sampling_strategy", None)  # no padding, so nothing is won by like lengths
    ours = {
        # A batch is an optimizer step: PackedTrainer divides it by tokens.
        "per_device_train_batch_size": asked.documents_per_process,
        "gradient_accumulation_steps": 1,
        "output_dir": str(output_dir),
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,  # prepare has cut
        "packing": False,
        "remove_unused_columns": True,
        "disable_tqdm": True,
        "push_to_hub": False,
        "use_cpu": not device.is_cuda,
        "eval_on_start": evaluate_first,
        "include_num_input_tokens_seen": "no",  # PackedTrainer counts: there is no padding to leave out
        "save_total_limit": KEPT_CHECKPOINTS,
        "save_only_model": False,  # without the optimizer's state there is nothing to go on from
        "restore_callback_states_from_checkpoint": False,
        "logging_nan_inf_filter": False,  # a NaN must be seen, and the filter costs a synchronisation a step
        "average_tokens_across_devices": True,
    }
    if is_worker():
        ours |= {
            "ddp_backend": "nccl" if device.is_cuda else "gloo",
            "ddp_find_unused_parameters": False,  # every adapter is used in every step
            # The first forward would exchange them, and again when it is tried again for want of memory, alone.
            "ddp_broadcast_buffers": False,
        }
    with _refusals("TrainingArguments"):
        return SFTConfig(**(written | ours))


@contextmanager
def _refusals(section: str) -> Iterator[None]:
    """What a library refuses in there, or lacks a package for, is the configuration's fault."""
    try:
        yield
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        sentence = " ".join(str(error).split())
        raise ConfigError(f"{section}: {sentence}") from error


def optimise(
    spec: RunSpec,
    prepared: Prepared,
    work_dir: Path,
    adapter_dir: Path,
    checkpoints: Path,
    stop: Stop,
    reporter: Reporter,
    startup: StartUp | None = None,
) -> Outcome:
    """Train and leave adapter_model.safetensors and metrics.jsonl in `adapter_dir`.

    Resumes from the newest one in `checkpoints`. Raises InterruptedRunError after a checkpoint when `stop` says
    so, OutOfGpuMemoryError when the GPU is full, ConfigError for what SFTConfig, LoraConfig or bitsandbytes refuse and
    for a loss that is not finite.
    """
    started = time.monotonic()
    device = pick_device()
    try:
        startup = startup or StartUp()
        outcome = _optimise(spec, prepared, work_dir, adapter_dir, checkpoints, stop, reporter, device, startup)
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfGpuMemoryError(
            f"{device.name} ran out of memory: {error}",
            hint=f"smaller pieces of a step and recomputed activations were tried; what is left is a lower "
            f"TrainingArguments.max_length (the longest row has {_longest(prepared):,} tokens), 4 bit, a lower "
            "LoraConfig.r, or a larger GPU: `tuner plan WORKSPACE --gpu 24GB` names the fewest changes that fit",
        ) from error
    except RuntimeError as error:
        if is_worker() and "closed by peer" in str(error):
            raise TunerError("another training process has ended") from error  # which says why
        raise
    return replace(outcome, seconds=time.monotonic() - started)


def _optimise(
    spec: RunSpec,
    prepared: Prepared,
    work_dir: Path,
    adapter_dir: Path,
    checkpoints: Path,
    stop: Stop,
    reporter: Reporter,
    device: Device,
    startup: StartUp,
) -> Outcome:
    resume = newest_checkpoint(checkpoints, reporter)
    # The checkpoint carries the evaluation before the first step.
    pieces = choose_pieces(spec, prepared, work_dir / prepared.base_model_dir, device)
    evaluation_due = resume is not None and bool(read_seal(resume)["evaluation_due"])
    evaluate_first = prepared.evaluation is not None and (resume is None or evaluation_due)
    arguments = training_arguments(spec, prepared, device, pieces, checkpoints, evaluate_first=evaluate_first)
    with startup.part("model"):
        model, coverage, exact = _model(spec, prepared, work_dir, device, reporter, startup)
    _leave_if_asked(stop)
    make_directories(adapter_dir)
    metrics_file = adapter_dir / METRICS
    metrics_file.unlink(missing_ok=True)
    watches = spec.training.arguments.watchdog
    watchdog = Watchdog(shuffled=arguments.train_sampling_strategy != "sequential") if watches else None
    evaluates = prepared.evaluation is not None
    recorder = _Recorder(stop, reporter, metrics_file, watchdog=watchdog, evaluates=evaluates)
    keep_best = KeepBest(Rule.of(spec.training), model, checkpoints)
    first_step = _FirstStep(startup, device, reporter)
    callbacks = [recorder, keep_best, first_step]
    trainer = _trainer(model, exact, arguments, pieces, prepared, work_dir, callbacks, reporter, spec.trust_remote_code)
    trainer.keep_best, trainer.stop = keep_best, stop
    with startup.part("levers"):
        chosen = _take_levers(trainer, exact, device, spec, pieces, checkpoints)
    _leave_if_asked(stop)
    reporter.note(f"{device.name}: {chosen}")
    documents = arguments.per_device_train_batch_size * trainer.accelerator.num_processes
    if hint := small_steps(chosen.larger_steps_gain, documents):
        reporter.note(hint)
    state = TrainerState.load_from_json(str(resume / "trainer_state.json")) if resume else None
    if resume and state:
        reporter.note(f"resuming after step {state.global_step} of {state.max_steps}")
    if rank() == 0:
        keep_best.begin(resume)
    if (
        resume
        and state
        and (state.global_step >= state.max_steps or keep_best.rule.is_over(state.log_history, state.max_steps))
    ):
        trainer.finish_from(resume)
    else:
        if resume:
            trainer.add_callback(_Carry(trainer, resume))
        trainer.evaluation_due = evaluation_due
        try:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        except _OverError:
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)
    before, kept, after = _keep(trainer, prepared, reporter)
    recorder.record(trainer.state.log_history)
    history = metrics(trainer.state.log_history)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    save_adapter(model, adapter_dir, _adapter_dtype(spec.training))
    epochs = float(trainer.state.epoch)
    ranks = trainer.accelerator.num_processes
    return Outcome(
        coverage=coverage,
        lora_config=model.peft_config["default"].to_dict(),
        lora_defaults=LoraConfig().to_dict(),
        device=device,
        steps=trainer.state.global_step,
        epochs=epochs,
        examples=_examples(trainer.state.global_step, prepared.train.rows, arguments, ranks),
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=0.0,
        first_train_loss=losses[0],
        last_train_loss=losses[-1],
        eval_loss_before=before,
        eval_loss_after=after,
        kept_step=kept,
        versions=versions(),
        levers=chosen.told,
        startup=first_step.seconds,
    )


def _leave_if_asked(stop: Stop) -> None:
    """Where no step has been taken since the run began or went on, there is nothing to save."""
    stop.requested = _any_rank(stop.requested)
    if stop.requested:
        raise InterruptedRunError("stopped before another step was taken")


def small_steps(gain: float | None, documents: int) -> str | None:
    """What to say when LARGER_STEPS times the documents of a step would be `gain` times as fast; None: nothing."""
    if gain is None or gain < WORTH_SAYING:
        return None
    return (
        f"steps of {documents} documents leave the GPU waiting for its CPU: with {LARGER_STEPS * documents} it trains "
        f"{gain:.1f} times as many tokens a second (gradient_accumulation_steps; larger steps are another recipe)"
    )


def _examples(steps: int, rows: int, arguments: SFTConfig, ranks: int) -> int:
    """How many rows were trained on in these steps: an epoch's last one has what is left."""
    documents: int = arguments.per_device_train_batch_size * ranks
    epochs, more = divmod(steps, math.ceil(rows / documents))
    return epochs * rows + more * documents


def _model(
    spec: RunSpec, prepared: Prepared, work_dir: Path, device: Device, reporter: Reporter, startup: StartUp
) -> tuple[PeftModel, Coverage, Exact]:
    """The quantized base with new adapters, and what to know about them said."""
    seed = spec.training.arguments.seed
    transformers.set_seed(seed)
    base = startup.base_model() or load_base_model(
        work_dir / prepared.base_model_dir, spec.training, device, trust_remote_code=spec.trust_remote_code
    )
    with torch.autocast("cuda", device.dtype) if device.is_cuda else nullcontext():
        proved = prove(base)
    exact = Exact(
        packs=proved.packs and PACKING not in spec.disabled,
        learnt_head=proved.learnt_head and LEARNT_HEAD not in spec.disabled,
    )
    transformers.set_seed(seed)  # however many numbers loading drew
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, coverage, renamed = attach_lora(base, spec.training)
    said = (str(each.message).split() for each in caught if not issubclass(each.category, FutureWarning))
    said_by_peft = dict.fromkeys(f"PEFT: {' '.join(words)}" for words in said)
    if not has_plain_head(model.get_base_model()):
        exact = replace(exact, learnt_head=False)  # modules_to_save has made the head one that is trained
    for asked, got in renamed.items():
        reporter.note(f"LoraConfig.target_modules: {asked} is part of {got} in this model")
    reporter.note(str(coverage))
    if coverage.uncovered:
        reporter.warn(f"LoRA leaves out {', '.join(coverage.uncovered)}, as LoraConfig says")
    for line in (*said_by_peft, *vllm_problems(model.peft_config["default"].to_dict())):
        reporter.warn(line)
    return model, coverage, exact


def _take_levers(
    trainer: _Trainer, exact: Exact, device: Device, spec: RunSpec, estimated: Pieces, checkpoints: Path
) -> Choice:
    """Decide which short cuts are taken, or read what this run decided when it began, and put them on the model."""
    decided = checkpoints / LEVERS
    machine = ", ".join([device.name, *(f"{name} {number}" for name, number in versions().items())])
    chosen = _of_first_rank(_decided(decided, machine))
    if chosen is None:
        chosen = choose(
            trainer,
            exact,
            device,
            disabled=spec.disabled,
            estimated=estimated,
            checkpointing=spec.training.arguments.activation_checkpointing,
            machine=machine,
        )
        chosen = _agreed(chosen)
        if trainer.args.should_save:
            make_directories(decided.parent)
            chosen.save(decided)
    apply(chosen, trainer, exact, device)
    trainer.chosen = chosen
    return chosen


def _decided(file: Path, machine: str) -> Choice | None:
    """What was decided for this machine; None: nothing."""
    try:
        chosen = Choice.load(file)
    except (InputMissingError, ConfigError):
        return None
    return chosen if chosen.machine == machine else None


def _of_first_rank(chosen: Choice | None) -> Choice | None:
    """The first rank's for all: one with another kind of GPU, which alone would decide again, would wait for ever."""
    if not torch.distributed.is_initialized():
        return chosen
    said = [chosen.model_dump() if chosen else None]
    torch.distributed.broadcast_object_list(said)
    return Choice.model_validate(said[0]) if said[0] else None


def _agreed(chosen: Choice) -> Choice:
    """The first rank's levers for all, and as many tokens as the one with the least room takes."""
    if not torch.distributed.is_initialized():
        return chosen
    said: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(said, chosen.model_dump())
    every = [Choice.model_validate(one) for one in said]
    return every[0].model_copy(
        update={"tokens": min(one.tokens for one in every), "recomputes": any(one.recomputes for one in every)}
    )


def _trainer(
    model: PeftModel,
    exact: Exact,
    arguments: SFTConfig,
    pieces: Pieces,
    prepared: Prepared,
    work_dir: Path,
    callbacks: list[TrainerCallback],
    reporter: Reporter,
    trust_remote_code: bool = False,
) -> _Trainer:
    tokenizer = AutoTokenizer.from_pretrained(
        work_dir / prepared.tokenizer_dir, local_files_only=True, trust_remote_code=trust_remote_code
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.data for parameter in trained]
    with _refusals("TrainingArguments"):
        trainer = _Trainer(
            micro_batch_tokens=pieces.tokens,
            exact=exact,
            say=reporter.warn,
            model=model,
            args=arguments,
            train_dataset=_load_split(prepared.train, work_dir),
            eval_dataset=_load_split(prepared.evaluation, work_dir) if prepared.evaluation else None,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
            trainer.remove_callback(callback)
        for parameter, value in zip(trained, values, strict=True):
            # SFTTrainer casts adapters of a quantized model to bf16, where AdamW's late updates round to nothing:
            # those before it are taken back, as rounded biases would not be the base's.
            parameter.data = value
        # Only to hear now what they refuse; train() makes the scheduler again, for the real number of steps.
        trainer.create_optimizer_and_scheduler(num_training_steps=100)
    return trainer


def _keep(trainer: _Trainer, prepared: Prepared, reporter: Reporter) -> tuple[float | None, int, float | None]:
    """Make the model the adapter to keep: the held-out loss before training, the step kept, and its loss."""
    state = trainer.state
    if prepared.evaluation is None:
        return None, int(state.global_step), None
    if state.global_step not in held_out_losses(state.log_history):
        trainer.evaluate()
    if state.global_step < state.max_steps:
        reporter.note(f"the held-out loss falls no more: stopped after step {state.global_step} of {state.max_steps}")
    kept = trainer.keep_best.put_back(state)
    if kept != state.global_step:
        reporter.note(f"the adapter of step {kept} is kept: its held-out loss is the least")
    before = next(entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry)
    after = held_out_losses(state.log_history)[kept]
    if after >= before:
        reporter.warn(
            f"the adapter's held-out loss, {after:.4g}, is not less than the base model's, {before:.4g}: with "
            "--require 'eval_loss < base' it would not be pushed"
        )
    return before, kept, after


def _adapter_dtype(training: TrainingConfig) -> torch.dtype:
    """bf16, which every reader takes and which halves the file; fp32 for who asked for an fp32 model."""
    return torch.float32 if training.model.dtype == "float32" else torch.bfloat16


def save_adapter(model: PeftModel, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """adapter_model.safetensors, with the tensors named as PEFT names them."""
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(model).items())
    }
    save_file(state, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
