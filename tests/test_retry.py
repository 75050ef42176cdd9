"""Back-off, the count of failures and Retry-After, with a clock and chance of the test's own."""

import random
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tuner.retry import Backoff, Retries, retry_after_s

NOW = datetime(2026, 1, 2, tzinfo=UTC)
YEAR_S = 365 * 86_400.0


# ── back-off ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_wait_is_twice_the_last_up_to_the_ceiling() -> None:
    backoff = Backoff(0.5, 3.0)
    assert [backoff.wait_s(failures) for failures in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


def test_it_grows_by_its_factor() -> None:
    backoff = Backoff(1.0, 1000.0, factor=10.0)
    assert [backoff.wait_s(failures) for failures in (1, 2, 3)] == [1.0, 10.0, 100.0]


@pytest.mark.parametrize(("drawn", "wait_s"), [(0.0, 8.0), (0.5, 6.0), (1.0, 4.0)])
def test_chance_takes_off_no_more_than_the_jitter(drawn: float, wait_s: float) -> None:
    assert Backoff(1.0, 8.0, jitter=0.5).wait_s(9, lambda: drawn) == wait_s


def test_a_service_that_is_away_for_weeks_overflows_nothing() -> None:
    assert Backoff(0.005, 300.0).wait_s(10**9) == 300.0


def test_chance_takes_no_number_from_the_sequence_of_a_training() -> None:
    random.seed(1)
    Backoff(1.0, 1.0, jitter=0.5).wait_s(1)
    drawn = random.random()
    random.seed(1)
    assert drawn == random.random()


# ── the count of failures ────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_last_attempt_has_none_after_it(clock: Clock) -> None:
    retries = Retries(Backoff(1.0, 60.0), attempts=3, clock=clock)
    assert [retries.next_wait_s() for _ in range(3)] == [1.0, 2.0, None]
    assert retries.failures == 3


def test_no_try_begins_after_the_deadline(clock: Clock) -> None:
    retries = Retries(Backoff(4.0, 60.0), clock=clock)
    assert retries.next_wait_s(within_s=10) == 4.0
    clock.now_s += 4.0
    assert retries.next_wait_s(within_s=10) is None  # at 12 s
    assert retries.elapsed_s == 4.0


def test_progress_gives_back_attempts_time_and_the_first_wait(clock: Clock) -> None:
    retries = Retries(Backoff(4.0, 60.0), attempts=2, clock=clock)
    assert retries.next_wait_s(within_s=5) == 4.0
    clock.now_s += 100.0
    retries.progressed()
    assert retries.next_wait_s(within_s=5) == 4.0


@pytest.mark.parametrize(("asked_s", "wait_s"), [(None, 2.0), (0.0, 2.0), (1.0, 2.0), (30.0, 30.0)])
def test_the_next_try_comes_no_sooner_than_the_server_asks(clock: Clock, asked_s: float | None, wait_s: float) -> None:
    assert Retries(Backoff(2.0, 60.0), clock=clock).next_wait_s(asked_s) == wait_s


def test_a_server_that_asks_for_more_than_the_deadline_gets_no_further_try(clock: Clock) -> None:
    retries = Retries(Backoff(2.0, 60.0), clock=clock)
    assert retries.next_wait_s(retry_after_s({"Retry-After": "9" * 400}), within_s=300) is None


# ── Retry-After ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30", 30.0),
        (" 0 ", 0.0),
        ("Fri, 02 Jan 2026 00:00:30 GMT", 30.0),
        ("Friday, 02-Jan-26 00:00:30 GMT", 30.0),  # RFC 850's form
        ("Fri Jan  2 00:00:30 2026", 30.0),  # C's
        ("Fri, 02 Jan 2026 00:00:30 -0000", 30.0),
        ("Fri, 02 Jan 2026 01:00:30 +0100", 30.0),
        ("Thu, 01 Jan 2026 00:00:00 GMT", 0.0),
        ("9" * 400, YEAR_S),  # of which float() makes infinity
        ("9" * 5000, YEAR_S),  # and int() an error
        ("Fri, 31 Dec 9999 23:59:59 -2359", YEAR_S),
        ("Mon, 01 Jan 0001 00:00:00 +2359", 0.0),
        ("Fri, 31 Dec 99999 23:59:59 GMT", None),
        ("Fri, 31 Dec 20260000000000000000 23:59:59 GMT", None),
        ("Mon, 99 Foo 2026 00:00:00 GMT", None),
        ("soon", None),
        ("-1", None),
        ("1e3", None),
        ("1.5", None),
        ("nan", None),
        ("30, 60", None),
        ("\u00b9", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_never_without_end(value: str, seconds: float | None) -> None:
    assert retry_after_s({"Retry-After": value}, NOW) == seconds


def test_an_answer_without_retry_after_asks_for_nothing() -> None:
    assert retry_after_s({"Date": format_datetime(NOW, usegmt=True)}, NOW) is None


@pytest.mark.parametrize("server_is_ahead", [timedelta(days=400), timedelta(days=-400), timedelta(0)])
def test_a_date_is_judged_by_the_servers_own_clock(server_is_ahead: timedelta) -> None:
    there = NOW + server_is_ahead
    headers = {
        "Date": format_datetime(there, usegmt=True),
        "Retry-After": format_datetime(there + timedelta(seconds=300), usegmt=True),
    }
    assert retry_after_s(headers, NOW) == 300.0


def test_a_date_is_judged_by_our_clock_where_the_servers_says_nothing() -> None:
    headers = {"Date": "yesterday", "Retry-After": "Fri, 02 Jan 2026 00:00:30 GMT"}
    assert retry_after_s(headers, NOW) == 30.0


_DATES = st.builds(
    "{}, {} {} {} {}:{}:{} {}".format,
    st.sampled_from(["Mon", "Fri", "Foo", ""]),
    st.integers(-1, 99),
    st.sampled_from(["Jan", "Feb", "Foo", "-"]),
    st.integers(-1, 10**6),
    *[st.integers(-1, 99)] * 3,
    st.sampled_from(["GMT", "UTC", "EST", "-0000", "+2359", "+9999", "-9999", "Foo", ""]),
)


@given(st.text() | _DATES, st.text() | _DATES)
@example("Fri, 02 Jan 2026 00:00:30 +99999999999999999999", "Fri, 02 Jan 20260000000000000000 00:00:30 GMT")
@example("Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359")
def test_whatever_a_server_writes_is_no_error_and_at_most_a_year(value: str, date: str) -> None:
    asked_s = retry_after_s({"Retry-After": value, "Date": date}, NOW)
    assert asked_s is None or 0 <= asked_s <= YEAR_S
