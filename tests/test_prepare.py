"""Fetched files → token rows: every row that is not trained on is counted and listed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from data_files import write_data
from tiny import Heard, make_job, prepared_job, rows_of, tiny_base

from tuner.errors import ConfigError, DataError
from tuner.pipeline.adapter import file_digests
from tuner.pipeline.chat_template import FALLBACK_CHAT_TEMPLATE
from tuner.runspec import Prepared

pytestmark = pytest.mark.train


def long_row(words: int = 400) -> dict[str, Any]:
    turns = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "one more " * words}]
    return {"messages": turns}


def prepared(
    directory: Path, rows: Any, config: Any = None, reporter: Heard | None = None, **request: Any
) -> tuple[Prepared, Path]:
    job = make_job(directory, rows, config or {}, **request)
    return prepared_job(job, reporter)[1], job.work_dir


def problems(result: Prepared, work_dir: Path) -> list[dict[str, Any]]:
    assert result.problems_file
    return [json.loads(line) for line in (work_dir / result.problems_file).read_text().splitlines()]


def tokens_of(result: Prepared, work_dir: Path) -> list[dict[str, list[int]]]:
    from datasets import Dataset

    return [dict(row) for row in Dataset.from_file(str(work_dir / result.train.path))]


# ── a smoke run ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_smoke_run_says_which_part_of_the_rows_it_takes(tmp_path: Path) -> None:
    heard = Heard()
    result, _ = prepared(tmp_path, rows_of("messages", 120), reporter=heard, smoke=True)
    assert (result.rows_read, result.train.rows, result.eval_rows, result.smoke_unused_rows) == (120, 64, 6, 50)
    said = "a smoke run takes 64 of the 114 training rows and 6 of the 6 held-out ones"
    assert [line for line in heard.notes if line.startswith(said)]


def test_a_smoke_run_of_few_rows_takes_them_all_and_says_nothing(tmp_path: Path) -> None:
    heard = Heard()
    result, _ = prepared(tmp_path, rows_of("messages", 40), reporter=heard, smoke=True)
    assert (result.train.rows + result.eval_rows, result.smoke_unused_rows) == (40, 0)
    assert not [line for line in heard.notes if "smoke run takes" in line]


def test_a_smoke_run_says_that_its_chat_template_is_a_copy(tmp_path: Path) -> None:
    said = "the chat template is our copy of that of phi-3-mini-4k-instruct; a run takes the model's own"
    mine = {"ModelConfig": {"chat_template": FALLBACK_CHAT_TEMPLATE}}
    for count, (shape, config) in ((1, ("messages", {})), (0, ("messages", mine)), (0, ("text", {}))):
        heard = Heard()
        prepared(tmp_path / shape / str(count), rows_of(shape, 40), config, reporter=heard, smoke=True)
        assert heard.notes.count(said) == count


# ── what evaluating costs ────────────────────────────────────────────────────────────────────────────────────────────


def split_at(fraction: float, **arguments: Any) -> dict[str, Any]:
    return {"DatasetConfig": {"train_test_split": fraction}, "TrainingArguments": arguments}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (split_at(0.5, num_train_epochs=1), "evaluating 60 held-out rows 2 times costs about 8"),
        (split_at(0.9, num_train_epochs=1), None),
        (split_at(0.9, num_train_epochs=1, eval_steps=1), "evaluating 12 held-out rows 8 times costs about 3"),
        (split_at(0.8), None),
        (split_at(1), None),
        ({}, None),
    ],
)
def test_what_evaluating_costs_is_said_where_it_is_much(
    tmp_path: Path, config: dict[str, Any], said: str | None
) -> None:
    heard = Heard()
    job = make_job(tmp_path, rows_of("messages", 120), config)
    prepared_job(job, heard)
    found = [line for line in heard.warnings if line.startswith("evaluating")]
    assert bool(found) is bool(said)
    assert all(line.startswith(str(said)) for line in found)
    assert all("a larger TrainingArguments.eval_steps evaluates less often" in line for line in found)
    prepared_job(job, heard)  # of token files that were there already it is said too
    assert len([line for line in heard.warnings if line.startswith("evaluating")]) == 2 * len(found)


def test_of_many_held_out_rows_it_is_said_what_would_hold_out_as_many_as_by_default(tmp_path: Path) -> None:
    heard = Heard()
    prepared(tmp_path, rows_of("messages", 1100), split_at(0.5, num_train_epochs=1), reporter=heard)
    assert any("DatasetConfig.train_test_split: 0.5455 holds out 500, a larger" in line for line in heard.warnings)


# ── rows that are too long ───────────────────────────────────────────────────────────────────────────────────────────

LIMIT = {"TrainingArguments": {"max_length": 100}}


def test_over_length_rows_are_dropped_counted_and_listed(tmp_path: Path) -> None:
    heard = Heard()
    result, work_dir = prepared(tmp_path, [*rows_of("messages", 30), long_row()], LIMIT, heard)
    assert (result.rows_read, result.over_length_rows, result.truncated_rows) == (31, 1, 0)
    assert result.train.rows + result.evaluation.rows == 30  # type: ignore[union-attr]
    assert result.train.longest <= 100
    (listed,) = problems(result, work_dir)
    assert listed["row"] == 31
    assert "more than the 100 of max_length" in listed["reason"]
    assert result.problems[0].row == 31
    assert any("1 longer than 100 tokens" in line for line in heard.warnings)


def test_over_length_rows_are_cut_counted_and_listed_when_asked(tmp_path: Path) -> None:
    """KAITO fault 13: they are cut at 1,024 tokens in silence."""
    config = LIMIT | {"DatasetConfig": {"over_length": "truncate", "train_test_split": 1}}
    heard = Heard()
    result, work_dir = prepared(tmp_path, [*rows_of("messages", 30), long_row()], config, heard)
    assert (result.over_length_rows, result.truncated_rows) == (0, 1)
    assert (result.train.rows, result.train.longest) == (31, 100)
    assert len(problems(result, work_dir)) == 1
    assert any("cut to 100 tokens: 1 rows" in line for line in heard.warnings)


def test_an_over_length_row_stops_the_run_when_asked(tmp_path: Path) -> None:
    config = LIMIT | {"DatasetConfig": {"over_length": "error"}}
    with pytest.raises(DataError, match=r"train\.parquet:31: [\d,]+ tokens, more than the 100"):
        prepared(tmp_path, [*rows_of("messages", 30), long_row()], config)


@pytest.mark.parametrize(("long_rows", "stops"), [(3, False), (4, True)])
def test_more_than_a_tenth_too_long_stops_the_run(long_rows: int, stops: bool, tmp_path: Path) -> None:
    rows = [*rows_of("messages", 30 - long_rows), *(long_row(400 + number) for number in range(long_rows))]
    if stops:
        with pytest.raises(DataError, match=r"4 of 30 rows \(13%\) are longer than 100 tokens"):
            prepared(tmp_path, rows, LIMIT)
    else:
        assert prepared(tmp_path, rows, LIMIT)[0].over_length_rows == 3


def test_a_row_of_many_turns_counts_once_however_many_examples_it_makes(tmp_path: Path) -> None:
    """Qwen3's template makes an example of every turn; three rows of five long turns are three rows."""
    from importlib.resources import files

    template = (files("trl") / "chat_templates" / "qwen3.jinja").read_text("utf-8")
    turns = [
        {"role": "user", "content": "More."},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n" + "one more " * 300},
    ]
    rows = [*rows_of("messages", 30), {"messages": turns * 5}]
    result, _ = prepared(tmp_path, rows, LIMIT | {"ModelConfig": {"chat_template": template}}, preset="qwen3-0.6b")
    assert result.over_length_rows == 1


