"""Small real data files for tests: rows of every shape, written in every format that is read.

    write_data(tmp_path / "train.parquet", message_rows(30))
    write_data(tmp_path / "train.jsonl.zst", completion_rows(30))

The name says the format: .parquet .json .jsonl .csv .arrow (file) .arrows (stream) .txt, each also with .gz or .zst.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

Rows = Sequence[Mapping[str, Any]]
FORMATS = ("parquet", "json", "jsonl", "csv", "arrow", "arrows")


def message_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Conversations of system, user and assistant; no two are the same."""
    return [
        {
            "messages": [
                {"role": "system", "content": "You add numbers."},
                {"role": "user", "content": f"What is {number} plus one?"},
                {"role": "assistant", "content": f"It is {number + 1}."},
            ]
        }
        for number in range(first, first + count)
    ]


def completion_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{number} + 1 = ", "completion": f"{number + 1}, as café and 数 say"}
        for number in range(first, first + count)
    ]


def text_rows(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    return [{"text": f"Document {number}: one line of text."} for number in range(first, first + count)]


def write_data(path: Path, rows: Rows) -> Path:
    """Writes the rows as the name says and gives the path back."""
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    path.write_bytes(compressed(path.name, _WRITERS[name.rpartition(".")[2]](rows)))
    return path


def compressed(name: str, content: bytes) -> bytes:
    """The content as gzip or zstd when the name ends so."""
    if name.endswith(".gz"):
        return gzip.compress(content, mtime=0)
    if name.endswith(".zst"):
        return pyarrow.Codec("zstd").compress(content, asbytes=True)
    return content


def _parquet(rows: Rows) -> bytes:
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), content)
    return content.getvalue()


def _json(rows: Rows) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def _json_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv(rows: Rows) -> bytes:
    """Values that are no text become JSON text, which is what a CSV file can hold of them."""
    content = io.StringIO()
    writer = csv.DictWriter(content, fieldnames=list(rows[0]))
    writer.writeheader()
    for row in rows:
        writer.writerow({name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()})
    return content.getvalue().encode()


def _arrow_file(rows: Rows) -> bytes:
    table = pyarrow.Table.from_pylist(list(rows))
    content = io.BytesIO()
    with pyarrow.ipc.new_file(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return content.getvalue()


def _arrow_stream(rows: Rows) -> bytes:
    table = pyarrow.Table.from_pylist(list(rows))
    content = io.BytesIO()
    with pyarrow.ipc.new_stream(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return content.getvalue()


def _text(rows: Rows) -> bytes:
    return "".join(row["text"] + "\n" for row in rows).encode()


_WRITERS: dict[str, Callable[[Rows], bytes]] = {
    "parquet": _parquet,
    "json": _json,
    "jsonl": _json_lines,
    "csv": _csv,
    "arrow": _arrow_file,
    "arrows": _arrow_stream,
    "txt": _text,
}
