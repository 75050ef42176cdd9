"""Whether a training still makes sense, told from the losses it has logged. A run that does not is stopped with why.

The rules are about what was logged and nothing else, so they cost no synchronisation, and a resumed run is judged as an
unbroken one. A false alarm costs a paid run, and a miss costs little, as the best adapter is kept, early stopping ends
what gets worse and gates keep it from the registry. So each limit is far from what healthy runs do
(tests/test_watchdog.py draws thousands). `TrainingArguments.watchdog: false` leaves only the first rule.

What people report of LoRA: 0.5 to 3 nats a token at first, ten times less in the third epoch of few rows and 0 for a
classifier that is sure; single batches at five times the usual, and steps down where an epoch begins. A run that got
lost goes from about 1 to between 3 and 8 and oscillates there; one that broke goes from about 1 to 0 at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from tuner.errors import ConfigError, DataError

ZERO = 1e-7  # nats a token: as little as fp32 can tell from none
ZERO_LOGS = 10  # in a row: a classifier's batches are 0 now and then
NOT_KNOWN = 0.01  # nats a token: who learns passes through less before there is nothing left
GRADIENT_LOSS = 0.01  # nats a token: above it there is always a gradient
SPIKE = 3.0  # times the median before it,
SPIKE_LOSS = 3.0  # at least so many nats a token, and more than three in four before it
SPIKE_LOGS = 10  # in a row: a single bad batch is none
BEFORE_LOGS = 20  # before the spike; fewer than ten tell nothing
FIRST_LOGS = 5
MOVED = 0.001  # a share of the loss: less is no movement
LEARNING_STEPS = 100  # fewer may all be warm-up
LEARNING_LOGS = 20

Entries = Sequence[Mapping[str, float]]  # of metrics.jsonl
_OFF = "TrainingArguments.watchdog: false turns this check off, and the run goes on from its last checkpoint"


def check_finite(newest: Entries) -> None:
    """Raises ConfigError for a loss that is no number."""
    for entry in newest:
        for name in ("loss", "eval_loss"):
            if not math.isfinite(entry.get(name, 0.0)):
                held_out = "held-out " if name == "eval_loss" else ""
                raise ConfigError(
                    f"the {held_out}loss is not finite at step {int(entry['step'])}",
                    hint="lower TrainingArguments.learning_rate"
                    if entry["step"]
                    else "nothing was trained yet: the base's weights are damaged, or too large for fp16",
                )


@dataclass
class Watchdog:
    """What a run has logged. `shuffled`: rows come in no order; else the next may be of a kind that is much harder."""

    shuffled: bool = True
    _trained: list[Mapping[str, float]] = field(default_factory=list)
    _held_out: list[float] = field(default_factory=list)

    def check(self, newest: Entries, max_steps: int) -> None:
        """Raises DataError for rows that teach nothing, ConfigError for a run that broke, got lost or gets nowhere."""
        self._trained += (entry for entry in newest if "loss" in entry)
        self._held_out += (entry["eval_loss"] for entry in newest if "eval_loss" in entry)
        if not self._trained:
            return
        _check_zero(self._trained)
        _check_gradient(self._trained[-2:])
        if self.shuffled:
            _check_spike(self._trained[-SPIKE_LOGS - BEFORE_LOGS :])
        _check_movement(self._trained, self._held_out, max_steps)


def _check_zero(trained: Entries) -> None:
    """A loss of 0 is an answer that is known by heart: good at the end of a run, and suspicious before."""
    recent, before = trained[-ZERO_LOGS:], trained[-ZERO_LOGS - BEFORE_LOGS : -ZERO_LOGS]
    if len(recent) < ZERO_LOGS or max(entry["loss"] for entry in recent) > ZERO:
        return
    if not before:
        raise DataError(
            f"the training loss is 0 from the first log to step {int(recent[-1]['step'])}: the model knows every "
            "answer already",
            hint=f"`tuner data preview FILE` shows what is learnt; {_OFF}",
        )
    if len(before) >= ZERO_LOGS and min(entry["loss"] for entry in before) > NOT_KNOWN:
        usual = median(entry["loss"] for entry in before)
        raise ConfigError(
            f"the training loss fell from about {usual:.3g} to 0 at step {int(recent[0]['step'])} and stayed there: "
            "nobody learns that fast",
            hint=f"lower TrainingArguments.learning_rate; {_OFF}",
        )


def _check_gradient(recent: Entries) -> None:
    if len(recent) == 2 and all(e.get("grad_norm") == 0 and e["loss"] > GRADIENT_LOSS for e in recent):
        steps = " and ".join(str(int(entry["step"])) for entry in recent)
        raise ConfigError(
            f"no gradient reaches the adapters: its norm is 0 at steps {steps}",
            hint=f"leave out what LoraConfig says of layers and modules; {_OFF}",
        )


def _check_spike(trained: Entries) -> None:
    recent, before = trained[-SPIKE_LOGS:], trained[:-SPIKE_LOGS]
    if len(before) < SPIKE_LOGS:
        return
    losses = [entry["loss"] for entry in before]
    usual = median(losses)
    if min(entry["loss"] for entry in recent) <= max(SPIKE * usual, SPIKE_LOSS, sorted(losses)[3 * len(losses) // 4]):
        return
    norms = [entry["grad_norm"] for entry in recent if "grad_norm" in entry]
    raise ConfigError(
        f"the training loss went from about {usual:.3g} to {median(entry['loss'] for entry in recent):.3g} and stayed "
        f"there from step {int(recent[0]['step'])} to {int(recent[-1]['step'])}"
        + (f", with gradients of norm {max(norms):.3g}" if norms else ""),
        hint=f"lower TrainingArguments.learning_rate, or set max_grad_norm; {_OFF}",
    )


def _spread(trained: Entries) -> float:
    """How far the logged losses are from their median, most of them less."""
    losses = [entry["loss"] for entry in trained]
    middle = median(losses)
    return median(abs(loss - middle) for loss in losses)


def _check_movement(trained: Entries, held_out: Sequence[float], max_steps: int) -> None:
    """Half a run in which the losses did not move: no adapter comes of it. One that moves the wrong way may come back
    when the learning rate falls, and is early stopping's and the gates' to judge.

    Logged training losses are of other documents each time, so without held-out rows a small gain drowns in their
    spread: then only a loss that does not move at all tells that nothing is learnt.
    """
    step = trained[-1]["step"]
    if step < max(LEARNING_STEPS, max_steps / 2) or len(trained) < LEARNING_LOGS:
        return
    first, now = (median(entry["loss"] for entry in part) for part in (trained[:FIRST_LOGS], trained[-10:]))
    if now < first * (1 - MOVED):
        return
    if held_out[1:]:
        if any(abs(loss - held_out[0]) > MOVED * held_out[0] for loss in held_out[1:]):
            return
    elif _spread(trained) > MOVED * first:
        return
    losses = [("training", first, now), *([("held-out", held_out[0], held_out[-1])] if held_out[1:] else [])]
    said = ", ".join(f"{name} loss {before:.4g} → {after:.4g}" for name, before, after in losses)
    raise ConfigError(
        f"nothing was learnt in {int(step)} of {max_steps} steps: {said}",
        hint=f"raise TrainingArguments.learning_rate, or see what is learnt with `tuner data preview`; {_OFF}",
    )