def test_max_length_unwritten_is_at_most_8192_and_the_models_context(tmp_path: Path) -> None:
    assert prepared(tmp_path / "4k", rows_of("text", 24))[0].max_length == 4096
    other = prepared(tmp_path / "128k", rows_of("text", 24), preset="phi-3-mini-128k-instruct")
    assert other[0].max_length == 8192


def test_more_than_the_context_is_warned_about(tmp_path: Path) -> None:
    heard = Heard()
    prepared(tmp_path, rows_of("text", 24), {"TrainingArguments": {"max_length": 5000}}, heard)
    assert any("5,000 is more than the 4,096" in line for line in heard.warnings)


def test_a_token_that_the_model_has_no_embedding_of_stops_the_run(tmp_path: Path) -> None:
    """It would end training on a GPU without a word of why."""
    base = Path(shutil.copytree(tiny_base(), tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    result, work_dir = prepared(tmp_path / "whole", rows_of("messages", 24), base_model=base)
    largest = max(max(row["input_ids"]) for row in tokens_of(result, work_dir))
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": largest}))
    with pytest.raises(ConfigError, match=f"token {largest:,}, and its config.json has a vocab_size of {largest:,}"):
        prepared(tmp_path / "short", rows_of("messages", 24), base_model=base)


# ── rows that teach nothing ──────────────────────────────────────────────────────────────────────────────────────────

NO_TOOLS = (
    "{% for m in messages %}{% if 'pig' in m.content %}{{ raise_exception('no pigs') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_rows_that_the_template_refuses_are_counted_and_listed(tmp_path: Path) -> None:
    config = {"ModelConfig": {"chat_template": NO_TOOLS}, "DatasetConfig": {"bad_row_share": 0.2}}
    result, work_dir = prepared(tmp_path, rows_of("messages", 40), config)  # every tenth is about a pig
    assert result.bad_rows == 4
    assert sorted(problem["row"] for problem in problems(result, work_dir)) == [8, 18, 28, 38]
    assert all("no pigs" in problem["reason"] for problem in problems(result, work_dir))
    assert result.train.rows + result.evaluation.rows == 36  # type: ignore[union-attr]


def test_too_many_rows_that_the_template_refuses_stop_the_run(tmp_path: Path) -> None:
    config = {"ModelConfig": {"chat_template": NO_TOOLS}, "DatasetConfig": {"bad_row_share": 0.05}}
    with pytest.raises(DataError, match=r"the chat template serves 36 of 40 rows: .*no pigs") as caught:
        prepared(tmp_path, rows_of("messages", 40), config)
    assert "problems.jsonl" in str(caught.value.hint)


def test_rows_with_nothing_left_to_learn_are_counted_and_listed(tmp_path: Path) -> None:
    config = LIMIT | {"DatasetConfig": {"over_length": "truncate", "train_test_split": 1}}
    question = {"messages": [{"role": "user", "content": "long " * 400}, {"role": "assistant", "content": "Yes."}]}
    result, work_dir = prepared(tmp_path, [*rows_of("messages", 30), question], config)
    assert (result.truncated_rows, result.unsupervised_rows, result.train.rows) == (1, 1, 30)
    assert [problem["reason"] for problem in problems(result, work_dir)][-1] == "no token of it is learnt"


SHARD_TEMPLATE = {"ModelConfig": {"chat_template": NO_TOOLS}}


def sharded(directory: Path, bad_of_ten: int) -> Path:
    """Six shards of ten rows, in each of which the template refuses the first ones: the same numbers in all of them."""
    (directory / "d").mkdir(parents=True)
    for shard in range(6):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{'pig' if row < bad_of_ten else 'cow'} {shard}.{row}"},
                    {"role": "assistant", "content": "Yes."},
                ]
            }
            for row in range(10)
        ]
        write_data(directory / "d" / f"part-{shard}.jsonl", rows)
    return directory / "d"


