"""A data file → its records: parquet, Arrow, JSON, JSON lines, CSV and text, each also compressed.

What a file is says its content, then its name, then DatasetConfig.dataset_extension. A file is gone through twice: once
for what its columns are (`survey`), once for its rows (`records`); neither holds more than a batch, but that a JSON
file which is one value is held whole.
"""

import csv
import io
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import dropwhile, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal, NamedTuple, cast

from tuner.content import refuse_foreign
from tuner.errors import DataError, InputMissingError
from tuner.folder import Use, split_word
from tuner.pipeline.columns import KNOWN
from tuner.pipeline.messages import is_empty, is_python, json_value
from tuner.pipeline.rows import Unusable, listed, type_name

BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Share:
    """How much of a source is taken: of all its files together at most `rows`, each row `weight` times.

    `source` names it, and decides with the seed which rows those are.
    """

    source: str
    rows: int | None
    weight: float | None


@dataclass(frozen=True, slots=True)
class DataFile:
    """A data file on disk, and what to call it in messages: a URL without its query, or the path as it was given.

    A part of a folder may have no rows, as long as another has some.
    """

    path: Path
    source: str
    use: Use = "training"
    is_part: bool = False
    share: Share | None = None


Record = tuple[int, dict[str, Any] | Unusable]


@dataclass(slots=True)
class Survey:
    """What all rows of a file say of its columns.

    `present` has every column, `filled` in how many rows it says something, `sets` how many rows have which of the
    known columns filled, and `values` the different values of watched columns: None where there are too many.
    """

    rows: int
    unusable: int
    present: dict[str, None]
    filled: Counter[str]
    sets: Counter[tuple[str, ...]]
    values: dict[str, set[str] | None]


class Table(NamedTuple):
    """`header` has the columns as a file without keys in its rows says them. `records` takes the columns to read, which
    formats with a key in each row do not need, and gives 1-based numbers with values by column."""

    header: Sequence[str]
    survey: Survey
    records: Callable[[Sequence[str]], Iterator[Record]]


_MOST_COLUMNS = 10_000  # that are told apart: keys may be data, too
_MOST_VALUES = 16


def _surveyed(records: Iterable[Record], watched: Mapping[str, Any], header: Sequence[str] = ()) -> Survey:
    survey = Survey(0, 0, dict.fromkeys(header), Counter(), Counter(), {})
    present, filled, sets = survey.present, survey.filled, survey.sets
    for _, record in records:
        survey.rows += 1
        if isinstance(record, Unusable):
            survey.unusable += 1
            continue
        if not record.keys() <= present.keys() and len(present) < _MOST_COLUMNS:
            present.update(dict.fromkeys(record))
        said = [name for name, value in record.items() if not is_empty(value)]
        filled.update(said)
        sets[tuple(name for name in said if name in watched)] += 1
        for name in said:
            if name in watched and watched[name] in _OF_FEW_VALUES:
                _note_value(survey.values, name, record[name])
    return survey


_OF_FEW_VALUES = ("label", "split")


def _note_value(values: dict[str, set[str] | None], name: str, value: object) -> None:
    seen = values.setdefault(name, set())
    if seen is not None:
        seen.add(str(value))
        if len(seen) > _MOST_VALUES:
            values[name] = None


@contextmanager
def reading(file: DataFile) -> Iterator[None]:
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


def open_table(file: DataFile, extension: str | None, watched: Mapping[str, Any]) -> Table | None:
    """None for a part of a folder in which nothing stands. `watched`: column → what it is, where that is known.

    Raises DataError for what cannot be read, InputMissingError for what is not there.
    """
    compression = _compression(file.path)
    with _open(file.path, compression) as stream:
        head = stream.read(_HEAD_BYTES)
    if file.is_part and not head.strip():
        return None
    kind = _kind(file, head, extension)
    if kind == "parquet":
        return _parquet_table(file.path, compression, watched)
    if kind in ("arrow file", "arrow stream"):
        return _arrow_table(file.path, compression, watched, is_file=kind == "arrow file")
    if kind == "text":
        return _text_table(file.path, compression)
    if kind == "csv":
        return _csv_table(file, compression, watched)
    return _json_table(file, compression, watched)


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


