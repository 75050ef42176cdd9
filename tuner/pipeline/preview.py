"""What a run would make of data files, before there is one: shapes, bad rows, token counts, and what is learnt.

    files ─ rows ─ texts ─ tokens ──► Preview ──► a terminal (learnt tokens in colour) or a file (⟦learnt⟧)

Rows, labels and limits come from the functions that the prepare stage calls, so what is shown is what is trained on.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from tuner.errors import ConfigError, DataError, InputMissingError
from tuner.folder import read_folder
from tuner.pipeline.chat_template import fallback_chat_template, stop_tokens
from tuner.pipeline.dataset import FileRows as ReadFile
from tuner.pipeline.dataset import remarks_on, selected
from tuner.pipeline.labels import Example, Labeller
from tuner.pipeline.libraries import check_packages, quiet
from tuner.pipeline.prepare import LONGEST_DEFAULT, MOST_OVER_LENGTH, directory_has_chat_template, texts_of
from tuner.pipeline.rows import BadRow, Conversation, Origin, Row
from tuner.pipeline.tables import DataFile
from tuner.presets import Preset, find_preset, preset_from_directory
from tuner.request import with_template_text
from tuner.runspec import Progress, Reporter
from tuner.training_config import ConfigSource, resolve_training_config
from tuner.training_settings import DatasetSettings, TrainingConfig

DEFAULT_PRESET = "phi-3-mini-4k-instruct"
BAD_ROWS_SHOWN = 10
ROW_CHARACTERS = 4000  # a longer row is cut, each of its learnt and not learnt runs in its own middle
RUN_CHARACTERS = 160  # what is left of such a run at least
_BATCH_ROWS = 1024
_TOKENIZER_ROWS = 2000
_TOKENIZER_VOCABULARY = 8192  # of prose about as many tokens as a real tokenizer makes


@dataclass(frozen=True, slots=True)
class FileRows:
    """What one file holds; `shape` is None when DatasetConfig.dataset_path leaves the file out."""

    source: str
    shape: str | None
    rows: int
    bad: int


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Over all texts that the rows become, before any is left out for its length."""

    texts: int
    shortest: int
    median: int
    percentile_95: int
    longest: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One token's characters, those before it that no token covers too; `tokens` is 0 for a rest after the last."""

    text: str
    learnt: bool
    special: bool
    tokens: int = 1


@dataclass(frozen=True, slots=True)
class ShownText:
    """One text of a row, token by token. `remark` says what a run does to it, or nothing."""

    title: str
    pieces: tuple[Piece, ...]
    remark: str


@dataclass(frozen=True, slots=True)
class Preview:
    """All that is printed, and `stops`: why a run would not train on this.

    `trained_tokens` and `learnt_tokens` are of the texts that a run would train on.
    """

    files: tuple[FileRows, ...]
    bad: tuple[BadRow, ...]
    bad_rows: int
    tokenizer: str
    counts: TokenCounts
    max_length: int
    over_length: int
    over_length_policy: str
    trained_tokens: int
    learnt_tokens: int
    remarks: tuple[str, ...]
    stops: tuple[str, ...]
    warnings: tuple[str, ...]
    shown: tuple[ShownText, ...]


