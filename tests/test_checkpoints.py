"""Checkpoints on disk: whose they are, how often they come, and what a full disk does to them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_train import arguments, trial
from tiny import Heard, Job, make_job, prepared_job, rows_of, stopped_in_the_first_step

from tuner.errors import ConfigError, InterruptedRunError
from tuner.pipeline.checkpoints import changes
from tuner.pipeline.run import preflight, train

pytestmark = pytest.mark.train

TESTS = Path(__file__).parent
SHORT = {"max_steps": 6, "logging_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.01}


def job_of(directory: Path, rows: int = 30, **written: Any) -> Job:
    return make_job(directory, rows_of("messages", rows), {"TrainingArguments": SHORT | written})


def interrupted(directory: Path, **written: Any) -> Job:
    job = job_of(directory, **written)
    fetched, prepared = prepared_job(job)
    with stopped_in_the_first_step(), pytest.raises(InterruptedRunError):
        train(job.spec, fetched, prepared, job.work_dir, Heard())
    return job


# ── whose they are ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_another_runs_checkpoint_stops_the_run_before_anything_and_says_what_changed(tmp_path: Path) -> None:
    before = interrupted(tmp_path)
    now = job_of(tmp_path, rows=31, learning_rate=0.02, seed=7)
    with pytest.raises(ConfigError) as caught:
        preflight(now.spec, now.secrets, now.work_dir, Heard())
    said = caught.value.message
    assert caught.value.exit_code == 78
    assert f"run {before.spec.digest[7:19]} after step 1, and this is run {now.spec.digest[7:19]}" in said
    assert said.endswith("TrainingArguments.learning_rate 0.01 → 0.02, TrainingArguments.seed 42 → 7, sources")
    assert "give another --work-dir" in str(caught.value.hint)


def test_the_same_run_elsewhere_written_goes_on(tmp_path: Path) -> None:
    """Where a value stands, where the adapter goes and what it must reach make no other run."""
    job = interrupted(tmp_path)
    config = {"TrainingArguments": {key: value for key, value in SHORT.items() if key != "max_steps"}}
    again = make_job(
        tmp_path,
        rows_of("messages", 30),
        config,
        overrides=("TrainingArguments.max_steps=6",),
        output=str(tmp_path / "other"),
        require=("steps > 1",),
    )
    assert again.spec.digest == job.spec.digest
    preflight(again.spec, again.secrets, again.work_dir, Heard())


def test_a_finished_run_is_in_nobodys_way(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    train(job.spec, *prepared_job(job), job.work_dir, Heard())
    other = job_of(tmp_path, seed=7)
    preflight(other.spec, other.secrets, other.work_dir, Heard())


def test_many_changes_are_counted_and_a_long_value_is_cut(tmp_path: Path) -> None:
    one = job_of(tmp_path / "one").spec
    other = job_of(tmp_path / "two", seed=1, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, max_grad_norm=2.0).spec
    assert changes(one, other).count(" → ") == 5
    assert "more" not in changes(one, other)
    template = "{{ messages }}" * 9
    config = {"ModelConfig": {"chat_template": template}, "TrainingArguments": SHORT | {"seed": 1, "max_steps": 7}}
    long = make_job(tmp_path / "three", rows_of("messages", 30), config, method="lora").spec
    said = changes(one, long)
    assert "ModelConfig.chat_template unset → {{ messages }}{{ messages }}{…, " in said
    assert said.endswith("more")


# ── how often ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        ({"save_steps": 2}, [4, 6]),  # KAITO's users write it alone
        ({"save_steps": 2, "save_strategy": "best"}, [4, 6]),
        ({"save_strategy": "best"}, [6]),
        ({"save_steps": 2, "save_strategy": "no"}, [6]),
    ],
)
def test_checkpoints_come_by_steps_when_save_steps_is_written(
    written: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    from tuner.pipeline.checkpoints import by_step

    tried = trial(tmp_path, arguments(**written), count=24)
    tried.train()
    assert list(by_step(tried.checkpoints)) == steps


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────

ON_A_FULL_DISK = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train import StopAfter
from tuner.errors import ConfigError, InterruptedRunError
from tuner.pipeline import train as stage
from tuner.pipeline.checkpoints import by_step, is_whole
from tuner.pipeline.run import run_stage
from tuner.runspec import RunSpec, Secrets

spec, work = RunSpec.load(Path({spec!r})), Path({work!r})
(here,) = (work / "checkpoints").iterdir()
real = stage.Stop


def until(step):
    stage.Stop = real
    asked = StopAfter(step)
    stage.Stop = lambda warn: asked.stop
    try:
        run_stage("train", spec, Secrets(), work, asked)
    except (InterruptedRunError, ConfigError) as error:
        return type(error).__name__, error.message, error.exit_code


ballast = here / "ballast"
said = [until(2)]
with ballast.open("wb", buffering=0) as file:
    try:
        while file.write(bytes(65536)):
            pass
    except OSError:
        pass
    file.truncate(max(0, file.tell() - {room}))
said.append(until(9))
said.append([[step, is_whole(path)] for step, path in by_step(here).items()])
ballast.unlink()
said.append(until(99))
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    "room", [150_000, pytest.param(0, marks=pytest.mark.long), pytest.param(500_000, marks=pytest.mark.long)]
)
def test_a_full_disk_is_said_and_the_last_good_checkpoint_is_gone_on_from(room: int, tmp_path: Path) -> None:
    """A real file system of 16 MB, full in the middle of the weights, at once, and in the middle of the optimizer."""
    jobs = [job_of(tmp_path / name, save_steps=1, eval_steps=3) for name in ("whole", "full")]
    for job in jobs:
        fetched, _ = prepared_job(job)
        fetched.save(job.work_dir / "fetched.json")
    whole, full = jobs
    from tuner.pipeline.run import checkpoints_of, inputs_digest, run_stage
    from tuner.runspec import Fetched, Trained

    run_stage("train", whole.spec, whole.secrets, whole.work_dir, Heard())
    checkpoints = checkpoints_of(inputs_digest(Fetched.load(full.work_dir / "fetched.json")), full.work_dir, 1)
    checkpoints.mkdir(parents=True)
    full.spec.save(tmp_path / "spec.json")
    code = ON_A_FULL_DISK.format(tests=str(TESTS), spec=str(tmp_path / "spec.json"), work=str(full.work_dir), room=room)
    mounted = 'mount -t tmpfs -o size=16m tmpfs "$0" || exit 99; exec "$@"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", mounted, str(checkpoints), sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
        check=False,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    assert done.returncode == 0, done.stderr
    first, second, kept, last = json.loads(done.stdout.splitlines()[-1])
    assert first[0] == "InterruptedRunError"
    assert second[0] == "ConfigError"
    assert second[2] == 78
    assert "the disk is full, so " in second[1]
    assert "the checkpoint of step 2 is kept" in second[1]
    assert [2, True] in kept
    assert all(good for _, good in kept)
    assert last is None
    files = [Trained.load(job.work_dir / "trained.json").files for job in jobs]
    assert files[0] == files[1]
