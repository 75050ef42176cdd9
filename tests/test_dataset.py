import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_files import FORMATS, completion_rows, message_rows, text_rows, write_data
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings

from tuner.errors import ConfigError, DataError, InputMissingError
from tuner.pipeline.dataset import FileRows, Gathered, gather_rows, order_sha256, selected, split_rows
from tuner.pipeline.rows import BadRow, Completion, Conversation, Origin, PlainText
from tuner.pipeline.tables import DataFile, Share
from tuner.training_settings import DatasetSettings


def settings(**changes: Any) -> DatasetSettings:
    return DatasetSettings(**changes)


def origins(rows: list[Any]) -> list[Origin]:
    return [row.origin for row in rows]


def as_file(path: Path) -> DataFile:
    return DataFile(path, path.name)


def read(*paths: Path, chat: bool = False, **changes: Any) -> list[Any]:
    chosen = selected([as_file(path) for path in paths], settings(**changes))
    return [found.row for file in chosen for found in FileRows(file, settings(**changes), chat=chat)]


def gather(*paths: Path, chat: bool = False, **changes: Any) -> Gathered:
    return gather_rows([as_file(path) for path in paths], settings(**changes), chat=chat)


def read_one(path: Path, row: Any, **changes: Any) -> Any:
    """What becomes of one row of JSON."""
    path.write_text(json.dumps([row]), encoding="utf-8")
    (result,) = read(path, **changes)
    return result


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return tmp_path / "one.json"


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00ff\nsize 12345\n"
TURN_KEYS = ("role", "from", "content", "value", "tool_calls", "function_call", "function", "arguments", "name", "type")
ROLES = ("user", "assistant", "gpt", "function_call", "text")
USER = {"role": "user", "content": "How many?"}
ASSISTANT = {"role": "assistant", "content": "Two."}


# ── formats ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("extension", FORMATS)
def test_every_format_gives_the_same_conversations(tmp_path: Path, extension: str, packing: str) -> None:
    rows = message_rows(25)
    read_back = read(write_data(tmp_path / f"data.{extension}{packing}", rows))
    assert [row.messages for row in read_back] == [row["messages"] for row in rows]
    assert all(isinstance(row, Conversation) and row.tools is None and not row.not_learnt for row in read_back)


@pytest.mark.parametrize("extension", FORMATS)
def test_every_format_gives_the_same_completions(tmp_path: Path, extension: str) -> None:
    rows = completion_rows(25)
    read_back = read(write_data(tmp_path / f"data.{extension}", rows))
    assert [(row.prompt, row.completion) for row in read_back] == [(row["prompt"], row["completion"]) for row in rows]


@pytest.mark.parametrize("extension", [*FORMATS, "txt", "txt.gz", "txt.zst"])
def test_plain_text_trains_in_every_format__kaito_fault_8(tmp_path: Path, extension: str) -> None:
    rows = text_rows(25)
    read_back = read(write_data(tmp_path / f"data.{extension}", rows))
    assert [row.text for row in read_back if isinstance(row, PlainText)] == [row["text"] for row in rows]


def test_a_row_of_a_table_knows_its_number_across_batches_and_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(text_rows(3000)), path, row_group_size=700)
    rows = read(path)
    assert [row.origin.row for row in rows] == list(range(1, 3001))
    assert all(row.text.startswith(f"Document {row.origin.row - 1}:") for row in rows)


def test_a_row_of_text_and_json_lines_knows_its_line(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("first\n\n  \nfourth")
    lines = tmp_path / "b.jsonl"
    lines.write_text('\n{"text": "second"}\n\n{"text": "fourth"}\n')
    assert [row.origin for row in read(text, lines)] == [
        Origin("a.txt", 1),
        Origin("a.txt", 4),
        Origin("b.jsonl", 2),
        Origin("b.jsonl", 4),
    ]


def test_five_thousand_rows_are_all_read_in_order(tmp_path: Path) -> None:
    rows = message_rows(5000)
    gathered = gather(write_data(tmp_path / "data.parquet", rows))
    assert [row.messages for row in gathered.rows if isinstance(row, Conversation)] == [row["messages"] for row in rows]


def test_the_cache_of_the_datasets_library_is_a_stream_named_arrow(tmp_path: Path) -> None:
    path = write_data(tmp_path / "data.arrows", text_rows(3)).rename(tmp_path / "data-00000-of-00001.arrow")
    assert len(read(path)) == 3


@pytest.mark.parametrize(
    ("document", "count"),
    [
        ('[{"text": "a"}, {"text": "b"}]', 2),
        ('[\n {"text": "a"},\n {"text": "b"}\n]', 2),
        ('{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}', 2),
        ('{\n "data": [\n {"text": "a"}\n ]\n}', 1),
        ('{"text": "a"}', 1),
        ('{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"type": "function"}]}', 1),
        ('{"text": "a"}\n{"text": "b"}\n', 2),
    ],
)
def test_one_json_value_and_one_object_a_line_are_told_apart(tmp_path: Path, document: str, count: int) -> None:
    path = tmp_path / "data.json"
    path.write_text(document)
    assert len(read(path)) == count


def test_a_json_object_with_two_lists_of_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('{"train": [{"text": "a"}], "test": [{"text": "b"}]}')
    with pytest.raises(DataError, match=r"data\.json: several lists of rows: train, test"):
        read(path)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, name: str) -> None:
    path = write_data(tmp_path / name, text_rows(2))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row.text for row in read(path)] == [row["text"] for row in text_rows(2)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_csv_has_fields_over_several_lines_and_the_delimiter_of_its_header(tmp_path: Path, delimiter: str) -> None:
    path = tmp_path / "data.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(
            [["prompt", "completion"], ["a,b;c\td", 'two\nlines, "quoted"'], [], ["x", "y" * 200_000]]
        )
    first, second = read(path)
    assert (first.prompt, first.completion) == ("a,b;c\td", 'two\nlines, "quoted"')
    assert (second.origin.row, len(second.completion)) == (2, 200_000)


def test_a_csv_row_with_too_few_fields_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("prompt,completion\na,b\nonly one\nc,d\n")
    assert read(path)[1] == BadRow(Origin("data.csv", 2), "1 fields, but the header has 2")


def test_a_csv_quote_that_is_never_closed_is_an_error_and_no_loss_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\na,b\nc,"d\n' + "e,f\n" * 100)
    with pytest.raises(DataError, match=r"data\.csv:2: a quote is opened here and never closed"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        "prompt|completion\na,1|b;2\n",
        "sep=;\nprompt;completion\na,1;b|2\n",
        '"sep=|"\r\nprompt|completion\r\na,1|b;2\r\n',
    ],
)
def test_csv_with_other_delimiters_is_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.csv").write_text(content)
    (row,) = read(tmp_path / "a.csv")
    assert (row.prompt, row.completion[0]) == ("a,1", "b")


