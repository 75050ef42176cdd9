"""What stops a training, and how far healthy ones are from it."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tuner.errors import ConfigError, DataError
from tuner.pipeline import watchdog
from tuner.pipeline.watchdog import Watchdog, check_finite

Entries = list[dict[str, float]]


def logged(*losses: float, norm: float = 1.0, every: int = 1) -> Entries:
    return [{"step": float(index * every), "loss": loss, "grad_norm": norm} for index, loss in enumerate(losses, 1)]


def falling(count: int, first: float = 2.0, last: float = 1.0) -> list[float]:
    return [last + (first - last) * math.exp(-4 * index / count) for index in range(count)]


def watch(entries: Entries, max_steps: int, *, shuffled: bool = True) -> None:
    """As a run does: one entry after the other."""
    dog = Watchdog(shuffled=shuffled)
    for entry in entries:
        dog.check([entry], max_steps)


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told_with_its_step(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match="loss is not finite at step 7"):
        check_finite([{"step": 7, name: value}])


def test_a_base_without_a_loss_is_not_for_want_of_a_lower_rate() -> None:
    for step, hint in ((0, "weights are damaged"), (7, "learning_rate")):
        with pytest.raises(ConfigError) as raised:
            check_finite([{"step": step, "eval_loss": math.nan}])
        assert hint in str(raised.value.hint)


def test_a_loss_of_zero_from_the_beginning_is_the_datas_fault() -> None:
    watch(logged(*[0.0] * 9, 1.0, *[0.0] * 9), 100)
    with pytest.raises(DataError, match="loss is 0 from the first log to step 10"):
        watch(logged(*[0.0] * 10), 100)


def test_a_loss_that_falls_to_zero_at_once_is_no_learning() -> None:
    """Reported of LoRA: 1.2, 0.8 and then 0 for ever."""
    with pytest.raises(ConfigError, match=r"fell from about 1\.\d+ to 0 at step 31 and stayed there"):
        watch(logged(*falling(30), *[0.0] * 10), 1000)
    watch(logged(*falling(30), *[0.0] * 9, 0.9), 1000)
    watch(logged(*falling(30), 0.005, *[0.0] * 10), 1000)  # learnt by heart


def test_gradients_of_zero_are_told_the_second_time() -> None:
    watch(logged(2.0, norm=0.0), 100)
    with pytest.raises(ConfigError, match="no gradient reaches the adapters: its norm is 0 at steps 1 and 2"):
        watch(logged(2.0, 2.0, norm=0.0), 100)
    watch(logged(0.001, 0.0, norm=0.0), 100)  # what is known has none


def test_a_log_without_a_gradient_norm_is_no_gradient_of_zero() -> None:
    watch([{"step": step, "loss": 2.0} for step in (1, 2, 3)], 100)


LOST = [7.5, 8.0, 7.9, 8.2, 7.7, 7.6, 8.1, 7.9, 7.8, 8.0]


def test_a_loss_that_jumps_and_stays_there_stops_the_run() -> None:
    steady = falling(30)
    watch(logged(*steady, *LOST[:9]), 1000)
    with pytest.raises(ConfigError, match=r"from about 1\.\d+ to 7\.9 and stayed there from step 31 to 40, .* norm 40"):
        watch(logged(*steady, *LOST, norm=40.0), 1000)


def test_rows_in_the_order_of_their_file_may_become_another_kind() -> None:
    watch(logged(*falling(30), *LOST), 1000, shuffled=False)


@pytest.mark.parametrize(
    "losses",
    [
        [*falling(30), *[9.0] * 9, 1.2, *[9.0] * 9],  # it came back
        [*falling(30, 0.02, 0.01), *[2.0] * 10],  # a hundred times a small loss is still a loss as others have
        [*falling(30), *[2.9] * 10],
        [*[6.0] * 9, *[20.0] * 10],  # nothing to compare with yet
    ],
)
def test_what_is_no_spike_does_not_stop(losses: list[float]) -> None:
    watch(logged(*losses), 1000)


def test_half_a_run_without_movement_stops_it_with_its_numbers() -> None:
    flat = logged(*[2.0] * 30, every=10)
    watch(flat[:24], 500)  # not half of it
    with pytest.raises(ConfigError, match=r"nothing was learnt in 250 of 500 steps: training loss 2 → 2$"):
        watch(flat, 500)
    held_out = [{"step": 0, "eval_loss": 2.1}, {"step": 100, "eval_loss": 2.0999}, {"step": 200, "eval_loss": 2.1001}]
    with pytest.raises(ConfigError, match=r"training loss 2 → 2, held-out loss 2\.1 → 2\.1"):
        watch([*held_out, *flat], 500)


@pytest.mark.parametrize(
    "entries",
    [
        [{"step": 0, "eval_loss": 2.1}, {"step": 100, "eval_loss": 2.09}, *logged(*[2.0] * 30, every=10)],
        # it may come back when the learning rate falls
        [{"step": 0, "eval_loss": 2.1}, {"step": 100, "eval_loss": 2.2}, *logged(*[2.0] * 30, every=10)],
        logged(*falling(30, 2.0, 1.98), every=10),  # one per cent is little, and something
        logged(*[2.0] * 60, every=1),  # too few steps to tell
    ],
)
def test_little_learning_is_left_to_gates(entries: Entries) -> None:
    watch(entries, 100 if len(entries) == 60 else 500)


@pytest.mark.parametrize("spread", [0.03, 0.1, 0.3])
def test_a_small_gain_among_uneven_documents_is_no_standstill(spread: float) -> None:
    """Without held-out rows there is only the training loss, and each log is of other documents."""
    for seed in range(20):
        uneven = random.Random(seed)
        losses = [loss * math.exp(uneven.gauss(0, spread)) for loss in falling(60, 1.0, 0.97)]
        watch(logged(*losses, every=10), 600)


# ── runs as people report them, drawn ────────────────────────────────────────────────────────────────────────────────

Draw = Callable[[random.Random, int], Iterator[float]]  # (chance, logs) → losses


def an_instruction_set(chance: random.Random, logs: int) -> Iterator[float]:
    first, last, spread = chance.uniform(0.5, 3), chance.uniform(0.3, 0.9), chance.uniform(0.02, 0.3)
    for loss in falling(logs, first, first * last):
        yield loss * math.exp(chance.gauss(0, spread))


def one_document_a_log(chance: random.Random, logs: int) -> Iterator[float]:
    """Some are a hundred times as hard as others, and one in fifty is noise."""
    for loss in falling(logs, 1.5, 0.8):
        yield chance.uniform(4, 11) if chance.random() < 0.02 else loss * math.exp(chance.gauss(0, 1.2))


def learnt_by_heart(chance: random.Random, logs: int) -> Iterator[float]:
    """Twenty epochs of few rows: steps down where an epoch begins, to a hundredth of a nat and less."""
    for log in range(logs):
        epoch = 20 * log // logs
        yield max(1e-6, 1.4 * 0.55**epoch) * math.exp(chance.gauss(0, 0.4))


def a_classifier(chance: random.Random, logs: int) -> Iterator[float]:
    """One token an answer: soon most batches are 0 to the last bit, and a wrong label is 15 nats."""
    for log in range(logs):
        sure = chance.random() < min(0.97, 3 * log / logs)
        yield 0.0 if sure else chance.choice((15.0, 4.0, 0.7, 0.1, 1e-3, 1e-5)) * chance.random()


def a_hump(chance: random.Random, logs: int) -> Iterator[float]:
    """A rate that is too high at its peak: worse than the base for half the run, and better at its end."""
    peak = chance.uniform(1.2, 2.5)
    for log in range(logs):
        part = log / logs
        yield (1 + (peak - 1) * math.sin(math.pi * min(1, 1.3 * part)) - 0.2 * part) * math.exp(chance.gauss(0, 0.05))


def of_strange_text(chance: random.Random, logs: int) -> Iterator[float]:
    """Hashes, names and a language that the base does not know."""
    for loss in falling(logs, chance.uniform(4, 8), 3.5):
        yield loss * math.exp(chance.gauss(0, 0.25))


def with_bad_batches(chance: random.Random, logs: int) -> Iterator[float]:
    """Up to five batches in a row at six times the loss, again and again."""
    bad = 0
    for loss in falling(logs, 1.2, 0.7):
        bad = bad - 1 if bad else chance.randrange(1, 6) if chance.random() < 0.03 else 0
        yield loss * (6 if bad else 1) * math.exp(chance.gauss(0, 0.1))


HEALTHY: tuple[Draw, ...] = (
    an_instruction_set,
    one_document_a_log,
    learnt_by_heart,
    a_classifier,
    a_hump,
    of_strange_text,
    with_bad_batches,
)


@pytest.mark.parametrize("draw", HEALTHY)
@pytest.mark.parametrize("evaluates", [False, True])
def test_no_healthy_run_is_stopped(draw: Draw, evaluates: bool) -> None:
    """A hundred runs of each kind, short and long, each judged at every log."""
    for seed in range(100):
        chance = random.Random(seed)
        logs = chance.choice((10, 60, 300, 1500)) if seed % 20 else 5000
        every = chance.choice((1, 1, 5, 10))
        losses = list(draw(chance, logs))
        entries: Entries = []
        for log, loss in enumerate(losses):
            if evaluates and log % max(1, logs // 5) == 0:
                held_out = 1.2 * sum(losses[max(0, log - 50) : log + 1]) / len(losses[max(0, log - 50) : log + 1])
                entries.append({"step": float(log * every), "eval_loss": held_out})
            entries.append({"step": float((log + 1) * every), "loss": loss, "grad_norm": min(loss, 1.0)})
        watch(entries, logs * every)


def _lost(chance: random.Random) -> list[float]:
    """About 1 for a while, then up to five times that within five logs, where it oscillates."""
    healthy = list(an_instruction_set(chance, 200))
    begin = chance.randrange(30, 150)
    usual = sum(healthy[begin - 20 : begin]) / 20
    top = max(5, usual * chance.uniform(4.5, 8))
    rising = [usual + (top - usual) * min(1, number / 5) for number in range(60)]
    return [*healthy[:begin], *(loss * math.exp(chance.gauss(0, 0.1)) for loss in rising)]


def _broken(chance: random.Random) -> list[float]:
    return [*list(an_instruction_set(chance, 200))[: chance.randrange(10, 150)], *[0.0] * 10]


def _still(chance: random.Random) -> list[float]:
    return [1.3 + chance.gauss(0, 1e-5) for _ in range(200)]


@pytest.mark.parametrize("draw", [_lost, _broken, _still])
def test_every_run_that_got_lost_is_stopped(draw: Callable[[random.Random], list[float]]) -> None:
    for seed in range(200):
        with pytest.raises((ConfigError, DataError)):
            watch(logged(*draw(random.Random(seed)), every=5), 1000)


# ── on real runs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(tmp_path: Path, rows: int = 40, **written: Any) -> Any:
    from test_train import arguments, trial

    tried = trial(tmp_path, arguments(**written), count=rows)
    tried.train()
    return tried.metrics()


def _spikes(entries: list[dict[str, float]]) -> Iterator[float]:
    """How often the median before each logged loss goes into it."""
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    for index in range(5, len(losses)):
        yield losses[index] / sorted(losses[max(0, index - 20) : index])[min(index, 20) // 2]


@pytest.mark.train
@pytest.mark.parametrize("rate", [2e-4, 2e-3, 2e-2])
def test_healthy_runs_are_far_from_every_limit(rate: float, tmp_path: Path) -> None:
    """Two documents a step and a log each step: as noisy as it gets."""
    entries = _run(tmp_path, max_steps=120, learning_rate=rate, gradient_accumulation_steps=1)
    assert max(_spikes(entries)) < watchdog.SPIKE / 2
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert min(losses) > 1000 * watchdog.ZERO
    assert min(entry["grad_norm"] for entry in entries if "grad_norm" in entry) > 0
    assert min(losses[60:]) < losses[0] * (1 - 10 * watchdog.MOVED)


@pytest.mark.train
def test_a_run_that_was_stopped_goes_on_when_the_check_is_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_train import arguments
    from tiny import Heard, make_job, prepared_job, rows_of

    from tuner.pipeline import run

    monkeypatch.setattr(watchdog, "LEARNING_STEPS", 20)
    still = {"max_steps": 40, "learning_rate": 1e-12, "lr_scheduler_type": "constant", "eval_strategy": "no"}
    still |= {"per_device_train_batch_size": 19, "gradient_accumulation_steps": 1, "save_steps": 7}
    heard = Heard()
    for turned_off in ({}, {"watchdog": False}):
        job = make_job(tmp_path, rows_of("messages", 20), arguments(**still, **turned_off))
        fetched, prepared = prepared_job(job)
        with nullcontext() if turned_off else pytest.raises(ConfigError, match="nothing was learnt in 20 of 40 steps"):
            run.train(job.spec, fetched, prepared, job.work_dir, heard)
    assert "resuming after step 14 of 40" in heard.notes


@pytest.mark.train
@pytest.mark.parametrize("on", [True, False])
def test_a_run_that_learns_nothing_is_stopped_unless_the_check_is_off(
    on: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "LEARNING_STEPS", 20)
    written: dict[str, Any] = {"max_steps": 40, "learning_rate": 1e-12, "lr_scheduler_type": "constant", "watchdog": on}
    written |= {"per_device_train_batch_size": 19, "gradient_accumulation_steps": 1, "eval_strategy": "no"}
    stopped = pytest.raises(ConfigError, match="nothing was learnt in 20 of 40 steps")
    with stopped if on else nullcontext():
        _run(tmp_path, rows=20, **written)
