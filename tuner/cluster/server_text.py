"""What a cluster says, fit to be shown: without the values of the object that it is about, and without secrets. Pure.

An API server quotes what it refuses (`data: Invalid value: {"tuning":{"input":{"urls":["https://…?sig=…"]}}}: field is
immutable`), and so may a webhook, a policy, a kubelet. None of them knows which part of it is a secret. What is shown
is the field and what is wrong with it; the value is in the file of whoever wrote it.
"""

import base64
import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tuner.redaction import redact

_HIDDEN = "…"
_SHORTEST_SECRET = 4  # characters: hiding every "a" would leave nothing to read
_LONGEST_EXPRESSION = 200  # a template's, in a value that nobody has filled in

# What k8s.io/apimachinery/pkg/util/validation/field puts a value behind.
_VALUE = re.compile(r"\b(Invalid value|Unsupported value|Duplicate value|Not found): ")
_DUMP = re.compile(r"\bmap\[|\{")


def shown(text: str, secrets: Collection[str] = ()) -> str:
    """The text without quoted values and dumps of objects, without these known secrets, and redacted."""
    text = _without_dumps(_without_values(text))
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    return redact(text)


def secrets_of(body: Mapping[str, Any] | None) -> frozenset[str]:
    """What in an object that is sent must never come back in words: a Secret's values, as they are and encoded.

    Of a value that is JSON, such as a docker config, each text in it as well.
    """
    if body is None or body.get("kind") != "Secret":
        return frozenset()
    found: set[str] = set()
    for encoded in (body.get("data") or {}).values():
        found.add(str(encoded))
        try:
            found.update(_texts_in(base64.b64decode(str(encoded), validate=True).decode()))
        except ValueError:
            continue
    for text in (body.get("stringData") or {}).values():
        found.update(_texts_in(str(text)))
    return frozenset(text for text in found if len(text) >= _SHORTEST_SECRET)


def _texts_in(text: str) -> Iterator[str]:
    yield text
    try:
        value = json.loads(text)
    except ValueError:
        return
    yield from _leaves(value)


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _leaves(each)
    elif isinstance(value, list):
        for each in value:
            yield from _leaves(each)


# ── values and dumps ─────────────────────────────────────────────────────────────────────────────────────────────────


def _without_values(text: str) -> str:
    """`spec.x: Invalid value: "abc": must be …` without the value."""
    parts: list[str] = []
    at = 0
    while found := _VALUE.search(text, at):
        end = _end_of_value(text, found.end())
        parts.append(text[at : found.start()] + found[1])
        at = end
    return "".join(parts) + text[at:]


def _end_of_value(text: str, start: int) -> int:
    """Where the value ends that begins here, in JSON or as Go prints it."""
    opening = re.compile(r"(?:[&*]?[\w.\[\]*]*\{|map\[|\[|\")").match(text, start)
    if opening is None:  # a number, or none at all
        bare = re.compile(r"[\w.+-]+(?=: |, |\]?$)").match(text, start)
        return bare.end() if bare else start - len(": ")
    if opening.group() == '"':
        return _end_of_string(text, start)
    return _end_of_brackets(text, opening.end() - 1)


def _end_of_string(text: str, start: int) -> int:
    ending = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL).match(text, start)
    return ending.end() if ending else len(text)


def _end_of_brackets(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`; a text that was cut off closes none."""
    depth = 0
    at = start
    while at < len(text):
        if text[at] == '"':
            at = _end_of_string(text, at)
            continue
        depth += (text[at] in "{[") - (text[at] in "}]")
        at += 1
        if depth == 0:
            return at
    return len(text)


def _without_dumps(text: str) -> str:
    """Objects in the middle of a sentence. A template expression, `{{image}}`, is none."""
    parts: list[str] = []
    at = 0
    while found := _DUMP.search(text, at):
        end = _end_of_brackets(text, found.end() - 1)
        whole, inside = text[found.start() : end], text[found.end() : end]
        if found.group() == "map[":
            whole = f"map[{_HIDDEN}]"
        elif '"' in inside or "'" in inside or len(inside) > _LONGEST_EXPRESSION:
            whole = f"{{{_HIDDEN}}}"
        parts.append(text[at : found.start()] + whole)
        at = end
    return "".join(parts) + text[at:]
