"""What stops a training, and how far healthy ones are from it."""

import math
import random
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tuner.errors import ConfigError, DataError
from tuner.pipeline import watchdog
from tuner.pipeline.watchdog import check, check_finite


def logged(*losses: float, norm: float = 1.0, every: int = 1) -> list[dict[str, float]]:
    return [{"step": float(index * every), "loss": loss, "grad_norm": norm} for index, loss in enumerate(losses, 1)]


def falling(count: int, first: float = 2.0, last: float = 1.0) -> list[float]:
    return [last + (first - last) * math.exp(-4 * index / count) for index in range(count)]


@pytest.mark.parametrize("name", ["loss", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_told_with_its_step(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match="loss is not finite at step 7"):
        check_finite([{"step": 7, name: value}])


def test_a_loss_of_zero_is_the_datas_fault() -> None:
    with pytest.raises(DataError, match="loss is 0 at step 3"):
        check(logged(2.0, 1.0, 0.0), 100)


def test_gradients_of_zero_are_told_the_second_time() -> None:
    check(logged(2.0, norm=0.0), 100)
    with pytest.raises(ConfigError, match="no gradient reaches the adapters: its norm is 0 at steps 1 and 2"):
        check(logged(2.0, 2.0, norm=0.0), 100)


def test_a_log_without_a_gradient_norm_is_no_gradient_of_zero() -> None:
    check([{"step": step, "loss": 2.0} for step in (1, 2, 3)], 100)


def test_a_loss_that_jumps_and_stays_there_stops_the_run() -> None:
    steady, lost = falling(30), [7.5, 8.0, 7.9, 8.2, 7.7]
    check(logged(*steady, *lost[:4]), 1000)
    with pytest.raises(ConfigError, match=r"from about 1\.\d+ to 7\.9 and stayed there from step 31 to 35, .* norm 40"):
        check(logged(*steady, *lost, norm=40.0), 1000)


@pytest.mark.parametrize(
    "losses",
    [
        [*falling(30), 9.0, 9.0, 9.0, 9.0, 1.2, 9.0],  # it came back
        [*falling(30, 0.02, 0.01), *[0.2] * 5],  # thrice a small loss is a small loss
        [*falling(30), *[2.9] * 5],
        [*[6.0] * 4, *[20.0] * 5],  # nothing to compare with yet
    ],
)
def test_what_is_no_spike_does_not_stop(losses: list[float]) -> None:
    check(logged(*losses), 1000)


def test_half_a_run_without_learning_stops_it_with_its_numbers() -> None:
    flat = logged(*[2.0] * 30, every=10)
    check(flat[:24], 500)  # not half of it
    with pytest.raises(ConfigError, match=r"nothing was learnt in 300 of 500 steps: training loss 2 → 2$"):
        check(flat, 500)
    held_out = [{"step": 0, "eval_loss": 2.1}, {"step": 100, "eval_loss": 2.0999}, {"step": 200, "eval_loss": 2.2}]
    with pytest.raises(ConfigError, match=r"training loss 2 → 2, held-out loss 2\.1 → 2\.1"):
        check([*held_out, *flat], 500)


@pytest.mark.parametrize(
    "entries",
    [
        [*logged(*[2.0] * 30, every=10), {"step": 0, "eval_loss": 2.1}, {"step": 100, "eval_loss": 2.0}],
        logged(*falling(30, 2.0, 1.98), every=10),  # one per cent is little, and something
        logged(*[2.0] * 60, every=1),  # too few steps to tell
    ],
)
def test_little_learning_is_left_to_gates(entries: list[dict[str, float]]) -> None:
    check(entries, 100 if len(entries) == 60 else 500)


@pytest.mark.parametrize("spread", [0.03, 0.1, 0.3])
def test_a_small_gain_among_uneven_documents_is_no_standstill(spread: float) -> None:
    """Without held-out rows there is only the training loss, and each log is of other documents."""
    for seed in range(20):
        uneven = random.Random(seed)
        losses = [loss * math.exp(uneven.gauss(0, spread)) for loss in falling(60, 1.0, 0.97)]
        for end in range(1, 61):
            check(logged(*losses[:end], every=10), 600)


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
    assert min(losses) > 1000 * watchdog.NOTHING_TO_LEARN
    assert min(entry["grad_norm"] for entry in entries if "grad_norm" in entry) > 0
    assert min(losses[60:]) < losses[0] * (1 - 10 * watchdog.LEARNING_SHARE)


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