def test_csv_with_quotes_escaped_by_a_backslash_is_read_and_other_backslashes_stay(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"say \\"Hi\\", ok","\\frac{1}{2}"\n"C:\\new",b\n')
    assert [(row.prompt, row.completion) for row in read(tmp_path / "a.csv")] == [
        ('say "Hi", ok', "\\frac{1}{2}"),
        ("C:\\new", "b"),
    ]


def test_blanks_after_the_commas_of_a_csv_header_are_no_part_of_names_and_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt, completion\na, "b, c"\n')
    (row,) = read(tmp_path / "a.csv")
    assert (row.prompt, row.completion) == ("a", "b, c")


def test_blanks_before_values_stay_where_the_header_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\na, b\n")
    assert read(tmp_path / "a.csv")[0].completion == " b"


PAIR = {"instruction": "How many?", "output": "Two."}


@pytest.mark.parametrize(
    "document",
    [
        {"instruction": {"0": "How many?", "1": "How many?"}, "output": {"0": "Two.", "1": "Two."}},
        {"instruction": ["How many?", "How many?"], "output": ["Two.", "Two."]},
        {"0": PAIR, "1": PAIR},
        {"columns": ["instruction", "output"], "index": [0, 1], "data": [["How many?", "Two."]] * 2},
        {"schema": {"fields": []}, "data": [PAIR, PAIR]},
    ],
)
def test_frames_as_pandas_writes_them_are_their_rows(tmp_path: Path, document: Any) -> None:
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert [row.messages for row in read(tmp_path / "a.json")] == [[USER, ASSISTANT]] * 2


@pytest.mark.parametrize(
    "document",
    [
        {"id": 1, "dialogue": [{"speaker": "user", "text": "Hi"}, {"speaker": "agent", "text": "yo"}]},
        {"chapters": [{"text": "one"}, {"text": "two"}]},
    ],
)
def test_a_list_of_objects_in_one_row_is_not_taken_for_the_rows(tmp_path: Path, document: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(document))
    with pytest.raises(DataError, match="rows of no known shape"):
        read(tmp_path / "a.jsonl")


def test_lines_of_bare_lists_of_turns_are_conversations(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps([USER, ASSISTANT])}\n" * 2)
    assert [row.messages for row in read(tmp_path / "a.jsonl")] == [[USER, ASSISTANT]] * 2


def test_text_that_parquet_has_as_bytes_is_read_and_what_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    texts = pyarrow.array([b"How many?", b"caf\xe9"], pyarrow.binary())
    answers = pyarrow.array([b"Two.", b"Two."], pyarrow.large_binary())
    pyarrow.parquet.write_table(pyarrow.table({"question": texts, "answer": answers}), tmp_path / "a.parquet")
    good, bad = read(tmp_path / "a.parquet")
    assert good.messages == [USER, ASSISTANT]
    assert bad == BadRow(Origin("a.parquet", 2), "not UTF-8")


def test_a_map_of_parquet_is_an_object(tmp_path: Path) -> None:
    turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.map_(pyarrow.string(), pyarrow.int64()))])
    turns = [{"role": "tool", "content": [("a", 1), ("b", None)]}]
    row = pyarrow.array([turns], pyarrow.list_(turn))
    table = pyarrow.table({"messages": row, "response": ["Two."]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0].messages[0] == {"role": "tool", "content": '{"a": 1}'}


# ── what kind of file ────────────────────────────────────────────────────────────────────────────────────────────────


def test_train_json_export_parquet_is_parquet__kaito_fault_16(tmp_path: Path) -> None:
    path = write_data(tmp_path / "data.parquet", text_rows(3)).rename(tmp_path / "train_json_export.parquet")
    assert len(read(path)) == 3


def test_only_the_last_suffix_of_a_name_counts__kaito_fault_16(tmp_path: Path) -> None:
    path = write_data(tmp_path / "data.csv.gz", completion_rows(3)).rename(tmp_path / "my.parquet.json_old.csv.gz")
    assert len(read(path)) == 3


@pytest.mark.parametrize("extension", ["parquet", "arrow", "arrows", "jsonl", "parquet.zst", "jsonl.gz"])
def test_content_says_what_a_file_is_when_its_name_says_something_else(tmp_path: Path, extension: str) -> None:
    path = write_data(tmp_path / f"data.{extension}", text_rows(3)).rename(tmp_path / "download.csv")
    assert [row.text for row in read(path)] == [row["text"] for row in text_rows(3)]


def test_the_source_says_the_kind_when_the_local_name_does_not(tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.csv", text_rows(3)).rename(tmp_path / "0001")
    found, *_ = FileRows(DataFile(path, "https://example.com/data/train.csv"), settings(), chat=False)
    assert found.row.origin == Origin("https://example.com/data/train.csv", 1)


def test_dataset_extension_says_the_kind_when_nothing_else_does(tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.csv", text_rows(3)).rename(tmp_path / "download")
    assert len(read(path, dataset_extension="csv")) == 3


def test_without_any_word_on_the_kind_the_setting_is_named(tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.csv", text_rows(3)).rename(tmp_path / "download")
    with pytest.raises(DataError, match="download: neither content nor name") as caught:
        read(path)
    assert caught.value.hint is not None
    assert "dataset_extension" in caught.value.hint


def test_dataset_extension_does_not_make_parquet_of_text(tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.csv", text_rows(3)).rename(tmp_path / "download")
    with pytest.raises(DataError, match="dataset_extension says parquet, but the content is not"):
        read(path, dataset_extension="parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.parquet", b"", "a.parquet: the file is empty"),
        ("a.csv", b"\n \n", "a.csv: the file is empty"),
        ("a.csv", b"text\n", "a.csv: the file has no rows"),
        ("a.json", b"[]", "a.json: the file has no rows"),
        ("a.json", b"3", "a.json: a number instead of a list of objects"),
        ("a.json", b'[{"text": "a"},\n {"text": }]', "a.json:2: not JSON: Expecting value at column 11"),
        ("a.json", b'[{"text": "a"},\n {"text": "\xff"}]', "a.json:2: not UTF-8"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
        ("a.jsonl", b"nonsense\n{oops}\n", "a.jsonl:1: not JSON: Expecting value at character 1; no better"),
        ("a.parquet", b"PAR1 and then nothing", "a.parquet: damaged or cut off"),
        ("a.arrow", b"ARROW1\0\0 and then nothing", "a.arrow: damaged or cut off"),
        ("a.parquet", b'{"error": "not found"}', "a.parquet: named as parquet, but its content is not"),
        ("a.csv", b"<!DOCTYPE html><html>", "a.csv: a web page"),
        ("a.jsonl", b"\x07\x08\0\0", "a.jsonl: binary data of an unknown kind"),
        ("a.txt", LFS_POINTER, "a.txt: a Git LFS pointer, and not the file it stands for"),
        ("a.jsonl", LFS_POINTER, "a.jsonl: a Git LFS pointer, and not the file it stands for"),
        ("a.parquet", LFS_POINTER, "a.parquet: a Git LFS pointer, and not the file it stands for"),
        ("a.jsonl", b"PK\x03\x04\x14\0a.jsonl", "a.jsonl: a zip archive"),
        ("a.csv", b"PK\x03\x04\x14\0[Content_Types].xml", "a.csv: an Excel workbook"),
        ("a.txt", b"\xfd7zXZ\x00\0\0", "a.txt: compressed by xz"),
        ("a.txt", b"BZh91AY", "a.txt: compressed by bzip2"),
        ("a.jsonl.gz", gzip.compress(b"a.jsonl".ljust(257, b"\0") + b"ustar\0"), "a.jsonl.gz: a tar archive"),
        ("a.jsonl", b"{'text': 'a'}\n{'text': None}\n", "a.jsonl:1: not JSON, but as Python prints it"),
        ("a.json", b"[{'text': 'a'},\n {'text': True}]", "a.json: not JSON, but as Python prints it"),
        ("a.csv", "text\nå".encode("utf-16"), "a.csv: the text is UTF-16"),
    ],
)
def test_a_file_that_is_no_data_gets_a_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("extension", ["parquet", "arrow", "arrows", "jsonl.gz", "jsonl.zst", "parquet.gz"])
def test_a_file_that_was_cut_off_is_an_error(tmp_path: Path, extension: str) -> None:
    path = write_data(tmp_path / f"a.{extension}", text_rows(200))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="damaged or cut off"):
        read(path)


def test_a_file_that_is_not_there_is_missing_input(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"gone\.parquet: No such file"):
        read(tmp_path / "gone.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_bytes_that_are_not_utf_8_make_a_bad_row(tmp_path: Path, name: str) -> None:
    path = write_data(tmp_path / name, text_rows(3))
    path.write_bytes(path.read_bytes().replace(b"Document 1", b"Document \xe9"))
    (bad,) = [row for row in read(path) if isinstance(row, BadRow)]
    assert "not UTF-8" in bad.reason


def test_parquet_text_that_is_not_utf_8_makes_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"good", b"caf\xe9", b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert read(path) == [
        PlainText(Origin("a.parquet", 1), "good"),
        BadRow(Origin("a.parquet", 2), "not UTF-8"),
        PlainText(Origin("a.parquet", 3), "fine"),
    ]


def test_a_broken_line_of_json_lines_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": \n{"text": "b"}\n["c"]\n')
    assert [str(row) for row in read(path) if isinstance(row, BadRow)] == [
        "a.jsonl:1: not JSON: Expecting value at character 11",
        "a.jsonl:3: a list instead of an object",
    ]


# ── which files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_file_is_trained_on_in_order__kaito_fault_4(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for number, folder in enumerate(folders):
        folder.mkdir()
        write_data(folder / "train.parquet", message_rows(3, first=10 * number))
    files = [
        DataFile(folder / "train.parquet", f"https://example.com/{folder.name}/train.parquet") for folder in folders
    ]
    gathered = gather_rows(files, settings(), chat=False)
    assert [str(row.origin) for row in gathered.rows] == [
        f"https://example.com/{folder}/train.parquet:{row}" for folder in "ab" for row in (1, 2, 3)
    ]


def test_files_of_different_formats_and_shapes_are_one_dataset(tmp_path: Path) -> None:
    gathered = gather(
        write_data(tmp_path / "a.parquet", message_rows(3)),
        write_data(tmp_path / "b.csv", completion_rows(2)),
        write_data(tmp_path / "c.txt.gz", text_rows(1)),
    )
    assert gathered.shapes == {"messages": 3, "prompt/completion": 2, "text": 1}


def test_a_part_of_a_folder_may_have_no_rows_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_bytes(b"")
    table = pyarrow.Table.from_pylist(text_rows(3))
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    write_data(tmp_path / "rows.parquet", text_rows(3))
    names = ("empty.json", "none.parquet", "rows.parquet")
    gathered = gather_rows([DataFile(tmp_path / name, name, is_part=True) for name in names], settings(), chat=False)
    assert (len(gathered.rows), gathered.remarks) == (3, ["empty.json: no rows", "none.parquet: no rows"])
    with pytest.raises(DataError, match=r"no rows to train on; empty\.json: no rows; none\.parquet: no rows"):
        gather_rows([DataFile(tmp_path / name, name, is_part=True) for name in names[:2]], settings(), chat=False)


def test_rows_of_a_validation_file_are_evaluated_and_nothing_else_is_held_out(tmp_path: Path) -> None:
    files = [
        DataFile(write_data(tmp_path / "a.jsonl", text_rows(30)), "a.jsonl"),
        DataFile(write_data(tmp_path / "b.jsonl", text_rows(5, first=28)), "b.jsonl", "validation"),
    ]
    gathered = gather_rows(files, settings(), chat=False)
    split = split_rows(gathered.rows, settings(), gathered.validation)
    assert {row.origin.file for row in split.train} == {"a.jsonl"}
    assert {row.origin.file for row in split.evaluation} == {"b.jsonl"}
    assert (len(split.train), len(split.evaluation), split.leaked) == (30, 5, 2)


@pytest.mark.parametrize("written", ["b.jsonl", "data/b.jsonl", "/mnt/data/b.jsonl", "./b.jsonl"])
def test_dataset_path_selects_the_file_it_ends_with(tmp_path: Path, written: str) -> None:
    paths = [write_data(tmp_path / name, text_rows(2)) for name in ("a.jsonl", "b.jsonl", "ab.jsonl")]
    assert {row.origin.file for row in read(*paths, dataset_path=written)} == {"b.jsonl"}


def test_dataset_path_that_selects_nothing_says_what_is_there(tmp_path: Path) -> None:
    paths = [write_data(tmp_path / name, text_rows(2)) for name in ("a.jsonl", "b.jsonl")]
    with pytest.raises(ConfigError, match=r"no file 'c\.jsonl'") as caught:
        read(*paths, dataset_path="c.jsonl")
    assert caught.value.hint is not None
    assert "a.jsonl, b.jsonl" in caught.value.hint


# ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"messages": json.dumps([USER, ASSISTANT])},
        {"conversations": [USER, ASSISTANT]},
        {"conversation": [USER, ASSISTANT], "turns": 1},
        {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Two."}]},
        {"conversations": [{"from": "user", "value": "How many?"}, {"from": "ChatGPT", "value": "Two."}]},
        {"messages": [{**USER, "name": None, "tool_calls": None}, {**ASSISTANT, "tool_calls": []}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]},
                ASSISTANT,
            ]
        },
        {"instruction": "How many?", "input": "", "output": "Two."},
        {"instruction": "How many?", "output": "Two.", "text": "### Instruction: How many?"},
        {"instruction": "", "input": "How many?", "output": "Two.", "system": None, "history": []},
        {"instruction": "How many?", "context": "", "response": "Two.", "category": "open_qa"},
        {"question": "How many?", "answer": "Two."},
        {"query": "How many?", "response": "Two."},
        {"input": "How many?", "output": "Two."},
    ],
)
def test_shapes_of_conversations_are_recognised(one: Path, row: dict[str, Any]) -> None:
    assert read_one(one, row) == Conversation(Origin("one.json", 1), [USER, ASSISTANT])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT], "system": "Be brief."},
        {"messages": [{"role": "developer", "content": "Be brief."}, USER, ASSISTANT], "system": "Not this."},
        {"question": "How many?", "response": "Two.", "system_prompt": "Be brief."},
        {"instruction": "How many?", "output": "Two.", "system": "Be brief."},
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "How many?"},
                {"from": "gpt", "value": "Two."},
            ]
        },
    ],
)
def test_a_system_prompt_comes_first(one: Path, row: dict[str, Any]) -> None:
    assert read_one(one, row).messages == [{"role": "system", "content": "Be brief."}, USER, ASSISTANT]


