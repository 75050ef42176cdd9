"""benchmarks/training_gpu.py has no line that was never run: each part on a CPU with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bed")


def dry(work: Path, *arguments: str) -> str:
    command = [sys.executable, "benchmarks/training_gpu.py", *arguments, "--dry-run-cpu", "--work", str(work)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_without_a_gpu_it_says_so() -> None:
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("a GPU is here")
    done = subprocess.run(
        [sys.executable, "benchmarks/training_gpu.py", "ceilings"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "no NVIDIA GPU here" in done.stderr


def test_ceilings_kernels_and_parity(work: Path) -> None:
    table = dry(work, "ceilings")
    assert "| fused-lora | equal |" in table
    assert "| packed beside one by one | equal |" in table
    assert "these figures mean nothing" in table


def test_a_variant_alone_gives_its_figures_to_the_one_that_started_it(work: Path) -> None:
    measured = json.loads(dry(work, "throughput", "--only", "Tuner").splitlines()[-1])
    assert measured["learnt_per_s"]
    assert "fused-lora" in measured["note"]


@pytest.mark.long
def test_every_system_is_measured(work: Path) -> None:
    table = dry(work, "throughput")
    for name in ("KAITO as shipped", "TRL defaults", "TRL packing + our attention", "Tuner less packing"):
        assert f"| {name}" in table
    assert "failed" not in table
    assert "failed" not in dry(work, "throughput", "--mix", "long", "--memory-cap", "24GB")


@pytest.mark.long
def test_end_to_end_reaches_the_registry(work: Path) -> None:
    table = dry(work, "end-to-end")
    assert "failed" not in table
    assert "| Tuner, weights warm |" in table
    assert "| KAITO's chain, weights warm |" in table
