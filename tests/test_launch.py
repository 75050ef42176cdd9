"""Several training processes: the documents and losses of one, ended together. Two processes over gloo, in NF4."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from data_files import write_data
from tiny import Heard, make_job, prepared_job, rows_of

from tuner.errors import ConfigError, InterruptedRunError, TunerError
from tuner.pipeline.launch import _failure, _wait, by_itself, is_worker, rank, train_in_processes, world_size
from tuner.runspec import StageResult, Trained

pytestmark = pytest.mark.train

CONFIG = {
    "TrainingArguments": {
        "max_steps": 6,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
}
# Another division of the same eight documents a step.
IN_ONE = {"TrainingArguments": CONFIG["TrainingArguments"] | {"gradient_accumulation_steps": 4}}


# Ends with an exit code, or by a signal where that is negative.
_ENDS = "import os; code = {}; os.kill(os.getpid(), -code) if code < 0 else os._exit(code)"


def ready(directory: Path, config: Any, count: int = 45) -> Any:
    job = make_job(directory, rows_of("messages", count), config)
    fetched, prepared = prepared_job(job)
    fetched.save(job.work_dir / "fetched.json")
    prepared.save(job.work_dir / "prepared.json")
    return job, fetched, prepared


def metrics(work_dir: Path) -> list[dict[str, float]]:
    (path,) = work_dir.glob("adapter-*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_two_processes_train_on_the_same_documents_with_the_same_losses_as_one(tmp_path: Path) -> None:
    """42 rows in steps of eight: an epoch ends with a step of two, one for each."""
    from tuner.pipeline.run import train

    one, fetched, prepared = ready(tmp_path / "one", IN_ONE)
    alone = train(one.spec, fetched, prepared, one.work_dir, Heard())
    two, _, _ = ready(tmp_path / "two", CONFIG)
    train_in_processes(two.spec, two.work_dir, 2, Heard())
    together = Trained.load(two.work_dir / "trained.json")
    assert (together.steps, together.tokens, together.examples) == (alone.steps, alone.tokens, alone.examples)
    for both, single in zip(metrics(two.work_dir), metrics(one.work_dir), strict=True):
        assert both.keys() == single.keys()
        assert both == pytest.approx(single, rel=1e-3)


@pytest.mark.long
def test_two_processes_stop_early_and_keep_the_adapter_that_one_does(tmp_path: Path) -> None:
    from tuner.pipeline.run import train

    # Nothing is ten nats better, so both stop after the third evaluation.
    soon = {"eval_steps": 2, "early_stopping_patience": 2, "early_stopping_threshold": 10.0, "max_steps": 20}
    configs = ({"TrainingArguments": each["TrainingArguments"] | soon} for each in (IN_ONE, CONFIG))
    one, two = (ready(tmp_path / name, config) for name, config in zip(("one", "two"), configs, strict=True))
    alone = train(one[0].spec, *one[1:], one[0].work_dir, Heard())
    train_in_processes(two[0].spec, two[0].work_dir, 2, Heard())
    together = Trained.load(two[0].work_dir / "trained.json")
    assert alone.steps == 6
    assert (together.steps, together.kept_step) == (alone.steps, alone.kept_step)
    assert together.eval_loss_after == pytest.approx(alone.eval_loss_after, rel=1e-3)


_PROGRAM = """
import sys
from pathlib import Path
from tuner.pipeline.launch import train_in_processes
from tuner.runspec import RunSpec, Silent
from tuner.errors import TunerError
try:
    train_in_processes(RunSpec.load(Path(sys.argv[1])), Path(sys.argv[2]), 2, Silent())
