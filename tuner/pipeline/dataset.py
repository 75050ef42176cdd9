"""Data files → rows of one of three kinds, and their split into training and held-out rows.

    file ── what it is ──► records ── which shape ──► Conversation | Completion | PlainText, or BadRow and why

What a file is says its content, then its name, then DatasetConfig.dataset_extension. Which shape its rows have say the
columns named in DatasetConfig, else the columns themselves, once for each file; columns of no shape are not read:

    shape               columns                                                            becomes
    messages            messages, conversations or conversation, as role/content or        Conversation
                        from/value, a list or its JSON text (+ tools, system)
    prompt/completion   both texts                                                         Completion
                        both lists of messages (+ tools): the completion's are learnt      Conversation
    a question and      one of instruction, prompt, question, query, else input, and       Conversation
    its answer          one of output, completion, response, answer
                        (+ system or system_prompt, history; input or context beside instruction)
    text                text                                                               PlainText

A question's answer is a Conversation because two plain texts put together have nothing between them; whoever wants
exactly that names them as context_column and response_column.
"""

import csv
import hashlib
import io
import json
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import dropwhile, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from tuner.errors import ConfigError, DataError, InputMissingError, did_you_mean
from tuner.training_settings import DatasetSettings

# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands: 1-based, for JSON lines and text the line."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them. Assistant messages at index >= `supervised_from` are learnt."""

    origin: Origin
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    supervised_from: int


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


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file on disk, and what to call it in messages: a URL without its query, or the path as it was given."""

    path: Path
    source: str


@dataclass(frozen=True, slots=True)
class Gathered:
    """Every row of every file, in order. `shapes` counts the usable rows of each shape."""

    rows: list[Row]
    bad: list[BadRow]
    shapes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Split:
    """`duplicates` is how many rows repeat another one word for word; a row and its copies are on one side.
    `known_prompts` is how many held-out rows have a prompt that is trained on too, with another answer."""

    train: list[Row]
    evaluation: list[Row]
    duplicates: int
    known_prompts: int


# ── rows of files ────────────────────────────────────────────────────────────────────────────────────────────────────

HELD_OUT_SHARE = 0.05
HELD_OUT_ROWS_AT_MOST = 500
ROWS_TO_HOLD_OUT_FROM = 20  # fewer are all trained on: one row says nothing about a loss
BATCH_ROWS = 1024
PEEKED_ROWS = 100  # how many rows of a file without a schema are looked at for its columns
REASONS_SHOWN = 5


def gather_rows(files: Sequence[DataFile], settings: DatasetSettings) -> Gathered:
    """All rows in memory. Raises DataError when there are none, or more bad ones than `bad_row_share` allows."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    shapes: dict[str, int] = defaultdict(int)
    for shape, row in read_shaped_rows(files, settings):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            rows.append(row)
            shapes[shape] += 1
    total = len(rows) + len(bad)
    if total == 0:
        raise DataError("there are no rows to train on")
    if not rows or len(bad) > settings.bad_row_share * total:
        allowed = f"at most {settings.bad_row_share:.0%} may be bad" if rows else "none is left"
        shown = "".join(f"\n  {row}" for row in bad[:REASONS_SHOWN])
        more = f"\n  … and {len(bad) - REASONS_SHOWN:,} more" if len(bad) > REASONS_SHOWN else ""
        raise DataError(
            f"{len(bad):,} of {total:,} rows cannot be trained on, {allowed}:{shown}{more}",
            hint="correct these rows, or name the right columns in DatasetConfig",
        )
    return Gathered(rows, bad, dict(shapes))


def read_shaped_rows(files: Sequence[DataFile], settings: DatasetSettings) -> Iterator[tuple[str, Row | BadRow]]:
    """Every row of every file that `dataset_path` selects (without it: all), in order, each with its shape's name.

    Files are streamed; only a JSON file that is one value is held whole. Raises InputMissingError when a file is not
    there, ConfigError when `dataset_path` selects none, DataError when one cannot be read, is empty or has rows of no
    known shape.
    """
    for file in _selected(files, settings):
        with _reading(file):
            table = _open_table(file, settings)
            shape = _recognise(table.columns, settings, file.source)
            for column in shape.columns:
                if table.columns.count(column) > 1:
                    raise DataError(f"{file.source}: there are several columns {column!r}")
            row_number = 0
            for row_number, record in table.records(shape.columns):
                origin = Origin(file.source, row_number)
                if isinstance(record, _Unusable):
                    yield shape.name, BadRow(origin, str(record))
                    continue
                try:
                    yield shape.name, shape.build(origin, record)
                except _Unusable as error:
                    yield shape.name, BadRow(origin, str(error))
            if row_number == 0:
                raise DataError(f"{file.source}: the file has no rows")


