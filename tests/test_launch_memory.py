"""One of two training processes runs out of memory: the step is the same, and where nothing helps both end with 73."""

import os
import stat
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from test_launch import CONFIG, metrics, ready
from tiny import Heard

from tuner.errors import OutOfGpuMemoryError
from tuner.pipeline.launch import train_in_processes
from tuner.runspec import Trained

pytestmark = pytest.mark.train

# Nine rows in steps of eight: every second step is one row, and the second process has none of it.
ROWS = 10
SMALL_PIECES = 60  # tokens at once: some rows of a step together, not all

# A python that is out of memory in the forwards of rank 1 that FAULTY names, counted from the first step's first.
_PYTHON = """\
#!{python}
import os, runpy, sys
import torch
from tuner.pipeline import train, trainer

train.CPU_MICRO_BATCH_TOKENS = {pieces}
forwards = 0
in_a_step = False
accumulate, nll = trainer.PackedTrainer._accumulate, trainer.summed_nll

def watched(*arguments):
    global in_a_step
    in_a_step = True
    try:
        return accumulate(*arguments)
    finally:
        in_a_step = False

def faulty(*arguments):
    global forwards
    forwards += in_a_step
    if in_a_step and os.environ.get("RANK") == "1" and forwards in {faulty}:
        raise torch.OutOfMemoryError("CUDA out of memory (a test says so)")
    return nll(*arguments)

trainer.PackedTrainer._accumulate, trainer.summed_nll = watched, faulty
sys.argv = ["tuner", *sys.argv[3:]]  # after -m tuner
runpy.run_module("tuner", run_name="__main__")
"""


def python_that_is_out_of_memory(directory: Path, faulty: str) -> str:
    script = directory / "python"
    text = _PYTHON.format(python=sys.executable, pieces=SMALL_PIECES, faulty=faulty)
    script.write_text(textwrap.dedent(text), encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def train_with(directory: Path, faulty: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """The work directory, and what the second process said."""
    directory.mkdir()
    job, _, _ = ready(directory, CONFIG, count=ROWS)
    monkeypatch.setattr(sys, "executable", python_that_is_out_of_memory(directory, faulty))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    train_in_processes(job.spec, job.work_dir, 2, Heard())
    return job.work_dir, (job.work_dir / "rank-1.log").read_text("utf-8")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return train_with(tmp_path_factory.mktemp("undisturbed") / "run", "()", patch)[0]


@pytest.mark.parametrize(
    "faulty",
    [
        "(1,)",  # the very first: nothing of the other process may be left waiting for a second beginning
        pytest.param("(2,)", marks=pytest.mark.long),  # gradients of a part of the step are there already
        pytest.param("(1, 4)", marks=pytest.mark.long),  # again at the smaller size: activations are recomputed
    ],
)
def test_one_process_out_of_memory_gives_the_losses_of_an_undisturbed_run(
    faulty: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work_dir, said = train_with(tmp_path / "run", faulty, monkeypatch)
    assert said.count("out of memory: going on with") == len(faulty.strip("(),").split(","))
    for disturbed, calm in zip(metrics(work_dir), metrics(undisturbed), strict=True):
        assert disturbed == pytest.approx(calm, rel=1e-4)
    one, other = (Trained.load(path / "trained.json") for path in (work_dir, undisturbed))
    assert (one.steps, one.tokens, one.examples) == (other.steps, other.tokens, other.examples)


def test_a_process_whose_memory_is_never_enough_ends_all_with_73(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = time.monotonic()
    with pytest.raises(OutOfGpuMemoryError, match="training process 1: CPU ran out of memory") as raised:
        train_with(tmp_path / "run", "range(10**9)", monkeypatch)
    assert "max_length" in str(raised.value.hint)
    assert time.monotonic() - began < 120
