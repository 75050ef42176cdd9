"""The optimisation loop: TRL's SFTTrainer over token rows whose labels are already decided."""

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoTokenizer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from tuner.errors import ConfigError, InterruptedRunError, OutOfGpuMemoryError, TunerError
from tuner.pipeline.libraries import versions
from tuner.pipeline.model import Coverage, Device, attach_lora, load_base_model, pick_device
from tuner.runspec import Prepared, Progress, Reporter, RunSpec, Split

CHECKPOINT_INTERVAL_S = 600  # the most work that a lost machine costs
KEPT_CHECKPOINTS = 2  # the one before is there when the newest was not written whole


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
    history: list[dict[str, float]]
    versions: dict[str, str]


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
        """Signals come here while the block runs. Only the main thread may enter it."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _Recorder(TrainerCallback):  # type: ignore[misc]
    """Reports each log, keeps metrics.jsonl, asks for recovery checkpoints, obeys Stop."""

    def __init__(self, stop: Stop, reporter: Reporter, metrics_file: Path) -> None:
        self._stop = stop
        self._reporter = reporter
        self._metrics_file = metrics_file
        self._last_checkpoint = time.monotonic()
        self._last_log = (time.monotonic(), 0.0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._stop.requested:
            control.should_save = control.should_training_stop = True
        elif time.monotonic() - self._last_checkpoint >= CHECKPOINT_INTERVAL_S:
            control.should_save = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last_checkpoint = time.monotonic()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        entries = metrics(state.log_history)
        self._metrics_file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
        if "loss" not in (kwargs.get("logs") or {}):
            return  # an evaluation, or the summary at the end
        now, tokens = time.monotonic(), float(state.num_input_tokens_seen)
        before, tokens_before = self._last_log
        values = {"loss": entries[-1]["loss"], "tokens_per_s": (tokens - tokens_before) / max(now - before, 1e-9)}
        self._last_log = (now, tokens)
        if not math.isfinite(values["loss"]):
            raise TunerError(
                f"the loss is {values['loss']} at step {state.global_step}",
                hint="lower TrainingArguments.learning_rate; the last checkpoint is kept",
            )
        self._reporter.progress(
            Progress("train", "training", state.global_step, state.max_steps, "steps", values=values)
        )


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
        {names[key]: entry[key] for key in names if key in entry}
        for entry in log_history
        if "loss" in entry or "eval_loss" in entry
    ]


class TokenMeanTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose evaluation loss is the mean over supervised tokens, not a mean of batch means."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        training = self.model.training
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        with torch.no_grad():
            for batch in self.get_eval_dataloader(eval_dataset):
                inputs = self._prepare_inputs(batch)
                with self.compute_loss_context_manager():
                    output = self.model(**inputs, use_cache=False, fused_lm_head=True)
                total -= output.log_probs.double().sum().cpu()
                count += int(output.label_mask.sum())
        figures = {f"{metric_key_prefix}_loss": float(total) / max(count, 1)}
        self.log(dict(figures))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        self.model.train(training)
        return figures

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: adapter.py writes the card, once, with what the run really did."""


def _load_split(split: Split, work_dir: Path) -> Dataset:
    dataset = Dataset.from_file(str(work_dir / split.path))
    return dataset.select_columns(["input_ids", "labels"])