def _selected(files: Sequence[DataFile], settings: DatasetSettings) -> Sequence[DataFile]:
    """The files whose path or source ends with `dataset_path`; KAITO's is relative to /mnt, its files in /mnt/data."""
    if settings.dataset_path is None:
        return files
    wanted = tuple(part for part in PurePosixPath(settings.dataset_path).parts if part not in ("/", "."))
    without_mnt = wanted[1:] if wanted[:1] == ("mnt",) else wanted
    without_data = without_mnt[1:] if without_mnt[:1] == ("data",) else without_mnt
    for tail in (wanted, without_mnt, without_data):
        found = [
            file
            for file in files
            if tail and tail in (PurePosixPath(name).parts[-len(tail) :] for name in (file.path, file.source))
        ]
        if found:
            return found
    raise ConfigError(
        f"DatasetConfig.dataset_path: no file {settings.dataset_path!r} in the data",
        hint=f"there is {_listed([file.source for file in files])}; without dataset_path every file is used",
    )


@contextmanager
def _reading(file: DataFile) -> Iterator[None]:
    """What the system and pyarrow raise while a file is read, as errors that name the file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.strerror:  # the system's own; pyarrow's have none
            raise InputMissingError(f"{file.source}: {error.strerror}") from error
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"{file.source}: damaged or cut off: {reason}", hint="fetch the file again, or look at it where it was made"
        ) from error


# ── what a file is ───────────────────────────────────────────────────────────────────────────────────────────────────

Kind = Literal["parquet", "arrow file", "arrow stream", "json", "csv", "text"]
Compression = Literal["gzip", "zstd"]

_KIND_OF_EXTENSION: dict[str, Kind] = {
    "parquet": "parquet",
    "pq": "parquet",
    "arrow": "arrow file",
    "feather": "arrow file",
    "json": "json",
    "jsonl": "json",
    "ndjson": "json",
    "csv": "csv",
    "tsv": "csv",
    "txt": "text",
    "text": "text",
}
_KIND_OF_MAGIC: dict[bytes, Kind] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow file",
    b"\xff\xff\xff\xff": "arrow stream",
}
_COMPRESSION_OF_MAGIC: dict[bytes, Compression] = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_UTF_8_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 64 * 1024


class _Unusable(Exception):  # noqa: N818 - why one row is put aside, not an error of the run
    """Its text is the reason."""


_Record = tuple[int, dict[str, Any] | _Unusable]


class _Table(NamedTuple):
    """`records` takes the columns to read and gives 1-based numbers with values by column."""

    columns: Sequence[str]
    records: Callable[[Sequence[str]], Iterator[_Record]]


def _open_table(file: DataFile, settings: DatasetSettings) -> _Table:
    compression = _compression(file.path)
    with _open(file.path, compression) as stream:
        head = stream.read(_HEAD_BYTES)
    kind = _kind(file, head, settings)
    if kind == "parquet":
        return _parquet_table(file.path, compression)
    if kind in ("arrow file", "arrow stream"):
        return _arrow_table(file.path, compression, is_file=kind == "arrow file")
    if kind == "text":
        return _Table(["text"], lambda _columns: _text_records(file.path, compression))
    if kind == "csv":
        return _csv_table(file, compression)
    return _json_table(file, compression)


def _compression(path: Path) -> Compression | None:
    with path.open("rb") as stream:
        head = stream.read(4)
    return next((name for magic, name in _COMPRESSION_OF_MAGIC.items() if head.startswith(magic)), None)


def _open(path: Path, compression: Compression | None) -> BinaryIO:
    """The file's bytes as they were before compression, forwards only."""
    if compression is None:
        return path.open("rb")
    import pyarrow

    # pyarrow's stream has what BufferedReader asks of a raw stream, but not its type.
    return io.BufferedReader(cast(Any, pyarrow.input_stream(str(path), compression=compression)))


