"""Which adapter of a run is kept, and when going on is no use: both follow from the held-out losses alone.

So a resumed run decides as an unbroken one does, and every process of a run as the others. The weights of the best step
so far lie beside the checkpoints, and in each of them, so that a checkpoint has all that going on from it needs.
"""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuner.durable import make_directories
from tuner.pipeline.checkpoints import room_for
from tuner.training_settings import TrainingConfig

PATIENT_SHARE = 0.4  # of all steps; that long without a better loss, and at least two evaluations
_NAME = "best-{}.safetensors"


@dataclass(frozen=True)
class Rule:
    """What TrainingArguments says: keep the best or the last adapter, and how many evaluations to wait for a better.

    `patience` None waits for PATIENT_SHARE of the run, however often it evaluates; 0 waits for ever. A loss counts as
    better when it is less by more than `threshold`.
    """

    keeps_best: bool = True
    patience: int | None = None
    threshold: float = 0.0

    @classmethod
    def of(cls, training: TrainingConfig) -> "Rule":
        return cls(
            keeps_best=training.arguments.load_best_model_at_end,
            patience=training.arguments.early_stopping_patience,
            threshold=training.arguments.early_stopping_threshold,
        )

    def best_step(self, log_history: Sequence[Mapping[str, float]]) -> int | None:
        """The step with the least held-out loss, the later of equal ones; None before the first evaluation in training.

        The model before training is no candidate: an adapter that changes nothing is not worth keeping.
        """
        losses = held_out_losses(log_history)
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def is_over(self, log_history: Sequence[Mapping[str, float]], max_steps: int) -> bool:
        """Whether the held-out loss has not become better for too long."""
        best, best_step, waited = math.inf, 0, 0
        last = 0
        for step, loss in held_out_losses(log_history).items():
            last = step
            if loss < best - self.threshold:
                best, best_step, waited = loss, step, 0
            else:
                waited += 1
        if self.patience is not None:
            return 0 < self.patience <= waited
        return waited >= 2 and last - best_step >= PATIENT_SHARE * max_steps


def held_out_losses(log_history: Sequence[Mapping[str, float]]) -> dict[int, float]:
    """Step → held-out loss of the evaluations during training, in their order."""
    return {int(entry["step"]): entry["eval_loss"] for entry in log_history if "eval_loss" in entry and entry["step"]}


class KeepBest(TrainerCallback):  # type: ignore[misc]
    """Keeps the weights of the best evaluation in `directory`, and ends a run whose best is too long ago."""

    def __init__(self, rule: Rule, model: nn.Module, directory: Path) -> None:
        self.rule = rule
        self._model = model
        self._directory = directory

    def begin(self, resume: Path | None) -> None:
        """Have what the checkpoint has, and nothing else."""
        make_directories(self._directory)
        for path in self._directory.glob(_NAME.format("*")):
            path.unlink()
        if resume:
            self._copy(resume, self._directory)

    def copy_into(self, checkpoint: Path) -> None:
        """Let the checkpoint have the best weights so far."""
        self._copy(self._directory, checkpoint)

    @staticmethod
    def _copy(source: Path, target: Path) -> None:
        for path in source.glob(_NAME.format("*")):
            copy = target / path.name
            copy.unlink(missing_ok=True)
            try:
                os.link(path, copy)
            except OSError:  # not every file system has links
                shutil.copyfile(path, copy)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        is_best = self.rule.best_step(state.log_history) == state.global_step
        if is_best and self.rule.keeps_best and state.is_world_process_zero:
            self._save(state.global_step)
        if state.global_step < state.max_steps and self.rule.is_over(state.log_history, state.max_steps):
            control.should_training_stop = True
            control.should_save = True  # what follows may still fail
        return control

    def _save(self, step: int) -> None:
        path = self._directory / _NAME.format(step)
        partial = path.with_suffix(".partial")
        weights = {name: p.detach().to("cpu").contiguous() for name, p in _trained(self._model).items()}
        with room_for(partial):
            save_file(weights, partial)
        partial.replace(path)
        for other in self._directory.glob(_NAME.format("*")):
            if other != path:
                other.unlink()

    def put_back(self, state: TrainerState) -> int:
        """Make the model what it was at the step to keep; that step."""
        best = self.rule.best_step(state.log_history) if self.rule.keeps_best else None
        if best is None or best == state.global_step:
            return int(state.global_step)
        if not state.is_world_process_zero:
            return best  # the first process alone saves the adapter, and then clears this directory away
        weights = load_file(self._directory / _NAME.format(best))
        with torch.no_grad():
            for name, parameter in _trained(self._model).items():
                parameter.copy_(weights[name])
        return best


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
