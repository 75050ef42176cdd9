"""Trainer and pusher, two containers of one pod that meet at a lock in a volume of their own.

    trainer   takes the lock ── writes `started` ── … trains … ── writes `trained` ── ends, and with it the lock
    pusher    waits for `started` ─────────────── waits for the lock ───────────────► reads `trained`

The kernel frees the lock however the trainer dies, so the pusher never waits for a dead one, and what it finds then is
the whole truth: a marker of this very run, or none. Nothing here imports anything heavy: the lock is taken first.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tuner import pod
from tuner.errors import ConfigError, InputMissingError, InterruptedRunError
from tuner.runspec import Contract

_POLL_S = 0.2


class Finished(Contract):
    """The marker `trained`: which run, and which inputs of it. The volume's other runs are not this pod's."""

    run_digest: str
    inputs_digest: str


class Turns:
    """First the trainer's, then the pusher's."""

    def __init__(self, directory: Path = pod.RUN_DIR) -> None:
        self._directory = directory
        self._lock = directory / pod.LOCK
        self._started = directory / pod.STARTED
        self._trained = directory / pod.TRAINED
        self._given_up = directory / pod.GIVEN_UP

    @property
    def is_shared(self) -> bool:
        """Whether there is a volume to meet in: where the trainer pushes by itself there is none."""
        return self._directory.is_dir()

    @contextmanager
    def trainers(self) -> Iterator[None]:
        """Holds the lock. Raises InterruptedRunError when the pusher has given up: nobody would push."""
        with self._lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._started.touch()
            # After `started`, as the pusher looks for that after giving up: at least one of them sees the other.
            if self._given_up.exists():
                raise InterruptedRunError(
                    "the pusher waited for this container and has ended",
                    hint="a new pod begins anew; why did this one take so long to start?",
                )
            yield

    def finish(self, finished: Finished) -> None:
        """Say that the adapter is there. Only the trainer may, before its turn ends."""
        finished.save(self._trained)

    @contextmanager
    def pushers(self, within_s: float) -> Iterator[Finished | None]:
        """What the trainer has finished, once it has ended; None when that is nothing, or it never began."""
        if not self._has_started(within_s):
            yield None
            return
        with self._lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a signal's handler that raises ends the waiting
            yield self._finished()

    def _has_started(self, within_s: float) -> bool:
        deadline = time.monotonic() + within_s
        while not self._started.exists():
            if time.monotonic() >= deadline:
                self._given_up.touch()
                return self._started.exists()
            time.sleep(_POLL_S)
        return True

    def _finished(self) -> Finished | None:
        try:
            return Finished.load(self._trained)
        except (InputMissingError, ConfigError):
            return None