def test_bad_rows_of_several_files_of_a_directory_are_all_counted_each_with_its_file(tmp_path: Path) -> None:
    data = sharded(tmp_path, 1)
    config = SHARD_TEMPLATE | {"DatasetConfig": {"bad_row_share": 0.2}}
    result, work_dir = prepared(tmp_path, data, config)
    assert result.bad_rows == 6
    assert sorted((problem["file"], problem["row"]) for problem in problems(result, work_dir)) == [
        (str(data / f"part-{shard}.jsonl"), 1) for shard in range(6)
    ]


def test_the_limit_of_bad_rows_counts_those_of_all_files_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the chat template serves 36 of 60 rows"):
        prepared(tmp_path, sharded(tmp_path, 4), SHARD_TEMPLATE)


def test_a_file_that_is_given_twice_has_its_bad_rows_counted_twice(tmp_path: Path) -> None:
    shard = sharded(tmp_path, 1) / "part-0.jsonl"
    result, _ = prepared(tmp_path, [shard, shard], SHARD_TEMPLATE)
    assert (result.rows_read, result.bad_rows) == (20, 2)


def test_a_run_with_nothing_to_learn_stops(tmp_path: Path) -> None:
    config = {"TrainingArguments": {"max_length": 4}, "DatasetConfig": {"over_length": "truncate"}}
    with pytest.raises(DataError, match="no row has a token to learn"):
        prepared(tmp_path, rows_of("messages", 24), config)


