"""The first step of Tuner is that of plain TRL and PEFT: the same loss, the same gradients."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_base

pytestmark = pytest.mark.train

PHI_3, QWEN = "phi-3-mini-4k-instruct", "qwen2.5-coder-7b-instruct"  # q, k and v in one matrix, and apart


@pytest.fixture(scope="module")
def parity() -> Iterator[Any]:
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        import parity

        yield parity
    finally:
        sys.path.pop(0)


# TRL's padding, and its two names for activation checkpointing
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("dtype", "loss", "norm"), [("float32", 1e-5, 1e-5), ("bfloat16", 1e-3, 1e-2)])
@pytest.mark.parametrize("preset", [PHI_3, QWEN])
def test_the_first_step_is_that_of_plain_trl(preset: str, dtype: str, loss: float, norm: float, parity: Any) -> None:
    import torch

    from tuner.pipeline.model import Device

    device = Device(torch.device("cpu"), getattr(torch, dtype), "CPU")
    base = tiny_base(preset)
    plain, ours = parity.measure(base, preset, device)
    assert plain.norm > 0.01
    apart = ours.differs(plain)
    assert apart[0] < loss
    assert apart[1] < norm


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_single_other_label_would_be_seen(parity: Any) -> None:
    """The limits mean something: one token of 250 that is not learnt is ten times too much."""
    import torch

    from tuner.pipeline.model import Device
    from tuner.presets import find_preset

    device = Device(torch.device("cpu"), torch.float32, "CPU")
    rows = parity.make_rows(200)
    other = [dict(row) for row in rows]
    other[0]["labels"] = [*other[0]["labels"][:-1], -100]
    plain = parity.plain(tiny_base(), rows, device, find_preset(PHI_3).linear_modules)
    ours = parity.ours(tiny_base(), other, device, PHI_3)
    loss, norm = ours.differs(plain)
    assert loss > 1e-4
    assert norm > 1e-4