def _kind(file: DataFile, head: bytes, settings: DatasetSettings) -> Kind:
    """Content, then name, then `dataset_extension`. A name counts by its last suffix only: a_json_export.csv is CSV."""
    for magic, kind in _KIND_OF_MAGIC.items():
        if head.startswith(magic):
            return kind
    if not head.strip():
        raise DataError(f"{file.source}: the file is empty")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file.source}: the text is UTF-16", hint="save it as UTF-8")
    named = _kind_of_name(file.path.name) or _kind_of_name(PurePosixPath(file.source).name)
    if named in ("parquet", "arrow file"):
        raise DataError(
            f"{file.source}: named as {named.split()[0]}, but its content is not", hint=f"it starts with {head[:40]!r}"
        )
    if b"\0" in head:
        raise DataError(f"{file.source}: binary data of an unknown kind", hint=_KINDS_HINT)
    if _is_json_object(head.removeprefix(_UTF_8_BOM).lstrip().partition(b"\n")[0]):
        return "json"
    if named != "text" and head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise DataError(f"{file.source}: a web page (HTML), not data", hint="use the link of the download itself")
    if named is not None:
        return named
    if settings.dataset_extension is None:
        if head.removeprefix(_UTF_8_BOM).lstrip().startswith((b"{", b"[")):
            return "json"
        raise DataError(f"{file.source}: neither content nor name say what kind of data this is", hint=_KINDS_HINT)
    meant = _KIND_OF_EXTENSION.get(settings.dataset_extension)
    if meant in ("json", "csv", "text"):
        return meant
    raise DataError(
        f"{file.source}: DatasetConfig.dataset_extension says {settings.dataset_extension}, but the content is not",
        hint=f"it starts with {head[:40]!r}",
    )


_KINDS_HINT = (
    "parquet, Arrow, JSON, JSON lines, CSV and text are read, each also as .gz or .zst; "
    "a name's last suffix or DatasetConfig.dataset_extension says which text is meant"
)


def _kind_of_name(name: str) -> Kind | None:
    suffixes = [suffix.lower().removeprefix(".") for suffix in PurePosixPath(name).suffixes]
    if suffixes and suffixes[-1] in ("gz", "zst"):
        del suffixes[-1]
    return _KIND_OF_EXTENSION.get(suffixes[-1]) if suffixes else None


def _is_json_object(line: bytes) -> bool:
    return line.startswith(b"{") and isinstance(_json_value(line), dict)


# ── parquet and Arrow ────────────────────────────────────────────────────────────────────────────────────────────────


def _parquet_table(path: Path, compression: Compression | None) -> _Table:
    import pyarrow.parquet

    def batches(columns: Sequence[str]) -> Iterator[Any]:
        with (
            _open_seekable(path, compression) as stream,
            # pre_buffer, pyarrow's default, keeps all that was read until the end: the whole file in memory.
            pyarrow.parquet.ParquetFile(stream, pre_buffer=False) as parquet,
        ):
            yield from parquet.iter_batches(BATCH_ROWS, columns=list(columns))

    with _open_seekable(path, compression) as stream:
        schema = pyarrow.parquet.read_schema(stream)
    return _Table(_columns_with_values(schema), lambda columns: _records_of_batches(batches(columns), columns))


def _arrow_table(path: Path, compression: Compression | None, *, is_file: bool) -> _Table:
    """Arrow's file format, or its stream format, which is also what the datasets library keeps in its cache."""
    import pyarrow.ipc

    def batches() -> Iterator[Any]:
        if is_file:
            with _open_seekable(path, compression) as stream, pyarrow.ipc.open_file(stream) as reader:
                yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            with _open(path, compression) as stream, pyarrow.ipc.open_stream(stream) as reader:
                yield from reader

    if is_file:
        with _open_seekable(path, compression) as stream, pyarrow.ipc.open_file(stream) as reader:
            schema = reader.schema
    else:
        with _open(path, compression) as stream, pyarrow.ipc.open_stream(stream) as reader:
            schema = reader.schema
    return _Table(_columns_with_values(schema), lambda columns: _records_of_batches(batches(), columns))


def _open_seekable(path: Path, compression: Compression | None) -> BinaryIO:
    """For formats that are read from their end: a compressed file is unpacked to a temporary one."""
    if compression is None:
        return path.open("rb")
    unpacked = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    with _open(path, compression) as stream:
        shutil.copyfileobj(stream, unpacked)
    unpacked.seek(0)
    return unpacked


def _columns_with_values(schema: Any) -> list[str]:
    import pyarrow

    return [field.name for field in schema if not pyarrow.types.is_null(field.type)]


