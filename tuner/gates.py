"""What a trained adapter must reach to be pushed: "eval_loss <= 0.98 * base" → Gate.

    gate     =  sum ("<=" | "<" | ">=" | ">" | "==") sum
    sum      =  product (("+" | "-") product)*
    product  =  value (("*" | "/") value)*
    value    =  number | metric | "-" value | "(" sum ")"

Python's own parser reads it, as its expressions have all of this; what else they have is refused. Nothing that somebody
typed is run as code.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType

from tuner.errors import ConfigError, Problem, cut, did_you_mean

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
_ARITHMETIC: Mapping[type[ast.operator], Callable[[float, float], float]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
)
_SIGN = MappingProxyType({ast.LtE: "<=", ast.GtE: ">=", ast.Eq: "==", ast.Lt: "<", ast.Gt: ">"})
_NODES = (ast.Constant, ast.Name, ast.Load, ast.UnaryOp, ast.USub, ast.BinOp, *_ARITHMETIC)  # of a sum

# Names, decimal numbers and our signs. Python has more: ** // << != %, texts, comments, 0x10, 1_000, 1j, and 1or 2.
_NAME = r"(?<![\w.])[A-Za-z_]\w*"
_NUMBER = r"(?=\.?\d)(?!0\d)[\d.]+(?:[eE][-+]?\d+)?(?![\w.])"
_WORDS = re.compile(rf"(?:\s*(?:{_NAME}|{_NUMBER}|<=|>=|==|([*/<>])(?!\1)|[-+()]))*\s*", re.ASCII)
# Python's parser, and whoever walks its tree, goes as deep as a text does.
_CHARACTERS_AT_MOST, _NESTED_AT_MOST = 500, 20
_GATES_AT_MOST = 50


def _evaluate(term: ast.expr, figures: Mapping[str, float]) -> float:
    match term:
        case ast.Name(name):
            return figures[name]
        case ast.UnaryOp(operand=operand):
            return -_evaluate(operand, figures)
        case ast.BinOp(left, sign, right):
            try:
                return _ARITHMETIC[type(sign)](_evaluate(left, figures), _evaluate(right, figures))
            except (ZeroDivisionError, OverflowError):
                return math.nan  # which no comparison holds for
        case _:
            return _number(term)


def _number(term: ast.expr) -> float:
    return float(ast.unparse(term))  # from an integer of 400 digits it would be an error, from text it is infinite


def _bounds(term: ast.expr, most: Mapping[str, float]) -> tuple[float, float]:
    """What a term may come to, least and most, when no metric is more than `most` says of it.

    Raises _NoGateError where it never is a number.
    """
    match term:
        case ast.Name(name):
            low, high = _LEAST[name], most.get(name, math.inf)
        case ast.UnaryOp(operand=operand):
            a, b = _bounds(operand, most)
            low, high = -b, -a
        case ast.BinOp(left, sign, right):
            (a, b), (c, d) = _bounds(left, most), _bounds(right, most)
            match sign:
                case ast.Div() if c == d == 0:
                    raise _NoGateError("it divides by zero")
                case ast.Add():
                    low, high = a + c, b + d
                case ast.Sub():
                    low, high = a - d, b - c
                case ast.Div() if c <= 0 <= d:
                    low, high = -math.inf, math.inf
                case _:
                    corners = [_corner(sign, x, y) for x in (a, b) for y in (c, d)]
                    low, high = min(corners), max(corners)
        case _:
            low = high = _number(term)
    if low == math.inf or high == -math.inf:
        raise _NoGateError("a number in it is too large")
    return low, high


def _corner(sign: ast.operator, left: float, right: float) -> float:
    """A metric may be as large as anything, and never is infinite: 0 × ∞ is 0 here, and ∞ ÷ ∞ may be near 0."""
    value = _ARITHMETIC[type(sign)](left, right)
    return 0.0 if math.isnan(value) else value


class _NoGateError(Exception):
    """Why a text is no gate, in words that follow it."""

    def __init__(self, why: str, hint: str = "for example 'eval_loss <= 0.98 * base'") -> None:
        super().__init__(why)
        self.hint = hint


@dataclass(frozen=True)
class Verdict:
    """Whether a gate is passed, and the sentence that shows its numbers."""

    passed: bool
    sentence: str


@dataclass(frozen=True)
class Gate:
    """One comparison; `text` is how it was written."""

    text: str
    left: ast.expr = field(repr=False, compare=False)
    comparison: str
    right: ast.expr = field(repr=False, compare=False)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(re.findall(_NAME, self.text)))

    @property
    def needs_held_out_rows(self) -> bool:
        return not _OF_HELD_OUT_ROWS.isdisjoint(self.metrics)

    def foregone(self, most: Mapping[str, float] = MappingProxyType({})) -> bool | None:
        """What every run gets that takes a metric no further than `most` says; None where only the run can tell."""
        (a, b), (c, d) = _bounds(self.left, most), _bounds(self.right, most)
        if ast.dump(self.left) == ast.dump(self.right):
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
    if len(texts) > _GATES_AT_MOST:
        problems = [Problem(f"{len(texts):,} gates, and at most {_GATES_AT_MOST} are read", path=origin)]
    for text in texts[:_GATES_AT_MOST]:
        try:
            gates.append(parse_gate(text))
        except ConfigError as error:
            problems.append(Problem(error.message, path=origin, hint=error.hint))
    if problems:
        raise ConfigError.of(problems)
    return tuple(gates)


def parse_gate(text: str) -> Gate:
    """Raises ConfigError for what is no comparison of metrics, with a did-you-mean for a name."""
    text = " ".join(text.split())
    shown = text if len(text) <= _CHARACTERS_AT_MOST else cut(text, 60)
    try:
        return _gate(text)
    except _NoGateError as error:
        raise ConfigError(f"{shown!r} is no gate: {error}", hint=error.hint) from None


def _gate(text: str) -> Gate:
    _check_words(text)
    match _parse(text):
        case ast.Compare(left, [sign], [right]):
            gate = Gate(text, left, _SIGN[type(sign)], right)
        case ast.Compare(comparators=[one, *_]) | ast.BoolOp(values=[one, *_]):
            extra = re.findall("and|or|[<=>]+", text[one.end_col_offset :])[0]
            raise _NoGateError(f"{extra!r} is too much", "one comparison a gate; give --require again")
        case _:
            raise _NoGateError(f"a comparison ({' '.join(_COMPARISONS)}) must follow, and it ends there")
    for node in (*ast.walk(gate.left), *ast.walk(gate.right)):
        if not isinstance(node, _NODES):
            raise _NoGateError(f"what is {ast.get_source_segment(text, node) or '+'!r}?")
    if not gate.metrics:
        raise _NoGateError("it compares only numbers", f"the metrics are {', '.join(METRICS)}")
    outcome = gate.foregone()
    if outcome is not None:
        why = "it holds whatever the run does" if outcome else "no run can pass it"
        raise _NoGateError(why, "losses and counts are 0 or more, perplexities 1 or more")
    return gate


def _check_words(text: str) -> None:
    if len(text) > _CHARACTERS_AT_MOST:
        raise _NoGateError(
            f"it has {len(text):,} characters; at most {_CHARACTERS_AT_MOST} are read",
            "write it as several gates; all of them must hold",
        )
    words = _WORDS.match(text)
    if words and words.end() < len(text):
        raise _NoGateError(f"what is {text[words.end() :].partition('?')[0][:20].strip()!r}?")
    depths = list(accumulate((letter == "(") - (letter == ")") for letter in text))
    if max(depths, default=0) > _NESTED_AT_MOST or re.search(rf"(-\s*){{{_NESTED_AT_MOST + 1}}}", text):
        raise _NoGateError("it is nested too deeply")
    for name in re.findall(_NAME, text):
        if name not in (*METRICS, "and", "or"):
            near = did_you_mean(name, METRICS)
            why = f"no metric {name!r}" + (f", {near}" if near else "")
            raise _NoGateError(why, near or f"the metrics are {', '.join(METRICS)}")


def _parse(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        # Its columns count from 1, and the text's end is 0.
        begin, end = (error.offset or 0) - 1, (error.end_offset or 0) - 1
        word = text[begin : max(end, begin + 1)] if begin >= 0 else ""
        if "never closed" in error.msg:
            why = "a ) is missing"
        elif word and (word[0] not in "-+*/)<>=" or "unmatched" in error.msg):
            why = f"{word!r} is too much"
        else:
            why = f"a number or a metric is missing {f'before {word!r}' if word else 'at its end'}"
        raise _NoGateError(why) from None
