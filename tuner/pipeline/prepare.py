"""Fetched files → token ids and labels on disk, with every row that is not trained on counted and listed."""

import hashlib
import json
import platform
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tuner.content import hash_file
from tuner.durable import make_directories, sync_tree
from tuner.errors import ConfigError, DataError, InputMissingError
from tuner.pipeline.adapter import write_json
from tuner.pipeline.chat_template import fallback_chat_template, stop_tokens
from tuner.pipeline.dataset import HELD_OUT_ROWS_AT_MOST, gather_rows, order_sha256, split_rows
from tuner.pipeline.dataset import Split as RowSplit
from tuner.pipeline.labels import Labeller, TokenRow
from tuner.pipeline.libraries import quiet
from tuner.pipeline.rows import BadRow, Completion, Conversation, PlainText, Row
from tuner.pipeline.sentences import canary_sentences, row_format
from tuner.pipeline.tables import DataFile, Share
from tuner.plan import count_evaluations, evaluation_share
from tuner.runspec import (
    Contract,
    Fetched,
    Prepared,
    Progress,
    Reporter,
    RowFormat,
    RowProblem,
    RunSpec,
    Source,
    Split,
    UrlSource,
)

LONGEST_DEFAULT = 8192
EVALUATION_WORTH_SAYING = 0.25  # of what training costs
MOST_OVER_LENGTH = 0.10  # share of rows; above it the run stops
SMOKE_TRAIN_ROWS = 64
SMOKE_EVALUATION_ROWS = 16
_SHOWN_PROBLEMS = 20
_CACHE = "cache.json"
_OWN_CODE = (
    *("prepare", "labels", "chat_template", "sentences"),
    *("dataset", "tables", "columns", "messages", "rows"),
)
# The last three, where they are there, turn a tokenizer without tokenizer.json into a fast one.
_DECIDE_TOKENS = ("transformers", "tokenizers", "jinja2", "pyarrow", "sentencepiece", "tiktoken", "protobuf")


def prepare(spec: RunSpec, fetched: Fetched, work_dir: Path, reporter: Reporter) -> Prepared:
    """`make_tokens`, and a warning where evaluating what is held out would cost a large part of training."""
    prepared = make_tokens(spec, fetched, work_dir, reporter)
    if not spec.smoke:
        _warn_of_evaluation(spec, prepared, reporter)  # by settings that the token files do not depend on
    return prepared


