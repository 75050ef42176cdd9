"""One training process for each GPU of this machine, started, watched and ended together."""

import os
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

_POLL_S = 0.1
_GRACE_S = 60
_LOST_S = 5


def rank() -> int:
    """Which of a run's training processes this is; 0 where there is only one."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many training processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def end_with_parent() -> None:
    """End this process when the one that started it is gone: nobody else would."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(128 + signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def is_worker() -> bool:
    return "RANK" in os.environ


def train_in_processes(spec: RunSpec, work_dir: Path, count: int, reporter: Reporter) -> None:
    """Run the train stage on `count` GPUs; it leaves trained.json as in one process.

    The first process talks for all; the others' words are in rank-N.log in the work directory. Raises what the first
    one to fail raised. A signal to this process reaches all of them, each once.
    """
    reporter.note(f"training on {count} GPUs, one process each")
    spec_file = work_dir / "spec.json"
    spec.save(spec_file)
    command = [sys.executable, "-m", "tuner", "stage", "train", "--spec", str(spec_file), "--work-dir", str(work_dir)]
    group = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
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

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