def _kind(file: DataFile, head: bytes, extension: str | None) -> Kind:
    """Content, then name, then `dataset_extension`. A name counts by its last suffix only: a_json_export.csv is CSV."""
    for magic, kind in _KIND_OF_MAGIC.items():
        if head.startswith(magic):
            return kind
    if not head.strip():
        raise DataError(f"{file.source}: the file is empty")
    refuse_foreign(head, file.source)
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
    if extension is None:
        if head.removeprefix(_UTF_8_BOM).lstrip().startswith((b"{", b"[")):
            return "json"
        raise DataError(f"{file.source}: neither content nor name say what kind of data this is", hint=_KINDS_HINT)
    meant = _KIND_OF_EXTENSION.get(extension)
    if meant in ("json", "csv", "text"):
        return meant
    raise DataError(
        f"{file.source}: DatasetConfig.dataset_extension says {extension}, but the content is not",
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
    return line.startswith(b"{") and isinstance(json_value(line), dict)


# ── parquet and Arrow ────────────────────────────────────────────────────────────────────────────────────────────────


def _parquet_table(path: Path, compression: Compression | None, watched: Mapping[str, Any]) -> Table:
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
    header = list(schema.names)
    survey = _survey_of_batches(batches(list(dict.fromkeys(header))), header, watched)
    return Table(header, survey, lambda columns: _records_of_batches(batches(columns), columns))


def _arrow_table(path: Path, compression: Compression | None, watched: Mapping[str, Any], *, is_file: bool) -> Table:
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
            header = list(reader.schema.names)
    else:
        with _open(path, compression) as stream, pyarrow.ipc.open_stream(stream) as reader:
            header = list(reader.schema.names)
    survey = _survey_of_batches(batches(), header, watched)
    return Table(header, survey, lambda columns: _records_of_batches(batches(), columns))


def _open_seekable(path: Path, compression: Compression | None) -> BinaryIO:
    """For formats that are read from their end: a compressed file is unpacked to a temporary one."""
    if compression is None:
        return path.open("rb")
    unpacked = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - the caller closes it
    with _open(path, compression) as stream:
        shutil.copyfileobj(stream, unpacked)
    unpacked.seek(0)
    return unpacked


def _survey_of_batches(batches: Iterable[Any], header: Sequence[str], watched: Mapping[str, Any]) -> Survey:
    import numpy as np

    survey = Survey(0, 0, dict.fromkeys(header), Counter(), Counter(), {})
    for whole in batches:
        for start in range(0, whole.num_rows, BATCH_ROWS):
            batch = whole.slice(start, BATCH_ROWS)
            survey.rows += batch.num_rows
            said = {
                name: _says_something(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)
            }
            survey.filled.update({name: int(mask.sum()) for name, mask in said.items()})
            known = [name for name in said if name in watched]
            rows, counts = (
                np.unique(
                    np.array([said[name] for name in known]).reshape(len(known), batch.num_rows).T,
                    axis=0,
                    return_counts=True,
                )
                if known
                else (np.zeros((1, 0), dtype=bool), np.array([batch.num_rows]))
            )
            for row, count in zip(rows, counts, strict=True):
                survey.sets[tuple(name for name, is_said in zip(known, row, strict=True) if is_said)] += int(count)
            for name in known:
                if watched[name] in _OF_FEW_VALUES and survey.values.get(name, ()) is not None:
                    for value in batch.column(name).drop_null().unique().to_pylist():
                        if not is_empty(value):
                            _note_value(survey.values, name, value)
    survey.filled = +survey.filled
    return survey


def _says_something(column: Any) -> Any:
    """(n,) bool: where a value is there that is no empty text, list or NaN."""
    import pyarrow
    import pyarrow.compute

    kind = column.type
    there = column.is_valid()
    if pyarrow.types.is_null(kind) or isinstance(column, pyarrow.ExtensionArray):
        return there.to_numpy(zero_copy_only=False)
    if pyarrow.types.is_dictionary(kind):
        return _says_something(column.dictionary_decode())
    with suppress(pyarrow.ArrowNotImplementedError):
        if pyarrow.types.is_floating(kind):
            there = pyarrow.compute.and_(there, pyarrow.compute.invert(pyarrow.compute.is_nan(column)))
        elif pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_map(kind):
            there = pyarrow.compute.greater(pyarrow.compute.list_value_length(column), 0)
        elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_binary(kind):
            there = pyarrow.compute.greater(pyarrow.compute.binary_length(column), 0)
    return there.fill_null(False).to_numpy(zero_copy_only=False)


def _records_of_batches(batches: Iterable[Any], columns: Sequence[str]) -> Iterator[Record]:
    number = 0
    for batch in batches:
        chosen = batch.select(list(columns))
        for start in range(0, chosen.num_rows, BATCH_ROWS):
            for record in _records_of_batch(chosen.slice(start, BATCH_ROWS)):
                number += 1
                yield number, record


def _records_of_batch(batch: Any) -> list[dict[str, Any] | Unusable]:
    try:
        columns = [[_plain(value) for value in column.to_pylist()] for column in batch.columns]
    except UnicodeDecodeError:  # Arrow does not look at what a writer calls text
        if batch.num_rows == 1:
            return [Unusable("not UTF-8")]
        return [record for index in range(batch.num_rows) for record in _records_of_batch(batch.slice(index, 1))]
    return [dict(zip(batch.schema.names, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(value: Any) -> Any:
    """The value as JSON would have it: a struct has every key of every row, and those that a row did not have are null;
    Spark, Impala and Hive write text as bytes, and objects with free keys as maps, here lists of pairs."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        if value and all(isinstance(pair, tuple) for pair in value):
            return {str(_plain(key)): _plain(inner) for key, inner in value if inner is not None}
        return [_plain(inner) for inner in value]
    return value


# ── text formats ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _text_table(path: Path, compression: Compression | None) -> Table:
    """A document is a line that is not blank."""
    survey = _surveyed(_text_records(path, compression), KNOWN, ["text"])
    return Table(["text"], survey, lambda _columns: _text_records(path, compression))


def _text_records(path: Path, compression: Compression | None) -> Iterator[Record]:
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


def _not_utf_8(error: UnicodeDecodeError) -> Unusable:
    return Unusable(f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1} of the line")


def _csv_table(file: DataFile, compression: Compression | None, watched: Mapping[str, Any]) -> Table | None:
    """CSV with a header, with quotes within quotes doubled, or else escaped as Spark and MySQL do."""
    lines = partial(_csv_lines, file.path, compression)
    first = next(lines(), "")
    named = _SEPARATOR_LINE.fullmatch(first.strip())
    skipped = 1 if named else 0
    header_line = next(islice(lines(), skipped, None), "")
    unquoted = _QUOTED.sub("", header_line)
    delimiter = named[1] if named else max(",;\t|", key=unquoted.count)
    blanks = _BLANK_AFTER.fullmatch(header_line.strip().replace(delimiter, ",")) is not None

    def records_of(escaped: bool) -> Iterator[Record]:
        return _csv_records(file, lambda: islice(lines(), skipped, None), delimiter, blanks=blanks, escaped=escaped)

    def surveyed(escaped: bool) -> tuple[list[str], Survey]:
        records = records_of(escaped)
        header = next(records)[1]
        assert isinstance(header, dict)
        return list(header.values()), _surveyed(records, watched, list(header.values()))

    escaped = False
    try:
        header, survey = surveyed(escaped)
        failed = survey.unusable
        fault = None
    except DataError as error:
        failed, fault = None, error
    if failed != 0 and any('\\"' in line for line in lines()):
        with suppress(DataError):
            other = surveyed(True)
            if failed is None or other[1].unusable < failed:
                (header, survey), escaped, fault = other, True, None
    if fault:
        raise fault

    def records(_columns: Sequence[str]) -> Iterator[Record]:
        found = records_of(escaped)
        next(found)
        return found

    return Table(header, survey, records)


_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?', re.IGNORECASE)  # Excel's
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_BLANK_AFTER = re.compile(r"[^ ][^,]*(, [^,]*)+")  # `a, b, c`: the blanks are no part of the values
_ESCAPED_QUOTE = re.compile(r'(?<!\\)\\"')


def _csv_lines(path: Path, compression: Compression | None) -> Iterator[str]:
    with _open(path, compression) as stream:
        # Bytes that are not UTF-8 become lone surrogates: text_of finds them, so the row is bad, not the file.
        lines = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        yield from dropwhile(str.isspace, lines)


def _csv_records(
    file: DataFile, lines: Callable[[], Iterator[str]], delimiter: str, *, blanks: bool, escaped: bool
) -> Iterator[Record]:
    """The header first, as record 0, then the rows. Raises DataError where nothing more can be told apart."""
    # The module's limit of 131,072 characters a field is one setting for the whole process; documents are longer.
    csv.field_size_limit(2**31 - 1)
    text = (_ESCAPED_QUOTE.sub('""', line) for line in lines()) if escaped else lines()
    rows = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=blanks)
    try:
        header = [name.strip() for name in next(rows)]
    except csv.Error as error:
        raise DataError(f"{file.source}: the header is not CSV: {error}") from error
    yield 0, {str(place): name for place, name in enumerate(header)}
    number = 0
    while True:
        try:
            fields = next(rows, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):  # one open quote has swallowed all the rows after it
                raise DataError(f"{file.source}:{number + 1}: a quote is opened here and never closed") from error
            number += 1
            yield number, Unusable(f"not CSV: {error}")
            continue
        if fields is None:
            return
        if fields:
            number += 1
            if len(fields) == len(header):
                yield number, dict(zip(header, fields, strict=True))
            else:
                yield number, Unusable(f"{len(fields)} fields, but the header has {len(header)}")


def _json_table(file: DataFile, compression: Compression | None, watched: Mapping[str, Any]) -> Table:
    """One object a line, a list of objects, or an object that holds the list. A list of turns is a conversation.

    Python's reader and not pyarrow's: messages have no one type that would fit them all.
    """
    if _has_value_per_line(file.path, compression):

        def records(_columns: Sequence[str]) -> Iterator[Record]:
            return ((number, _json_record(line)) for number, line in _lines(file.path, compression))
    else:
        document = _records_of_json_document(file, compression)

        def records(_columns: Sequence[str]) -> Iterator[Record]:
            return iter(document)

    survey = _surveyed(records(()), watched)
    if survey.rows and survey.rows == survey.unusable:
        number, reason = next(records(()))
        others = f"; no better are the {survey.rows - 1:,} after it" if survey.rows > 1 else ""
        raise DataError(f"{file.source}:{number}: {reason}{others}")
    return Table([], survey, records)


def _has_value_per_line(path: Path, compression: Compression | None) -> bool:
    """JSON lines, told from one value over many lines by its first two lines that are not blank."""
    lines = [line.strip() for _, line in islice(_lines(path, compression), 2)]
    if len(lines) < 2:
        return False
    if lines[0].startswith(b"["):
        return lines[1].startswith(b"[") and isinstance(json_value(lines[0]), list)
    # No value can go on with an object after a first line like `{`, so here a broken first row is no obstacle.
    return lines[1].startswith(b"{") or _is_json_object(lines[0])


def _json_record(line: bytes) -> dict[str, Any] | Unusable:
    try:
        value = json_value(line.decode())
    except UnicodeDecodeError as error:
        return _not_utf_8(error)
    return value if isinstance(value, Unusable) else _as_record(value)


def _as_record(value: object) -> dict[str, Any] | Unusable:
    if isinstance(value, dict):
        return value
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        return {"messages": value}
    return Unusable(f"{type_name(value)} instead of an object")


def _records_of_json_document(file: DataFile, compression: Compression | None) -> list[Record]:
    with _open(file.path, compression) as stream:
        content = stream.read()
    try:
        document = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file.source}:{line}: not UTF-8", hint="save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        if is_python(content):
            raise DataError(
                f"{file.source}: not JSON, but as Python prints it", hint="write it with json.dump"
            ) from error
        raise DataError(f"{file.source}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.source}: not JSON: {error}") from error
    if isinstance(document, dict):
        document = _rows_in(document, file.source)
    if not isinstance(document, list):
        raise DataError(f"{file.source}: {type_name(document)} instead of a list of objects")
    return [(number, _as_record(row)) for number, row in enumerate(document, 1)]


# What the list of rows is called in `{"version": …, "data": [rows]}`.
_LISTS_OF_ROWS = ("data", "rows", "records", "items", "examples", "instances", "samples", "entries", "dataset", "train")


def _rows_in(document: dict[str, Any], source: str) -> list[Any]:
    """The rows in an object that holds their list, or as pandas writes a frame; any other object is one row."""
    lists = [
        name
        for name, value in document.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    is_row = any(name in KNOWN and not isinstance(value, list | dict) for name, value in document.items())
    if not is_row and set(lists) & {*_LISTS_OF_ROWS, *(name for name in lists if split_word(name))}:
        if len(lists) > 1:
            raise DataError(f"{source}: several lists of rows: {listed(lists)}", hint="put each into a file of its own")
        return list(document[lists[0]])
    return _frame_rows(document) or [document]


def _frame_rows(document: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The rows of DataFrame.to_json() (columns, also as lists), to_json(orient="index") and orient="split"."""
    values = list(document.values())
    if document.keys() == {"columns", "index", "data"} and all(isinstance(value, list) for value in values):
        return [dict(zip(document["columns"], row, strict=False)) for row in document["data"]]
    if not values or any(KNOWN.get(name) == "messages" for name in document):
        return None
    if all(isinstance(value, dict) and value for value in values):
        if all(name.isdigit() for name in document):
            return values
        keys = list(values[0])
        if all(list(value) == keys for value in values) and all(key.isdigit() for key in keys):
            return [{name: value[key] for name, value in document.items()} for key in keys]
    lengths = {len(value) if isinstance(value, list) else -1 for value in values}
    if len(lengths) == 1 and -1 not in lengths and any(_is_column_of_texts(value) for value in values):
        return [dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)]
    return None


def _is_column_of_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(item is None or isinstance(item, str) for item in value)