def _records_of_batches(batches: Iterable[Any], columns: Sequence[str]) -> Iterator[_Record]:
    number = 0
    for batch in batches:
        chosen = batch.select(list(columns))
        for start in range(0, chosen.num_rows, BATCH_ROWS):
            for record in _records_of_batch(chosen.slice(start, BATCH_ROWS)):
                number += 1
                yield number, record


def _records_of_batch(batch: Any) -> list[dict[str, Any] | _Unusable]:
    import pyarrow

    try:
        columns = [
            [_without_nulls(value) for value in column.to_pylist()]
            if pyarrow.types.is_nested(column.type)
            else column.to_pylist()
            for column in batch.columns
        ]
    except UnicodeDecodeError:  # Arrow does not look at what a writer calls text
        if batch.num_rows == 1:
            return [_Unusable("not UTF-8")]
        return [record for index in range(batch.num_rows) for record in _records_of_batch(batch.slice(index, 1))]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _without_nulls(value: Any) -> Any:
    """A struct has every key of every row; those that a row did not have are null."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


# ── text formats ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _text_records(path: Path, compression: Compression | None) -> Iterator[_Record]:
    """A document is a line that is not blank."""
    for number, line in _lines(path, compression):
        try:
            yield number, {"text": line.decode().rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield number, _not_utf_8(error)


def _lines(path: Path, compression: Compression | None) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their 1-based numbers."""
    with _open(path, compression) as stream:
        for number, line in enumerate(stream, 1):
            content = line.removeprefix(_UTF_8_BOM) if number == 1 else line
            if content.strip():
                yield number, content


def _not_utf_8(error: UnicodeDecodeError) -> _Unusable:
    return _Unusable(f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1} of the line")


def _csv_table(file: DataFile, compression: Compression | None) -> _Table:
    """CSV with a header; the delimiter is whichever of `,`, `;` and tab the header has most of."""

    def text_lines() -> Iterator[str]:
        with _open(file.path, compression) as stream:
            # Bytes that are not UTF-8 become lone surrogates: _text finds them, so the row is bad, not the file.
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
            yield from dropwhile(str.isspace, lines)

    def parsed() -> Any:
        return csv.reader(text_lines(), delimiter=delimiter, strict=True)

    def records(_columns: Sequence[str]) -> Iterator[_Record]:
        # The module's limit of 131,072 characters a field is one setting for the whole process; documents are longer.
        csv.field_size_limit(2**31 - 1)
        rows = parsed()
        next(rows)
        number = 0
        while True:
            try:
                fields = next(rows, None)
            except csv.Error as error:
                if "unexpected end of data" in str(error):  # one open quote has swallowed all the rows after it
                    raise DataError(f"{file.source}:{number + 1}: a quote is opened here and never closed") from error
                number += 1
                yield number, _Unusable(f"not CSV: {error}")
                continue
            if fields is None:
                return
            if fields:
                number += 1
                if len(fields) == len(header):
                    yield number, dict(zip(header, fields, strict=True))
                else:
                    yield number, _Unusable(f"{len(fields)} fields, but the header has {len(header)}")

    first_line = next(text_lines())
    delimiter = max(",;\t", key=first_line.count)
    try:
        header = next(parsed())
    except csv.Error as error:
        raise DataError(f"{file.source}: the header is not CSV: {error}") from error
    return _Table(header, records)


def _json_table(file: DataFile, compression: Compression | None) -> _Table:
    """One object a line, a list of objects, or an object that holds the list.

    Python's reader and not pyarrow's: messages have no one type that would fit them all.
    """

    if _has_object_per_line(file.path, compression):

        def records(_columns: Sequence[str]) -> Iterator[_Record]:
            return ((number, _json_record(line)) for number, line in _lines(file.path, compression))
    else:
        document = _records_of_json_document(file, compression)

        def records(_columns: Sequence[str]) -> Iterator[_Record]:
            return iter(document)

    seen = list(islice(records(()), PEEKED_ROWS))
    if not seen:
        raise DataError(f"{file.source}: the file has no rows")
    readable = [record for _, record in seen if isinstance(record, dict)]
    if not readable:
        number, reason = seen[0]
        others = f"; no better are the {len(seen) - 1} after it" if len(seen) > 1 else ""
        raise DataError(f"{file.source}:{number}: {reason}{others}")
    columns = {name: None for record in readable for name, value in record.items() if value is not None}
    return _Table(list(columns), records)


