"""What was typed → the calls below it. The only place that prints or exits.

stdout is data, stderr is talk. Everything but Typer is imported inside the commands: `tuner --help` is quick.
"""

import io
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from typing import Any, TextIO, cast

import typer

from tuner.cli import completion
from tuner.cli.commands import app
from tuner.cli.common import Stopped, environment_error, say
from tuner.errors import (
    EXIT_INTERNAL,
    ConfigError,
    InputMissingError,
    InterruptedRunError,
    NotPushedError,
    TunerError,
    UsageError,
)
from tuner.redaction import hide_arguments, hide_environment, redact
from tuner.signals import handling

__all__ = ["app", "main"]

EXIT_SIGINT, EXIT_SIGPIPE = 128 + signal.SIGINT, 128 + signal.SIGPIPE


def main(argv: Sequence[str]) -> int:
    """The exit code. Nothing below this function prints an error or exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without "→" is no reason to stop
    completes = os.environ.get("_TUNER_COMPLETE")
    if completes == "complete_bash":
        completion.read_bash_words(os.environ)
    hide_environment(os.environ)
    hide_arguments(argv)
    try:
        # a shell's TAB is not spoken into
        with _redacted_stderr(), nullcontext() if completes else _signals():
            code = app(args=list(argv), prog_name="tuner", standalone_mode=False)
            print(end="", flush=True)  # a reader that is gone shows here, and not when Python ends
    except TunerError as error:
        return _explain(error, argv)
    except _TyperError as error:
        return _explain_usage(error)
    except (KeyboardInterrupt, typer.Abort):  # the second Ctrl-C of a training, which has said so
        return EXIT_SIGINT
    except Stopped as stopped:
        return stopped.exit_code
    except SystemExit as left:  # Typer's way of ending a completion, and with a reader of stdout that is gone
        return EXIT_SIGPIPE if isinstance(left.__context__, OSError) else int(left.code or 0)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_SIGPIPE
    except (OSError, RuntimeError, ValueError) as error:
        known = environment_error(error)
        return _explain(known, argv) if known else _bug()
    except Exception:
        return _bug()
    return int(code or 0)


# Typer has a copy of click in newer releases: its errors are found through one that it exports.
_TyperError: type[Exception] = typer.BadParameter.__mro__[2]


class _Redacted:
    """A text stream on which no secret gets: libraries, warnings and threads write there by themselves."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _redacted_stderr() -> Iterator[None]:
    with redirect_stderr(cast(TextIO, _Redacted(sys.stderr))):
        yield


_PATIENCE_S = 3.0  # for an orderly end: a connection that says nothing may hold it up


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM are acknowledged and end the block, with uploads taken back and files closed.

    A second one, or some seconds, end the process. The train stage has handlers of its own. Without one for SIGTERM a
    container's first process would not end at all.
    """
    stopping = False

    def end(number: int, _frame: object) -> None:
        nonlocal stopping
        exit_code = 128 + number
        if stopping:
            _leave(exit_code)
        stopping = True
        say(f"{signal.Signals(number).name}: stopping; what was downloaded and saved so far is kept")
        patience = threading.Timer(_PATIENCE_S, _leave, (exit_code,))
        patience.daemon = True
        patience.start()
        raise Stopped(exit_code)

    with handling(end):
        yield


def _leave(exit_code: int) -> None:
    """End the process as it stands: all that is kept is on the disk already."""
    if sys.stderr.isatty():
        print(end="\x1b[?25h", file=sys.stderr, flush=True)  # the bars had hidden the cursor
    os._exit(exit_code)


def _explain(error: TunerError, argv: Sequence[str]) -> int:
    say(f"error: {error.message}")
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        for problem in error.problems:
            hint = problem.hint if problem.hint and problem.hint not in problem.message else None
            say(f"  {problem}" + (f"\n      hint: {hint}" if hint else ""))
    if error.hint and error.hint not in error.message:
        say(f"hint: {error.hint}")
    if isinstance(error, InterruptedRunError | NotPushedError) and argv[:1] != ["stage"]:
        say(f"go on with: {shlex.join(['tuner', *argv])}")
    return error.exit_code


def _explain_usage(error: Exception) -> int:
    """Typer's own words, in our form."""
    context = getattr(error, "ctx", None)
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if message.startswith("Usage:"):  # no arguments at all
        say(message)
        return UsageError.exit_code
    if unreadable := re.fullmatch(r"invalid value for '(.+?)': \w+ '(.*)' is not readable\.", message, re.IGNORECASE):
        say(f"error: {unreadable[1]} {unreadable[2]}: cannot be read: Permission denied")
        return InputMissingError.exit_code
    say(f"error: {message[0].lower()}{message[1:]}")
    say(f"hint: {context.command_path if context else 'tuner'} --help")
    return UsageError.exit_code


def _bug() -> int:
    import traceback

    say(traceback.format_exc())
    say("error: this is a bug in tuner; the lines above say where")
    return EXIT_INTERNAL