def make_tokens(spec: RunSpec, fetched: Fetched, work_dir: Path, reporter: Reporter) -> Prepared:
    """Read, check, split, tokenize; leave train.arrow, evaluation.arrow, tokenizer/ and problems.jsonl.

    What was prepared before of the very same rows, tokenizer and settings is taken as it lies there, and said again.
    Raises DataError when too many rows are bad or too long, or when nothing in them would be learnt; ConfigError when
    the chat template or the tokenizer does not serve.
    """
    key = None if spec.smoke else tokens_key(spec, fetched)
    known = _prepared_before(key, spec, fetched, work_dir, reporter)
    if known:
        known.save(work_dir / "prepared.json")
        return known
    reporter = heard = _Heard(reporter)
    quiet()
    settings = spec.training.dataset
    directory = work_dir / "prepared"
    shutil.rmtree(directory, ignore_errors=True)  # an earlier run's template must not stay beside this one's tokenizer
    make_directories(directory)
    chat = has_chat_template(spec, fetched, work_dir)
    gathered = gather_rows(data_files(spec, fetched, work_dir), settings, chat=chat)
    for remark in gathered.remarks:
        reporter.note(remark)
    split = split_rows(gathered.rows, settings, gathered.validation, gathered.copies)
    train, evaluation = split.train, split.evaluation
    base_dir = _base_model_dir(spec, fetched, gathered.rows, work_dir)
    conversations = any(isinstance(row, Conversation) for row in train)
    tokenizer = load_tokenizer(spec, work_dir / base_dir, conversations=conversations)
    tokenizer.save_pretrained(directory / "tokenizer")
    _leave_places_out(directory / "tokenizer" / "tokenizer_config.json")
    labeller = Labeller(tokenizer, stop_tokens(tokenizer, work_dir / base_dir))
    if spec.smoke:
        train, evaluation = train[:SMOKE_TRAIN_ROWS], evaluation[:SMOKE_EVALUATION_ROWS]
    context = context_length(spec, work_dir / base_dir)
    limit = spec.training.arguments.max_length or min(LONGEST_DEFAULT, context)
    if limit > context:
        reporter.warn(f"max_length {limit:,} is more than the {context:,} tokens that the model attends to")
    tallies = {
        name: _tokenize(rows, labeller, limit, settings.over_length, name, reporter)
        for name, rows in (("training", train), ("held-out", evaluation))
    }
    for remark in labeller.remarks():
        reporter.warn(remark)
    if conversations and fetched.base_model is None and tokenizer.chat_template == spec.preset.chat_template:
        reporter.note(f"the chat template is our copy of that of {spec.preset.name}; a run takes the model's own")
    problems = [
        *(RowProblem(file=bad.origin.file, row=bad.origin.row, reason=bad.reason) for bad in gathered.bad),
        *(problem for tally in tallies.values() for problem in tally.problems),
    ]
    problems_file = _write_problems(problems, directory / "problems.jsonl")
    over = sum(tally.over_length for tally in tallies.values())
    untold = sum(tally.bad for tally in tallies.values())
    count = len(train) + len(evaluation)
    listed = f"all of them are listed in {problems_file}"
    if untold > settings.bad_row_share * count:
        shown = "; ".join(f"{p.file}:{p.row}: {p.reason}" for p in tallies["training"].problems[:3])
        raise DataError(f"the chat template serves {count - untold:,} of {count:,} rows: {shown}", hint=listed)
    if settings.over_length == "drop" and over > MOST_OVER_LENGTH * count:
        raise DataError(
            f"{over:,} of {count:,} rows ({over / count:.0%}) are longer than {limit:,} tokens",
            hint="raise TrainingArguments.max_length; DatasetConfig.over_length: truncate cuts their ends, where the "
            "answers are; " + listed,
        )
    rows = tallies["training"].rows
    if not rows:
        raise DataError("no row has a token to learn", hint=f"`tuner data preview FILE` shows what is learnt; {listed}")
    straddles = sum(row.straddles for row in rows)
    if straddles:
        reporter.warn(f"in {straddles:,} answers the first token begins in the prompt: the template ends it mid-word")
    held_out = tallies["held-out"].rows
    row_formats = dict(sorted(tallies["training"].formats.items()))
    sentences = canary_sentences(labeller, row_formats)
    _check_vocabulary((row.input_ids for row in (*rows, *held_out)), work_dir / base_dir)
    _check_vocabulary((np.array(sentence.token_ids) for sentence in sentences), work_dir / base_dir)
    needing = next((gate for gate in spec.gates if gate.needs_held_out_rows), None)
    if needing and not held_out:
        raise DataError(
            f"the gate {needing.text!r} needs held-out rows, and of {count:,} rows none is held out",
            hint="give more rows, or DatasetConfig.train_test_split below 1",
        )
    result = Prepared(
        run_digest=spec.digest,
        train=_write_split(rows, directory / "train.arrow", work_dir),
        evaluation=_write_split(held_out, directory / "evaluation.arrow", work_dir) if held_out else None,
        has_validation_split=split.is_given,
        rows_not_taken=gathered.not_taken,
        rows_read=gathered.good_rows + len(gathered.bad),
        shapes=gathered.shapes,
        row_formats=row_formats,
        sentences=sentences,
        bad_rows=len(gathered.bad) + untold,
        over_length_rows=over if settings.over_length == "drop" else 0,
        truncated_rows=over if settings.over_length == "truncate" else 0,
        unsupervised_rows=sum(tally.unsupervised for tally in tallies.values()),
        smoke_unused_rows=len(split.train) + len(split.evaluation) - count,
        problems=tuple(problems[:_SHOWN_PROBLEMS]),
        problems_file=problems_file and str(Path(problems_file).relative_to(work_dir)),
        max_length=limit,
        tokenizer_dir="prepared/tokenizer",
        base_model_dir=base_dir,
    )
    _say(result, split, reporter)
    sync_tree(directory)
    if spec.smoke:
        sync_tree(work_dir / base_dir)
    result.save(work_dir / "prepared.json")
    if key:
        cache = TokenCache(key=key, prepared=result, files=_files(directory), said=heard.said)
        cache.save(directory / _CACHE)
    return result