def _has_object_per_line(path: Path, compression: Compression | None) -> bool:
    """JSON lines, told from one value over many lines by its first two lines that are not blank."""
    lines = [line.strip() for _, line in islice(_lines(path, compression), 2)]
    if len(lines) < 2 or lines[0].startswith(b"["):
        return False
    # No value can go on with an object after a first line like `{`, so here a broken first row is no obstacle.
    return lines[1].startswith(b"{") or _is_json_object(lines[0])


def _json_record(line: bytes) -> dict[str, Any] | _Unusable:
    try:
        value = _json_value(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf_8(error)
    if isinstance(value, _Unusable):
        return value
    return value if isinstance(value, dict) else _Unusable(f"{_type_name(value)} instead of an object")


def _json_value(text: str | bytes) -> Any:
    """The value, or an _Unusable that says why there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return _Unusable(f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # not UTF-8, numbers of too many digits, too deep
        return _Unusable(f"not JSON: {error}")


def _records_of_json_document(file: DataFile, compression: Compression | None) -> list[_Record]:
    with _open(file.path, compression) as stream:
        content = stream.read()
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file.source}:{line}: not UTF-8", hint="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{file.source}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.source}: not JSON: {error}") from error
    if isinstance(document, dict):
        document = _list_in(document, file.source)
    if not isinstance(document, list):
        raise DataError(f"{file.source}: {_type_name(document)} instead of a list of objects")
    return [
        (number, row if isinstance(row, dict) else _Unusable(f"{_type_name(row)} instead of an object"))
        for number, row in enumerate(document, 1)
    ]


def _list_in(document: dict[str, Any], source: str) -> list[Any]:
    """The rows in `{"version": …, "data": [rows]}`; an object that is itself one row stands alone."""
    lists = {
        name: value
        for name, value in document.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    if not lists or any({"role", "from"} & value[0].keys() for value in lists.values()):
        return [document]
    if len(lists) > 1:
        raise DataError(
            f"{source}: several lists of rows: {_listed(list(lists))}", hint="put each into a file of its own"
        )
    return next(iter(lists.values()))


# ── which shape ──────────────────────────────────────────────────────────────────────────────────────────────────────

_MESSAGES_COLUMNS = ("messages", "conversations", "conversation")
_QUESTION_COLUMNS = ("instruction", "prompt", "question", "query")
_ANSWER_COLUMNS = ("output", "completion", "response", "answer")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_KNOWN_COLUMNS = (*_MESSAGES_COLUMNS, *_QUESTION_COLUMNS, *_ANSWER_COLUMNS, "text")
_A_TYPO = 0.8  # a likeness that words of another meaning do not have


class _Shape(NamedTuple):
    """`build` raises _Unusable."""

    name: str
    columns: Sequence[str]
    build: Callable[[Origin, Mapping[str, Any]], Row]


def _recognise(columns: Sequence[str], settings: DatasetSettings, source: str) -> _Shape:
    if settings.messages_column is not None:
        _need_column(settings.messages_column, "messages_column", columns, source)
        return _messages_shape(settings.messages_column, columns)
    if settings.context_column is not None:
        response_column = settings.response_column or "text"  # KAITO's default
        _need_column(settings.context_column, "context_column", columns, source)
        _need_column(response_column, "response_column", columns, source)
        return _completion_shape(settings.context_column, response_column, columns)
    if settings.response_column is not None:
        _need_column(settings.response_column, "response_column", columns, source)
        return _text_shape(settings.response_column)

    for column in _MESSAGES_COLUMNS:
        if column in columns:
            return _messages_shape(column, columns)
    if "prompt" in columns and "completion" in columns:
        return _completion_shape("prompt", "completion", columns, judged="label" in columns)
    questions = [column for column in _QUESTION_COLUMNS if column in columns]
    extras = [column for column in ("input", "context") if column in columns]
    if not questions and extras == ["input"]:
        questions, extras = extras, []
    answers = [column for column in _ANSWER_COLUMNS if column in columns]
    # Two candidates, or a context that would be left out without a word: the user must say what is meant.
    if len(questions) == len(answers) == 1 and (not extras or (questions == ["instruction"] and len(extras) == 1)):
        return _question_shape(questions[0], next(iter(extras), None), answers[0], columns)
    if "text" in columns and not (questions and answers):
        return _text_shape("text")
    near = {column: get_close_matches(column.strip().lower(), _KNOWN_COLUMNS, 1, _A_TYPO) for column in columns}
    meant = [f"{column!r} as {found[0]}" for column, found in near.items() if found and column not in _KNOWN_COLUMNS]
    raise DataError(
        f"{source}: rows of no known shape; the file has {_listed(columns)}",
        hint=(f"is {' and '.join(meant)} meant? " if meant else "")
        + "name the columns: DatasetConfig.messages_column, or context_column and response_column, or only "
        "response_column for plain text; known without that are messages, conversations, prompt/completion, "
        "instruction/input/output, question/answer and text",
    )


def _need_column(column: str, setting: str, columns: Sequence[str], source: str) -> None:
    if column not in columns:
        raise DataError(
            f"{source}: no column {column!r}; the file has {_listed(columns)}",
            hint=did_you_mean(column, columns) or f"set DatasetConfig.{setting} to one of them",
        )


def _messages_shape(column: str, columns: Sequence[str]) -> _Shape:
    system_column = _first_of(_SYSTEM_COLUMNS, columns)
    optional = [name for name in (system_column, _first_of(("tools",), columns)) if name]

    def build(origin: Origin, record: Mapping[str, Any]) -> Conversation:
        messages, supervised_from = _messages(record.get(column), column)
        if system_column and record.get(system_column) and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": _text(record[system_column], system_column)})
            supervised_from += supervised_from > 0
        return _conversation(origin, messages, record.get("tools"), supervised_from)

    return _Shape(column, [column, *optional], build)


def _completion_shape(
    prompt_column: str, completion_column: str, columns: Sequence[str], *, judged: bool = False
) -> _Shape:
    """`judged`: `label` may say false, as in data for KTO, of a completion that is not wanted."""
    optional = [name for name in ("tools", *(["label"] if judged else [])) if name in columns]

    def build(origin: Origin, record: Mapping[str, Any]) -> Row:
        if judged and record.get("label") is False:
            raise _Unusable("label is false: an answer that is not wanted")
        prompt, completion = record.get(prompt_column), record.get(completion_column)
        if isinstance(prompt, list) and isinstance(completion, list):
            asked, _ = _messages(prompt, prompt_column)
            answered, supervised_from = _messages(completion, completion_column)
            return _conversation(origin, asked + answered, record.get("tools"), len(asked) + supervised_from)
        return Completion(origin, _filled_text(prompt, prompt_column), _filled_text(completion, completion_column))

    return _Shape(f"{prompt_column}/{completion_column}", [prompt_column, completion_column, *optional], build)


def _question_shape(question: str, extra: str | None, answer: str, columns: Sequence[str]) -> _Shape:
    system_column, history_column = _first_of(_SYSTEM_COLUMNS, columns), _first_of(("history",), columns)
    optional = [name for name in (extra, system_column, history_column) if name]

    def build(origin: Origin, record: Mapping[str, Any]) -> Conversation:
        messages = []
        if system_column and record.get(system_column):
            messages.append({"role": "system", "content": _text(record[system_column], system_column)})
        if history_column and record.get(history_column):
            messages += _history(record[history_column], history_column)
        parts = [_text(record[name], name) for name in (question, extra) if name and record.get(name) is not None]
        asked = "\n\n".join(part for part in parts if part.strip())
        if not asked:
            raise _Unusable(f"{question} is empty")
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": _filled_text(record.get(answer), answer)})
        return Conversation(origin, messages, None, 0)

    return _Shape(f"{question}/{answer}", [question, answer, *optional], build)


def _text_shape(column: str) -> _Shape:
    def build(origin: Origin, record: Mapping[str, Any]) -> PlainText:
        return PlainText(origin, _filled_text(record.get(column), column))

    return _Shape(column, [column], build)


def _first_of(names: Sequence[str], columns: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


# ── one row ──────────────────────────────────────────────────────────────────────────────────────────────────────────

_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "function_call"),  # ShareGPT: an assistant's call, as JSON
}
# A turn that is not learnt, as OpenAI and Axolotl mark it.
_LEFT_OUT = (("weight", 0, "weight is 0"), ("train", False, "train is false"))
_PASSED_ON = ("name", "tool_call_id", "reasoning_content", "thinking")  # what templates read beside role and content


def _conversation(origin: Origin, messages: list[dict[str, Any]], tools: object, supervised_from: int) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages[supervised_from:]):
        some = " to learn" if any(message["role"] == "assistant" for message in messages) else ""
        raise _Unusable(f"no assistant turn{some}")
    return Conversation(origin, messages, _tools(tools), supervised_from)


def _messages(value: object, column: str) -> tuple[list[dict[str, Any]], int]:
    """The messages in the form that templates take, and the index from where assistant turns are learnt.

    Turns may come in any order: whether a template can do with that is seen when it does.
    """
    turns = _parsed(value, column)
    if not isinstance(turns, list):
        raise _Unusable(f"{column} is {_type_name(turns)}, not a list of messages")
    if not turns:
        raise _Unusable(f"{column} is empty")
    messages: list[dict[str, Any]] = []
    supervised_from = 0
    learns_already = False
    for index, turn in enumerate(turns):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise _Unusable(f"{where} is {_type_name(turn)}, not a message")
        message = _message(turn, where)
        messages.append(message)
        if message["role"] == "assistant":
            mark = next((mark for key, value, mark in _LEFT_OUT if turn.get(key) == value), None)
            if mark:
                if learns_already:
                    raise _Unusable(f"{where}.{mark} after a turn that is learnt; only leading turns can be left out")
                supervised_from = index + 1
            else:
                learns_already = True
    return messages, supervised_from


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    role_key, content_key = ("from", "value") if "role" not in turn and "from" in turn else ("role", "content")
    written_role = turn.get(role_key)
    role = _ROLES.get(written_role.strip().lower()) if isinstance(written_role, str) else None
    if role is None:
        raise _Unusable(f"{where}.{role_key} is {_shortened(written_role)}, not system, user, assistant or tool")
    content = turn.get(content_key)
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(content, f"{where}.{content_key}")}
    message: dict[str, Any] = {"role": role}
    calls = turn.get("tool_calls") or turn.get("function_call")
    if role == "assistant" and calls:
        message["content"] = "" if content is None else _content(content, f"{where}.{content_key}")
        message["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    else:
        message["content"] = _content(content, f"{where}.{content_key}")
        if role == "assistant" and not message["content"].strip():
            raise _Unusable(f"{where}.{content_key} is empty: an assistant turn without text and without tool calls")
    for key in _PASSED_ON:
        if turn.get(key) is not None:
            message[key] = _text(turn[key], f"{where}.{key}")
    return message


def _content(value: object, where: str) -> str:
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text":
            written = part.get("type") if isinstance(part, dict) else part
            raise _Unusable(f"{where}[{index}] is a part of type {_shortened(written)}; only text can be trained on")
        texts.append(_text(part.get("text"), f"{where}[{index}].text"))
    return "".join(texts)


def _tool_calls(value: object, where: str) -> list[dict[str, Any]]:
    """Calls as templates take them: arguments are an object, which they write as JSON themselves."""
    calls = _parsed(value, where)
    normal = []
    for call in calls if isinstance(calls, list) else [calls]:
        if not isinstance(call, dict) or not isinstance(function := call.get("function", call), dict):
            raise _Unusable(f"{where} is {_type_name(calls)} that holds no call of a function")
        arguments = _parsed(function.get("arguments") or {}, f"{where}.arguments")
        if not isinstance(arguments, dict):
            raise _Unusable(f"{where}.arguments is {_type_name(arguments)}, not an object")
        name = _filled_text(function.get("name"), f"{where}.name")
        _text(json.dumps(arguments, ensure_ascii=False, default=str), f"{where}.arguments")
        identity = {"id": _text(call["id"], f"{where}.id")} if call.get("id") is not None else {}
        normal.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return normal


def _tools(value: object) -> list[dict[str, Any]] | None:
    tools = _parsed(value, "tools") if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Unusable(f"tools is {_type_name(tools)}, not a list of objects")
    _text(json.dumps(tools, ensure_ascii=False, default=str), "tools")
    return tools


def _history(value: object, column: str) -> list[dict[str, Any]]:
    """Alpaca's earlier turns: a list of [question, answer]."""
    turns = _parsed(value, column)
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise _Unusable(f"{column} is not a list of [question, answer]")
    return [
        message
        for index, (question, answer) in enumerate(turns)
        for message in (
            {"role": "user", "content": _text(question, f"{column}[{index}][0]")},
            {"role": "assistant", "content": _filled_text(answer, f"{column}[{index}][1]")},
        )
    ]


def _parsed(value: object, where: str) -> object:
    """The value itself, or what its JSON text says."""
    if not isinstance(value, str):
        return value
    parsed = _json_value(value)
    if isinstance(parsed, _Unusable):
        raise _Unusable(f"{where} is text, but {parsed}")
    return parsed


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _Unusable(f"{where} is {_type_name(value)}" + ("" if value is None else ", not text"))
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _Unusable(f"{where} is not UTF-8 at character {error.start + 1}") from None
    return value


def _filled_text(value: object, where: str) -> str:
    text = _text(value, where)
    if not text.strip():
        raise _Unusable(f"{where} is empty")
    return text


def _type_name(value: object) -> str:
    names = {"NoneType": "null", "str": "text", "bool": "a boolean", "int": "a number", "float": "a number"}
    names |= {"list": "a list", "dict": "an object", "bytes": "binary data"}
    return names.get(type(value).__name__, type(value).__name__)


def _shortened(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"


def _listed(names: Sequence[str]) -> str:
    short = (name if len(name) <= 60 else f"{name[:59]}…" for name in names[:20])
    shown = ", ".join("".join(letter if letter.isprintable() else "?" for letter in name) for name in short)
    return f"{shown} and {len(names) - 20} more" if len(names) > 20 else shown or "nothing"


# ── split ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def split_rows(rows: Sequence[Row], settings: DatasetSettings) -> Split:
    """The rows in training order, and those held out for evaluation.

    Equal rows, settings and seed give an equal order on every machine. The last rows of that order are held out: of
    20 rows and more 5 %, at most 500, or what `train_fraction` leaves. Rows with the same prompt go together, whatever
    their answers, so that nothing held out was seen in training; a group of more rows than are still wanted is trained
    on instead. Where few prompts stand for most rows, only copies of a whole row go together.
    """
    order = list(range(len(rows)))
    if settings.shuffle:
        random.Random(settings.shuffle_seed).shuffle(order)
    contents = [_content_digest(row) for row in rows]
    prompts = [_prompt_digest(row) for row in rows]
    wanted = _held_out_count(len(rows), settings.train_fraction)
    held_out = _hold_out(order, prompts, wanted)
    if 2 * len(held_out) < wanted:
        held_out = _hold_out(order, contents, wanted)
    trained_prompts = {prompts[index] for index in order if index not in held_out}
    return Split(
        train=[rows[index] for index in order if index not in held_out],
        evaluation=[rows[index] for index in order if index in held_out],
        duplicates=len(rows) - len(set(contents)),
        known_prompts=sum(prompts[index] in trained_prompts for index in held_out),
    )


def _hold_out(order: Sequence[int], keys: Sequence[bytes], wanted: int) -> set[int]:
    """Up to `wanted` rows from the end of `order`, those with an equal key together."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        groups[key].append(index)
    held_out: set[int] = set()
    for index in reversed(order):
        if len(held_out) == wanted:
            break
        group = groups[keys[index]]
        if index not in held_out and len(held_out) + len(group) <= wanted:
            held_out.update(group)
    return held_out


def _held_out_count(count: int, train_fraction: float | None) -> int:
    if train_fraction is not None:
        return count - max(1, round(count * train_fraction))
    if count < ROWS_TO_HOLD_OUT_FROM:
        return 0
    return min(HELD_OUT_ROWS_AT_MOST, max(1, round(count * HELD_OUT_SHARE)))


def _content_digest(row: Row) -> bytes:
    """Equal for rows that teach the same, wherever they stand."""
    match row:
        case Conversation():
            content: list[Any] = ["conversation", row.messages, row.tools, row.supervised_from]
        case Completion():
            content = ["completion", row.prompt, row.completion]
        case PlainText():
            content = ["text", row.text]
    return _digest(content)


def _prompt_digest(row: Row) -> bytes:
    """Equal for rows that ask the same: all before the last answer."""
    match row:
        case Conversation():
            answers = [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]
            return _digest(["conversation", row.messages[: answers[-1] if answers else None], row.tools])
        case Completion():
            return _digest(["completion", row.prompt])
        case PlainText():
            return _content_digest(row)


def _digest(content: list[Any]) -> bytes:
    # default=str: a tool's arguments in parquet may be dates or the like.
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()


def order_sha256(origins: Sequence[Origin]) -> str:
    """The digest of which rows come in which order: file and row number of each.

    Files count by their place among the sorted names, so that the folder they lie in makes no difference.
    """
    numbers = {file: number for number, file in enumerate(sorted({origin.file for origin in origins}))}
    digest = hashlib.sha256()
    for origin in origins:
        digest.update(f"{numbers[origin.file]}:{origin.row}\n".encode())
    return digest.hexdigest()