def test_alpaca_has_its_input_under_the_instruction_and_its_history_before(one: Path) -> None:
    row = {"instruction": "Add.", "input": "1 and 1", "output": "Two.", "history": [["How many?", "One."]]}
    assert [message["content"] for message in read_one(one, row).messages] == [
        "How many?",
        "One.",
        "Add.\n\n1 and 1",
        "Two.",
    ]


def test_prompt_and_completion_as_messages_are_a_conversation_whose_completion_is_learnt(one: Path) -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert read_one(one, row) == Conversation(
        Origin("one.json", 1), [USER, ASSISTANT, USER, ASSISTANT], None, frozenset({0, 1, 2})
    )


@pytest.mark.parametrize(
    ("columns", "why", "listed"),
    [
        (
            {"question": "a", "answer": "b", "response": "c", "text": "d"},
            " (response and answer could each be the response)",
            "question, answer, response, text",
        ),
        (
            {"instruction": "a", "question": "b", "output": "c"},
            " (instruction and question could each be the prompt)",
            "instruction, question, output",
        ),
        ({"prompt": "a", "text": "b"}, " (prompt beside text: a prompt, or its answer?)", "prompt, text"),
        ({"prompt": "a", "id": 1}, "", "prompt, id"),
        ({"body": "a"}, "", "body"),
    ],
)
def test_columns_that_do_not_say_what_is_meant_are_listed(
    one: Path, columns: dict[str, Any], why: str, listed: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_one(one, columns)
    assert caught.value.message == f"one.json: rows of no known shape{why}; the file has {listed}"
    assert "DatasetConfig.columns: {COLUMN: prompt, OTHER: response}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("columns", "meant"),
    [
        ({"mesages": []}, "is 'mesages' as messages meant? "),
        ({"Prompt": "a", "completions": "b"}, "is 'Prompt' as prompt and 'completions' as completion meant? "),
        ({"prompt": "a", "reply": "b"}, "say what the columns are"),
    ],
)
def test_a_misspelt_column_is_asked_about(one: Path, columns: dict[str, Any], meant: str) -> None:
    with pytest.raises(DataError) as caught:
        read_one(one, columns)
    assert str(caught.value.hint).startswith(meant)


