"""What a row of data becomes: a conversation, a completion, a text, or a bad row and why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: 1-based, for JSON lines and text the line."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them. Assistant messages are learnt, less those at an index in `not_learnt`.

    `template_arguments` go to the chat template beside messages and tools: documents, enable_thinking, …
    """

    origin: Origin
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    not_learnt: frozenset[int] = frozenset()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """Two texts that follow each other as they are; the second is learnt."""

    origin: Origin
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class PlainText:
    """A document that is learnt whole."""

    origin: Origin
    text: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be trained on, and why."""

    origin: Origin
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


Row = Conversation | Completion | PlainText


class Unusable(Exception):  # noqa: N818 - why one row is put aside, not an error of the run
    """Its text is the reason."""


# ── values in words ──────────────────────────────────────────────────────────────────────────────────────────────────


def text_of(value: object, where: str) -> str:
    """The value if it is text that can be encoded. Raises Unusable."""
    if not isinstance(value, str):
        raise Unusable(f"{where} is {type_name(value)}" + ("" if value is None or value != value else ", not text"))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Unusable(f"{where} is not UTF-8 at character {error.start + 1}") from None
    return value


def filled_text(value: object, where: str) -> str:
    """Text in which something stands. Raises Unusable."""
    text = text_of(value, where)
    if not text.strip():
        raise Unusable(f"{where} is empty")
    return text


def type_name(value: object) -> str:
    """What JSON calls it; NaN is what pandas writes for null."""
    if value != value:
        return "null"
    names = {"NoneType": "null", "str": "text", "bool": "a boolean", "int": "a number", "float": "a number"}
    names |= {"list": "a list", "dict": "an object", "bytes": "binary data"}
    return names.get(type(value).__name__, type(value).__name__)


def shortened(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def listed(names: Sequence[str]) -> str:
    """Up to 20 names that a terminal can show."""
    short = (name if len(name) <= 60 else f"{name[:59]}…" for name in names[:20])
    shown = ", ".join("".join(letter if letter.isprintable() else "?" for letter in name) for name in short)
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "nothing"
