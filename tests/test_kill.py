"""kill -9 at random moments of training, and the same command again: the bytes of an unbroken run."""

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from data_files import message_rows, write_data

pytestmark = pytest.mark.train

STEPS = 12


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("killed")
    write_data(folder / "train.parquet", message_rows(60))
    arguments = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "max_steps": STEPS}
    config = folder / "training_config.yaml"
    config.write_text(yaml.safe_dump({"training_config": {"TrainingArguments": arguments}}), encoding="utf-8")
    flags = ["--smoke", "--model", "phi-3-mini-4k-instruct", "--data", str(folder / "train.parquet")]
    steps = ["--config", str(config), "--set", f"TrainingArguments.max_steps={STEPS}"]
    return [sys.executable, "-m", "tuner", "run", *flags, *steps, "--work-dir"]


def finish(command: list[str], work_dir: Path) -> str:
    """The digest that stdout ends with."""
    done = subprocess.run([*command, str(work_dir)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("@")[2]


@pytest.fixture(scope="module")
def unbroken(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    return finish(command, tmp_path_factory.mktemp("unbroken"))


def kill_after(command: list[str], work_dir: Path, step: int, delay_s: float) -> None:
    """Start the run and kill it some time after the checkpoint of `step` was begun."""
    process = subprocess.Popen([*command, str(work_dir)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not list(work_dir.glob(f"checkpoints/*/checkpoint-{step}*")):
            time.sleep(0.002)
        time.sleep(delay_s)
    finally:
        process.kill()
        process.wait()


def broken(command: list[str], work_dir: Path, seed: int, kills: int) -> str:
    generator = random.Random(seed)
    for step in sorted(generator.sample(range(1, STEPS), kills)):
        kill_after(command, work_dir, step, generator.uniform(0, 0.1))
    return finish(command, work_dir)


def test_a_run_killed_twice_ends_in_the_bytes_of_an_unbroken_one(
    command: list[str], unbroken: str, tmp_path: Path
) -> None:
    assert broken(command, tmp_path, seed=1, kills=2) == unbroken


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 12))
def test_twenty_random_kills_change_nothing(seed: int, command: list[str], unbroken: str, tmp_path: Path) -> None:
    assert broken(command, tmp_path, seed=seed, kills=2) == unbroken