# ── what is evaluated ────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_own_validation_file_is_what_is_evaluated_and_its_leaks_are_warned_of(tmp_path: Path) -> None:
    train = write_data(tmp_path / "rows.jsonl", rows_of("messages", 30))
    own = write_data(tmp_path / "own.jsonl", rows_of("messages", 6, first=28))
    heard = Heard()
    result, _ = prepared(tmp_path, [train, Path(f"{own}#use=validation")], reporter=heard)
    assert (result.train.rows, result.eval_rows, result.has_validation_split) == (30, 6, True)
    assert any("2 of 6 validation rows are trained on word for word" in line for line in heard.warnings)


def test_the_validation_split_of_a_directory_is_what_is_evaluated(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for name, first, count in (("train", 0, 30), ("validation", 30, 4), ("test", 40, 9)):
        write_data(tmp_path / "d" / f"{name}-00000-of-00001.parquet", rows_of("messages", count, first=first))
    result, _ = prepared(tmp_path, tmp_path / "d")
    assert (result.rows_read, result.train.rows, result.eval_rows) == (34, 30, 4)


def test_of_a_source_as_many_rows_are_trained_on_as_it_says(tmp_path: Path) -> None:
    path = write_data(tmp_path / "rows.jsonl", rows_of("messages", 30))
    heard = Heard()
    result, _ = prepared(tmp_path, Path(f"{path}#rows=10"), reporter=heard)
    assert (result.rows_read, result.train.rows, result.eval_rows, result.rows_not_taken) == (30, 10, 0, 20)
    assert f"{path}: 10 of 30 rows are taken" in heard.notes


# ── what is said of columns ──────────────────────────────────────────────────────────────────────────────────────────


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    heard = Heard()
    prepared(tmp_path, [row | {"topic": "animals"} for row in rows_of("messages", 24)], reporter=heard)
    assert "columns not read: topic (24 rows)" in heard.notes


@pytest.mark.parametrize(("raw", "shown"), [({}, True), ({"raw_text": True}, False)])
def test_named_columns_are_trained_with_the_models_chat_template_unless_raw_text_is_asked_for(
    tmp_path: Path, raw: dict[str, Any], shown: bool
) -> None:
    from transformers import AutoTokenizer

    rows = [{"mail": f"How many {number}?", "reply": "Two."} for number in range(24)]
    config = {"DatasetConfig": {"context_column": "mail", "response_column": "reply", **raw}}
    result, work_dir = prepared(tmp_path, rows, config)
    tokenizer = AutoTokenizer.from_pretrained(work_dir / result.tokenizer_dir)
    text = tokenizer.decode(tokens_of(result, work_dir)[0]["input_ids"])
    assert ("<|user|>" in text) is shown
    assert "Two." in text


# ── which chat template ──────────────────────────────────────────────────────────────────────────────────────────────


def used_template(result: Prepared, work_dir: Path) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(work_dir / result.tokenizer_dir).chat_template)


def base_with_template(directory: Path, template: str | None) -> Path:
    import shutil

    base = directory / "base"
    shutil.copytree(tiny_base(), base)
    (base / "chat_template.jinja").unlink()
    if template:
        (base / "chat_template.jinja").write_text(template)
    return base


MINE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TOKENIZERS = MINE.replace("[", "(").replace("]", ")")


def test_the_users_template_goes_before_the_tokenizers(tmp_path: Path) -> None:
    base = base_with_template(tmp_path, TOKENIZERS)
    config = {"ModelConfig": {"chat_template": MINE}}
    assert used_template(*prepared(tmp_path, rows_of("messages", 24), config, base_model=base)) == MINE


def test_the_tokenizers_template_goes_before_the_presets(tmp_path: Path) -> None:
    base = base_with_template(tmp_path, TOKENIZERS)
    assert used_template(*prepared(tmp_path, rows_of("messages", 24), base_model=base)) == TOKENIZERS


def test_the_presets_template_serves_a_tokenizer_without_one(tmp_path: Path) -> None:
    from tuner.presets import find_preset

    base = base_with_template(tmp_path, None)
    used = used_template(*prepared(tmp_path, rows_of("messages", 24), base_model=base))
    assert used == find_preset("phi-3-mini-4k-instruct").chat_template


