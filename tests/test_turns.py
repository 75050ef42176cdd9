"""Trainer and pusher, who meet in a volume; with real processes where the kernel's part is what matters."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tuner import pod
from tuner.errors import NotPushedError
from tuner.pipeline.turns import MOST_STARTS, Finished, Turns
from tuner.runspec import StageResult

ONE = Finished(run_digest="sha256:one", inputs_digest="a")
PUSHED = StageResult(stage="push", values={"image": "reg.example/a@sha256:1"})

PUSHER = """
import sys, time
from pathlib import Path
from tuner.pipeline.turns import Turns
Turns(Path(sys.argv[1])).be_the_pusher()
print("ready", flush=True)
time.sleep(60)
"""


def pusher(directory: Path) -> "subprocess.Popen[str]":
    """A process that is the pusher, and does nothing."""
    process = subprocess.Popen([sys.executable, "-c", PUSHER, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_each_gets_what_the_other_has_said(tmp_path: Path) -> None:
    trainers, pushers = Turns(tmp_path), Turns(tmp_path)
    pushers.be_the_pusher()

    def push() -> None:
        assert pushers.wait_for_adapter() == ONE
        assert pushers.pushed() is None
        pushers.tell(PUSHED)

    thread = threading.Thread(target=push)
    thread.start()
    time.sleep(0.2)
    assert thread.is_alive()
    trainers.finish(ONE)
    assert trainers.wait_for_push() == PUSHED
    thread.join(10)
    assert Turns(tmp_path).pushed() == PUSHED  # as one sees it that is started again after all was done


def test_a_pusher_that_dies_and_is_started_again_is_waited_for(tmp_path: Path) -> None:
    process = pusher(tmp_path)
    Turns(tmp_path).begin_push()
    result: list[StageResult] = []
    waiting = threading.Thread(target=lambda: result.append(Turns(tmp_path).wait_for_push(away_s=4)))
    waiting.start()
    time.sleep(1.5)
    process.kill()
    process.communicate()
    time.sleep(1.5)
    again = pusher(tmp_path)
    time.sleep(4.5)  # longer than anybody may be away
    assert waiting.is_alive()
    Turns(tmp_path).tell(PUSHED)
    waiting.join(10)
    again.kill()
    again.communicate()
    assert result == [PUSHED]


def test_a_pusher_that_stays_away_is_waited_for_only_so_long(tmp_path: Path) -> None:
    process = pusher(tmp_path)
    process.kill()
    process.communicate()
    with pytest.raises(NotPushedError, match="does not begin to push"):
        Turns(tmp_path).wait_for_push(away_s=0.1)


def test_a_pusher_that_lives_and_never_begins_holds_the_gpu_only_so_long(tmp_path: Path) -> None:
    """As one that fails at its very start, again and again."""
    process = pusher(tmp_path)
    with pytest.raises(NotPushedError, match="does not begin to push"):
        Turns(tmp_path).wait_for_push(away_s=0.1)
    process.kill()
    process.communicate()


def test_kubelets_pause_before_they_start_a_container_again_is_no_staying_away() -> None:
    assert pod.PUSHER_AWAY_S > 300  # CrashLoopBackOff's longest


def test_a_push_that_is_killed_again_and_again_is_given_up(tmp_path: Path) -> None:
    for _ in range(MOST_STARTS):
        Turns(tmp_path).begin_push()
    with pytest.raises(NotPushedError, match=f"{MOST_STARTS} pushes were begun"):
        Turns(tmp_path).begin_push()


def test_a_marker_that_is_cut_short_is_none(tmp_path: Path) -> None:
    (tmp_path / "pushed").write_text('{"stage": "pu')
    assert Turns(tmp_path).pushed() is None


def test_without_a_volume_nobody_meets(tmp_path: Path) -> None:
    assert Turns(tmp_path).is_shared
    assert not Turns(tmp_path / "none").is_shared


def test_the_pusher_waits_without_anything_heavy_in_memory() -> None:
    code = "import sys; import tuner.cli, tuner.pipeline.turns; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "fcntl" in loaded
    assert not loaded & {"torch", "transformers", "pyarrow", "datasets", "requests"}
