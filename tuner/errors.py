"""What can go wrong, each kind with its exit code.

    TunerError
    ├── UsageError            64  the command line makes no sense
    ├── DataError             65  the data is bad
    ├── InputMissingError     66  a file, URL, repository or secret is not there
    ├── ServiceError          69  a service is down; running again may help
    ├── OutOfGpuMemoryError   73  out of GPU memory after every fallback
    ├── NotPushedError        74  trained, not pushed; the adapter is kept
    ├── InterruptedRunError   75  stopped after a checkpoint; running again resumes
    ├── GateError             76  trained, and a gate said no; the adapter is kept
    ├── DeniedError           77  credentials missing, wrong or not enough
    └── ConfigError           78  a Workspace, ConfigMap, preset or flag is wrong

Codes follow sysexits.h where it has one, so that a shell and a podFailurePolicy read the same.
Anything that is not a TunerError is a bug of ours: exit 70 and its traceback.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from tuner.redaction import redact

EXIT_INTERNAL = 70
MOST_PROBLEMS = 100  # of one configuration: nobody reads on, and with thousands it is an attack, or the wrong file
_LONGEST_WORD = 100


class TunerError(Exception):
    """One sentence on what is wrong with which value, and a hint on what to do next; neither shows a secret."""

    exit_code = EXIT_INTERNAL

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = redact(message)
        super().__init__(self.message)
        self.hint = hint

    @property
    def hint(self) -> str | None:
        return self._hint

    @hint.setter
    def hint(self, hint: str | None) -> None:
        self._hint = hint and redact(hint)


class UsageError(TunerError):
    exit_code = 64


class DataError(TunerError):
    exit_code = 65


class InputMissingError(TunerError):
    exit_code = 66


class ServiceError(TunerError):
    exit_code = 69


class OutOfGpuMemoryError(TunerError):
    exit_code = 73


class NotPushedError(TunerError):
    exit_code = 74


class InterruptedRunError(TunerError):
    exit_code = 75


class GateError(TunerError):
    exit_code = 76


class DeniedError(TunerError):
    exit_code = 77


@dataclass(frozen=True)
class Problem:
    """One fault in a file: where it stands, what it is, what to do.

    `path` is the field path as kubectl writes it (`tuning.input.urls[1]`), `line` is 1-based in `file`.
    """

    message: str
    path: str = ""
    file: str = ""
    line: int | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", redact(self.message))
        object.__setattr__(self, "hint", self.hint and redact(self.hint))

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.file and self.line else self.file
        place = " ".join(part for part in (where, self.path) if part)
        return f"{place}: {self.message}" if place else self.message


class ConfigError(TunerError):
    """All the problems of a configuration at once, in the order of the file."""

    exit_code = 78

    def __init__(self, message: str, *, hint: str | None = None, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message, hint=hint)
        self.problems = tuple(problems)

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> "ConfigError":
        """The one error for a list of at least one problem. Whoever finds MOST_PROBLEMS + 1 may stop looking."""
        if len(problems) == 1:
            return cls(str(problems[0]), hint=problems[0].hint, problems=problems)
        if len(problems) > MOST_PROBLEMS:
            first = (*problems[:MOST_PROBLEMS], Problem("there are more problems than these"))
            return cls(f"more than {MOST_PROBLEMS} problems in the configuration", problems=first)
        return cls(f"{len(problems)} problems in the configuration", problems=problems)


# The kinds above: what other modules derive for themselves has a code of one of them.
KINDS: Mapping[int, type[TunerError]] = MappingProxyType({kind.exit_code: kind for kind in TunerError.__subclasses__()})


def did_you_mean(word: str, known: Iterable[str]) -> str | None:
    """`did you mean "learning_rate"?`, or None when nothing known is near."""
    if len(word) > _LONGEST_WORD:
        return None
    by_lower = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f'did you mean "{by_lower[near[0]]}"?' if near else None


def cut(text: str, most: int = 1000) -> str:
    """The text, its end left out where it is longer than a message should show."""
    return text if len(text) <= most else text[: most - 1] + "…"
