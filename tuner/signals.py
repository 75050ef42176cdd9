"""Who hears SIGINT and SIGTERM: the innermost block that wants to."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handling(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handler` while the block runs; after it, whom they called before.

    What is ignored stays ignored: nohup, and jobs in the background of a script. Only the main thread may say who
    hears: in another one, as where a program calls run() in it, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # None: a handler that Python did not set, which it cannot put back either
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)