@pytest.mark.parametrize("extension", ["csv", "parquet"])
def test_a_column_that_is_there_twice_is_refused(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"a.{extension}"
    if extension == "csv":
        path.write_text("text,text\na,b\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), path)
    with pytest.raises(DataError, match="there are several columns 'text'"):
        read(path)


def test_columns_of_json_lines_are_those_of_the_first_rows_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null, "id": 1}\n{"prompt": "a"}\n{"prompt": "a", "completion": "b"}\n')
    assert [type(row) for row in read(path)] == [BadRow, BadRow, Completion]


# ── every column is read, refused or named ───────────────────────────────────────────────────────────────────────────


def late(first: dict[str, Any], last: dict[str, Any], count: int = 3000) -> list[dict[str, Any]]:
    return [*([first] * count), last]


@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet", "csv"])
def test_a_column_that_only_the_last_row_has_is_read_there(tmp_path: Path, extension: str) -> None:
    rows = late(
        {"instruction": "Add.", "input": "", "output": "2"}, {"instruction": "Add.", "input": "L", "output": "2"}
    )
    if extension.startswith("json"):
        rows = [{name: value for name, value in row.items() if value} for row in rows]
    read_back = read(write_data(tmp_path / f"a.{extension}", rows))
    assert {row.messages[0]["content"] for row in read_back[:-1]} == {"Add."}
    assert read_back[-1].messages[0]["content"] == "Add.\n\nL"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"system": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"history": [["How many?", "Two."]]}, USER),
        ({"history": [USER, ASSISTANT]}, USER),
        ({"context": "Long."}, {"role": "user", "content": "How many?\n\nLong."}),
        ({"context": "Long.", "query": None, "input": "How many?"}, {"role": "user", "content": "How many?\n\nLong."}),
    ],
)
def test_what_stands_beside_a_late_row_is_read(tmp_path: Path, extra: dict[str, Any], expected: dict[str, Any]) -> None:
    pair = {"query": "How many?", "response": "Two."}
    read_back = read(write_data(tmp_path / "a.jsonl", late(pair, pair | extra)))
    assert read_back[-1].messages[0] == expected
    assert read_back[0].messages == [USER, ASSISTANT]


def test_rows_of_several_shapes_in_one_file_are_each_read_as_what_they_are(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "How many?", "completion": "Two."},
        {"text": "Words."},
        {"question": "How many?", "answer": "Two."},
    ]
    gathered = gather(write_data(tmp_path / "a.jsonl", rows))
    assert gathered.shapes == {"messages": 1, "prompt/completion": 1, "text": 1, "question/answer": 1}


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"messages": [USER, ASSISTANT], "id": 7, "lang": "en", "empty": None}, "id (2 rows), lang (2 rows)"),
        ({"messages": [{**USER, "id": 1, "note": ""}, {**ASSISTANT, "id": 2}]}, "messages[].id (4 turns)"),
        ({"messages": [USER, ASSISTANT], "response": "Other."}, "response (2 rows)"),
        ({"messages": [{**USER, "tool_calls": [{"name": "x"}]}, ASSISTANT]}, "messages[].tool_calls (2 turns)"),
        ({"messages": [USER, ASSISTANT], "prompt": "How many?"}, "prompt (2 rows)"),
        ({"conversations": [USER, ASSISTANT], "messages": [USER, ASSISTANT]}, "conversations (2 rows)"),
        ({"question": "a", "answer": "b", "text": "c", "score": 0}, "text (2 rows), score (2 rows)"),
        ({"text": "c", "title": "d", "system": "e"}, "title (2 rows), system (2 rows)"),
        ({"prompt": "a", "completion": "b", "answer": "c"}, "answer (2 rows)"),
        ({"messages": [USER, ASSISTANT], "split": "gsm8k"}, "split (2 rows)"),
    ],
)
@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_columns_and_keys_of_turns_that_are_not_read_are_named_with_their_counts(
    tmp_path: Path, row: dict[str, Any], unread: str, extension: str
) -> None:
    gathered = gather(write_data(tmp_path / f"a.{extension}", [row, row]))
    assert len(gathered.rows) == 2
    assert gathered.remarks == [f"columns not read: {unread}"]


def test_columns_not_read_are_counted_over_all_files_in_one_line(tmp_path: Path) -> None:
    paths = [write_data(tmp_path / f"{name}.jsonl", [{"text": "x", "id": 1}] * 3) for name in "ab"]
    assert gather(*paths).remarks == ["columns not read: id (6 rows)"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs of a preferred and a rejected answer"),
        ({"messages": [USER], "chosen": ASSISTANT, "rejected": ASSISTANT}, "pairs of a preferred and a rejected"),
        ({"messages": [USER, ASSISTANT], "rejected_response": "c"}, "pairs of a preferred and a rejected answer"),
        ({"messages": [USER, ASSISTANT], "images": ["a.jpg"]}, "pictures, sound or video"),
        ({"instruction": "a", "output": "b", "audio": "c.wav"}, "pictures, sound or video"),
    ],
)
@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_what_a_supervised_run_must_not_learn_stops_it_with_the_reason(
    tmp_path: Path, row: dict[str, Any], said: str, extension: str
) -> None:
    plain = {"messages": [USER, ASSISTANT]}
    rows = [dict.fromkeys(row) | plain] * 30 + [dict.fromkeys(plain) | row]
    with pytest.raises(DataError, match=rf"a\.{extension}: 1 row has {said}.* \(columns? ") as caught:
        read(write_data(tmp_path / f"a.{extension}", rows))
    assert "DatasetConfig.columns" in str(caught.value.hint)


@pytest.mark.parametrize("empty", [None, [], ""])
def test_a_column_of_pictures_without_one_is_no_matter(one: Path, empty: Any) -> None:
    assert read_one(one, {"messages": [USER, ASSISTANT], "images": empty}).messages == [USER, ASSISTANT]


def test_the_answer_of_a_column_beside_turns_that_end_with_a_question_is_learnt(one: Path) -> None:
    row = read_one(one, {"messages": [USER, ASSISTANT, USER], "response": "Three."})
    assert row.messages == [USER, ASSISTANT, USER, {"role": "assistant", "content": "Three."}]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Which?", "A": "pear", "B": "spoon", "C": "", "answer": "A"},
        {"question": "Which?", "choices": ["pear", "spoon"], "answer": "A"},
        {"question": "Which?", "options": {"A": "pear", "B": "spoon"}, "answer": "A"},
        {"question": "Which?", "choices": {"text": ["pear", "spoon"], "label": ["A", "B"]}, "answer": "A"},
        {"question": "Which?", "choices": json.dumps(["pear", "spoon"]), "answer": "A"},
    ],
)
def test_choices_belong_to_the_question(one: Path, row: dict[str, Any]) -> None:
    assert read_one(one, row).messages[0]["content"] == "Which?\n\nA. pear\nB. spoon"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {**ASSISTANT, "reasoning": "One and one."}]},
        {"messages": [USER, {**ASSISTANT, "reasoning_content": "One and one."}]},
        {"question": "How many?", "answer": "Two.", "reasoning": "One and one."},
        {"prompt": "How many?", "completion": "Two.", "reasoning_content": "One and one."},
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "value": "One and one."}, {"type": "text", "value": "Two."}],
                },
            ]
        },
    ],
)
def test_a_thought_goes_with_its_answer(one: Path, row: dict[str, Any]) -> None:
    assert read_one(one, row).messages == [USER, ASSISTANT | {"reasoning_content": "One and one."}]


@pytest.mark.parametrize("as_text", [False, True])
def test_what_a_template_is_to_be_rendered_with_goes_along(one: Path, as_text: bool) -> None:
    documents, arguments = [{"title": "t", "text": "w"}], {"enable_thinking": False}
    pack = json.dumps if as_text else lambda value: value
    row = {"messages": [USER, ASSISTANT], "documents": pack(documents), "chat_template_kwargs": pack(arguments)}
    assert read_one(one, row).template_arguments == {"enable_thinking": False, "documents": documents}