except TunerError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_two_processes_that_are_told_to_stop_save_one_checkpoint_and_go_on_from_it(tmp_path: Path) -> None:
    unbroken, _, _ = ready(tmp_path / "unbroken", CONFIG)
    train_in_processes(unbroken.spec, unbroken.work_dir, 2, Heard())
    stopped, _, _ = ready(tmp_path / "stopped", CONFIG)
    stopped.spec.save(tmp_path / "spec.json")
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(tmp_path / "spec.json"), str(stopped.work_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while process.poll() is None and not list(stopped.work_dir.glob("adapter-*/metrics.jsonl")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "checkpoint saved" in said
    train_in_processes(stopped.spec, stopped.work_dir, 2, Heard())
    assert metrics(stopped.work_dir) == metrics(unbroken.work_dir)
    digests = [Trained.load(job.work_dir / "trained.json").files for job in (stopped, unbroken)]
    assert digests[0]["adapter_model.safetensors"] == digests[1]["adapter_model.safetensors"]


_SLOW_IN_EVALUATIONS = """\
#!{python}
import runpy, sys, time
from pathlib import Path
from tuner.pipeline import train

summed_loss = train._Trainer._summed_loss

def slow(trainer, documents):
    if trainer.state.global_step:
        Path({evaluating!r}).touch()
        time.sleep({seconds})
    return summed_loss(trainer, documents)

train._Trainer._summed_loss = slow
train.CPU_MICRO_BATCH_TOKENS = 64
sys.argv = ["tuner", *sys.argv[3:]]  # after -m tuner
runpy.run_module("tuner", run_name="__main__")
"""


@pytest.mark.long
def test_two_processes_leave_an_evaluation_together_and_go_on_with_it(tmp_path: Path) -> None:
    evaluating = tmp_path / "evaluating"
    written = CONFIG["TrainingArguments"] | {"eval_strategy": "steps", "eval_steps": 3}
    config = {"TrainingArguments": written, "DatasetConfig": {"train_test_split": 0.5}}
    jobs = [ready(tmp_path / name, config)[0] for name in ("unbroken", "stopped")]
    python = tmp_path / "python"

    def train(job: Any, seconds: float) -> subprocess.Popen[str]:
        python.write_text(
            _SLOW_IN_EVALUATIONS.format(python=sys.executable, evaluating=str(evaluating), seconds=seconds)
        )
        python.chmod(0o755)
        job.spec.save(tmp_path / "spec.json")
        program = f"import sys; sys.executable = {str(python)!r}\n{_PROGRAM}"
        return subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "spec.json"), str(job.work_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            text=True,
        )

    def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
        said, _ = process.communicate(timeout=300)
        return process.returncode, said

    unbroken, stopped = jobs
    assert ended(train(unbroken, 0)) == (0, "")
    evaluating.unlink()
    process = train(stopped, 5)
    while process.poll() is None and not evaluating.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (75, "stopped in the evaluation after step 3 of 6; checkpoint saved\n")
    assert ended(train(stopped, 0)) == (0, "")
    digests = [Trained.load(job.work_dir / "trained.json").files for job in jobs]
    assert digests[0] == digests[1]


def test_what_stops_the_first_process_is_raised_with_its_own_words(tmp_path: Path) -> None:
    job, _, _ = ready(tmp_path, {"TrainingArguments": CONFIG["TrainingArguments"] | {"learning_rate": 1e30}})
    with pytest.raises(ConfigError, match="loss is not finite"):
        train_in_processes(job.spec, job.work_dir, 2, Heard())


def test_a_process_that_is_killed_ends_the_others(tmp_path: Path) -> None:
    job, _, _ = ready(tmp_path, {"TrainingArguments": CONFIG["TrainingArguments"] | {"max_steps": 5000}})

    def kill_the_second() -> None:
        while True:
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    environment = (entry / "environ").read_bytes().split(b"\0")
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                if b"RANK=1" in environment and str(job.work_dir).encode() in command:
                    os.kill(int(entry.name), signal.SIGKILL)
                    return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_the_second)
    killer.start()
    with pytest.raises(TunerError, match="training process 1 was ended by SIGKILL"):
        train_in_processes(job.spec, job.work_dir, 2, Heard())
    killer.join()


# ── other launchers ──────────────────────────────────────────────────────────────────────────────────────────────────

