"""How the command line talks while it works: bars on a terminal, plain lines and JSON progress elsewhere."""

import json
import sys
import threading
import time
from types import TracebackType
from typing import Any, Self, TextIO

from tuner.runspec import Progress, StageName

_LINE_INTERVAL_S = 5.0  # of JSON progress: a pod's log should stay readable


class Talk:
    """A Reporter on stderr, used as a context manager."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self._said: dict[tuple[str, str], tuple[float, int, float]] = {}
        self._bars: Any = None
        self._tasks: dict[tuple[str, str], Any] = {}
        if stream.isatty():
            self._bars = _bars(stream)

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def stage(self, name: StageName) -> None:
        """A new stage begins: its bars replace those of the one before."""
        with self._lock:
            if self._bars:
                for task in self._tasks.values():
                    self._bars.remove_task(task)
            self._tasks.clear()
            self._said.clear()
        self._line(f"── {name}")

    def note(self, line: str) -> None:
        self._line(line)

    def warn(self, line: str) -> None:
        self._line(f"warning: {line}", style="yellow")

    def _line(self, line: str, style: str | None = None) -> None:
        with self._lock:
            if self._bars:
                self._bars.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
            else:
                print(line, file=self._stream, flush=True)

    def progress(self, progress: Progress) -> None:
        with self._lock:
            if self._bars:
                self._draw(progress)
            else:
                self._print_json(progress)

    def _draw(self, progress: Progress) -> None:
        key = (progress.stage, progress.task)
        values = "  ".join(f"{name} {_number(value)}" for name, value in progress.values.items())
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(progress.task, total=progress.total, unit=progress.unit, values="")
        self._bars.update(
            self._tasks[key], completed=progress.done, total=progress.total, unit=progress.unit, values=values
        )

    def _print_json(self, progress: Progress) -> None:
        key = (progress.stage, progress.task)
        now = time.monotonic()
        began, first, last = self._said.get(key, (now, progress.done, float("-inf")))
        finished = progress.total is not None and progress.done >= progress.total
        if (now - last < _LINE_INTERVAL_S and not finished) or last == float("inf"):
            self._said.setdefault(key, (began, first, last))
            return
        self._said[key] = (began, first, float("inf") if finished else now)
        line: dict[str, Any] = {"stage": progress.stage, "task": progress.task, "done": progress.done}
        line |= {"total": progress.total, "unit": progress.unit}
        line |= {name: float(f"{value:.6g}") for name, value in progress.values.items()}
        if progress.total and progress.done > first and now > began:
            line["eta_s"] = round((progress.total - progress.done) * (now - began) / (progress.done - first))
        print(json.dumps(line), file=self._stream, flush=True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _bars(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Done(ProgressColumn):
        """`3.1/13.1 MB 2.0 MB/s` or `12/468 steps 3.2/s`."""

        def render(self, task: Task) -> Text:
            total, speed = task.total, task.speed
            if task.fields["unit"] == "B":
                text = decimal(int(task.completed)) + (f"/{decimal(int(total))}" if total else "")
                return Text(text + (f"  {decimal(int(speed))}/s" if speed else ""))
            text = f"{task.completed:,.0f}" + (f"/{total:,.0f}" if total else "") + f" {task.fields['unit']}"
            return Text(text + (f"  {speed:,.1f}/s" if speed else ""))

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        Done(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[values]}"),
        console=Console(file=stream, stderr=stream is sys.stderr),
        transient=True,
    )
