import io
import json
import re
import threading
import time

import pytest

from tuner import talk as talk_module
from tuner.redaction import redact
from tuner.runspec import Progress
from tuner.talk import Lasting, Talk


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    """A pipe whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the talk sees: its only element."""
    now = [100.0]
    monkeypatch.setattr(talk_module.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def json_lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines() if line.startswith("{")]


def training(done: int, total: int = 1000) -> Progress:
    return Progress("train", "training", done, total, "steps", {"loss": 1.23456789, "tokens_per_s": 4321.9})


# ── lines ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_stages_notes_and_warnings_are_a_line_each() -> None:
    stream = io.StringIO()
    with Talk(stream) as talk:
        talk.stage("fetch")
        talk.note("fetched 1 file [bold]")
        talk.warn("slow")
    assert stream.getvalue() == "── fetch\nfetched 1 file [bold]\nwarning: slow\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET https://h/a.parquet?sig=x failed", "GET https://h/a.parquet?… failed"),
        ("https://user:pass@h/a#token", "https://h/a"),
        ("HTTP://h/a?b 'https://h/c?d'", "HTTP://h/a?… 'https://h/c?…'"),
        ("https:/h/a?sig=x", "https://h/a?…"),
        ("write an https:// URL", "write an https:// URL"),
        ("is it right? see https://h/a", "is it right? see https://h/a"),
        ("oci:/a/b:1", "oci:/a/b:1"),
    ],
)
def test_no_line_has_a_query_or_a_user(text: str, shown: str) -> None:
    stream = io.StringIO()
    with Talk(stream) as talk:
        talk.note(text)
    assert redact(text) == shown
    assert stream.getvalue() == shown + "\n"


def test_a_reader_that_is_gone_does_not_stop_the_run() -> None:
    with Talk(Gone()) as talk:
        talk.stage("train")
        talk.progress(training(1))
        talk.warn("still here")


def test_a_signal_may_speak_while_a_line_is_written() -> None:
    class Interrupted(io.StringIO):
        def write(self, text: str) -> int:
            if "first" in text:
                talk.warn("SIGINT: finishing this step")
            return super().write(text)

    stream = Interrupted()
    talk = Talk(stream)
    done = threading.Thread(target=talk.note, args=("first",), daemon=True)
    done.start()
    done.join(timeout=10)
    assert not done.is_alive()
    assert "SIGINT" in stream.getvalue()


def test_a_stream_that_is_written_to_twice_at_once_is_not_an_error() -> None:
    class Reentrant(io.StringIO):
        def write(self, text: str) -> int:
            raise RuntimeError("reentrant call")

    assert Lasting(Reentrant()).write("lost") == 4


# ── progress in a log ────────────────────────────────────────────────────────────────────────────────────────────────


def test_steps_have_a_line_at_once_and_at_the_end(clock: list[float]) -> None:
    stream = io.StringIO()
    talk = Talk(stream)
    for step in range(1, 1001):
        clock[0] += 0.001
        talk.progress(training(step))
    talk.progress(training(1000))
    first, last = json_lines(stream)
    assert first == {
        "stage": "train",
        "task": "training",
        "done": 1,
        "total": 1000,
        "unit": "steps",
        "loss": 1.23457,
        "tokens_per_s": 4321.9,
    }
    assert (last["done"], last["eta_s"]) == (1000, 0)


def test_what_is_over_in_seconds_has_no_line(clock: list[float]) -> None:
    stream = io.StringIO()
    talk = Talk(stream)
    for done in range(0, 101, 10):
        clock[0] += 0.3
        talk.progress(Progress("prepare", "tokenizing rows", done, 100, "rows"))
    assert stream.getvalue() == ""


def test_lines_of_a_long_task_become_seldomer(clock: list[float]) -> None:
    stream = io.StringIO()
    talk = Talk(stream)
    for second in range(10 * 3600):
        clock[0] += 1
        talk.progress(training(second + 1, 36000))
    lines = json_lines(stream)
    assert 100 < len(lines) < 700
    assert lines[1]["done"] == 6
    assert lines[1]["eta_s"] == pytest.approx(35994, abs=2)


def test_the_rate_counts_from_where_a_resumed_task_began(clock: list[float]) -> None:
    stream = io.StringIO()
    talk = Talk(stream)
    talk.progress(training(900))
    clock[0] += 10
    talk.progress(training(910))
    assert json_lines(stream)[-1]["eta_s"] == 90


