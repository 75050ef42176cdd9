"""What a trained adapter must reach to be pushed: "eval_loss <= 0.98 * base" → Gate.

    gate     =  sum ("<=" | "<" | ">=" | ">" | "==") sum
    sum      =  product (("+" | "-") product)*
    product  =  value (("*" | "/") value)*
    value    =  number | metric | "-" value | "(" sum ")"

The text becomes a small tree of our own: nothing that somebody typed is run as code.
"""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from tuner.errors import ConfigError, Problem, did_you_mean

METRICS: Mapping[str, str] = MappingProxyType(
    {
        "eval_loss": "held-out loss of the adapter",
        "base": "held-out loss before training",
        "eval_perplexity": "held-out perplexity of the adapter",
        "base_perplexity": "held-out perplexity before training",
        "train_loss": "the last training loss",
        "first_train_loss": "the first training loss",
        "steps": "optimizer steps",
        "epochs": "times through the training rows",
        "examples": "rows trained on, counted each time",
        "tokens": "tokens trained on",
    }
)
_OF_HELD_OUT_ROWS = frozenset({"eval_loss", "base", "eval_perplexity", "base_perplexity"})
_LEAST = MappingProxyType({name: 1.0 if name.endswith("perplexity") else 0.0 for name in METRICS})

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = MappingProxyType(
    {"<=": operator.le, ">=": operator.ge, "==": operator.eq, "<": operator.lt, ">": operator.gt}
)
_ARITHMETIC: Mapping[str, Callable[[float, float], float]] = MappingProxyType(
    {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
)
_WORD = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)|([A-Za-z_]\w*)|(<=|>=|==|[-+*/()<>]))")
_NESTED_AT_MOST = 20


@dataclass(frozen=True)
class _Number:
    value: float


@dataclass(frozen=True)
class _Metric:
    name: str


@dataclass(frozen=True)
class _Calculation:
    sign: str
    left: "_Term"
    right: "_Term"


_Term = _Number | _Metric | _Calculation


def _evaluate(term: _Term, figures: Mapping[str, float]) -> float:
    match term:
        case _Number(value):
            return value
        case _Metric(name):
            return figures[name]
        case _Calculation(sign, left, right):
            try:
                return _ARITHMETIC[sign](_evaluate(left, figures), _evaluate(right, figures))
            except (ZeroDivisionError, OverflowError):
                return math.nan  # which no comparison holds for


def _metrics(term: _Term) -> Iterator[str]:
    match term:
        case _Metric(name):
            yield name
        case _Calculation(_, left, right):
            yield from _metrics(left)
            yield from _metrics(right)


def _bounds(term: _Term, most: Mapping[str, float]) -> tuple[float, float]:
    """What a term may come to, least and most, when no metric is more than `most` says of it.

    Raises _NoNumberError where it never is a number.
    """
    match term:
        case _Number(value):
            low = high = value
        case _Metric(name):
            low, high = _LEAST[name], most.get(name, math.inf)
        case _Calculation(sign, left, right):
            (a, b), (c, d) = _bounds(left, most), _bounds(right, most)
            if sign == "/" and c == d == 0:
                raise _NoNumberError("it divides by zero")
            match sign:
                case "+":
                    low, high = a + c, b + d
                case "-":
                    low, high = a - d, b - c
                case "/" if c <= 0 <= d:
                    low, high = -math.inf, math.inf
                case _:
                    corners = [_corner(sign, x, y) for x in (a, b) for y in (c, d)]
                    low, high = min(corners), max(corners)
    if low == math.inf or high == -math.inf:
        raise _NoNumberError("a number in it is too large")
    return low, high


def _corner(sign: str, left: float, right: float) -> float:
    """A metric may be as large as anything, and never is infinite: 0 × ∞ is 0 here, and ∞ ÷ ∞ may be near 0."""
    value = left * right if sign == "*" else left / right
    return 0.0 if math.isnan(value) else value


class _NoNumberError(Exception):
    """A term that has no value."""


@dataclass(frozen=True)
class Verdict:
    """Whether a gate is passed, and the sentence that shows its numbers."""

    passed: bool
    sentence: str


@dataclass(frozen=True)
class Gate:
    """One comparison; `text` is how it was written."""

    text: str
    left: _Term
    comparison: str
    right: _Term

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*_metrics(self.left), *_metrics(self.right))))

    @property
    def needs_held_out_rows(self) -> bool:
        return not _OF_HELD_OUT_ROWS.isdisjoint(self.metrics)

    def foregone(self, most: Mapping[str, float] = MappingProxyType({})) -> bool | None:
        """What every run gets that takes a metric no further than `most` says; None where only the run can tell."""
        (a, b), (c, d) = _bounds(self.left, most), _bounds(self.right, most)
        if self.left == self.right:
            return "=" in self.comparison
        holds = _COMPARISONS[self.comparison]
        match self.comparison:
            case "==":
                return True if a == b == c == d else False if b < c or d < a else None
            case "<" | "<=":
                best, worst = (a, d), (b, c)
            case _:
                best, worst = (b, c), (a, d)
        return True if holds(*worst) else None if holds(*best) else False

    def judge(self, figures: Mapping[str, float | None]) -> Verdict:
        """A figure that was not measured, or is no number, passes no gate."""
        known = {name: math.nan if (value := figures.get(name)) is None else value for name in self.metrics}
        left, right = _evaluate(self.left, known), _evaluate(self.right, known)
        passed = _COMPARISONS[self.comparison](left, right)
        shown = ", ".join(f"{name} {_figure(known[name])}" for name in self.metrics)
        return Verdict(passed, f"{self.text}: {_figure(left)} {self.comparison} {_figure(right)} ({shown})")