def data_files(spec: RunSpec, fetched: Fetched, work_dir: Path) -> list[DataFile]:
    """The fetched files, each with a name that no other one has: two URLs may differ in their queries alone."""
    count = Counter(file.source for file in fetched.files)
    return [
        DataFile(
            work_dir / file.path,
            file.source if count[file.source] == 1 else f"{file.source} ({Path(file.path).name})",
            file.use,
            file.is_part,
            _share(spec.sources[file.source_index], file.source_index),
        )
        for file in fetched.files
    ]


def _share(source: Source, index: int) -> Share | None:
    if source.rows is None and source.weight is None:
        return None
    place = source.url if isinstance(source, UrlSource) else getattr(source, "path", f"source {index + 1}")
    return Share(str(place), source.rows, source.weight)


def _files(directory: Path) -> dict[str, str]:
    """Path below the directory → sha256 of every file but cache.json."""
    found = [path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / _CACHE]
    return {str(path.relative_to(directory)): hash_file(path) for path in found}


class TokenCache(Contract):
    """cache.json: of which inputs the token files are, what they must be, and what was said of them."""

    key: str
    prepared: Prepared
    files: dict[str, str]
    said: tuple[tuple[Literal["note", "warn"], str], ...]


class _Heard:
    """A Reporter that passes on and remembers what is not progress."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.said: tuple[tuple[Literal["note", "warn"], str], ...] = ()
        self.progress = reporter.progress

    def note(self, line: str) -> None:
        self.said += (("note", line),)
        self._reporter.note(line)

    def warn(self, line: str) -> None:
        self.said += (("warn", line),)
        self._reporter.warn(line)


def tokens_key(spec: RunSpec, fetched: Fetched) -> str | None:
    """Names everything that the token files depend on; None where the base is not known by its content.

    Files by content and in order, the tokenizer with its base model, template, dataset settings, and the code that
    makes rows and labels of them, ours and others'.
    """
    if fetched.base_model is None or not fetched.base_model.digest:
        return None
    depends = {
        "files": [(file.source, file.sha256, file.use, file.is_part, file.source_index) for file in fetched.files],
        "shares": [(source.rows, source.weight) for source in spec.sources],
        "base": fetched.base_model.digest,
        "preset": [spec.preset.chat_template, spec.preset.context_length],
        "template": spec.training.model.chat_template,
        "dataset": spec.training.dataset.values() | {"max_length": spec.training.arguments.max_length},
        "code": [hash_file(Path(__file__).with_name(f"{name}.py")) for name in _OWN_CODE],
        "trust_remote_code": spec.trust_remote_code,
        "libraries": {name: _version(name) for name in _DECIDE_TOKENS} | {"python": platform.python_version()},
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _prepared_before(
    key: str | None, spec: RunSpec, fetched: Fetched, work_dir: Path, reporter: Reporter
) -> Prepared | None:
    """What lies in the work directory, when it was made of the same inputs and is still as it was written."""
    try:
        cache = TokenCache.load(work_dir / "prepared" / _CACHE)
    except (InputMissingError, ConfigError):
        return None
    whole = cache.key == key and _files(work_dir / "prepared") == cache.files
    lacks = cache.prepared.evaluation is None and any(gate.needs_held_out_rows for gate in spec.gates)
    if not whole or lacks or fetched.base_model is None:
        return None
    for kind, line in cache.said:
        (reporter.note if kind == "note" else reporter.warn)(line)
    reporter.note("these token files were there already")
    return cache.prepared.model_copy(update={"run_digest": spec.digest, "base_model_dir": fetched.base_model.path})


def _base_model_dir(spec: RunSpec, fetched: Fetched, rows: Sequence[Row], work_dir: Path) -> str:
    if fetched.base_model:
        return fetched.base_model.path
    from tuner.pipeline.tiny_model import make_tiny_model  # the only torch before training, for smoke runs

    seed = spec.training.arguments.seed
    make_tiny_model(spec.preset, texts_of(rows[:1000]), work_dir / "smoke-model", seed=seed)
    return "smoke-model"


def texts_of(rows: Iterable[Row]) -> Iterator[str]:
    """All the words of the rows, to train a tokenizer on."""
    for row in rows:
        match row:
            case PlainText():
                yield row.text
            case Completion():
                yield row.prompt
                yield row.completion
            case Conversation():
                yield from (str(message.get("content", "")) for message in row.messages)


def load_tokenizer(spec: RunSpec, directory: Path, *, conversations: bool) -> Any:
    """The base model's tokenizer with the template to train with: what the user wrote, its own, the preset's."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory}: no tokenizer that transformers can load: {error}") from error
    written = spec.training.model.chat_template
    if written:
        tokenizer.chat_template = written
    elif conversations and not tokenizer.chat_template:
        tokenizer.chat_template = spec.preset.chat_template or fallback_chat_template(tokenizer)
    return tokenizer


