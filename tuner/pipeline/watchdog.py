"""Whether a training still makes sense, told from the losses it has logged. A run that does not is stopped with why.

The rules are about what was logged and nothing else, so they cost no synchronisation, and a resumed run is judged as an
unbroken one. Their limits are far from what healthy runs do (tests/test_watchdog.py says how far); what is merely poor
is left to early stopping and to gates. `TrainingArguments.watchdog: false` leaves only the first rule.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from tuner.errors import ConfigError, DataError

NOTHING_TO_LEARN = 1e-7  # nats a token: a model that knows every row by heart stays above it
SPIKE = 3.0  # times the median before it, and at least
SPIKE_AT_LEAST = 1.0  # nats a token above it
SPIKE_LOGS = 5  # in a row: a single bad batch is none
MEDIAN_LOGS = 20  # before the spike; fewer than five tell nothing
LEARNING_SHARE = 0.001  # that little better in half a run is nothing learnt
LEARNING_STEPS = 100  # fewer may all be warm-up

Entries = Sequence[Mapping[str, float]]  # of metrics.jsonl
_OFF = "TrainingArguments.watchdog: false turns this check off"


def check_finite(newest: Entries) -> None:
    """Raises ConfigError for a loss that is no number."""
    for entry in newest:
        for name in ("loss", "eval_loss"):
            if not math.isfinite(entry.get(name, 0.0)):
                held_out = "held-out " if name == "eval_loss" else ""
                raise ConfigError(
                    f"the {held_out}loss is not finite at step {int(entry['step'])}",
                    hint="lower TrainingArguments.learning_rate",
                )


def check(entries: Entries, max_steps: int) -> None:
    """Raises DataError for rows that teach nothing, ConfigError for a run that got lost or does not get anywhere."""
    trained = [entry for entry in entries if "loss" in entry]
    if not trained:
        return
    _check_signal(trained)
    _check_spike(trained)
    _check_learning(trained, entries, max_steps)


def _check_signal(trained: Entries) -> None:
    now = trained[-1]
    if now["loss"] <= NOTHING_TO_LEARN:
        raise DataError(
            f"the training loss is 0 at step {int(now['step'])}: the model knows every answer already",
            hint=f"`tuner data preview FILE` shows what is learnt; {_OFF}",
        )
    if len(trained) > 1 and all(entry.get("grad_norm") == 0 for entry in trained[-2:]):
        raise ConfigError(
            f"no gradient reaches the adapters: its norm is 0 at steps {int(trained[-2]['step'])} and "
            f"{int(now['step'])}",
            hint=f"leave out what LoraConfig says of layers and modules; {_OFF}",
        )


def _check_spike(trained: Entries) -> None:
    recent, before = trained[-SPIKE_LOGS:], trained[-SPIKE_LOGS - MEDIAN_LOGS : -SPIKE_LOGS]
    if len(before) < SPIKE_LOGS:
        return
    usual = median(entry["loss"] for entry in before)
    if min(entry["loss"] for entry in recent) <= max(SPIKE * usual, usual + SPIKE_AT_LEAST):
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


def _check_learning(trained: Entries, entries: Entries, max_steps: int) -> None:
    """Half a run in which neither the training loss nor the held-out loss became any better.

    Logged training losses are of other documents each time, so without held-out rows a small gain drowns in their
    spread: then only a loss that does not move at all tells that nothing is learnt.
    """
    step = trained[-1]["step"]
    if step < max(LEARNING_STEPS, max_steps / 2) or len(trained) < 4 * SPIKE_LOGS:
        return
    first, now = (
        median(entry["loss"] for entry in part) for part in (trained[:SPIKE_LOGS], trained[-2 * SPIKE_LOGS :])
    )
    held_out = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    losses = [("training", first, now), *([("held-out", held_out[0], min(held_out[1:]))] if held_out[1:] else [])]
    if any(after < before * (1 - LEARNING_SHARE) for _, before, after in losses):
        return
    if not held_out[1:] and _spread(trained) > LEARNING_SHARE * first:
        return
    said = ", ".join(f"{name} loss {before:.4g} → {after:.4g}" for name, before, after in losses)
    raise ConfigError(
        f"nothing was learnt in {int(step)} of {max_steps} steps: {said}",
        hint=f"raise TrainingArguments.learning_rate, or see what is learnt with `tuner data preview`; {_OFF}",
    )
