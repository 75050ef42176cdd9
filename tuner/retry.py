"""When to try again: the one back-off, the one count of failures, and the one reader of Retry-After.

The loops stay with what they repeat, since they differ in everything else. tenacity and stamina repeat a function that
raises, and of our seven loops two do: the others count anew once there was progress, have another deadline as soon as a
server has answered, go on from where an answer broke off, or only want the number (a queue's key, a watch). tenacity's
attempts and start cannot be set back but by writing to its private state.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

_LONGEST_S = 365 * 86_400.0  # what anybody asks for beyond that is as good as never, and still a number
_MOST_GROWTHS = 100  # beyond all ceilings, and before a float overflows

# Of its own: a retry must take no number from a training's sequence.
chance: Callable[[], float] = random.Random().random


@dataclass(frozen=True)
class Backoff:
    """How long to wait after the first failure, the second, and so on: each time `factor` as long, up to the ceiling.

    `jitter` is the share of a wait that chance may take off, so that not all clients come back at once: 0.5 waits for
    half to all of it.
    """

    initial_s: float
    ceiling_s: float
    factor: float = 2.0
    jitter: float = 0.0

    def wait_s(self, failures: int, chance: Callable[[], float] = chance) -> float:
        """Seconds after so many failures in a row, from 1. `chance` gives numbers from 0 up to 1."""
        grown_s = self.initial_s * self.factor ** min(failures - 1, _MOST_GROWTHS)
        return min(grown_s, self.ceiling_s) * (1 - self.jitter * chance())


class Retries:
    """The failures of one piece of work since it last got further. `attempts` of them in a row are the end."""

    def __init__(
        self,
        backoff: Backoff,
        *,
        attempts: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = chance,
    ) -> None:
        self._backoff, self._attempts = backoff, attempts
        self._clock, self._chance = clock, chance
        self.progressed()

    def progressed(self) -> None:
        """The work got further: failures and time count from here."""
        self.failures = 0
        self._since = self._clock()

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._since

    def next_wait_s(self, asked_s: float | None = None, *, within_s: float = math.inf) -> float | None:
        """Seconds from this failure to the next try; None when that was the last, or the next came after `within_s`.

        `asked_s` is what the server asked for: the next try comes no sooner.
        """
        self.failures += 1
        wait_s = max(self._backoff.wait_s(self.failures, self._chance), asked_s or 0.0)
        is_over = self.failures == self._attempts or self.elapsed_s + wait_s > within_s
        return None if is_over else wait_s


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds from an answer's Retry-After, at most a year; None when it has none, or one that says nothing.

    It holds seconds or a date (RFC 9110 10.2.3). A date is judged by the server's own clock where `Date` tells it: its
    clock may be wrong, or ours (`now`).
    """
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal():
        return min(float(value), _LONGEST_S)
    moment = parse_http_date(value)
    if moment is None:
        return None
    asked_s = (moment - (parse_http_date(headers.get("Date", "")) or now or datetime.now(UTC))).total_seconds()
    return min(max(asked_s, 0.0), _LONGEST_S)


def parse_http_date(value: str) -> datetime | None:
    """The moment that a header names; None when it names none."""
    try:
        moment = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the second for numbers that no date has
        return None
    # HTTP's dates are UTC, and one of its three forms says no zone: RFC 9110 5.6.7
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
