"""A queue of keys: each is in it once, one worker has it at a time, and a key that fails waits longer each time."""

import heapq
import threading
import time
from collections import deque

from tuner.retry import Backoff

_BACKOFF = Backoff(0.005, 300.0)


class WorkQueue:
    """Keys to look at. A key that is added while somebody works on it comes again when that is done."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ready: deque[str] = deque()
        self._waiting: set[str] = set()  # those in _ready
        self._at_work: set[str] = set()
        self._again: set[str] = set()
        self._later: list[tuple[float, str]] = []  # a heap; an entry counts only while _due has its time
        self._due: dict[str, float] = {}
        self._failures: dict[str, int] = {}
        self._added_at: dict[str, float] = {}
        self._closed = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._ready)

    def add(self, key: str, after_s: float = 0.0) -> None:
        """Now, or after a while: the sooner of that and what was said before holds."""
        with self._changed:
            if after_s > 0:
                due = time.monotonic() + after_s
                if due < self._due.get(key, float("inf")):
                    self._due[key] = due
                    heapq.heappush(self._later, (due, key))
                    self._changed.notify()
                return
            self._put(key)

    def _put(self, key: str) -> None:
        self._due.pop(key, None)
        self._added_at.setdefault(key, time.monotonic())
        if key in self._at_work:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.append(key)
            self._changed.notify()

    def take(self, timeout_s: float) -> tuple[str, float] | None:
        """The next key and how many seconds it was due; None after the timeout and when the queue is closed."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._closed:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    due, key = heapq.heappop(self._later)
                    if self._due.get(key) == due:
                        self._put(key)
                if self._ready:
                    key = self._ready.popleft()
                    self._waiting.discard(key)
                    self._at_work.add(key)
                    return key, now - self._added_at.pop(key, now)
                if now >= deadline:
                    return None
                self._changed.wait(min(deadline, self._later[0][0] if self._later else deadline) - now)
            return None

    def done(self, key: str) -> None:
        """It went well."""
        with self._changed:
            self._failures.pop(key, None)
            self._back(key)

    def failed(self, key: str, at_least_s: float = 0.0) -> float:
        """It did not: it comes again after twice as long as the last time; how many seconds that is."""
        with self._changed:
            failures = self._failures[key] = self._failures.get(key, 0) + 1
            self._back(key)
        wait_s = max(at_least_s, _BACKOFF.wait_s(failures))
        self.add(key, wait_s)
        return wait_s

    def _back(self, key: str) -> None:
        self._at_work.discard(key)
        if key in self._again:
            self._again.discard(key)
            self._put(key)

    def forget(self, key: str) -> None:
        """What it is about is gone."""
        with self._changed:
            self._failures.pop(key, None)
            self._due.pop(key, None)

    def close(self) -> None:
        """Nobody gets anything any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