def test_a_row_cannot_set_what_training_decides(one: Path) -> None:
    row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"add_generation_prompt": True}}
    assert read_one(one, row).reason == "chat_template_kwargs sets add_generation_prompt, which training decides"


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_rows_of_a_split_column_go_where_their_split_says(tmp_path: Path, extension: str) -> None:
    splits = ["train", "test", "dev", "train", "validation", "eval"]
    rows = [{"question": f"q{number}", "answer": "a", "split": split} for number, split in enumerate(splits)]
    gathered = gather(write_data(tmp_path / f"a.{extension}", rows))
    assert [row.origin.row for row in gathered.rows] == [1, 4]
    assert [row.origin.row for row in gathered.validation] == [3, 5]
    assert gathered.remarks == [f"a.{extension}: 2 rows of a test split are not read"]


# ── named columns ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_messages_column_names_the_messages__kaito_fault_7(one: Path) -> None:
    row = {"text": "not this", "chat": [USER, ASSISTANT]}
    assert read_one(one, row, messages_column="chat").messages == [USER, ASSISTANT]


def test_context_and_response_column_name_a_completion__kaito_fault_7(one: Path) -> None:
    row = {"question": "1 + 1 =", "answer": " 2", "messages": "not this"}
    read_back = read_one(one, row, context_column="question", response_column="answer")
    assert read_back == Completion(Origin("one.json", 1), "1 + 1 =", " 2")


def test_response_column_alone_names_plain_text__kaito_fault_7(one: Path) -> None:
    assert read_one(one, {"body": "words", "text": "not this"}, response_column="body").text == "words"


def test_context_column_alone_goes_with_text_as_in_kaito(one: Path) -> None:
    assert read_one(one, {"ask": "a", "text": "b"}, context_column="ask") == Completion(Origin("one.json", 1), "a", "b")


@pytest.mark.parametrize(
    "named",
    [
        {"context_column": "body", "response_column": "reply"},
        {"columns": {"body": "prompt", "reply": "response"}},
        {"prompt_template": "{body}", "response_column": "reply"},
        {"prompt_template": "{body}", "columns": {"reply": "response"}},
    ],
)
def test_named_columns_make_a_chat_turn_for_a_model_with_a_chat_template_or_raw_text_where_that_is_asked_for(
    one: Path, named: dict[str, Any]
) -> None:
    row = {"body": "How many?", "reply": "Two.", "answer": "not this"}
    assert read_one(one, row, chat=True, **named).messages == [USER, ASSISTANT]
    raw = Completion(Origin("one.json", 1), "How many?", "Two.")
    assert read_one(one, row, chat=True, raw_text=True, **named) == raw
    assert read_one(one, row, chat=False, **named) == raw
    assert read_one(one, row, chat=False, raw_text=False, **named).messages == [USER, ASSISTANT]


def test_prompt_and_completion_are_raw_text_as_in_trl_unless_a_chat_turn_is_asked_for(one: Path) -> None:
    row = {"prompt": "How many?", "completion": "Two."}
    assert isinstance(read_one(one, row, chat=True), Completion)
    assert read_one(one, row, raw_text=False).messages == [USER, ASSISTANT]


def test_all_rows_of_a_file_are_raw_text_or_none_is(tmp_path: Path) -> None:
    pair = {"prompt": "How many?", "completion": "Two."}
    path = write_data(tmp_path / "a.jsonl", [pair, pair | {"system": "Be brief."}, pair | {"system": ""}])
    assert [type(row) for row in read(path)] == [Conversation] * 3


def test_a_template_puts_several_columns_together(one: Path) -> None:
    template = "Subject: {subject}\n\n{body of mail} {{as it is}}"
    row = {"subject": "Hi", "body of mail": "Where {is} it?", "answer": "Two.", "input": "not this"}
    read_back = read_one(one, row, prompt_template=template)
    assert read_back == Completion(Origin("one.json", 1), "Subject: Hi\n\nWhere {is} it? {as it is}", "Two.")
    assert read_one(one, row | {"subject": None, "body of mail": ""}, prompt_template=template).reason == (
        "subject and body of mail are empty"
    )


def test_a_system_prompt_for_all_rows_goes_before_those_that_have_none(tmp_path: Path) -> None:
    own = {"role": "system", "content": "Mine."}
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [own, USER, ASSISTANT]}]
    read_back = read(write_data(tmp_path / "a.jsonl", rows), system_prompt="Ours.")
    assert [row.messages[0]["content"] for row in read_back] == ["Ours.", "Mine."]


@pytest.mark.parametrize(
    ("row", "columns", "messages"),
    [
        ({"chat": [USER, ASSISTANT], "messages": "x"}, {"chat": "messages"}, [USER, ASSISTANT]),
        ({"question": "How many?", "final": "Two.", "answer": "x"}, {"final": "response"}, [USER, ASSISTANT]),
        ({"q": "How many?", "answer": "Two.", "question": "x"}, {"q": "prompt"}, [USER, ASSISTANT]),
        (
            {"question": "How many?", "answer": "Two.", "persona": "Be brief.", "system": "x"},
            {"persona": "system"},
            [{"role": "system", "content": "Be brief."}, USER, ASSISTANT],
        ),
        ({"prompt": "How many?", "chosen": "Two.", "rejected": "x"}, {"chosen": "response"}, [USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "images": ["x"]}, {"images": "ignored"}, [USER, ASSISTANT]),
        ({"messages": [USER, ASSISTANT], "label": False}, {"label": "ignored"}, [USER, ASSISTANT]),
    ],
)
def test_columns_are_what_somebody_says_they_are(
    one: Path, row: dict[str, Any], columns: dict[str, Any], messages: list[Any]
) -> None:
    assert read_one(one, row, chat=True, columns=columns).messages == messages


def test_a_column_that_is_to_be_ignored_is_not_named_as_not_read(tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.jsonl", [{"text": "a", "id": 1, "other": 2}])
    assert gather(path, columns={"id": "ignored"}).remarks == ["columns not read: other (1 row)"]


@pytest.mark.parametrize(
    ("changes", "column"),
    [
        ({"columns": {"zzz": "prompt"}}, "zzz"),
        ({"prompt_template": "{zzz}"}, "zzz"),
        ({"messages_column": "mesages"}, "mesages"),
        ({"context_column": "zzz", "response_column": "body"}, "zzz"),
        ({"context_column": "body", "response_column": "zzz"}, "zzz"),
        ({"response_column": "zzz"}, "zzz"),
    ],
)
def test_a_named_column_that_is_not_there_lists_what_is__kaito_fault_7(
    one: Path, changes: dict[str, str], column: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_one(one, {"messages": [USER, ASSISTANT], "body": "words"}, **changes)
    assert caught.value.message == f"one.json: no column {column!r}; the file has messages, body"
    assert caught.value.hint == (
        'did you mean "messages"?'
        if column == "mesages"
        else f"set DatasetConfig.{next(name for name, value in changes.items() if column in value)} to one of them"
    )


# ── tools ────────────────────────────────────────────────────────────────────────────────────────────────────────────

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tool_calls_come_through_with_arguments_as_an_object(one: Path, tools: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Zürich"}'}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "sun"},
        ASSISTANT,
    ]
    row = read_one(one, {"messages": turns, "tools": tools})
    assert row.tools == [TOOL]
    assert row.messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "content": "sun", "tool_call_id": "c1", "name": "weather"},
        ASSISTANT,
    ]


def test_sharegpt_function_calls_become_tool_calls(one: Path) -> None:
    turns = [
        {"from": "human", "value": "How many?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "sun"},
        {"from": "gpt", "value": "Two."},
    ]
    assert read_one(one, {"conversations": turns}).messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sun"},
        ASSISTANT,
    ]


