"""How the command line talks while it works: bars on a terminal, plain lines and few JSON lines elsewhere."""

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from tuner.redaction import redact
from tuner.runspec import Progress, StageName

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

_FIRST_INTERVAL_S, _LAST_INTERVAL_S = 5.0, 60.0  # between JSON lines: seldomer the longer a task takes
_BAR_FROM_WIDTH = 80  # columns of a terminal
_IDLE_AFTER_S = 1.0  # a stage without a bar shows its time, once it takes any


class Lasting:
    """A text stream that outlives its reader: when a log's pipe or a terminal is gone, the run is not."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding = stream.encoding

    def write(self, text: str) -> int:
        # RuntimeError: a signal's handler speaks in the middle of another write
        with suppress(OSError, RuntimeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, RuntimeError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@dataclass
class _Task:
    """One task since it was first heard of; `last_line_at` is when its last JSON line was printed."""

    progress: Progress
    began: float
    first_done: int
    last_line_at: float | None = None

    @property
    def is_done(self) -> bool:
        return self.progress.total is not None and self.progress.done >= self.progress.total

    def rate(self, now: float) -> float | None:
        """Units a second since it began here: what an earlier run had done counts for nothing."""
        done, seconds = self.progress.done - self.first_done, now - self.began
        return done / seconds if done > 0 and seconds > 0 else None

    def left_s(self, now: float) -> float | None:
        rate = self.rate(now)
        return (self.progress.total - self.progress.done) / rate if rate and self.progress.total else None


class Talk:
    """A Reporter on stderr, used as a context manager."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = Lasting(stream)
        # Reentrant: a signal's handler may speak while this thread is speaking.
        self._lock = threading.RLock()
        self._stage: tuple[StageName, float] | None = None
        self._tasks: dict[str, _Task] = {}
        self._console: Console | None = None
        self._live: Live | None = None
        if stream.isatty():
            self._console, self._live = _screen(self._stream, self._draw)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            with self._lock:
                self._stage = None
                self._tasks.clear()
            self._live.stop()

    def stage(self, name: StageName) -> None:
        """A new stage begins, and with it the bars of the one before are gone."""
        with self._lock:
            self._stage = name, time.monotonic()
            self._tasks.clear()
        if self._live:
            self._live.refresh()  # else the last bar would stand once more below the line
        self._line(f"── {name}", style="bold")

    def note(self, line: str) -> None:
        self._line(line)

    def warn(self, line: str) -> None:
        self._line(f"warning: {line}", style="yellow")

    def _line(self, line: str, style: str = "") -> None:
        shown = redact(line)
        if self._console:
            from rich.text import Text

            # Not under our lock: the thread that draws takes the console's first, then ours.
            self._console.print(Text(shown, style), soft_wrap=True)
            return
        with self._lock:
            print(shown, file=self._stream, flush=True)

    def progress(self, progress: Progress) -> None:
        now = time.monotonic()
        with self._lock:
            task = self._tasks.setdefault(progress.task, _Task(progress, now, progress.done))
            was_done, task.progress = task.is_done and task.last_line_at is not None, progress
            if not self._console and not was_done and _is_line_due(task, now):
                task.last_line_at = now
                print(json.dumps(_json_line(task, now)), file=self._stream, flush=True)

    def _draw(self) -> "RenderableType":
        """What stands below the lines on a terminal: a bar for each task that is not done, or the stage's time."""
        now = time.monotonic()
        with self._lock:
            tasks = [task for task in self._tasks.values() if not task.is_done]
            width = self._console.width if self._console else _BAR_FROM_WIDTH
            return _bars(tasks, now, width) if tasks else _idle(self._stage, now)


# ── JSON lines ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_line_due(task: _Task, now: float) -> bool:
    """Steps from the first to the last; of what is over in seconds nothing, as the stage's own line follows."""
    if task.last_line_at is None:
        return task.progress.unit == "steps" or now - task.began >= _FIRST_INTERVAL_S
    return task.is_done or now - task.last_line_at >= min(
        _LAST_INTERVAL_S, max(_FIRST_INTERVAL_S, (now - task.began) / 20)
    )


def _json_line(task: _Task, now: float) -> dict[str, Any]:
    progress = task.progress
    line: dict[str, Any] = {"stage": progress.stage, "task": redact(progress.task)}
    line |= {"done": progress.done, "total": progress.total, "unit": progress.unit}
    line |= {name: float(f"{value:.6g}") for name, value in progress.values.items()}
    left_s = task.left_s(now)
    return line if left_s is None else {**line, "eta_s": round(left_s)}


# ── a terminal ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _screen(stream: Lasting, draw: "Callable[[], RenderableType]") -> "tuple[Console, Live] | tuple[None, None]":
    from rich.console import Console
    from rich.live import Live

    console = Console(file=stream)  # type: ignore[arg-type]  # all of TextIO that rich uses
    if console.is_dumb_terminal:
        return None, None
    return console, Live(
        console=console, get_renderable=draw, refresh_per_second=4, transient=True, redirect_stdout=False
    )


def _bars(tasks: list[_Task], now: float, width: int) -> "RenderableType":
    """A row for each: name, bar, amount, time left, values. Where they do not fit, the bar gives way, then the values.

    rich.progress would keep these tasks a second time, and its speed and time left stand still while nothing comes.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    has_bars = width >= _BAR_FROM_WIDTH
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, max_width=min(40, width // 4))
    for is_fixed in (False, True, True, True) if has_bars else (True, True, False):
        table.add_column(no_wrap=is_fixed)
    for task in tasks:
        progress = task.progress
        left_s = task.left_s(now)
        shown = ProgressBar(total=progress.total, completed=progress.done, width=24) if progress.total else ""
        table.add_row(
            Text(redact(progress.task)),  # which may hold what rich takes for markup
            *([shown] if has_bars else []),
            _amount(progress),
            "" if left_s is None else f"{_clock(left_s)} left",
            Text(_values(task, now), no_wrap=True, overflow="ellipsis"),
        )
    return table


def _idle(stage: tuple[StageName, float] | None, now: float) -> "RenderableType":
    from rich.console import Group
    from rich.text import Text

    if stage is None or now - stage[1] < _IDLE_AFTER_S:
        return Group()  # no line at all
    return Text(f"{stage[0]} … {_clock(now - stage[1])}", "dim")


def _amount(progress: Progress) -> str:
    """`3.1 MB of 13.1 MB` or `12 of 468 steps`."""
    if progress.unit == "B":
        from rich.filesize import decimal

        return decimal(progress.done) + (f" of {decimal(progress.total)}" if progress.total else "")
    return f"{progress.done:,}" + (f" of {progress.total:,}" if progress.total else "") + f" {progress.unit}"


def _values(task: _Task, now: float) -> str:
    """`loss 1.234  4,321 tokens/s`; of bytes and rows how fast they come."""
    shown = [
        f"{_number(value)} {name.removesuffix('_per_s')}/s" if name.endswith("_per_s") else f"{name} {_number(value)}"
        for name, value in task.progress.values.items()
    ]
    rate = task.rate(now)
    if rate and not shown:
        if task.progress.unit == "B":
            from rich.filesize import decimal

            return f"{decimal(int(rate))}/s"
        return f"{_number(rate)} {task.progress.unit}/s"
    return "  ".join(shown)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    """`0:07`, `12:34` or `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
