"""One training process for each GPU of this machine, started, watched and ended together.

Nobody else's: what torchrun, Kubeflow, accelerate, Ray or MPI say in the environment of RANK and WORLD_SIZE is about
processes that tuner did not start, and is kept from the libraries, which would wait for them.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pydantic import ValidationError

from tuner.errors import EXIT_INTERNAL, KINDS, InterruptedRunError, TunerError
from tuner.runspec import Reporter, RunSpec, StageResult
from tuner.signals import handling

_POLL_S = 0.1
_GRACE_S = 60
_LOST_S = 5


_WORKER = "TUNER_WORKER"  # in the environment of the processes that train_in_processes starts, and of no other
# By what launchers tell a process of the others, as torch, accelerate and transformers read it.
_LAUNCHERS = re.compile(
    r"((LOCAL|NODE|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|(TORCHELASTIC|ACCELERATE|FSDP)_\w+"
    r"|(PMI|(OMPI|MV2)_COMM_WORLD(_LOCAL)?)_(RANK|SIZE)|MPI_LOCALN?RANK(ID|S)"
)


def is_worker() -> bool:
    """Whether this is one of several training processes of a run."""
    return _WORKER in os.environ


def rank() -> int:
    """Which of a run's training processes this is, and which GPU it has; 0 where there is only one."""
    return int(os.environ["RANK"]) if is_worker() else 0


def world_size() -> int:
    """How many training processes there are."""
    return int(os.environ["WORLD_SIZE"]) if is_worker() else 1


@contextmanager
def by_itself(reporter: Reporter) -> Iterator[None]:
    """In the block this process is alone, whatever another launcher has said to it; that it has is said."""
    names = [] if is_worker() else [name for name in os.environ if _LAUNCHERS.fullmatch(name)]
    theirs = {name: os.environ.pop(name) for name in names}
    if theirs:
        shown = ", ".join(sorted(theirs)[:4]) + (", …" if len(theirs) > 4 else "")
        reporter.note(
            f"{shown} in the environment {'is' if len(theirs) == 1 else 'are'} another launcher's, and ignored: tuner "
            "starts one process for each GPU of this machine itself"
        )
    others = theirs.get("WORLD_SIZE", "1")
    if others not in ("", "0", "1"):
        reporter.warn(f"each of the {others} processes that the other launcher starts does the whole run: start one")
    try:
        yield
    finally:
        os.environ.update(theirs)


def end_with_parent() -> None:
    """End this process when the one that started it is gone: nobody else would."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def train_in_processes(spec: RunSpec, work_dir: Path, count: int, reporter: Reporter) -> None:
    """Run the train stage on `count` GPUs; it leaves trained.json as in one process.

    The first process talks for all; the others' words are in rank-N.log in the work directory. Raises what the first
    one to fail raised. A signal to this process reaches all of them, each once.
    """
    reporter.note(f"training on {count} GPUs, one process each")
    spec_file = work_dir / "spec.json"
    spec.save(spec_file)
    command = [sys.executable, "-m", "tuner", "stage", "train", "--spec", str(spec_file), "--work-dir", str(work_dir)]
    port = str(_free_port())
    group = {_WORKER: "1", "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        workers = []
        for number in range(count):
            log = None if number == 0 else stack.enter_context((work_dir / f"rank-{number}.log").open("wb"))
            workers.append(
                subprocess.Popen(
                    command,
                    env=os.environ | group | {"RANK": str(number), "LOCAL_RANK": str(number)},
                    stdout=subprocess.PIPE if number == 0 else log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C comes from here, once
                )
            )
        stack.callback(_end, workers)
        said: list[bytes] = []
        reader = threading.Thread(target=lambda: said.extend(workers[0].stdout or []))
        reader.start()
        with _passing_on(workers):
            code, number = _wait(workers)
        reader.join()
    if code == 0:
        return
    raise _failure(code, number, said, work_dir)


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int]:
    """The exit code and the number of the worker whose end explains the others', once all have ended; (0, 0) when none
    failed."""
    failed: dict[int, int] = {}  # number → exit code of those that ended by themselves, in that order
    deadline = float("inf")
    while True:
        codes = [worker.poll() for worker in workers]
        failed |= {number: code for number, code in enumerate(codes) if code and number not in failed}
        if failed and deadline == float("inf"):
            # Who is told to stop saves first; who lost a partner waits for it in a collective for ever.
            told = InterruptedRunError.exit_code in failed.values()
            deadline = time.monotonic() + (_GRACE_S if told else _LOST_S)
        if None not in codes:
            break
        if time.monotonic() > deadline:
            _end(workers)
            break
        time.sleep(_POLL_S)
    # Who lost a partner may end with a surprise of its own before that one is seen to have ended.
    number = min(failed, key=lambda number: failed[number] == EXIT_INTERNAL, default=0)
    return failed.get(number, 0), number


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
    for worker in workers:
        worker.wait()
        if worker.stdout:
            worker.stdout.close()


@contextmanager
def _passing_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """SIGINT and SIGTERM go to every worker instead of ending this process."""

    def forward(number: int, _frame: object) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    with handling(forward):
        yield


def _failure(code: int, number: int, said: Sequence[bytes], work_dir: Path) -> BaseException:
    """What worker `number` would have raised in this process. `said` is the first one's stdout."""
    if code == 128 + signal.SIGINT:
        return KeyboardInterrupt()
    log = work_dir / f"rank-{number}.log"
    kind = KINDS.get(code, TunerError)
    # The first process talks for all, whichever of them ended first.
    if result := _last_words(said, code):
        return kind(result.message, hint=result.hint)
    if number and (result := _last_words(log.read_bytes().splitlines() if log.exists() else [], code)):
        return kind(f"training process {number}: {result.message}", hint=result.hint)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return kind(f"training process {number} {how}" + (f": {log} says why" if number else ""))


def _last_words(lines: Sequence[bytes], code: int) -> StageResult | None:
    """The StageResult among them, where it is of this exit code and more than that there was a bug."""
    for line in reversed(lines):
        try:
            result = StageResult.model_validate_json(line)
        except ValidationError:
            continue
        return result if result.exit_code == code and code in KINDS else None
    return None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