def test_parquet_nulls_of_other_rows_keys_are_no_part_of_a_message(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": tools}
        for call, tools in ((CALL, [TOOL]), (other, None))
    ]
    rows.append({"messages": [USER, ASSISTANT], "tools": None})
    read_back = read(write_data(tmp_path / "a.parquet", rows))
    assert [row.messages[1] for row in read_back] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [other]},
        ASSISTANT,
    ]
    assert [row.tools for row in read_back] == [[TOOL], None, None]


MARKS = [
    ("weight", 0, 1),  # OpenAI, Together, Fireworks
    ("weight", "0", "1"),
    ("train", False, True),  # Axolotl
    ("training", False, True),
    ("loss", False, None),  # ms-swift
    ("loss_weight", 0.0, 1.0),  # LLaMA-Factory
    ("mask", True, False),  # NeMo
]


@pytest.mark.parametrize(("key", "no", "yes"), MARKS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_turn_that_is_marked_is_not_learnt_wherever_it_stands(
    one: Path, key: str, no: object, yes: object, place: int
) -> None:
    turns = [turn for index in range(3) for turn in (USER, {**ASSISTANT, key: no if index == place else yes})]
    row = read_one(one, {"messages": turns})
    assert (row.messages, row.not_learnt) == ([USER, ASSISTANT] * 3, {2 * place + 1})


def test_marks_of_turns_count_after_a_system_prompt_that_has_its_own_column(one: Path) -> None:
    turns = [USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]
    row = read_one(one, {"messages": turns, "system": "Be brief."})
    assert (row.messages[2], row.not_learnt) == (ASSISTANT, {2})


KTO = [
    ({"prompt": "p", "completion": "c"}, "label", False, True),
    ({"prompt": "p", "completion": "c"}, "label", 0, 1),
    ({"prompt": "p", "completion": "c"}, "label", "False", "True"),
    ({"prompt": "p", "completion": "c"}, "label", "0.0", "1.0"),
    ({"prompt": "p", "completion": "c"}, "label", -1, 1),
    ({"messages": [USER, ASSISTANT]}, "label", False, True),
    ({"instruction": "p", "output": "c"}, "kto_tag", False, True),
    ({"question": "p", "answer": "c"}, "label", "no", "yes"),
]


@pytest.mark.parametrize(("row", "column", "no", "yes"), KTO)
@pytest.mark.parametrize("extension", ["jsonl", "parquet", "csv"])
def test_an_answer_that_is_said_to_be_unwanted_is_a_bad_row(
    tmp_path: Path, row: dict[str, Any], column: str, no: Any, yes: Any, extension: str
) -> None:
    rows = [row | {column: yes if number else no} for number in range(12)]
    gathered = gather(write_data(tmp_path / f"a.{extension}", rows))
    (bad,) = gathered.bad
    assert bad.origin.row == 1
    assert bad.reason.startswith(f"{column} is ")
    assert bad.reason.endswith(": an answer that is not wanted")
    assert (len(gathered.rows), gathered.remarks) == (11, [])


@pytest.mark.parametrize("labels", [[0, 1, 2], ["spam", "no"], [1, 1, 1]])
def test_a_label_that_is_no_judgement_is_named_as_not_read(tmp_path: Path, labels: list[Any]) -> None:
    rows = [{"prompt": f"p{number}", "completion": "c", "label": label} for number, label in enumerate(labels)]
    gathered = gather(write_data(tmp_path / "a.jsonl", rows))
    assert len(gathered.rows) == len(labels)
    assert gathered.remarks == [f"columns not read: label ({len(labels)} rows)"]


def test_a_label_beside_text_is_a_class_and_named_as_not_read(tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.jsonl", [{"text": f"t{number}", "label": number % 2} for number in range(4)])
    gathered = gather(path)
    assert (len(gathered.rows), gathered.remarks) == (4, ["columns not read: label (4 rows)"])


@pytest.mark.parametrize(
    ("row", "tools"),
    [
        ({"tools": [TOOL["function"]]}, [TOOL]),
        ({"tools": json.dumps([TOOL["function"]])}, [TOOL]),
        ({"functions": [TOOL["function"]]}, [TOOL]),
        ({"tools": [json.dumps(TOOL)]}, [TOOL]),
        ({"tools": [{"name": "weather", "input_schema": {"type": "object"}}]}, [TOOL]),
        ({"tools": [{"type": "function", "function": TOOL["function"]}]}, [TOOL]),
        ({"tools": []}, None),
        ({"tools": "[]"}, None),
    ],
)
def test_tools_are_as_servers_pass_them(one: Path, row: dict[str, Any], tools: Any) -> None:
    assert read_one(one, {"messages": [USER, ASSISTANT]} | row).tools == tools


def test_tools_in_a_system_message_are_the_rows(one: Path) -> None:
    for content in ("", None, "Be brief."):
        row = read_one(one, {"messages": [{"role": "system", "content": content, "tools": [TOOL]}, USER, ASSISTANT]})
        assert row.tools == [TOOL]


OTHER_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}


@pytest.mark.parametrize(
    "turns",
    [
        [
            {"role": "tool_call", "content": json.dumps(CALL["function"])},
            {"role": "tool_call", "content": json.dumps(OTHER_CALL["function"])},
        ],
        [
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "function_call", "value": json.dumps(OTHER_CALL["function"])},
        ],
        [
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "assistant", "tool_calls": [OTHER_CALL]},
        ],
        [{"role": "assistant", "content": "", "tool_calls": json.dumps([CALL, OTHER_CALL])}],
        [{"from": "function_call", "value": json.dumps([CALL["function"], OTHER_CALL["function"]])}],
    ],
)
def test_calls_in_a_row_are_made_at_once(one: Path, turns: list[dict[str, Any]]) -> None:
    answers = [{"role": "tool", "content": "sun"}, {"role": "tool", "content": "rain"}]
    row = read_one(one, {"messages": [USER, *turns, *answers, ASSISTANT]})
    called = {"role": "assistant", "content": "", "tool_calls": [CALL, OTHER_CALL]}
    assert row.messages == [USER, called, *answers, ASSISTANT]


def test_a_call_after_a_word_of_the_assistant_is_made_in_the_same_turn(one: Path) -> None:
    turns = [USER, {"role": "assistant", "content": "I look."}, {"role": "tool_call", "content": json.dumps(CALL)}]
    row = read_one(one, {"messages": turns})
    assert row.messages == [USER, {"role": "assistant", "content": "I look.", "tool_calls": [CALL]}]


def test_a_call_with_a_thought_of_its_own_stays_a_turn_of_its_own(one: Path) -> None:
    """Joined to the one before, its thought would be lost."""
    turns = [
        {"role": "assistant", "content": "", "reasoning_content": thought, "tool_calls": [CALL]}
        for thought in ("first", "second")
    ]
    row = read_one(one, {"messages": [USER, *turns, {"role": "tool", "content": "r"}, ASSISTANT]})
    assert [message.get("reasoning_content") for message in row.messages] == [None, "first", "second", None, None]


def test_flat_tools_of_openais_responses_api_are_wrapped(one: Path) -> None:
    function = {"name": "weather", "parameters": {"type": "object"}}
    row = read_one(one, {"messages": [USER, ASSISTANT], "tools": [{"type": "function", **function}]})
    assert row.tools == [{"type": "function", "function": function}]


