"""YAML from outside → plain values, the line of each, and all that is wrong with them. The one reader of Workspace
files, training configurations, `--set` values, patches and presets.

    text ── events ──► nodes, counted ── aliases and merge keys resolved ──► Document (values, lines, faults)

**Limits.** Whatever the text holds, reading it takes less than a second and some tens of megabytes: the controller
reads what is in other people's namespaces. An alias counts for all that it stands for, so what is made of the values
(JSON, a copy, a repr) is within the same limits.

**Scalars.** What stands without quotes is read by YAML 1.2's core rules, https://yaml.org/spec/1.2.2/#103-core-schema:
`2e-4` is a number; a date, `1:30` and `y` are text. Where kubectl and KAITO, who read the same files, both go by YAML
1.1, so do we: yes, no, on and off are true and false, 0644 is octal, 1_000 and 0b11 are numbers. By the core rules they
would be one thing here and another one there, and nobody would be told. NaN, infinity and keys that are not text are
faults, since JSON has none of them, and so are the tags of programs.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from tuner.errors import MOST_PROBLEMS, ConfigError, InputMissingError, Problem, cut, did_you_mean

MAX_BYTES = 1024 * 1024  # as of a ConfigMap
MAX_VALUES = 20_000  # of one text, aliases counted for what they stand for
MAX_DEPTH = 64
MAX_DOCUMENTS = 500
MAX_KEY_CHARACTERS = 1024

YamlValue: TypeAlias = "bool | int | float | str | list[YamlValue] | dict[str, YamlValue] | None"
Location = tuple[str | int, ...]

UNFILLED_EXPRESSION = "an unfilled template expression: {}"
RENDER_FIRST = "render the file first (helm template, envsubst, …)"


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Fault:
    """One thing wrong at a place of a document. `covers`: whatever else is found at or below it is only noise.

    `line` is the one to change where that is not the place's own. `is_unfilled`: a placeholder that nobody filled in.
    """

    location: Location
    message: str
    hint: str | None = None
    covers: bool = False
    line: int | None = None
    is_unfilled: bool = False

    def hides(self, location: Location) -> bool:
        return self.covers and location[: len(self.location)] == self.location


@dataclass(frozen=True)
class Document:
    """One YAML document as plain values: JSON's, and nothing else.

    `lines` has the line of every key and list item, `text_lines` the one where a scalar's own text begins, both of
    `file` and 1-based. `written` is what stands in the file for a scalar without quotes: `no` for False, `1e5`.
    In the place of a value with a fault stands some text.
    """

    value: YamlValue = field(repr=False)
    file: str = ""
    line: int = 1
    lines: Mapping[Location, int] = field(default_factory=dict, repr=False)
    text_lines: Mapping[Location, int] = field(default_factory=dict, repr=False)
    written: Mapping[Location, str] = field(default_factory=dict, repr=False)
    faults: tuple[Fault, ...] = ()

    @property
    def mapping(self) -> dict[str, YamlValue]:
        """The value, when it is a mapping; else an empty one."""
        return self.value if isinstance(self.value, dict) else {}

    def line_of(self, location: Location) -> int:
        """The line of a place, or of the nearest one above it that stands in the file."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, self.line)

    def is_covered(self, location: Location) -> bool:
        """Whether a fault says all there is to say about this place."""
        return any(fault.hides(location) for fault in self.faults)

    def problem(self, fault: Fault) -> Problem:
        line = fault.line or self.line_of(fault.location)
        return Problem(cut(fault.message), field_path(fault.location), self.file, line, fault.hint)