def test_a_task_name_has_no_query(clock: list[float]) -> None:
    stream = io.StringIO()
    talk = Talk(stream)
    for _ in range(2):
        talk.progress(Progress("fetch", "https://h/a?sig=hunter2", 1, None, "B"))
        clock[0] += 6
    assert json_lines(stream)[0]["task"] == "https://h/a?…"
    assert "hunter2" not in stream.getvalue()


# ── a terminal ───────────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(terminal: Terminal, talk: Talk, width: int = 100) -> list[str]:
    """The lines below the text, as they stand now."""
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width).print(talk._draw())
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_a_bar_has_amount_time_left_and_values_with_units(terminal: Terminal, clock: list[float]) -> None:
    talk = Talk(terminal)
    talk.progress(training(0))
    clock[0] += 10
    talk.progress(training(100))
    (line,) = drawn(terminal, talk)
    assert line.startswith("training  ━")
    assert line.endswith("100 of 1,000 steps  1:30 left  loss 1.235  4,322 tokens/s")


def test_bars_are_aligned_and_bytes_have_their_rate(terminal: Terminal, clock: list[float]) -> None:
    talk = Talk(terminal)
    for done in (0, 10_000_000):
        talk.progress(Progress("fetch", "a.parquet", done, 20_000_000, "B"))
        talk.progress(Progress("fetch", "b-longer.parquet", done // 2, None, "B"))
        clock[0] += 5 - done / 2_000_000
    first, second = drawn(terminal, talk)
    assert "10.0 MB of 20.0 MB" in first
    assert "2.0 MB/s" in first
    assert "5.0 MB" in second
    assert first.index("10.0 MB of") == second.index("5.0 MB")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_names_and_bars_give_way_to_figures(
    terminal: Terminal, clock: list[float], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    talk = Talk(terminal)
    name = "0003-a-very-long-file-name-[bold]of-a-data-set.parquet"
    for done in (0, 10_000_000):
        talk.progress(Progress("fetch", name, done, 20_000_000, "B"))
        talk.progress(Progress("prepare", "tokenizing rows", done // 100_000, 440, "rows"))
        clock[0] += 5
    fetching, preparing = drawn(terminal, talk, width)
    assert fetching.startswith("0003-a-very-lo")
    assert fetching.endswith("10.0 MB of 20.0 MB  0:10 left  1.0 MB/s")
    assert preparing.startswith("tokenizing rows  ")
    assert "100 of 440 rows     0:34 left  10 rows/s" in preparing
    assert ("━━━━" in fetching) is (width >= 80)


def test_on_a_narrow_terminal_the_last_values_are_cut_and_nothing_else(
    terminal: Terminal, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    talk = Talk(terminal)
    talk.progress(training(0))
    clock[0] += 10
    talk.progress(training(100))
    (line,) = drawn(terminal, talk, 60)
    assert re.fullmatch(r"training  100 of 1,000 steps  1:30 left  loss 1.235 .*…", line)


def test_a_name_is_no_markup(terminal: Terminal, clock: list[float]) -> None:
    talk = Talk(terminal)
    talk.progress(Progress("fetch", "a[bold]b[/c]", 0, 10, "B"))
    (line,) = drawn(terminal, talk)
    assert line.startswith("a[bold]b[/c]  ")


def test_a_bar_is_gone_when_its_task_is_done_and_the_stage_shows_its_time(
    terminal: Terminal, clock: list[float]
) -> None:
    talk = Talk(terminal)
    talk.stage("train")
    talk.progress(training(1000))
    clock[0] += 75
    assert drawn(terminal, talk) == ["train … 1:15"]
    talk.stage("push")
    assert drawn(terminal, talk) == []


def test_nothing_of_a_bar_is_left_at_the_end(terminal: Terminal) -> None:
    with Talk(terminal) as talk:
        talk.stage("train")
        talk.progress(training(1))
        time.sleep(0.3)  # long enough to be drawn
    assert "training" in terminal.getvalue()
    assert terminal.getvalue().rstrip().endswith(("\x1b[?25h", "\x1b[2K"))
    assert "training" not in terminal.getvalue().rpartition("\x1b[2K")[2]


def test_lines_and_bars_from_many_threads_do_not_lock_each_other(terminal: Terminal) -> None:
    with Talk(terminal) as talk:
        threads = [
            threading.Thread(
                target=lambda: [(talk.progress(training(n)), talk.note(f"line {n}")) for n in range(100)], daemon=True
            )
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert not any(thread.is_alive() for thread in threads)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Talk(stream) as talk:
        talk.stage("fetch")
        talk.progress(training(1))
    assert "\x1b" not in stream.getvalue()
    assert len(json_lines(stream)) == 1