def test_calls_after_an_answer_to_the_first_are_turns_of_their_own(one: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    turns = [USER, call, {"role": "tool", "content": "sun"}, call, {"role": "tool", "content": "sun"}, ASSISTANT]
    assert read_one(one, {"messages": turns}).messages == turns


@pytest.mark.parametrize(
    ("content", "text"),
    [({"sky": "sun"}, '{"sky": "sun"}'), ([1, 2], "[1, 2]"), (7, "7"), ([{"type": "text", "text": "sun"}], "sun")],
)
def test_what_a_tool_answers_may_be_any_value(one: Path, content: Any, text: str) -> None:
    turns = [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": content}, ASSISTANT]
    assert read_one(one, {"messages": turns}).messages[2] == {"role": "tool", "content": text}


# ── ways to write a conversation ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "row",
    [
        {"messages": {"role": ["user", "assistant"], "content": ["How many?", "Two."]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["How many?", "Two."]}},
        {"messages": [json.dumps(USER), json.dumps(ASSISTANT)]},
        {"conversation": [{"human": "How many?", "assistant": "Two."}]},
        {"conversation": [{"assistant": "Two.", "user": "How many?"}]},
        {"messages": [{"role": "user", "value": "How many?"}, {"from": "gpt", "content": "Two."}]},
        {"messages": [{"role": "user", "content": None, "value": "How many?"}, ASSISTANT]},
        {"messages": [{"role": "user", "content": [{"text": "How many?"}]}, ASSISTANT]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "How many?"}]}, ASSISTANT]},
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "How many?"}]}, ASSISTANT]},
        {"messages": [{"role": "system", "content": None}, USER, ASSISTANT]},
        {"messages": [{"role": "system", "content": ""}, USER, ASSISTANT], "system": ""},
        {"prompt": [USER], "completion": "Two."},
        {"prompt": "How many?", "completion": [ASSISTANT]},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ASSISTANT])},
        [USER, ASSISTANT],
    ],
)
def test_ways_to_write_a_conversation(one: Path, row: Any) -> None:
    read_back = read_one(one, row)
    assert isinstance(read_back, Conversation), read_back
    assert read_back.messages == [USER, ASSISTANT]


def test_a_system_column_may_be_parts(one: Path) -> None:
    row = read_one(one, {"system": [{"text": "Be brief."}], "messages": [USER, ASSISTANT]})
    assert row.messages[0] == {"role": "system", "content": "Be brief."}


def test_an_answer_that_is_json_is_a_text(one: Path) -> None:
    row = read_one(one, {"prompt": "List.", "completion": '[{"name": "a", "user": "b"}]'})
    assert row == Completion(Origin("one.json", 1), "List.", '[{"name": "a", "user": "b"}]')


# ── bad rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "messages is null, not a list of messages"),
        ([], "messages is empty"),
        ("hello", "messages is text, but not JSON: Expecting value at character 1"),
        ({"role": "user"}, "messages is an object, not a list of messages"),
        ("[{'role': 'user'}]", "messages is text, but not JSON, but as Python prints it: json.dumps writes"),
        ([USER], "no assistant turn"),
        ([USER, "Two."], "messages[1] is text, not a message, and not JSON"),
        ([USER, {"content": "Two."}], "messages[1].role is null, not system, user, assistant or tool"),
        ([USER, {"role": "wizard", "content": "Two."}], "messages[1].role is 'wizard', not system"),
        ([USER, {"role": "assistant"}], "messages[1].content is null"),
        ([USER, {"role": "assistant", "content": " \n"}], "messages[1].content is empty"),
        ([USER, {"role": "assistant", "content": 2}], "messages[1].content is a number, not text"),
        ([USER, {"role": "assistant", "content": "\ud83d"}], "messages[1].content is not UTF-8 at character 1"),
        ([{"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT], "messages[0].content[0] is a part of type"),
        (
            [USER, {"role": "assistant", "tool_calls": ["weather"]}],
            "messages[1].tool_calls is text, not a call, and not JSON",
        ),
        ([USER, {"from": "gpt", "value": None}], "messages[1].value is null"),
        ([{**USER, "images": ["a.jpg"]}, ASSISTANT], "messages[0].images is a picture, sound or video"),
        ([USER, {**ASSISTANT, "weight": 0}], "no assistant turn to learn"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "messages[1].weight is 0.5; a turn is learnt or not"),
        ([{**USER, "train": True}, ASSISTANT], "messages[0].train asks to learn a turn of the user"),
        ([USER, {**ASSISTANT, "train": True, "weight": 0}], "messages[1]: its marks contradict each other"),
        (
            [USER, {**ASSISTANT, "train_detail": [{"begin_offset": 0}]}],
            "messages[1].train_detail marks parts of a turn",
        ),
        (
            [{"speaker": "a", "text": "b"}],
            "messages[0].role is null, not system, user, assistant or tool; its keys are",
        ),
    ],
)
def test_a_conversation_that_cannot_be_learnt_is_bad_and_says_why(one: Path, turns: Any, reason: str) -> None:
    good = {"messages": [USER, ASSISTANT]}
    one.write_text(json.dumps([good, {"messages": turns}]), encoding="utf-8")
    _, bad = read(one)
    assert bad.origin == Origin("one.json", 2)
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"prompt": " ", "completion": "b"}, "prompt is empty"),
        ({"prompt": "a", "completion": 3}, "completion is a number, not text"),
        ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "no assistant turn to learn"),
        ({"instruction": "", "input": None, "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "output": "b", "history": "x"}, "history is text, but not JSON"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "history is not a list of [question, answer]"),
        ({"text": "  "}, "text is empty"),
        ({"text": ["a"]}, "text is a list, not text"),
        ({"instruction": "a", "output": float("nan")}, "output is null"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "tools is text, but not JSON"),
        ({"messages": [USER, ASSISTANT], "tools": [1]}, "tools is a list, not a list of objects"),
    ],
)
def test_a_row_of_wrong_values_is_bad_and_says_why(one: Path, row: dict[str, Any], reason: str) -> None:
    bad = read_one(one, row)
    assert isinstance(bad, BadRow)
    assert bad.reason.startswith(reason)


@pytest.mark.parametrize(
    "turns",
    [[ASSISTANT], [ASSISTANT, USER, ASSISTANT], [USER, USER, ASSISTANT], [USER, ASSISTANT, USER]],
)
def test_the_order_of_turns_is_left_to_the_template(one: Path, turns: list[dict[str, str]]) -> None:
    assert read_one(one, {"messages": turns}).messages == turns


def test_a_few_bad_rows_are_put_aside_with_their_place(tmp_path: Path) -> None:
    rows = text_rows(20)
    rows[4], rows[11] = {"text": ""}, {"text": None}
    gathered = gather(write_data(tmp_path / "a.jsonl", rows))
    assert [str(bad) for bad in gathered.bad] == ["a.jsonl:5: text is empty", "a.jsonl:12: text is null"]
    assert (len(gathered.rows), gathered.shapes) == (18, {"text": 18})


def test_more_bad_rows_than_the_share_stop_the_run_with_the_first_reasons(tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.jsonl", text_rows(14) + [{"text": ""}] * 6)
    with pytest.raises(DataError) as caught:
        gather(path)
    assert caught.value.message.splitlines() == [
        "6 of 20 rows cannot be trained on, at most 10% may be bad:",
        *(f"  a.jsonl:{line}: text is empty" for line in range(15, 20)),
        "  … and 1 more",
    ]
    assert len(gather(path, bad_row_share=0.3).rows) == 14


def test_a_dataset_of_bad_rows_only_is_an_error_whatever_the_share(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 2 rows cannot be trained on, none is left"):
        gather(write_data(tmp_path / "a.jsonl", [{"text": ""}, {"text": ""}]), bad_row_share=1.0)


json_values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.text(max_size=5),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(
            strategies.sampled_from(TURN_KEYS), inner | strategies.sampled_from(ROLES), max_size=4
        )
    ),
)


