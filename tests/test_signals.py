"""Whoever hears signals in a block gives them back after it."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tuner.signals import handling


def test_both_signals_are_heard_in_the_block_and_by_the_one_before_after_it() -> None:
    heard: list[str] = []
    with handling(lambda number, frame: heard.append(f"outer {number}")):
        with handling(lambda number, frame: heard.append(f"inner {number}")):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == ["inner 15", "inner 2", "outer 15"]


def test_what_is_ignored_stays_ignored() -> None:
    """nohup, and a job in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handling(lambda number, frame: pytest.fail("heard")):
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_hears_nothing_and_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> object:
        with handling(lambda number, frame: None):
            return signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() is before


def test_a_handler_that_python_did_not_set_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    """signal() says None of one that a program in C has set, and takes none back."""
    real = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: real(number, handler) and None)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with handling(lambda number, frame: None):
            pass
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            real(number, handler)