def _figure(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.6g}"


def split_gates(text: str) -> tuple[str, ...]:
    """The gates of an annotation, which are separated by `;` or by lines."""
    return tuple(part.strip() for part in re.split(r"[;\n]", text) if part.strip())


def parse_gates(texts: Sequence[str], origin: str) -> tuple[Gate, ...]:
    """Each text as a Gate. Raises ConfigError with the problems of all; `origin` says where they were written."""
    gates: list[Gate] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            gates.append(parse_gate(text))
        except ConfigError as error:
            problems.append(Problem(error.message, path=origin, hint=error.hint))
    if problems:
        raise ConfigError.of(problems)
    return tuple(gates)


def parse_gate(text: str) -> Gate:
    """Raises ConfigError for what is no comparison of metrics, with a did-you-mean for a name."""
    return _Parser(" ".join(text.split())).gate()


class _Parser:
    """The grammar above by recursive descent."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._words = self._split()
        self._depth = 0

    def _split(self) -> list[tuple[str, str]]:
        """(kind, word), kind one of number, name and sign."""
        words = []
        at = 0
        while at < len(self._text):
            found = _WORD.match(self._text, at)
            if not found:
                raise self._refuse(f"what is {self._text[at:].partition('?')[0].strip()[:20]!r}?")
            kind = ("number", "name", "sign")[found.lastindex - 1 if found.lastindex else 0]
            words.append((kind, found[found.lastindex or 0]))
            at = found.end()
        return words

    def _refuse(self, why: str, hint: str | None = None) -> ConfigError:
        return ConfigError(f"{self._text!r} is no gate: {why}", hint=hint or "for example 'eval_loss <= 0.98 * base'")

    def _next(self, *signs: str) -> str | None:
        """The next word if it is one of these signs, taken."""
        if self._words and self._words[0] in [("sign", sign) for sign in signs]:
            return self._words.pop(0)[1]
        return None

    def gate(self) -> Gate:
        left = self._sum()
        comparison = self._next(*_COMPARISONS)
        if comparison is None:
            there = f"not {self._words[0][1]!r}" if self._words else "and it ends there"
            raise self._refuse(f"a comparison ({' '.join(_COMPARISONS)}) must follow, {there}")
        right = self._sum()
        if self._words:
            raise self._refuse(f"{self._words[0][1]!r} is too much", "one comparison a gate; give --require again")
        gate = Gate(self._text, left, comparison, right)
        if not gate.metrics:
            raise self._refuse("it compares only numbers", f"the metrics are {', '.join(METRICS)}")
        try:
            outcome = gate.foregone()
        except _NoNumberError as error:
            raise self._refuse(str(error)) from error
        if outcome is not None:
            why = "it holds whatever the run does" if outcome else "no run can pass it"
            raise self._refuse(why, "losses and counts are 0 or more, perplexities 1 or more")
        return gate

    def _sum(self) -> _Term:
        term = self._product()
        while sign := self._next("+", "-"):
            term = _Calculation(sign, term, self._product())
        return term

    def _product(self) -> _Term:
        term = self._value()
        while sign := self._next("*", "/"):
            term = _Calculation(sign, term, self._value())
        return term

    def _value(self) -> _Term:
        self._depth += 1
        if self._depth > _NESTED_AT_MOST:
            raise self._refuse("it is nested too deeply")
        try:
            return self._one_value()
        finally:
            self._depth -= 1

    def _one_value(self) -> _Term:
        if self._next("-"):
            return _Calculation("-", _Number(0.0), self._value())
        if self._next("("):
            inside = self._sum()
            if not self._next(")"):
                raise self._refuse("a ) is missing")
            return inside
        if not self._words or self._words[0][0] == "sign":
            there = f"before {self._words[0][1]!r}" if self._words else "at its end"
            raise self._refuse(f"a number or a metric is missing {there}")
        kind, word = self._words.pop(0)
        if kind == "number":
            return _Number(float(word))
        if word not in METRICS:
            near = did_you_mean(word, METRICS)
            raise self._refuse(
                f"no metric {word!r}" + (f", {near}" if near else ""), near or f"the metrics are {', '.join(METRICS)}"
            )
        return _Metric(word)
