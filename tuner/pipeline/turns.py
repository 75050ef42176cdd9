"""Trainer and pusher, two containers of one pod that meet in a volume of their own.

    trainer   … trains … ── writes `trained` ── waits for `pushed`, as long as there is a pusher ─► ends as it says
    pusher    waits for `trained` ── pushes ── writes `pushed` ── waits until it is told to stop

The pusher is a sidecar: the kubelet starts it again when it dies, and ends it after the trainer. So whatever kills it
alone costs no training, and what the trainer ends with is the whole truth: trained and pushed, or not.
Nothing here imports anything heavy: the pusher waits for hours.
"""

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tuner import pod
from tuner.errors import ConfigError, InputMissingError, NotPushedError
from tuner.open_files import OpenDirectory
from tuner.runspec import Contract, StageResult

_POLL_S = 0.5
MOST_STARTS = 5  # of a pusher that something kills while it pushes
ContractT = TypeVar("ContractT", bound=Contract)


class Finished(Contract):
    """The marker `trained`: which run, and which inputs of it. The volume's other runs are not this pod's."""

    run_digest: str
    inputs_digest: str


class Turns:
    """First the trainer's, then the pusher's, then the trainer's again."""

    def __init__(self, directory: Path = pod.RUN_DIR) -> None:
        self._path = directory

    @property
    def is_shared(self) -> bool:
        """Whether there is a volume to meet in: where the trainer pushes by itself there is none."""
        return self._path.is_dir()

    def _open(self) -> OpenDirectory:
        return OpenDirectory.at(self._path)

    # the trainer's

    def finish(self, finished: Finished) -> None:
        """Say that the adapter is there."""
        with self._open() as directory:
            finished.save_in(directory, pod.TRAINED)

    def wait_for_push(self, away_s: float = pod.PUSHER_AWAY_S) -> StageResult:
        """How the push ended. Raises NotPushedError when for `away_s` in a row nobody is there who pushes.

        One that dies again and again before it has begun is nobody; one that does after that gives up by itself.
        """
        seen = time.monotonic()
        while (result := self.pushed()) is None:
            if self.has_begun and self._has_pusher():
                seen = time.monotonic()
            elif time.monotonic() - seen > away_s:
                raise NotPushedError(
                    f"trained, but not pushed: the container {pod.PUSHER!r} has ended, or does not begin to push"
                )
            time.sleep(_POLL_S)
        return result

    def _has_pusher(self) -> bool:
        """Whether one lives: it holds the lock, which the kernel frees however it dies."""
        with self._open() as directory, os.fdopen(directory.open_shared(pod.PUSHER_LOCK), "rb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    # the pusher's

    def be_the_pusher(self) -> None:
        """Let the trainer know, for as long as this process lives, that there is a pusher."""
        with self._open() as directory:
            fcntl.flock(directory.open_shared(pod.PUSHER_LOCK), fcntl.LOCK_EX)  # and never closed

    def wait_for_adapter(self, meanwhile: Callable[[], None] = lambda: None) -> Finished:
        """What the trainer has finished, once it has. A signal's handler that raises ends the waiting."""
        while (finished := self._load(Finished, pod.TRAINED)) is None:
            meanwhile()
            time.sleep(_POLL_S)
        return finished

    @property
    def has_begun(self) -> bool:
        """Whether a push was begun in this pod."""
        with self._open() as directory:
            return directory.has(pod.PUSH_STARTS)

    def seconds_since_adapter(self) -> float:
        """For how long the adapter has waited, over all starts of the pusher."""
        with self._open() as directory:
            return max(0.0, time.time() - directory.file(pod.TRAINED).modified_at_s)

    def begin_push(self) -> None:
        """Raises NotPushedError when so many pushes have been begun that something must be wrong with them."""
        with self._open() as directory, os.fdopen(directory.open_shared(pod.PUSH_STARTS), "ab") as starts:
            if os.fstat(starts.fileno()).st_size >= MOST_STARTS:
                raise NotPushedError(
                    f"trained, but not pushed: {MOST_STARTS} pushes were begun, and each was killed",
                    hint="out of memory? --patch gives the container pusher more",
                )
            starts.write(b".")

    def pushed(self) -> StageResult | None:
        """How the push ended of which an earlier start of this container has told; None when it is still to be done."""
        return self._load(StageResult, pod.PUSHED)

    def tell(self, result: StageResult) -> None:
        """Say how the push ended: the trainer takes it from here."""
        with self._open() as directory:
            result.save_in(directory, pod.PUSHED)

    def _load(self, kind: type[ContractT], name: str) -> ContractT | None:
        """None while it is not there, or not whole. Raises DataError for what is no plain file."""
        try:
            with self._open() as directory:
                return kind.load_from(directory, name)
        except (InputMissingError, ConfigError):
            return None
