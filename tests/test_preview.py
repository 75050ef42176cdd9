"""What `tuner data preview` shows is what a run would train on."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_files import completion_rows, message_rows, text_rows, write_data
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import WORDS, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tuner.errors import ConfigError, DataError, InputMissingError
from tuner.pipeline.labels import Labeller
from tuner.pipeline.prepare import prepare
from tuner.pipeline.preview import (
    BAD_ROWS_SHOWN,
    Piece,
    Preview,
    draw,
    load_preview,
    print_preview,
    token_pieces,
)
from tuner.pipeline.rows import Completion, Origin
from tuner.presets import find_preset
from tuner.request import Request, build_run
from tuner.runspec import Fetched, FetchedFile, FetchedModel, Silent
from tuner.workspace import WorkspaceFile, make_workspace

pytestmark = pytest.mark.train

PHI = "phi-3-mini-4k-instruct"


def load(
    *files: Path,
    preset: str | None = PHI,
    base_model: Path | None = None,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    rows: int = 3,
) -> Preview:
    return load_preview(files, preset, base_model, config, overrides, rows, Silent())


def printed(preview: Preview, stream: io.StringIO | None = None) -> str:
    stream = stream or io.StringIO()
    print_preview(preview, stream)
    return stream.getvalue()


def marked(text: str) -> list[str]:
    """What stands between the marks, in the rows."""
    _, _, rows = text.partition("learnt tokens look ⟦so⟧")
    return re.findall("⟦(.*?)⟧", rows, re.DOTALL)


def write_config(path: Path, **sections: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"training_config": sections}))  # JSON is YAML
    return path


def conversation(*turns: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]}


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tuner.pipeline.tiny_model import make_tiny_model

    directory = tmp_path_factory.mktemp("base")
    make_tiny_model(find_preset(PHI), WORDS, directory)
    return directory


class TestWhatIsLearnt:
    @pytest.mark.parametrize(
        ("preset", "end"),
        [(PHI, "<|end|>"), ("llama-3.1-8b-instruct", "<|eot_id|>"), ("gemma-3-1b-it", "<end_of_turn>")],
    )
    def test_of_messages_the_answer_and_its_end_of_turn_are_marked(self, tmp_path: Path, preset: str, end: str) -> None:
        text = printed(load(write_data(tmp_path / "a.parquet", message_rows(3)), preset=preset))
        assert marked(text) == [f"It is {number}.{end}" for number in (1, 2, 3)]

    def test_of_prompt_and_completion_the_completion_and_eos_are_marked(self, tmp_path: Path) -> None:
        rows = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}, as café and 数 say"} for number in (1, 2)]
        text = printed(load(write_data(tmp_path / "a.jsonl", rows)))
        assert marked(text) == [f" {number}, as café and 数 say<|endoftext|>" for number in (2, 3)]

    def test_a_first_token_that_begins_in_the_prompt_is_shown_and_warned_of(self, tmp_path: Path) -> None:
        text = printed(load(write_data(tmp_path / "a.jsonl", completion_rows(20)), rows=1))
        assert "0 + 1 =⟦ 1, as" in text
        assert re.search(r"warning: in \d+ answers the first token begins in the prompt\n", text)

    def test_of_text_everything_is_marked_but_the_first_token_which_nothing_predicts(self, tmp_path: Path) -> None:
        text = printed(load(write_data(tmp_path / "a.txt", text_rows(1))))
        assert marked(text) == [" 0: one line of text.<|endoftext|>"]

    def test_prompt_and_special_tokens_and_line_ends_are_seen(self, tmp_path: Path) -> None:
        rows = [conversation("first\nsecond", "yes")]
        assert "<|user|>↵\nfirst↵\nsecond<|end|>↵\n<|assistant|>↵\n⟦yes<|end|>⟧↵\n" in printed(
            load(write_data(tmp_path / "a.jsonl", rows))
        )

    def test_on_a_terminal_the_same_runs_are_green_and_nothing_else_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        preview = load(write_data(tmp_path / "a.jsonl", [conversation("q", "one\ntwo", "r", "three")]))
        _, _, row = printed(preview, Terminal()).partition("tokens, ")
        styled = re.findall("\x1b\\[([0-9;]+)m(.*?)\x1b\\[0m", row)
        green = [text for style, text in styled if style in ("7;32", "1;7;32")]
        assert green == ["so", "one↵", "two", "<|end|>", "three", "<|end|>"]
        assert "⟦" not in row

    def test_counts_are_those_of_the_prepare_stage(self, tmp_path: Path, base_model: Path) -> None:
        path = write_data(tmp_path / "a.parquet", [*message_rows(40), {"messages": []}])
        spec = build_run(
            WorkspaceFile(workspace=make_workspace(PHI, [str(path)], str(tmp_path / "out"))),
            Request(base_model=base_model),
            tmp_path,
            {},
        ).spec
        fetched = Fetched(
            run_digest=spec.digest,
            files=(FetchedFile(source="a", path=str(path), sha256="", size_bytes=1),),
            base_model=FetchedModel(path=str(base_model), digest=""),
        )
        prepared = prepare(spec, fetched, tmp_path, Silent())
        preview = load(path, base_model=base_model)
        splits = [split for split in (prepared.train, prepared.evaluation) if split]
        assert len(splits) == 2
        assert preview.trained_tokens == sum(split.tokens for split in splits)
        assert preview.learnt_tokens == sum(split.supervised_tokens for split in splits)
        assert preview.counts.texts == sum(split.rows for split in splits)
        assert preview.counts.longest == max(split.longest for split in splits)
        assert (preview.bad_rows, preview.max_length) == (prepared.bad_rows, prepared.max_length)


# ── pieces ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def sentence_piece_tokenizer() -> Any:
    """As Llama 2 and Phi-3 have it: ▁ for spaces, bytes for what is unknown, BOS in front."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        WORDS, trainers.BpeTrainer(special_tokens=["<s>", "</s>", "<unk>"], show_progress=False)
    )
    written = json.loads(tokenizer.to_str())
    vocabulary = written["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    written["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(written))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def trimming_tokenizer() -> Any:
    """As GPT-2 has it: a token's offsets leave out the space that it begins with."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def labellers() -> list[Labeller]:
    return [Labeller(make) for make in (tiny_tokenizer(PHI), sentence_piece_tokenizer(), trimming_tokenizer())]


def pieces_of(labeller: Labeller, prompt: str, completion: str) -> list[Piece]:
    examples = labeller.examples(Completion(Origin("a", 1), prompt, completion))
    assert isinstance(examples, list)
    return token_pieces(labeller, examples[0])


class TestPieces:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
    @given(prompt=st.text(min_size=1, max_size=30), completion=st.text(min_size=1, max_size=30))
    def test_every_character_stands_once_and_every_token_counts_once(
        self, labellers: list[Labeller], prompt: str, completion: str
    ) -> None:
        for labeller in labellers:
            examples = labeller.examples(Completion(Origin("a", 1), prompt, completion))
            assert isinstance(examples, list)
            (tokens,) = labeller.tokenize(examples)
            pieces = token_pieces(labeller, examples[0])
            text = "".join(piece.text for piece in pieces)
            assert text.removeprefix("<s>").removesuffix(labeller.tokenizer.eos_token) == prompt + completion
            assert sum(piece.tokens for piece in pieces) == len(tokens.input_ids)
            assert sum(piece.tokens for piece in pieces if piece.learnt) == tokens.supervised.sum()

    def test_spaces_go_with_the_token_that_they_begin(self, labellers: list[Labeller]) -> None:
        for labeller in labellers:
            text = draw(pieces_of(labeller, "What is 2 + 2?", " It is 4."), marks=True).plain
            assert text.endswith(f"What is 2 + 2?⟦ It is 4.{labeller.tokenizer.eos_token}⟧")

    def test_a_begin_token_that_the_tokenizer_adds_is_seen(self, labellers: list[Labeller]) -> None:
        assert draw(pieces_of(labellers[1], "What", " is"), marks=True).plain == "<s>What⟦ is</s>⟧"

    def test_an_emoji_of_several_tokens_stands_once(self, labellers: list[Labeller]) -> None:
        for labeller in labellers:
            assert "⟦🦜" in draw(pieces_of(labeller, "bird:", "🦜"), marks=True).plain

    def test_control_characters_do_not_reach_the_terminal(self) -> None:
        text = draw([Piece("\x1b[31m\r\x9b\u202e\t", learnt=False, special=False)], marks=True).plain
        assert text == "␛[31m␍\\u009b\\u202e⇥"

    def test_of_a_long_text_every_boundary_stays_and_the_missing_tokens_are_counted(self) -> None:
        runs = [[Piece(f" {name}{number}", learnt, special=False) for number in range(3000)]
                for name, learnt in (("a", False), ("b", True), ("c", False))]  # fmt: skip
        text = draw([piece for run in runs for piece in run], marks=True).plain
        assert len(text) < 5000
        assert text.startswith(" a0 a1")
        assert " a2999⟦ b0 " in text
        assert " b2999⟧ c0 " in text
        assert text.endswith(" c2999")
        hidden = [int(count.replace(",", "")) for count in re.findall("… ([0-9,]+) tokens …", text)]
        assert len(hidden) == 3
        assert sum(hidden) + len(re.findall("[abc][0-9]+", text)) == 9000

    def test_a_text_of_ordinary_length_is_whole(self) -> None:
        assert "…" not in draw([Piece(" word", learnt=True, special=False)] * 700, marks=True).plain


# ── the summary ──────────────────────────────────────────────────────────────────────────────────────────────────────


class TestSummary:
    def test_says_of_each_file_its_shape_and_how_many_rows_are_bad(self, tmp_path: Path) -> None:
        one = write_data(tmp_path / "one.jsonl", [*message_rows(3), {"messages": []}])
        two = write_data(tmp_path / "two.parquet", completion_rows(2))
        text = printed(load(one, two))
        assert f"{one}: messages, 4 rows, 1 bad\n{two}: prompt/completion, 2 rows, none bad\n" in text

    def test_bad_rows_stand_with_file_row_and_reason(self, tmp_path: Path) -> None:
        path = write_data(tmp_path / "a.jsonl", [*message_rows(20), conversation("only a question")])
        assert f"  {path}:21: no assistant turn\n" in printed(load(path))

    def test_rows_that_the_chat_template_does_not_serve_are_bad_too(self, tmp_path: Path) -> None:
        path = write_data(tmp_path / "a.jsonl", [*message_rows(1), conversation("q", "an <|end|> inside")])
        text = printed(load(path))
        assert "messages, 2 rows, 1 bad" in text
        assert f"{path}:2: message 2: its content has the end-of-turn token <|end|>" in text

    def test_of_many_bad_rows_the_first_are_listed_and_a_run_would_stop(self, tmp_path: Path) -> None:
        path = write_data(tmp_path / "a.jsonl", [*message_rows(1), *[{"messages": []}] * 30])
        preview = load(path)
        text = printed(preview)
        assert text.count("messages is empty") == BAD_ROWS_SHOWN
        assert "… and 20 more" in text
        assert preview.stops == ("more than 10% of the rows are bad (DatasetConfig.bad_row_share)",)

    def test_the_first_rows_of_each_file_are_shown(self, tmp_path: Path) -> None:
        files = [write_data(tmp_path / f"{name}.jsonl", completion_rows(5)) for name in "ab"]
        preview = load(*files, rows=4)
        assert [shown.title for shown in preview.shown] == [f"{file}:{row}" for file in files for row in (1, 2)]

    def test_no_row_is_shown_when_none_is_asked_for(self, tmp_path: Path) -> None:
        assert load(write_data(tmp_path / "a.jsonl", completion_rows(5)), rows=0).shown == ()

    def test_says_that_a_tokenizer_of_ours_counts_roughly(self, tmp_path: Path, base_model: Path) -> None:
        path = write_data(tmp_path / "a.jsonl", message_rows(2))
        assert "only a rough guide" in load(path).tokenizer
        assert load(path, base_model=base_model).tokenizer == f"that of {base_model}; chat template: its own"

    def test_says_that_the_chat_template_of_a_preset_is_a_copy(self, tmp_path: Path) -> None:
        described = load(write_data(tmp_path / "a.jsonl", message_rows(2))).tokenizer
        assert described.endswith(f"chat template: our copy of that of {PHI}; a run takes the model's own")

    def test_counts_are_nearest_ranks(self, tmp_path: Path, base_model: Path) -> None:
        path = write_data(tmp_path / "a.txt", [{"text": "a" * (2 * number)} for number in range(1, 21)])
        counts = load(path, base_model=base_model).counts
        lengths = sorted(
            len(
                load(write_data(tmp_path / "b.txt", [{"text": "a" * (2 * number)}]), base_model=base_model)
                .shown[0]
                .pieces
            )
            for number in (1, 10, 19, 20)
        )
        assert [counts.shortest, counts.median, counts.percentile_95, counts.longest] == lengths


class TestFolders:
    def test_of_a_directory_the_files_are_shown_that_a_run_would_read(self, tmp_path: Path) -> None:
        for name in ("train.jsonl", "test.jsonl", "README.md"):
            write_data(tmp_path / "rows.jsonl", message_rows(3)).rename(tmp_path / name)
        assert [file.source for file in load(tmp_path).files] == [str(tmp_path / "train.jsonl")]

    def test_an_empty_directory_is_a_missing_input(self, tmp_path: Path) -> None:
        with pytest.raises(InputMissingError, match="no data file in it"):
            load(tmp_path)


class TestConfig:
    def test_messages_column_is_honoured(self, tmp_path: Path) -> None:
        path = write_data(tmp_path / "a.jsonl", [{"chat": conversation("q", "yes")["messages"], "messages": "no"}])
        config = write_config(tmp_path / "c.yaml", DatasetConfig={"messages_column": "chat"})
        text = printed(load(path, config=config))
        assert "a.jsonl: chat, 1 row, none bad" in text
        assert marked(text) == ["yes<|end|>"]

    def test_a_chat_template_in_a_file_beside_the_config_is_used(self, tmp_path: Path, base_model: Path) -> None:
        (tmp_path / "chat.jinja").write_text(
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        config = write_config(tmp_path / "c.yaml", ModelConfig={"chat_template": "chat.jinja"})
        path = write_data(tmp_path / "a.jsonl", [conversation("q", "yes")])
        for base in (None, base_model):
            preview = load(path, config=config, base_model=base)
            assert "[user]q<|end|>[assistant]⟦yes<|end|>⟧" in printed(preview)
            assert "chat template: ModelConfig.chat_template" in preview.tokenizer

    def test_a_setting_that_is_typed_wins_and_names_files_of_the_directory_that_one_is_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder").mkdir()
        (tmp_path / "chat.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}")
        config = write_config(tmp_path / "folder/c.yaml", ModelConfig={"chat_template": "nope.jinja"})
        path = write_data(tmp_path / "a.jsonl", [conversation("q", "yes")])
        preview = load(path, config=config, overrides=["ModelConfig.chat_template=chat.jinja"])
        assert "<user>q<|end|>" in printed(preview)

    def test_dataset_path_leaves_other_files_out(self, tmp_path: Path) -> None:
        one, two = (write_data(tmp_path / f"{name}.jsonl", completion_rows(2)) for name in ("one", "two"))
        config = write_config(tmp_path / "c.yaml", DatasetConfig={"dataset_path": "two.jsonl"})
        preview = load(one, two, config=config)
        assert f"{one}: left out by DatasetConfig.dataset_path" in printed(preview)
        assert [shown.title for shown in preview.shown] == [f"{two}:1", f"{two}:2"]

    def test_rows_longer_than_max_length_are_counted_and_said(self, tmp_path: Path, base_model: Path) -> None:
        path = write_data(tmp_path / "a.txt", [{"text": "short"}, {"text": "long " * 100}])
        config = write_config(tmp_path / "c.yaml", TrainingArguments={"max_length": 20})
        preview = load(path, config=config, base_model=base_model)
        text = printed(preview)
        assert "1 of 2 longer than max_length 20 (over_length: drop)" in text
        assert re.search(r"a\.txt:2 · (\d+) tokens, \d+ learnt · longer than max_length 20: left out\n", text)
        assert preview.stops == ("more than 10% of the rows are longer than max_length (DatasetConfig.over_length)",)

    def test_what_is_cut_off_is_not_learnt(self, tmp_path: Path, base_model: Path) -> None:
        path = write_data(tmp_path / "a.txt", [{"text": "long " * 100}])
        config = write_config(
            tmp_path / "c.yaml",
            TrainingArguments={"max_length": 20},
            DatasetConfig={"over_length": "truncate"},
        )
        preview = load(path, config=config, base_model=base_model)
        (shown,) = preview.shown
        assert [piece.learnt for piece in shown.pieces] == [False] + [True] * 19 + [False] * (len(shown.pieces) - 20)
        assert (preview.learnt_tokens, preview.trained_tokens) == (19, 20)

    def test_the_context_of_the_base_model_bounds_max_length(self, tmp_path: Path, base_model: Path) -> None:
        path = write_data(tmp_path / "a.txt", text_rows(1))
        assert load(path, preset="phi-3-mini-128k-instruct").max_length == 8192
        assert load(path, preset="phi-3-mini-128k-instruct", base_model=base_model).max_length == 4096


class TestBadInput:
    def test_names_all_files_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputMissingError, match=r"one\.jsonl: not there; .*two\.jsonl: not there"):
            load(tmp_path / "one.jsonl", tmp_path / "two.jsonl")

    def test_names_the_column_that_is_not_there(self, tmp_path: Path) -> None:
        path = write_data(tmp_path / "a.jsonl", message_rows(1))
        config = write_config(tmp_path / "c.yaml", DatasetConfig={"messages_column": "message"})
        with pytest.raises(DataError, match="no column 'message'; the file has messages") as caught:
            load(path, config=config)
        assert caught.value.hint == 'did you mean "messages"?'

    def test_says_why_when_every_row_is_bad(self, tmp_path: Path) -> None:
        path = write_data(tmp_path / "a.jsonl", [{"messages": []}] * 3)
        with pytest.raises(DataError, match=r"none of 3 rows can be trained on:\n.*a\.jsonl:1: messages is empty"):
            load(path)

    def test_says_why_when_the_chat_template_serves_no_row(self, tmp_path: Path) -> None:
        path = write_data(tmp_path / "a.jsonl", [conversation("q", "an <|end|> inside")])
        with pytest.raises(DataError, match=r"serves no row: .*a\.jsonl:1: message 2"):
            load(path)

    def test_names_a_preset_that_is_near(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no preset 'phi-3-mini-4k-instuct', did you mean"):
            load(write_data(tmp_path / "a.txt", text_rows(1)), preset="phi-3-mini-4k-instuct")

    def test_names_a_config_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputMissingError, match=r"--config .*c\.yaml: cannot be read"):
            load(write_data(tmp_path / "a.txt", text_rows(1)), config=tmp_path / "c.yaml")

    def test_names_a_chat_template_file_that_is_not_there(self, tmp_path: Path) -> None:
        config = write_config(tmp_path / "c.yaml", ModelConfig={"chat_template": "chat.jinja"})
        with pytest.raises(InputMissingError, match=r"chat\.jinja' is no Jinja template, .* cannot be read"):
            load(write_data(tmp_path / "a.txt", text_rows(1)), config=config)

    def test_names_a_base_model_without_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(ConfigError, match="no tokenizer that transformers can load"):
            load(write_data(tmp_path / "a.txt", text_rows(1)), base_model=tmp_path)