KUBEFLOW = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "9",  # where nobody listens
    "TORCHELASTIC_RUN_ID": "a",
}


@pytest.mark.parametrize("theirs", [{"RANK": "0"}, KUBEFLOW], ids=["RANK alone", "the second of two is waited for"])
def test_what_another_launcher_says_changes_nothing_of_a_run(theirs: dict[str, str], tmp_path: Path) -> None:
    data = write_data(tmp_path / "train.jsonl", rows_of("messages", 20))
    command = ["run", "--smoke", "--model", "phi-3-mini-4k-instruct", "--data", str(data), "--set"]
    command += ["TrainingArguments.max_steps=1", "--work-dir", str(tmp_path / "work")]
    done = subprocess.run(
        [sys.executable, "-m", "tuner", *command],
        env=os.environ | theirs,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("another launcher's, and ignored") == 1
    assert ("each of the 2 processes that the other launcher starts does the whole run" in done.stderr) is (
        "WORLD_SIZE" in theirs
    )


def test_what_another_launcher_says_is_hidden_for_a_while_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"CUDA_VISIBLE_DEVICES": "0", "SLURM_PROCID": "1", "FRANKFURT": "1", "MPI_HOME": "/opt"}
    theirs = KUBEFLOW | {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "PMI_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}
    for name, value in (mine | theirs).items():
        monkeypatch.setenv(name, value)
    heard = Heard()
    before = dict(os.environ)
    with by_itself(heard):
        assert not theirs.keys() & os.environ.keys()
        assert mine.keys() <= os.environ.keys()
        assert (is_worker(), rank(), world_size()) == (False, 0, 1)
        with by_itself(heard):
            pass
    assert dict(os.environ) == before
    assert len(heard.notes) == len(heard.warnings) == 1
    assert heard.notes[0].startswith("ACCELERATE_USE_FSDP, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, … in the environment")


def test_a_rank_of_another_launcher_makes_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (is_worker(), rank(), world_size()) == (False, 0, 1)
    monkeypatch.setenv("TUNER_WORKER", "1")
    assert (is_worker(), rank(), world_size()) == (True, 1, 2)
    with by_itself(Heard()):
        assert os.environ["RANK"] == "1"


# ── ends ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_exit_code_without_a_result_still_says_which_process(tmp_path: Path) -> None:
    error = _failure(75, 1, [], tmp_path)
    assert isinstance(error, InterruptedRunError)
    assert "rank-1.log" in str(error)
    said = StageResult(stage="train", exit_code=78, message="no such thing").to_message().encode()
    assert str(_failure(78, 0, [b"talk\n", said], tmp_path)) == "no such thing"
    assert str(_failure(78, 1, [said], tmp_path)) == "no such thing"
    (tmp_path / "rank-1.log").write_bytes(b"talk\n" + said + b"\nerror: no such thing\n")
    assert str(_failure(78, 1, [], tmp_path)) == "training process 1: no such thing"
    assert isinstance(_failure(130, 0, [], tmp_path), KeyboardInterrupt)


def test_a_process_that_lost_its_partner_does_not_explain_the_partners_end() -> None:
    """Both may be seen to have ended at one look."""
    for codes, explained in (((70, 73), (73, 1)), ((70, -9), (-9, 1)), ((70, 70), (70, 0)), ((0, 75), (75, 1))):
        workers = [subprocess.Popen([sys.executable, "-c", _ENDS.format(code)]) for code in codes]
        for worker in workers:
            worker.wait()
        assert _wait(workers) == explained
    assert _wait([]) == (0, 0)


def test_an_exit_code_means_the_kind_of_the_errors_module_whatever_else_was_imported() -> None:
    import tuner.cluster.api_errors  # noqa: F401 - its errors share codes
    from tuner.errors import KINDS, ConfigError

    assert KINDS[78] is ConfigError
    assert {kind.__module__ for kind in KINDS.values()} == {"tuner.errors"}