def test_a_model_that_nothing_is_known_of_gets_the_fallback(tmp_path: Path) -> None:
    base = base_with_template(tmp_path, None)
    result = prepared(tmp_path, rows_of("messages", 24), base_model=base, preset="somebody/some-model")
    assert used_template(*result) == FALLBACK_CHAT_TEMPLATE


# ── what is left for the next stage ──────────────────────────────────────────────────────────────────────────────────


def test_a_second_run_leaves_equal_files_and_nothing_of_the_first(tmp_path: Path) -> None:
    job = make_job(tmp_path, [*rows_of("messages", 30), long_row()], LIMIT)
    first = prepared_job(job)[1]
    before = file_digests(job.work_dir / "prepared") | file_digests(job.work_dir / "prepared" / "tokenizer")
    (job.work_dir / "prepared" / "tokenizer" / "left-behind.json").write_text("{}")
    second = prepared_job(job)[1]
    after = file_digests(job.work_dir / "prepared") | file_digests(job.work_dir / "prepared" / "tokenizer")
    assert first == second
    assert before == after
    assert len(before) >= 5


def test_prepared_json_says_the_same_as_what_was_returned(tmp_path: Path) -> None:
    result, work_dir = prepared(tmp_path, rows_of("prompt/completion", 30))
    assert Prepared.load(work_dir / "prepared.json") == result


def test_counts_are_those_of_the_files(tmp_path: Path) -> None:
    result, work_dir = prepared(tmp_path, rows_of("prompt/completion", 30))
    rows = tokens_of(result, work_dir)
    assert result.train.rows == len(rows) == 28
    assert result.train.tokens == sum(len(row["input_ids"]) for row in rows)
    assert result.train.supervised_tokens == sum(label != -100 for row in rows for label in row["labels"])
    assert result.train.longest == max(len(row["input_ids"]) for row in rows)
    assert result.shapes == {"prompt/completion": 30}


def test_the_order_follows_the_seed(tmp_path: Path) -> None:
    """KAITO fault 5: shuffle_seed is not used for the shuffle, and every run differs."""
    orders = {
        (seed, copy): prepared(
            tmp_path / f"{seed}-{copy}", rows_of("text", 30), {"DatasetConfig": {"shuffle_seed": seed}}
        )[0].train.order_sha256
        for seed in (1, 2)
        for copy in (1, 2)
    }
    assert orders[1, 1] == orders[1, 2] != orders[2, 1] == orders[2, 2]


# ── the same again ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_equal_rows_tokenizer_and_settings_are_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tuner.pipeline import prepare as stage

    first_heard, heard = Heard(), Heard()
    config = LIMIT | {"TrainingArguments": {"max_length": 100, "learning_rate": 1e-4}}
    first, work_dir = prepared(tmp_path, [*rows_of("messages", 30), long_row()], config, first_heard)
    monkeypatch.setattr(stage, "Labeller", lambda *_: pytest.fail("tokenized again"))
    config = LIMIT | {"TrainingArguments": {"max_length": 100, "learning_rate": 2e-4}}  # another run, the same tokens
    again, _ = prepared(tmp_path, [*rows_of("messages", 30), long_row()], config, heard)
    assert again.run_digest != first.run_digest
    assert again.model_copy(update={"run_digest": first.run_digest}) == first
    assert Prepared.load(work_dir / "prepared.json") == again
    assert heard.warnings == first_heard.warnings  # what is left out is shown each time
    assert heard.notes[:-1] == first_heard.notes


@pytest.mark.parametrize("change", ["rows", "max_length", "template", "damage", "base", "code"])
def test_anything_that_tokens_depend_on_makes_them_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, work_dir = prepared(tmp_path, rows_of("messages", 30))
    rows, config, request = rows_of("messages", 30), {}, {}
    match change:
        case "rows":
            rows = rows_of("messages", 30, first=1)
        case "max_length":
            config = LIMIT
        case "template":
            config = {"ModelConfig": {"chat_template": FALLBACK_CHAT_TEMPLATE}}
        case "damage":
            path = work_dir / first.train.path
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        case "base":
            request = {"base_model": tiny_base("qwen3-4b"), "preset": "qwen3-4b"}
        case "code":
            request = {"trust_remote_code": True}  # a repository's own tokenizer may see other tokens
    heard = Heard()
    prepared(tmp_path, rows, config, heard, **request)
    assert not any("there already" in line for line in heard.notes)
