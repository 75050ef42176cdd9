"""The lock between trainer and pusher, with real processes: the kernel's part is what matters."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tuner.errors import InterruptedRunError
from tuner.pipeline.turns import Finished, Turns

ONE = Finished(run_digest="sha256:one", inputs_digest="a")

TRAINER = """
import sys, time
from pathlib import Path
from tuner.pipeline.turns import Finished, Turns
turns = Turns(Path(sys.argv[1]))
with turns.trainers():
    if "finishes" in sys.argv:
        turns.finish(Finished(run_digest="sha256:one", inputs_digest="a"))
    print("ready", flush=True)
    time.sleep(60)
"""


@contextmanager
def trainer(directory: Path, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds the lock, and has maybe finished."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(directory), *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def kill_after(process: "subprocess.Popen[str]", delay_s: float) -> None:
    threading.Timer(delay_s, process.send_signal, [signal.SIGKILL]).start()


def test_the_pusher_waits_until_the_trainer_is_gone_and_gets_what_it_finished(tmp_path: Path) -> None:
    with trainer(tmp_path, "finishes") as process:
        began = time.monotonic()
        kill_after(process, 0.5)
        with Turns(tmp_path).pushers(within_s=10) as finished:
            assert finished == ONE
        assert time.monotonic() - began >= 0.5


def test_a_trainer_that_is_killed_at_work_leaves_nothing_to_push(tmp_path: Path) -> None:
    with trainer(tmp_path) as process:
        kill_after(process, 0.2)
        with Turns(tmp_path).pushers(within_s=10) as finished:
            assert finished is None
            assert process.wait() == -signal.SIGKILL


def test_a_trainer_that_never_comes_is_waited_for_only_so_long(tmp_path: Path) -> None:
    with Turns(tmp_path).pushers(within_s=0.3) as finished:
        assert finished is None


def test_a_trainer_that_comes_when_the_pusher_is_gone_does_not_train_for_nobody(tmp_path: Path) -> None:
    with Turns(tmp_path).pushers(within_s=0):
        pass
    with pytest.raises(InterruptedRunError, match="pusher waited"), Turns(tmp_path).trainers():
        raise AssertionError("never here")


def test_a_marker_that_is_cut_short_is_none(tmp_path: Path) -> None:
    with Turns(tmp_path).trainers():
        (tmp_path / "trained").write_text('{"run_digest": "sha256:o')
    with Turns(tmp_path).pushers(within_s=1) as finished:
        assert finished is None


def test_without_a_volume_nobody_meets(tmp_path: Path) -> None:
    assert Turns(tmp_path).is_shared
    assert not Turns(tmp_path / "none").is_shared


def test_the_lock_is_taken_before_anything_heavy_is_imported() -> None:
    code = "import sys; import tuner.cli, tuner.pipeline.turns; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "fcntl" in loaded
    assert not loaded & {"torch", "transformers", "pyarrow", "datasets", "requests"}