def training_arguments(spec: RunSpec, prepared: Prepared, device: Device, output_dir: Path) -> SFTConfig:
    """SFTConfig from TrainingArguments, with what only the machine decides: precision and activation checkpointing.

    Raises ConfigError in SFTConfig's own words.
    """
    written = {key: value for key, value in spec.training.section("TrainingArguments").items() if value is not None}
    recomputes = written.pop("gradient_checkpointing", written.pop("activation_checkpointing", device.is_cuda))
    written["gradient_checkpointing"] = recomputes
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__:  # its name since transformers 5.20
        written["activation_checkpointing"] = recomputes
    if not device.is_cuda:
        written |= {"bf16": False, "fp16": False, "use_cpu": True}
    elif "bf16" not in written and "fp16" not in written:
        written |= {"bf16": device.dtype is torch.bfloat16, "fp16": device.dtype is torch.float16}
    if prepared.evaluation is None:
        written |= {"eval_strategy": "no", "load_best_model_at_end": False}
    if "logging_steps" not in written:
        written["logging_steps"] = max(1, min(10, _steps(written, prepared.train.rows) // 20))
    ours = {
        "output_dir": str(output_dir),
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,  # prepare has cut
        "packing": False,
        "remove_unused_columns": True,
        "disable_tqdm": True,
        "push_to_hub": False,
        "include_num_input_tokens_seen": "non_padding",
        "save_total_limit": KEPT_CHECKPOINTS,
        "logging_nan_inf_filter": False,  # a NaN must be seen, and the filter costs a synchronisation a step
        "average_tokens_across_devices": True,
    }
    try:
        return SFTConfig(**(written | ours))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"TrainingArguments: {error}") from error


def _steps(arguments: dict[str, Any], rows: int) -> int:
    """About how many optimizer steps there will be, on one GPU."""
    if arguments.get("max_steps", -1) > 0:
        return int(arguments["max_steps"])
    documents = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    steps: float = arguments["num_train_epochs"] * rows / documents
    return math.ceil(steps)


def optimise(
    spec: RunSpec,
    prepared: Prepared,
    work_dir: Path,
    adapter_dir: Path,
    checkpoints: Path,
    stop: Stop,
    reporter: Reporter,
) -> Outcome:
    """Train and leave adapter_model.safetensors and metrics.jsonl in `adapter_dir`.

    Resumes from the newest one in `checkpoints`. Raises InterruptedRunError after a checkpoint when `stop` says
    so, OutOfGpuMemoryError when the GPU is full, ConfigError for what SFTConfig, LoraConfig or bitsandbytes refuse.
    """
    started = time.monotonic()
    device = pick_device()
    seed = int(spec.training.value("TrainingArguments", "seed"))
    transformers.set_seed(seed)
    base = load_base_model(
        work_dir / prepared.base_model_dir, spec.training, device, trust_remote_code=spec.trust_remote_code
    )
    tokenizer = AutoTokenizer.from_pretrained(work_dir / prepared.tokenizer_dir, local_files_only=True)
    transformers.set_seed(seed)
    model, coverage, renamed = attach_lora(base, spec.training)
    for asked, got in renamed.items():
        reporter.note(f"LoraConfig.target_modules: {asked} is part of {got} in this model")
    reporter.note(str(coverage))
    if coverage.uncovered:
        reporter.warn(f"LoRA leaves out {', '.join(coverage.uncovered)}, as LoraConfig.target_modules says")
    adapter_dir.mkdir(parents=True, exist_ok=True)
    metrics_file = adapter_dir / "metrics.jsonl"
    trainer = TokenMeanTrainer(
        model=model,
        args=training_arguments(spec, prepared, device, checkpoints),
        train_dataset=_load_split(prepared.train, work_dir),
        eval_dataset=_load_split(prepared.evaluation, work_dir) if prepared.evaluation else None,
        processing_class=tokenizer,
        callbacks=[_Recorder(stop, reporter, metrics_file)],
    )
    for callback in (transformers.PrinterCallback, transformers.ProgressCallback):
        trainer.remove_callback(callback)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # SFTTrainer casts adapters of a quantized model to bf16, where AdamW's late updates round to nothing.
            parameter.data = parameter.data.float()
    resume = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    before = None
    try:
        if resume:
            reporter.note(f"resuming after step {resume.rpartition('-')[2]}")
        elif prepared.evaluation:
            before = trainer.evaluate()["eval_loss"]
        mean_loss = trainer.train(resume_from_checkpoint=resume).training_loss
        if stop.requested and trainer.state.global_step < trainer.state.max_steps:
            raise InterruptedRunError(
                f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; checkpoint saved"
            )
        after = trainer.evaluate()["eval_loss"] if prepared.evaluation else None
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfGpuMemoryError(
            f"{device.name} ran out of memory: {error}",
            hint="lower TrainingArguments.per_device_train_batch_size (the documents per step stay as they are when "
            "gradient_accumulation_steps is not written) or max_length",
        ) from error
    history = metrics(trainer.state.log_history)
    losses = [entry["loss"] for entry in history if "loss" in entry] or [mean_loss]
    if before is None:
        before = next((entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] == 0), None)
    metrics_file.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")
    lora = model.peft_config["default"]
    save_adapter(model, adapter_dir)
    return Outcome(
        coverage=coverage,
        lora_config=lora.to_dict(),
        lora_defaults=LoraConfig().to_dict(),
        device=device,
        steps=trainer.state.global_step,
        epochs=float(trainer.state.epoch or 0),
        examples=round((trainer.state.epoch or 0) * prepared.train.rows),
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=time.monotonic() - started,
        first_train_loss=losses[0],
        last_train_loss=losses[-1],
        eval_loss_before=before,
        eval_loss_after=after,
        history=history,
        versions=versions(),
    )


def save_adapter(model: PeftModel, directory: Path) -> None:
    """adapter_model.safetensors in bf16, as PEFT names the tensors."""
    state = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(model).items())
    }
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