def _leave_places_out(config_file: Path) -> None:
    """What says where the tokenizer was loaded from, here or by whoever published it, does not go into an image."""
    config = json.loads(config_file.read_text(encoding="utf-8"))
    write_json(config_file, {key: value for key, value in config.items() if not _is_place(key, value)})


def _is_place(key: str, value: Any) -> bool:
    if key in ("is_local", "local_files_only", "name_or_path"):
        return True
    return isinstance(value, str) and not key.endswith("_token") and Path(value).is_absolute()


def has_chat_template(spec: RunSpec, fetched: Fetched, work_dir: Path) -> bool:
    """Whether the model that is trained has a chat template, as far as its files are here."""
    if spec.training.model.chat_template or spec.preset.chat_template:
        return True
    if fetched.base_model is None:
        return False
    return directory_has_chat_template(work_dir / fetched.base_model.path)


def directory_has_chat_template(directory: Path) -> bool:
    if any((directory / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # who loads the tokenizer says so
    return isinstance(config, dict) and bool(config.get("chat_template"))


def context_length(spec: RunSpec, base_dir: Path) -> int:
    """Tokens the model can attend to: config.json's word, which a --base-model may have other than the preset."""
    config = _text_config(base_dir)
    return int(config.get("max_position_embeddings") or spec.preset.context_length or LONGEST_DEFAULT)


def _text_config(base_dir: Path) -> dict[str, Any]:
    """config.json, or its part about text."""
    config: dict[str, Any] = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    text: dict[str, Any] = config.get("text_config", config)
    return text


def _check_vocabulary(token_ids: Iterable[npt.NDArray[Any]], base_dir: Path) -> None:
    """Raises ConfigError for a token that the model has no embedding of: on a GPU that ends a run without a word."""
    words = _text_config(base_dir).get("vocab_size")
    largest = max(int(ids.max()) for ids in token_ids)
    if words is not None and largest >= words:
        raise ConfigError(
            f"{base_dir}: its tokenizer gives token {largest:,}, and its config.json has a vocab_size of {words:,}",
            hint="tokens were added to the tokenizer and not to the model: take both from one place",
        )


@dataclass(frozen=True)
class _Tally:
    """What became of the rows of one split; `bad`, `over_length` and `unsupervised` count rows, however many examples
    a template makes of one."""

    rows: list[TokenRow]
    formats: Counter[RowFormat]
    problems: list[RowProblem]
    bad: int
    over_length: int
    unsupervised: int


def _tokenize(
    rows: Sequence[Row], labeller: Labeller, limit: int, over_length: str, task: str, reporter: Reporter
) -> _Tally:
    kept: list[TokenRow] = []
    formats: Counter[RowFormat] = Counter()
    problems: list[RowProblem] = []
    bad, over, unsupervised = set[int](), set[int](), set[int]()  # numbers of rows: a file may be given twice

    def put_aside(into: set[int], number: int, reason: str) -> None:
        into.add(number)
        origin = rows[number].origin
        problems.append(RowProblem(file=origin.file, row=origin.row, reason=reason))

    for begin in range(0, len(rows), 1024):
        batch = rows[begin : begin + 1024]
        examples = []
        numbers = []
        for number, row in enumerate(batch, begin):
            rendered = labeller.examples(row)
            if isinstance(rendered, BadRow):
                put_aside(bad, number, rendered.reason)
            else:
                examples.extend(rendered)
                numbers.extend([number] * len(rendered))
        for number, tokens in zip(numbers, labeller.tokenize(examples), strict=True):
            length = len(tokens.input_ids)
            if length > limit:
                reason = f"{length:,} tokens, more than the {limit:,} of max_length"
                if over_length == "error":
                    raise DataError(f"{tokens.origin}: {reason}", hint="DatasetConfig.over_length: drop")
                put_aside(over, number, reason)
                if over_length == "drop":
                    continue
                tokens = tokens.truncated(limit)
            if tokens.supervised.any():
                kept.append(tokens)
                formats[row_format(rows[number])] += 1
            else:
                put_aside(unsupervised, number, "no token of it is learnt")
        reporter.progress(Progress("prepare", f"tokenizing {task} rows", begin + len(batch), len(rows), "rows"))
    return _Tally(kept, formats, problems, len(bad), len(over), len(unsupervised))


def _write_split(rows: Sequence[TokenRow], path: Path, work_dir: Path) -> Split:
    import pyarrow as pa

    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
    # A stream, not a file: what datasets.Dataset.from_file maps into memory.
    with path.open("wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for begin in range(0, len(rows), 1000):
            batch = rows[begin : begin + 1000]
            edges = pa.array(np.cumsum([0, *(len(row.input_ids) for row in batch)], dtype=np.int32))
            columns = [
                pa.ListArray.from_arrays(edges, pa.array(np.concatenate(values)))
                for values in ([row.input_ids for row in batch], [row.labels() for row in batch])
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return Split(
        path=str(path.relative_to(work_dir)),
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        supervised_tokens=sum(int(row.supervised.sum()) for row in rows),
        longest=max(len(row.input_ids) for row in rows),
        order_sha256=order_sha256([row.origin for row in rows]),
    )


def _write_problems(problems: Sequence[RowProblem], path: Path) -> str | None:
    path.unlink(missing_ok=True)
    if not problems:
        return None
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(problem.model_dump(), ensure_ascii=False) + "\n")
    return str(path)


def _warn_of_evaluation(spec: RunSpec, prepared: Prepared, reporter: Reporter) -> None:
    if prepared.evaluation is None:
        return
    arguments, rows = spec.training.arguments, prepared.evaluation.rows
    share = evaluation_share(arguments, prepared.train, prepared.evaluation)
    if share < EVALUATION_WORTH_SAYING:
        return
    fraction = 1 - HELD_OUT_ROWS_AT_MOST / (prepared.train.rows + rows)
    fewer = f"DatasetConfig.train_test_split: {fraction:.4g} holds out {HELD_OUT_ROWS_AT_MOST}, "
    if prepared.has_validation_split:
        fewer = "a smaller validation split, "
    reporter.warn(
        f"evaluating {rows:,} held-out rows {count_evaluations(arguments, prepared.train.rows)} times costs about "
        f"{share:.0%} of what training itself costs; {fewer if rows > HELD_OUT_ROWS_AT_MOST else ''}a larger "
        "TrainingArguments.eval_steps evaluates less often"
    )


def _say(result: Prepared, split: RowSplit, reporter: Reporter) -> None:
    train = result.train
    held_out = "of a validation split" if split.is_given else "held out"
    reporter.note(
        f"prepared {train.rows:,} training rows ({train.tokens:,} tokens, "
        f"{train.supervised_tokens / train.tokens:.0%} learnt, longest {train.longest:,})"
        + (f", {result.evaluation.rows:,} {held_out}" if result.evaluation else ", none held out")
        + f"; shapes: {', '.join(f'{name} {count:,}' for name, count in result.shapes.items())}"
    )
    if result.smoke_unused_rows:
        used, held = min(len(split.train), SMOKE_TRAIN_ROWS), min(len(split.evaluation), SMOKE_EVALUATION_ROWS)
        reporter.note(
            f"a smoke run takes {used} of the {len(split.train):,} training rows and {held} of the "
            f"{len(split.evaluation):,} held-out ones; `tuner check --data` tries them all"
        )
    if split.duplicates:
        reporter.note(f"{split.duplicates:,} rows are the same as another and were kept on its side of the split")
    if split.leaked:
        reporter.warn(
            f"{split.leaked:,} of {len(split.evaluation):,} validation rows are trained on word for word, so the "
            "held-out loss says less: take them out of one of the files"
        )
    if split.known_prompts:
        why = "" if split.is_given else ": prompts repeat too often to keep them apart"
        reporter.warn(
            f"{split.known_prompts:,} held-out rows ask what training rows ask too, with other answers{why}, so the "
            "held-out loss says less"
        )
    left = {
        "bad": result.bad_rows,
        f"longer than {result.max_length:,} tokens": result.over_length_rows,
        "with nothing to learn": result.unsupervised_rows,
    }
    if any(left.values()):
        what = ", ".join(f"{count:,} {name}" for name, count in left.items() if count)
        reporter.warn(f"left out of {result.rows_read:,} rows: {what}; see {result.problems_file}")
    if result.truncated_rows:
        reporter.warn(
            f"cut to {result.max_length:,} tokens: {result.truncated_rows:,} rows; see {result.problems_file}"
        )