@given(turns=strategies.lists(json_values, max_size=3), tools=json_values)
@hypothesis_settings(max_examples=150, deadline=None)
def test_whatever_json_a_row_holds_it_is_a_row_or_a_bad_row(
    tmp_path_factory: pytest.TempPathFactory, turns: list[Any], tools: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    assert isinstance(read_one(path, {"messages": [*turns, ASSISTANT], "tools": tools}), Conversation | BadRow)


# ── shares ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def shared(tmp_path: Path, rows: int | None, weight: float | None, **changes: Any) -> Gathered:
    """Ten rows in two files of one source, and ten of another that is taken as it is."""
    share = Share("https://a.example/d", rows, weight)
    files = [
        DataFile(write_data(tmp_path / f"a{part}.jsonl", text_rows(5, first=5 * part)), f"a{part}", share=share)
        for part in (0, 1)
    ]
    files.append(DataFile(write_data(tmp_path / "b.jsonl", text_rows(10, first=10)), "b"))
    return gather_rows(files, settings(**changes), chat=False)


def taken(gathered: Gathered) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row, count in zip(gathered.rows, gathered.copies, strict=True):
        counts[row.origin.file[0]] = counts.get(row.origin.file[0], 0) + count
    return counts


@pytest.mark.parametrize(
    ("rows", "weight", "times", "not_taken", "said"),
    [
        (4, None, 4, 6, "4 of 10 rows are taken"),
        (99, None, 10, 0, "10 of 10 rows are taken"),
        (None, 0.3, 3, 7, "3 of 10 rows are taken"),
        (None, 2.0, 20, 0, "10 of 10 rows are taken, 20 times in all"),
        (None, 1.5, 15, 0, "10 of 10 rows are taken, 15 times in all"),
        (4, 2.0, 8, 6, "4 of 10 rows are taken, 8 times in all"),
    ],
)
def test_of_a_source_so_many_rows_are_taken_so_often_and_that_is_counted(
    tmp_path: Path, rows: int | None, weight: float | None, times: int, not_taken: int, said: str
) -> None:
    gathered = shared(tmp_path, rows, weight)
    assert taken(gathered) == {"a": times, "b": 10}
    assert (gathered.not_taken, gathered.good_rows) == (not_taken, 20)
    assert gathered.remarks == [f"https://a.example/d: {said}"]


def test_which_rows_of_a_source_are_taken_follows_the_seed(tmp_path: Path) -> None:
    drawn = [origins(shared(tmp_path, 4, None, shuffle_seed=seed).rows) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    in_order = origins(shared(tmp_path, 4, None, shuffle=False).rows)
    assert [str(origin) for origin in in_order[:4]] == ["a0:1", "a0:2", "a0:3", "a0:4"]


def test_a_row_that_is_trained_on_several_times_is_held_out_once() -> None:
    rows = numbered(40)
    split = split_rows(rows, settings(), copies=[3] * 40)
    assert (len(split.train), len(split.evaluation), split.duplicates, split.leaked) == (3 * 38, 2, 0, 0)
    assert not {*origins(split.train)} & {*origins(split.evaluation)}


# ── split ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def texts(*contents: str) -> list[PlainText]:
    return [PlainText(Origin("a.txt", number), content) for number, content in enumerate(contents, 1)]


def numbered(count: int) -> list[PlainText]:
    return texts(*(f"document {number}" for number in range(count)))


# Of 100 rows of one file, the 95 that are trained on: the same on every machine and Python.
GOLDEN_ORDER_OF_SEED_42 = "9b8b7550916a34eca99d09a18a555e931d3a50328542f37f80a29e80a59a28f1"


def test_the_seed_alone_decides_the_order__kaito_fault_5() -> None:
    rows = numbered(100)
    assert order_sha256(origins(split_rows(rows, settings()).train)) == GOLDEN_ORDER_OF_SEED_42
    assert order_sha256(origins(split_rows(rows, settings(shuffle_seed=43)).train)) != GOLDEN_ORDER_OF_SEED_42


def test_the_order_hash_does_not_depend_on_the_folder() -> None:
    rows = [PlainText(Origin(f"{name}.txt", number), "x") for name in "ab" for number in (1, 2)]
    moved = [PlainText(Origin(f"/mnt/data/{row.origin.file}", row.origin.row), "x") for row in rows]
    assert order_sha256(origins(moved)) == order_sha256(origins(rows))
    assert order_sha256(origins(moved[::-1])) != order_sha256(origins(rows))


@pytest.mark.parametrize(
    ("count", "train_fraction", "held_out"),
    [
        (19, None, 0),
        (20, None, 1),
        (100, None, 5),
        (20_000, None, 500),
        (100, 1.0, 0),
        (100, 0.8, 20),
        (1, 0.8, 0),
        (3, 0.1, 2),
    ],
)
def test_how_many_rows_are_held_out(count: int, train_fraction: float | None, held_out: int) -> None:
    split = split_rows(numbered(count), settings(train_fraction=train_fraction))
    assert (len(split.train), len(split.evaluation)) == (count - held_out, held_out)


def test_every_row_is_on_one_side_exactly__kaito_fault_12() -> None:
    rows = numbered(50)
    split = split_rows(rows, settings(train_fraction=0.8))
    assert sorted(row.origin.row for row in split.train + split.evaluation) == list(range(1, 51))


def test_without_shuffle_the_order_is_the_files_and_the_last_rows_are_held_out() -> None:
    rows = numbered(10)
    split = split_rows(rows, settings(shuffle=False, train_fraction=0.8))
    assert (split.train, split.evaluation) == (rows[:8], rows[8:])


def test_copies_of_a_held_out_row_are_not_trained_on() -> None:
    rows = texts("a", "twice", "b", "c", "d", "e", "f", "g", "h", "twice")
    split = split_rows(rows, settings(shuffle=False, train_fraction=0.8))
    assert [row.text for row in split.evaluation if isinstance(row, PlainText)] == ["twice", "twice"]
    assert split.duplicates == 1


def test_more_copies_than_are_held_out_are_trained_on_together() -> None:
    rows = texts("a", "b", "c", "d", "e", "f", "thrice", "thrice", "g", "thrice")
    split = split_rows(rows, settings(shuffle=False, train_fraction=0.8))
    assert [row.text for row in split.evaluation if isinstance(row, PlainText)] == ["f", "g"]
    assert split.duplicates == 2


def asked(*pairs: str) -> list[Any]:
    return [Completion(Origin("rows.jsonl", number), *pair.split()) for number, pair in enumerate(pairs, 1)]


def test_rows_with_the_same_prompt_are_on_one_side_whatever_their_answers() -> None:
    rows = asked("a 1", "twice 2", "b 3", "c 4", "d 5", "e 6", "f 7", "g 8", "h 9", "twice 10")
    split = split_rows(rows, settings(shuffle=False, train_fraction=0.8))
    assert [row.prompt for row in split.evaluation if isinstance(row, Completion)] == ["twice", "twice"]
    assert (split.duplicates, split.known_prompts) == (0, 0)


def test_where_prompts_repeat_too_often_to_keep_apart_it_is_counted() -> None:
    rows = asked(*(f"again {number}" for number in range(20)))
    split = split_rows(rows, settings(shuffle=False, train_fraction=0.8))
    assert (len(split.evaluation), split.known_prompts) == (4, 4)


@pytest.mark.parametrize(("turn", "asks_the_same"), [(0, False), (1, False), (2, False), (3, True)])
def test_a_conversations_prompt_is_all_before_its_last_answer(turn: int, asks_the_same: bool) -> None:
    roles = ("user", "assistant", "user", "assistant")
    turns = [{"role": role, "content": f"{role} {index}"} for index, role in enumerate(roles)]
    other = [message | ({"content": "other"} if index == turn else {}) for index, message in enumerate(turns)]
    one, two = (Conversation(Origin("a", number), each) for number, each in ((1, turns), (2, other)))
    rows = [*asked(*(f"{letter} {letter}" for letter in "bcdefghi")), one, two]
    split = split_rows(rows, settings(shuffle=False, train_fraction=0.9))
    # One row is wanted: two that ask the same are too many, and trained on.
    assert split.evaluation == ([rows[-3]] if asks_the_same else [two])


def test_copies_are_found_across_formats_and_split_by_content(tmp_path: Path) -> None:
    rows = message_rows(40)
    gathered = gather(write_data(tmp_path / "a.parquet", rows), write_data(tmp_path / "b.jsonl.gz", rows))
    split = split_rows(gathered.rows, settings())
    trained = {json.dumps(row.messages) for row in split.train if isinstance(row, Conversation)}
    held_out = [json.dumps(row.messages) for row in split.evaluation if isinstance(row, Conversation)]
    assert (len(held_out), split.duplicates) == (4, 40)
    assert not trained.intersection(held_out)