def field_path(location: Location) -> str:
    """`tuning.input.urls[1]`, `metadata.labels[app.kubernetes.io/name]`"""
    path = ""
    for key in location:
        part = cut(key.partition("?")[0], 80) if isinstance(key, str) else key  # a signed URL, mistaken for a key
        if isinstance(part, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", part):
            path += f".{part}" if path else part
        else:
            path += f"[{part}]" if str(part).isprintable() else f"[{part!r}]"
    return cut(path)


def what_is(value: object) -> str:
    """The kind of value in YAML's words; never the value itself, which may be secret."""
    for kind, words in _WORDS.items():
        if isinstance(value, kind):
            return words
    return "nothing"


_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_text(path: Path, name: str, *, hint: str | None = None) -> str:
    """The text of a file of YAML; `name` is what messages call it, `hint` for one that is not there.

    Raises InputMissingError where it cannot be read, ConfigError where it is too large or not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
            size_bytes = max(len(content), os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        siblings = [sibling.name for sibling in path.parent.glob("*")] if path.parent.is_dir() else []
        raise InputMissingError(
            f"{name}: there is no such file", hint=did_you_mean(path.name, siblings) or hint
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputMissingError(f"{name}: cannot be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{name}: {size_bytes:,} bytes are too many; at most {MAX_BYTES:,} are read")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        problem = Problem(
            "not UTF-8 text" + (" but UTF-16" if utf_16 else ""),
            file=name,
            line=content.count(b"\n", 0, error.start) + 1,
            hint="save the file as UTF-8",
        )
        raise ConfigError.of([problem]) from error


def read_documents(text: str, file: str, first_line: int = 1) -> tuple[list[Document], list[Problem]]:
    """The documents of a text that begins on `first_line` of `file`, those without anything in them left out.

    After an error of syntax, or where a limit is passed, nothing is read: the one problem says so.
    """
    documents: list[Document] = []
    try:
        _refuse_unreadable(text)
        for root in _Composer(text).roots():
            document = _Builder(text, first_line).document(root, file)
            if document.value is not None:
                documents.append(document)
    except _NotReadError as error:
        line = first_line + error.lines_before
        return documents, [Problem(error.message, file=file, line=line, hint=error.hint)]
    except yaml.MarkedYAMLError as error:
        return documents, [_syntax_problem(error, text, file, first_line)]
    return documents, []


def check_size(value: object, file: str = "") -> list[Problem]:
    """The problem with a value out of JSON that is larger than YAML's may be; none for any other."""
    values, level = 0, [value]
    for _ in range(MAX_DEPTH):
        values += len(level)
        if values > MAX_VALUES:
            return [Problem(_TOO_MANY, file=file)]
        level = [
            item
            for each in level
            if isinstance(each, list | dict)
            for item in (each if isinstance(each, list) else each.values())
        ]
        if not level:
            return []
    return [Problem(_TOO_DEEP, file=file)]


_TOO_MANY = f"more than {MAX_VALUES:,} values, counting what aliases stand for"
_TOO_LONG = f"more than {MAX_BYTES:,} bytes, counting what aliases stand for"
_TOO_DEEP = f"nested too deeply to be read: more than {MAX_DEPTH} levels"


class _NotReadError(Exception):
    """Why a text is not read on; `lines_before` is how many lines of it are before the place."""

    def __init__(self, message: str, lines_before: int, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.lines_before, self.hint = message, lines_before, hint


# Line breaks as YAML has them. A %TAG directive gives another meaning to tags, which have none here; a parser
# compares each with all those before it.
_TAG_DIRECTIVE = re.compile(r"(?:\A|[\n\r\x85\u2028\u2029])(%TAG)[ \t]")


def _refuse_unreadable(text: str) -> None:
    if len(text) > MAX_BYTES or len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise _NotReadError(f"more than {MAX_BYTES:,} bytes", 0)
    if found := yaml.reader.Reader.NON_PRINTABLE.search(text):
        character = f"U+{ord(found.group()):04X}"
        raise _NotReadError(f"the character {character} cannot be in YAML", text.count("\n", 0, found.start()))
    if found := _TAG_DIRECTIVE.search(text):
        raise _NotReadError("a %TAG directive means nothing here", text.count("\n", 0, found.start(1)))


def _syntax_problem(error: yaml.MarkedYAMLError, text: str, file: str, first_line: int) -> Problem:
    mark = error.problem_mark or error.context_mark
    line = min(mark.line, text.count("\n")) if mark else 0  # libyaml ends a text with a line break of its own
    if error.problem == "exceeded maximum nesting depth":
        return Problem(_TOO_DEEP, file=file, line=first_line + line)
    lines = text.splitlines()
    here = lines[line] if line < len(lines) else ""
    if "\t" in here[: len(here) - len(here.lstrip())]:
        hint = "there is a tab; YAML is indented with spaces"
    elif "{{" in here or "{%" in here:
        hint = "this looks like a template; render it first (helm template, …)"
    else:
        hint = "look at indentation, brackets and quotes in this line and the one before"
    said = f"not YAML: {error.problem or error.context or 'syntax error'}"
    return Problem(said, file=file, line=first_line + line, hint=hint)


# ── events → nodes ───────────────────────────────────────────────────────────────────────────────────────────────────

# libyaml's where it is there, ten times as quick; both give the same events.
_Parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Composer:
    """What PyYAML's composer does, within limits. An alias is counted as if all that it stands for stood there."""

    def __init__(self, text: str) -> None:
        self._parser = _Parser(text)
        self._anchors: dict[str, yaml.Node | None] = {}  # None: it has not ended yet
        self._values = 0
        self._characters = 0

    def roots(self) -> Iterator[yaml.Node]:
        """The node of each document. Tags are as written: "" where there is none."""
        documents = 0
        while not isinstance(event := self._parser.get_event(), yaml.StreamEndEvent):
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > MAX_DOCUMENTS:
                    raise _NotReadError(f"more than {MAX_DOCUMENTS} YAML documents", _line(event))
                self._anchors = {}
                yield self._node(self._parser.get_event(), 0)

    def _node(self, event: yaml.NodeEvent, depth: int) -> yaml.Node:
        node: yaml.Node
        begin: Any = event.start_mark  # libyaml has marks of its own
        if isinstance(event, yaml.AliasEvent):
            node = self._anchored(event)
        elif isinstance(event, yaml.ScalarEvent):
            node = yaml.ScalarNode(event.tag or "", event.value, begin, begin, event.style)
        else:
            assert isinstance(event, yaml.CollectionStartEvent)
            is_list = isinstance(event, yaml.SequenceStartEvent)
            kind = yaml.SequenceNode if is_list else yaml.MappingNode
            node = kind(event.tag or "", [], begin, begin, event.flow_style)
        self._count(node, depth, _line(event))
        if isinstance(event, yaml.CollectionStartEvent):
            if event.anchor:
                self._anchors[event.anchor] = None
            items: list[yaml.Node] = []
            while not isinstance(inner := self._parser.get_event(), yaml.CollectionEndEvent):
                items.append(self._node(inner, depth + 1))
            node.value = items if is_list else list(zip(items[::2], items[1::2], strict=True))
            node.end_mark = inner.end_mark
        if event.anchor and not isinstance(event, yaml.AliasEvent):
            self._anchors[event.anchor] = node
        return node

    def _anchored(self, event: yaml.AliasEvent) -> yaml.Node:
        name = event.anchor or ""
        node = self._anchors.get(name)
        if node is None:
            circle = f"*{cut(name, 60)} stands in what it stands for: an alias in a circle"
            nothing = f"not YAML: there is no &{cut(name, 60)} before *{cut(name, 60)}"
            raise _NotReadError(circle if name in self._anchors else nothing, _line(event))
        return node

    def _count(self, node: yaml.Node, depth: int, line: int) -> None:
        """The node and all that is in it."""
        self._values += 1
        self._characters += len(node.value) if isinstance(node, yaml.ScalarNode) else 0
        if depth > MAX_DEPTH:
            raise _NotReadError(_TOO_DEEP, line)
        if self._values > MAX_VALUES:
            raise _NotReadError(_TOO_MANY, line)
        if self._characters > MAX_BYTES:
            raise _NotReadError(_TOO_LONG, line)
        for each in () if isinstance(node, yaml.ScalarNode) else node.value:
            for inner in each if isinstance(each, tuple) else (each,):
                self._count(inner, depth + 1, line)


def _line(marked: yaml.Event | yaml.Node) -> int:
    return marked.start_mark.line if marked.start_mark else 0


# ── nodes → values ───────────────────────────────────────────────────────────────────────────────────────────────────

_STANDARD = "tag:yaml.org,2002:"

_CONSTANTS: Mapping[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **{spelt: True for word in ("true", "yes", "on") for spelt in (word, word.title(), word.upper())},
    **{spelt: False for word in ("false", "no", "off") for spelt in (word, word.title(), word.upper())},
}
_BETWEEN_DIGITS = re.compile(r"(?<=[0-9])_(?=[0-9])")
_WHOLE = (  # sign, digits; their base
    (re.compile(r"([-+]?)0o?([0-7]+)"), 8),
    (re.compile(r"([-+]?)0b([01]+)"), 2),
    (re.compile(r"([-+]?)0x([0-9a-fA-F]+)"), 16),
    (re.compile(r"([-+]?)([0-9]+)"), 10),
)
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NO_NUMBER = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INTEGER_CHARACTERS = 67  # 64 bits, 0b and a sign


def _resolved(text: str) -> bool | int | float | str | None:
    """What a scalar without quotes is. A whole number far beyond 64 bits is a float, as for many readers of JSON."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    digits = _BETWEEN_DIGITS.sub("", text)
    for pattern, base in _WHOLE:
        if found := pattern.fullmatch(digits):
            if len(digits) <= _INTEGER_CHARACTERS:  # int() takes minutes for a million of them
                return int(found[1] + found[2], base)
            return float(digits) if base == 10 else math.inf
    if _FLOAT.fullmatch(digits):
        return float(digits)
    return math.nan if _NO_NUMBER.fullmatch(text) else text


class _Builder:
    """Nodes → plain values, the line of each, and what YAML lets pass but a reader should not."""

    def __init__(self, text: str, first_line: int) -> None:
        self._text = text
        self._first_line = first_line
        self._lines: dict[Location, int] = {}
        self._text_lines: dict[Location, int] = {}
        self._written: dict[Location, str] = {}
        self._faults: list[Fault] = []
        self._checked: set[int] = set()  # mappings whose keys have been looked at: an alias says nothing twice

    def document(self, root: yaml.Node, file: str) -> Document:
        value = self._build(root, ())
        line = self._line(root)
        return Document(value, file, line, self._lines, self._text_lines, self._written, tuple(self._faults))

    def _line(self, node: yaml.Node) -> int:
        return self._first_line + _line(node)

    def _build(self, node: yaml.Node, location: Location) -> YamlValue:
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, location)
        if node.tag not in ("", "!", _STANDARD + ("seq" if isinstance(node, yaml.SequenceNode) else "map")):
            self._fault(Fault(location, _meaningless(node.tag), covers=True))
            return ""
        if isinstance(node, yaml.SequenceNode):
            return [self._at(each, each, (*location, index)) for index, each in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        if node.flow_style and any(isinstance(key, yaml.MappingNode) for key, _ in node.value):
            # {{ .Values.image }} without quotes is YAML for a mapping in a mapping.
            begin, end = node.start_mark.index, node.end_mark.index
            shown = cut(" ".join(self._text[begin : min(end, begin + 200)].split()), 60)
            self._fault(Fault(location, UNFILLED_EXPRESSION.format(shown), RENDER_FIRST, covers=True, is_unfilled=True))
            return shown
        pairs = self._pairs(node, location)
        return {name: self._at(key, value, (*location, name)) for name, (key, value) in pairs.items()}

    def _at(self, begin: yaml.Node, value: yaml.Node, location: Location) -> YamlValue:
        self._lines[location] = self._line(begin)
        return self._build(value, location)

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> YamlValue:
        # The text of a block begins on the line after its | or >.
        self._text_lines[location] = self._line(node) + (node.style in ("|", ">"))
        if not node.style and not node.tag:
            self._written[location] = node.value
        try:
            return _scalar_value(node)
        except ValueError as error:
            self._fault(Fault(location, str(error), covers=True))
            return str(node.value)

    def _pairs(self, node: yaml.MappingNode, location: Location) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """The nodes of each key and its value, `<<` merged in: own keys win, then those of what is merged first."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            wrong: Fault | None = None
            if isinstance(key, yaml.ScalarNode) and key.value == "<<" and not key.style and not key.tag:
                for source in value.value if isinstance(value, yaml.SequenceNode) else (value,):
                    if isinstance(source, yaml.MappingNode):
                        for name, pair in self._pairs(source, location).items():
                            merged.setdefault(name, pair)
                    else:
                        wrong = Fault(location, "<< merges mappings, and this is none")
            else:
                name, wrong = _key(key, location)
                if wrong is None and name in own:
                    lines = self._line(own[name][0]), self._line(key)
                    where = "on line {}" if lines[0] == lines[1] else "on lines {} and {}"
                    wrong = Fault((*location, name), f"written twice, {where.format(*lines)}")
                elif wrong is None:
                    own[name] = key, value
            if wrong and id(node) not in self._checked:
                self._fault(replace(wrong, line=self._line(key)))
        self._checked.add(id(node))
        return {**merged, **own}

    def _fault(self, fault: Fault) -> None:
        if len(self._faults) <= MOST_PROBLEMS:
            self._faults.append(fault)


def _key(node: yaml.Node, location: Location) -> tuple[str, Fault | None]:
    """A key of the mapping at `location`, and why it is none."""
    if not isinstance(node, yaml.ScalarNode):
        what = "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
        return "", Fault(location, f"a key is {what}, not text")
    try:
        key = _scalar_value(node)
    except ValueError as error:
        return "", Fault(location, f"a key {error}")
    if not isinstance(key, str):
        return "", Fault(location, f"the key {cut(node.value, 60)} is {what_is(key)}, not text", "put it in quotes")
    if len(key) > MAX_KEY_CHARACTERS:
        most = f"at most {MAX_KEY_CHARACTERS:,} are read"
        return "", Fault(location, f"the key {cut(key, 60)} has {len(key):,} characters; {most}")
    return key, None


_TYPES: Mapping[str, tuple[type, ...]] = {"null": (type(None),), "bool": (bool,), "int": (int,), "float": (int, float)}


def _scalar_value(node: yaml.ScalarNode) -> bool | int | float | str | None:
    """Raises ValueError with the sentence on what is no value here."""
    kind = node.tag.removeprefix(_STANDARD)
    if kind in ("!", "str") or (node.style and not kind):
        return str(node.value)
    if kind and kind not in _TYPES:
        raise ValueError(_meaningless(node.tag))
    value = _resolved(node.value)
    if kind and (not isinstance(value, _TYPES[kind]) or isinstance(value, bool) != (kind == "bool")):
        raise ValueError(f"cannot be read as {kind}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"must be a finite number, not {cut(node.value, 60)}")
    return float(value) if kind == "float" and value is not None else value


def _meaningless(tag: str) -> str:
    return f"the YAML tag {cut(tag.replace(_STANDARD, '!!'), 60)} means nothing here"