def load_preview(
    files: Sequence[Path],
    preset: str | None,
    base_model: Path | None,
    config: Path | None,
    overrides: Sequence[str],
    rows: int,
    reporter: Reporter,
) -> Preview:
    """Read and tokenize every row; `rows` of them are kept to be shown, the first of each file.

    `base_model` is a directory whose tokenizer counts; without one a byte-level tokenizer is trained on the rows.
    Without `preset` the base model's own facts hold, else those of DEFAULT_PRESET. Raises InputMissingError,
    DataError (a file that cannot be read, no usable row) and ConfigError (preset, config, tokenizer, chat template).
    """
    check_packages()
    quiet()
    facts = _preset(preset, base_model)
    training = _training(facts, config, overrides)
    for note in training.notes:
        reporter.note(note)
    settings = training.dataset
    template = training.model.chat_template
    data_files = _data_files(files, reporter)
    chat = bool(template or facts.chat_template or (base_model and directory_has_chat_template(base_model)))
    read = _read(data_files, settings, chat=chat)
    tokenizer, described = _tokenizer(facts, base_model, template, read.rows)
    labeller = Labeller(tokenizer, stop_tokens(tokenizer, base_model) if base_model else frozenset())
    limit = training.arguments.max_length or min(LONGEST_DEFAULT, facts.context_length or LONGEST_DEFAULT)
    tally = _tally(read.rows, labeller, limit, settings, -(-rows // len(read.shapes)), reporter)
    if not tally.lengths:
        raise DataError(f"the chat template serves no row: {tally.bad[0]}", hint="set ModelConfig.chat_template")
    bad = [*read.bad, *tally.bad]
    return Preview(
        files=_file_rows(data_files, read, bad),
        bad=tuple(bad[:BAD_ROWS_SHOWN]),
        bad_rows=len(bad),
        tokenizer=described,
        counts=_counts(tally.lengths),
        max_length=limit,
        over_length=tally.over_length,
        over_length_policy=settings.over_length,
        trained_tokens=tally.trained_tokens,
        learnt_tokens=tally.learnt_tokens,
        remarks=tuple(read.remarks),
        stops=tuple(_stops(read, tally, settings, exact=base_model is not None)),
        warnings=tuple(_warnings(tally, labeller)),
        shown=tuple(shown for row in tally.shown[: max(rows, 0)] for shown in _show(labeller, row, limit, settings)),
    )


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _preset(name: str | None, base_model: Path | None) -> Preset:
    """The preset, with the base model's own numbers where there is one."""
    if base_model is None:
        return find_preset(name or DEFAULT_PRESET)
    own = preset_from_directory(base_model)
    return own if name is None else find_preset(name).model_copy(update={"config": own.config})


def _training(preset: Preset, config: Path | None, overrides: Sequence[str]) -> TrainingConfig:
    source = None
    if config:
        try:
            source = ConfigSource(config.read_text(encoding="utf-8"), str(config))
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputMissingError(f"--config {config}: cannot be read: {reason}") from error
    training = resolve_training_config(method="qlora", preset=preset, config_map=source, overrides=overrides)
    return with_template_text(training, config.parent if config else Path(), Path("/mnt"))


def _data_files(paths: Sequence[Path], reporter: Reporter) -> list[DataFile]:
    """The files, and those of directories that a run would read."""
    for path in paths:
        if path.suffix.lower() in (".yaml", ".yml"):
            raise DataError(f"{path}: YAML is no data", hint=f"tuner check --data {path} looks at a Workspace's data")
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise InputMissingError(
            "; ".join(f"{path}: not there" for path in missing),
            hint="name data files on this machine; what a URL gives must be downloaded first",
        )
    found = []
    for path in paths:
        if path.is_dir():
            folder = read_folder(path, str(path))
            for remark in folder.remarks():
                reporter.note(f"{path}: {remark}")
            found += [DataFile(path / name, str(path / name), use, is_part=True) for name, use in folder.files]
        else:
            found.append(DataFile(path, str(path)))
    return found


@dataclass(frozen=True, slots=True)
class _Read:
    shapes: dict[str, str]  # file → its rows' shapes, without files that DatasetConfig.dataset_path leaves out
    rows: list[Row]
    bad: list[BadRow]
    remarks: list[str]


def _read(files: Sequence[DataFile], settings: DatasetSettings, *, chat: bool) -> _Read:
    """Every row; unlike a run it goes on when many are bad, which is when somebody wants to look."""
    shapes: dict[str, str] = {}
    rows: list[Row] = []
    bad: list[BadRow] = []
    opened = [ReadFile(file, settings, chat=chat) for file in selected(files, settings)]
    for file_rows in opened:
        shapes[file_rows.file.source] = "empty" if file_rows.is_empty else file_rows.describe()
        for found in file_rows:
            if isinstance(found.row, BadRow):
                bad.append(found.row)
            else:
                rows.append(found.row)
    remarks = list(remarks_on(opened))
    if not rows and not bad:
        raise DataError("; ".join(["there are no rows to train on", *remarks]))
    if not rows:
        reasons = "".join(f"\n  {row}" for row in bad[:BAD_ROWS_SHOWN])
        raise DataError(
            f"none of {len(bad):,} rows can be trained on:{reasons}",
            hint="correct these rows, or say what the columns are in DatasetConfig.columns",
        )
    return _Read(shapes, rows, bad, remarks)


def _file_rows(files: Sequence[DataFile], read: _Read, bad: Sequence[BadRow]) -> tuple[FileRows, ...]:
    rows_of = Counter(row.origin.file for row in (*read.rows, *read.bad))
    bad_of = Counter(row.origin.file for row in bad)
    return tuple(
        FileRows(name, read.shapes.get(name), rows_of[name], bad_of[name])
        for name in dict.fromkeys(file.source for file in files)
    )


def _tokenizer(preset: Preset, base_model: Path | None, written: str | None, rows: Sequence[Row]) -> tuple[Any, str]:
    """The tokenizer with the template to show, and a line that says which it is."""
    if base_model is None:
        from tuner.pipeline.tiny_model import make_tiny_tokenizer

        sample = rows[:: -(-len(rows) // _TOKENIZER_ROWS)]
        tokenizer: Any = make_tiny_tokenizer(preset, texts_of(sample), vocabulary=_TOKENIZER_VOCABULARY)
        described = (
            "byte-level, trained on this data: token counts are only a rough guide, answers and their ends are exact "
            "(--base-model DIR counts exactly)"
        )
    else:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(base_model, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{base_model}: no tokenizer that transformers can load: {error}") from error
        described = f"that of {base_model}"
    if not any(isinstance(row, Conversation) for row in rows):
        return tokenizer, described
    if written:
        tokenizer.chat_template = written
        return tokenizer, f"{described}; chat template: ModelConfig.chat_template"
    if base_model and tokenizer.chat_template:
        return tokenizer, f"{described}; chat template: its own"
    tokenizer.chat_template = preset.chat_template or fallback_chat_template(tokenizer)
    whose = f"that of {preset.name}" if preset.chat_template else "a plain one of ours, as none is known"
    if not base_model and preset.chat_template:
        whose = f"our copy of that of {preset.name}; a run takes the model's own"
    return tokenizer, f"{described}; chat template: {whose}"


# ── what is counted ──────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Tally:
    lengths: list[int] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    shown: list[list[Example]] = field(default_factory=list)
    split_rows: int = 0
    over_length: int = 0
    unsupervised: int = 0
    straddles: int = 0
    trained_tokens: int = 0
    learnt_tokens: int = 0


def _tally(
    rows: Sequence[Row],
    labeller: Labeller,
    limit: int,
    settings: DatasetSettings,
    shown_of_file: int,
    reporter: Reporter,
) -> _Tally:
    """Counts in the way of the prepare stage; the texts of the first rows of each file are kept."""
    tally = _Tally()
    shown: Counter[str] = Counter()
    for begin in range(0, len(rows), _BATCH_ROWS):
        batch = rows[begin : begin + _BATCH_ROWS]
        examples: list[Example] = []
        for row in batch:
            rendered = labeller.examples(row)
            if isinstance(rendered, BadRow):
                tally.bad.append(rendered)
                continue
            examples += rendered
            tally.split_rows += len(rendered) > 1
            if shown[row.origin.file] < shown_of_file:
                shown[row.origin.file] += 1
                tally.shown.append(rendered)
        for tokens in labeller.tokenize(examples):
            length = len(tokens.input_ids)
            tally.lengths.append(length)
            if length > limit:
                tally.over_length += 1
                if settings.over_length != "truncate":
                    continue
                tokens = tokens.truncated(limit)
            # The first token is never predicted, so a mask on it alone teaches nothing.
            if not tokens.supervised.any():
                tally.unsupervised += 1
                continue
            tally.straddles += tokens.straddles
            tally.trained_tokens += len(tokens.input_ids)
            tally.learnt_tokens += int(tokens.supervised.sum())
        reporter.progress(Progress("prepare", "tokenizing rows", begin + len(batch), len(rows), "rows"))
    return tally


def _counts(lengths: Sequence[int]) -> TokenCounts:
    ascending = sorted(lengths)

    def quantile(percent: int) -> int:
        return ascending[-(-percent * len(ascending) // 100) - 1]

    return TokenCounts(len(ascending), ascending[0], quantile(50), quantile(95), ascending[-1])


def _stops(read: _Read, tally: _Tally, settings: DatasetSettings, *, exact: bool) -> list[str]:
    """Why the prepare stage would end with an error. Of lengths only an exact count may say that."""
    served, share = len(read.rows), settings.bad_row_share
    found: list[str] = []
    if len(read.bad) > share * (served + len(read.bad)) or len(tally.bad) > share * served:
        found.append(f"more than {share:.0%} of the rows are bad (DatasetConfig.bad_row_share)")
    if not tally.learnt_tokens and (exact or not tally.over_length):
        found.append("no row has a token to learn")
    if exact and tally.over_length:
        if settings.over_length == "error":
            found.append("a row is longer than max_length (DatasetConfig.over_length: error)")
        elif settings.over_length == "drop" and tally.over_length > MOST_OVER_LENGTH * served:
            found.append(
                f"more than {MOST_OVER_LENGTH:.0%} of the rows are longer than max_length (DatasetConfig.over_length)"
            )
    return found


def _warnings(tally: _Tally, labeller: Labeller) -> list[str]:
    """What somebody should know before a run."""
    texts = len(tally.lengths)
    found: list[str] = []
    if tally.unsupervised:
        found.append(f"{tally.unsupervised:,} of {texts:,} texts have no token to learn and are left out")
    if tally.straddles:
        found.append(f"in {tally.straddles:,} answers the first token begins in the prompt")
    if tally.split_rows:
        found.append(
            f"{tally.split_rows:,} rows become several texts, as the chat template shows earlier turns differently"
        )
    return [*found, *labeller.remarks()]


def _show(labeller: Labeller, examples: Sequence[Example], limit: int, settings: DatasetSettings) -> list[ShownText]:
    shown = []
    for number, example in enumerate(examples, 1):
        pieces = token_pieces(labeller, example)
        length = sum(piece.tokens for piece in pieces)
        remark = ""
        if length > limit:
            remark = f"longer than max_length {limit:,}: "
            if settings.over_length == "truncate":
                remark += f"cut to {limit:,} tokens"
                pieces = [*pieces[:limit], *(Piece(p.text, False, p.special, p.tokens) for p in pieces[limit:])]
            else:
                remark += "left out" if settings.over_length == "drop" else "a run would stop"
        elif not any(piece.learnt for piece in pieces[1:]):
            remark = "nothing to learn: left out"
        shown.append(ShownText(_title(example.origin, number, len(examples)), tuple(pieces), remark))
    return shown


def _title(origin: Origin, number: int, count: int) -> str:
    return f"{origin}, text {number} of {count}" if count > 1 else str(origin)


def token_pieces(labeller: Labeller, example: Example) -> list[Piece]:
    """The text in pieces of a token each, and with it the tokens that stand for no character of it (BOS, EOS)."""
    (tokens,) = labeller.tokenize([example])
    tokenizer = labeller.tokenizer
    encoded = tokenizer(
        example.text, add_special_tokens=example.special_tokens, return_offsets_mapping=True, verbose=False
    )
    offsets = encoded["offset_mapping"]
    special_ids = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    pieces = []
    begin = 0
    for index, (token, learnt) in enumerate(zip(tokens.input_ids.tolist(), tokens.supervised.tolist(), strict=True)):
        # An EOS that was put after the text has no offsets.
        first, last = offsets[index] if index < len(offsets) else (begin, begin)
        end = max(begin, last)  # tokens that share a character (bytes of an emoji): the first shows it
        special = token in special_ids
        named = special and first == last
        text = tokenizer.convert_ids_to_tokens(token) if named else example.text[begin:end]
        pieces.append(Piece(text, learnt, special))
        begin = end
    if begin < len(example.text):
        pieces.append(Piece(example.text[begin:], learnt=False, special=False, tokens=0))
    return pieces


# ── what is printed ──────────────────────────────────────────────────────────────────────────────────────────────────

LEARNT_BEGIN, LEARNT_END = "⟦", "⟧"
_LEARNT, _SPECIAL, _CUT, _TITLE, _WARNING = "reverse green", "bold cyan", "dim", "bold", "yellow"
# Data must neither steer the terminal nor hide in it.
_VISIBLE = str.maketrans(
    {code: chr(0x2400 + code) for code in range(0x20)}
    | {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    | {"\n": "↵\n", "\t": "⇥"}
)


def print_preview(preview: Preview, stream: TextIO) -> None:
    """Write it for a person: learnt tokens in colour, or between ⟦ and ⟧ where there is none."""
    console = Console(file=stream, highlight=False, markup=False, soft_wrap=True)
    marks = console.color_system is None

    def say(line: str, style: str = "") -> None:
        console.print(Text(_on_one_line(line), style))

    for file in preview.files:
        say(_file_line(file))
    for bad in preview.bad:
        say(f"  {bad}", _WARNING)
    if preview.bad_rows > len(preview.bad):
        say(f"  … and {preview.bad_rows - len(preview.bad):,} more", _WARNING)
    for remark in preview.remarks:
        say(remark)
    say(f"tokenizer: {preview.tokenizer}")
    say(_tokens_line(preview))
    learnt = f"{preview.learnt_tokens / max(1, preview.trained_tokens):.0%}"
    say(f"learnt: {preview.learnt_tokens:,} of {preview.trained_tokens:,} tokens, {learnt}")
    for warning in preview.warnings:
        say(f"warning: {warning}", _WARNING)
    if preview.shown:
        legend = Text("\nlearnt tokens look ")
        legend.append(f"{LEARNT_BEGIN}so{LEARNT_END}" if marks else "so", "" if marks else _LEARNT)
        console.print(legend)
    for shown in preview.shown:
        console.print()
        learnt_count = sum(piece.tokens for piece in shown.pieces if piece.learnt)
        tokens = sum(piece.tokens for piece in shown.pieces)
        remark = f" · {shown.remark}" if shown.remark else ""
        say(f"── {shown.title} · {tokens:,} tokens, {learnt_count:,} learnt{remark}", _TITLE)
        console.print(draw(shown.pieces, marks=marks))


def _on_one_line(text: str) -> str:
    return text.translate(_VISIBLE).replace("\n", " ")


def _file_line(file: FileRows) -> str:
    if file.shape is None:
        return f"{file.source}: left out by DatasetConfig.dataset_path"
    rows = f"{file.rows:,} {'row' if file.rows == 1 else 'rows'}"
    return f"{file.source}: {file.shape}, {rows}, {f'{file.bad:,} bad' if file.bad else 'none bad'}"


def _tokens_line(preview: Preview) -> str:
    counts = preview.counts
    over = f"{preview.over_length:,}" if preview.over_length else "none"
    return (
        f"tokens a row: least {counts.shortest:,}, median {counts.median:,}, 95 % up to {counts.percentile_95:,}, "
        f"longest {counts.longest:,}; {over} of {counts.texts:,} longer than max_length {preview.max_length:,}"
        + (f" (over_length: {preview.over_length_policy})" if preview.over_length else "")
    )


def draw(pieces: Sequence[Piece], *, marks: bool) -> Text:
    """The text with its learnt runs in colour, or between `marks`; line ends and control characters are visible.

    Of a long text the middle of each run is left out, so that every boundary stands.
    """
    runs = [(learnt, list(run)) for learnt, run in groupby(pieces, key=lambda piece: piece.learnt)]
    characters = sum(len(piece.text) for piece in pieces)
    kept = characters if characters <= ROW_CHARACTERS else max(RUN_CHARACTERS, ROW_CHARACTERS // len(runs))
    text = Text()
    for learnt, run in runs:
        base = _LEARNT if learnt and not marks else ""
        text.append(LEARNT_BEGIN if learnt and marks else "")
        head, hidden_tokens, tail = _cut(run, kept)
        _append(text, head, base)
        if hidden_tokens:
            text.append(f" … {hidden_tokens:,} tokens … ", _CUT)
        _append(text, tail, base)
        text.append(LEARNT_END if learnt and marks else "")
    return text


def _append(text: Text, pieces: Sequence[Piece], base: str) -> None:
    for special, group in groupby(pieces, key=lambda piece: piece.special):
        style = f"bold {base}" if special and base else _SPECIAL if special else base
        text.append("".join(piece.text for piece in group).translate(_VISIBLE), style)


def _cut(run: Sequence[Piece], kept: int) -> tuple[Sequence[Piece], int, Sequence[Piece]]:
    """Whole tokens of about half of `kept` characters from both ends, and how many tokens are between."""
    if sum(len(piece.text) for piece in run) <= kept:
        return run, 0, ()
    head = _tokens_of(run, kept // 2)
    tail = min(_tokens_of(run[::-1], kept // 2), len(run) - head)
    hidden = run[head : len(run) - tail]
    return run[:head], sum(piece.tokens for piece in hidden), run[len(run) - tail :]


def _tokens_of(run: Sequence[Piece], characters: int) -> int:
    count = taken = 0
    while count < len(run) and taken < characters:
        taken += len(run[count].text)
        count += 1
    return count
