"""Data files → rows of one of three kinds, and their split into training and held-out rows.

    file ── what it is ──► records ── which shape ──► Conversation | Completion | PlainText, or BadRow and why
             tables.py                 columns.py, messages.py

A file is looked at whole before its first row is made: a column that only the last row has counts, and what must stop
a run stops it there.
"""

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tuner.errors import ConfigError, DataError
from tuner.folder import TEST_SPLIT, Use, split_word
from tuner.pipeline.columns import KNOWN, Roles, Shape
from tuner.pipeline.messages import is_empty, truth
from tuner.pipeline.rows import (
    BadRow,
    Completion,
    Conversation,
    Origin,
    PlainText,
    Row,
    Unusable,
    listed,
    shortened,
)
from tuner.pipeline.tables import DataFile, Share, Table, open_table, reading
from tuner.training_settings import DatasetSettings

HELD_OUT_SHARE = 0.05
HELD_OUT_ROWS_AT_MOST = 500
ROWS_TO_HOLD_OUT_FROM = 20  # fewer are all trained on: one row says nothing about a loss
REASONS_SHOWN = 5


# ── rows of files ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class FoundRow:
    """A row, or why it is none, the name of its shape, and what it is for."""

    row: Row | BadRow
    shape: str
    use: Use


class FileRows:
    """One file's rows. `unread` counts, once all have been read, in how many rows a column says something that is not
    read, and `test_rows` how many a split column keeps from training."""

    def __init__(self, file: DataFile, settings: DatasetSettings, *, chat: bool) -> None:
        """Looks through the whole file. `chat`: the model has a chat template.

        Raises InputMissingError when it is not there, DataError when it cannot be read, is empty (and no part of a
        folder), has rows of no known shape, or rows that a supervised run must not learn.
        """
        self.file = file
        self.unread: Counter[str] = Counter()
        self.test_rows = 0
        watched: dict[str, str] = {**KNOWN, **dict.fromkeys("ABCDEFGHIJ", "choices"), **settings.named_columns}
        watched |= dict.fromkeys(settings.prompt_columns, "prompt")
        with reading(file):
            table = open_table(file, settings.dataset_extension, watched)
        self._table = table if table and table.survey.rows else None
        if self._table is None:
            if not file.is_part:
                raise DataError(f"{file.source}: the file has no rows")
            return
        self._look(self._table, settings, chat=chat)

    @property
    def is_empty(self) -> bool:
        return self._table is None

    def describe(self) -> str:
        """`instruction/output (+ input, system), text`: the shapes of its rows, and what is read beside."""
        beside: dict[str, dict[str, None]] = {}
        for told in self._told.values():
            shape = told if isinstance(told, Shape) else self._usual
            beside.setdefault(shape.name, {}).update(dict.fromkeys(shape.beside))
        return ", ".join(f"{name} (+ {', '.join(more)})" if more else name for name, more in beside.items())

    def _look(self, table: Table, settings: DatasetSettings, *, chat: bool) -> None:
        survey, present = table.survey, list(table.survey.present)
        self._roles = roles = Roles(settings, present, survey.filled, self.file.source, chat=chat)
        roles.stop(survey.filled)
        self._told: dict[tuple[str, ...], Shape | str] = {filled: roles.shape_of(filled) for filled in survey.sets}
        shapes = {filled: shape for filled, shape in self._told.items() if isinstance(shape, Shape)}
        # A row whose own columns tell nothing is read as most are: then it is said what it lacks.
        usual = max(shapes, key=lambda filled: survey.sets[filled], default=None)
        shape = roles.shape_of(present) if usual is None else shapes[usual]
        if not isinstance(shape, Shape):
            raise roles.unknown(present, shape or next((str(why) for why in self._told.values() if why), ""))
        self._usual = shape
        self._known = frozenset(column for filled in survey.sets for column in filled)
        has_answers = any(each.has_answer for each in (shape, *shapes.values()))
        self._label = next(filter(self._is_judgement, roles.columns("label")), None) if has_answers else None
        self._split = next(filter(self._is_split, roles.columns("split")), None)
        self._columns = [column for column in present if roles.is_of_use(column)]
        read = {*shape.columns, *(column for each in shapes.values() for column in each.columns)}
        for column in read:
            if table.header.count(column) > 1:
                raise DataError(f"{self.file.source}: there are several columns {column!r}")
        self._columns = [column for column in self._columns if table.header.count(column) < 2]
        self._count_unread(table)

    def _is_judgement(self, column: str) -> bool:
        """Whether a label says of answers that they are wanted or not, as data for KTO does: no class, no score."""
        said = {_is_wanted(value) for value in self._values(column)}
        return None not in said and False in said

    def _is_split(self, column: str) -> bool:
        return any(split_word(value) for value in self._values(column))

    def _values(self, column: str) -> set[str]:
        """The few different values of a column."""
        values = self._table.survey.values.get(column) if self._table else None
        return values or set()

    def _count_unread(self, table: Table) -> None:
        special = {self._label, self._split}
        read_in: Counter[str] = Counter()
        for filled, count in table.survey.sets.items():
            told = self._told[filled] or self._usual
            columns = told.columns if isinstance(told, Shape) else frozenset(filled)  # of a bad row the reason is said
            read_in.update({column: count for column in filled if column in columns})
        for column, count in table.survey.filled.items():
            if count > read_in[column] and column not in special and not self._roles.is_ignored(column):
                self.unread[column] = count - read_in[column]

    def __iter__(self) -> Iterator[FoundRow]:
        """Every row in order, less those of a test split."""
        if self._table is None:
            return
        with reading(self.file):
            for number, record in self._table.records(self._columns):
                origin = Origin(self.file.source, number)
                if isinstance(record, Unusable):
                    yield FoundRow(BadRow(origin, str(record)), self._usual.name, self.file.use)
                    continue
                split = split_word(str(record.get(self._split))) if self._split else None
                if split == "test":
                    self.test_rows += 1
                    continue
                use: Use = "validation" if split == "validation" else self.file.use
                shape = self._usual
                try:
                    shape = self._shape_of(record)
                    if self._label and shape.has_answer and _is_wanted(record.get(self._label)) is False:
                        raise Unusable(
                            f"{self._label} is {shortened(record[self._label])}: an answer that is not wanted"
                        )
                    yield FoundRow(shape.build(origin, record, self.unread), shape.name, use)
                except Unusable as error:
                    yield FoundRow(BadRow(origin, str(error)), shape.name, use)

    def _shape_of(self, record: Mapping[str, Any]) -> Shape:
        filled = tuple(name for name, value in record.items() if name in self._known and not is_empty(value))
        told = self._told.get(filled)
        if told is None:
            told = self._told[filled] = self._roles.shape_of(filled)
        if isinstance(told, str) and told:
            raise Unusable(told)
        return told if isinstance(told, Shape) else self._usual


def _is_wanted(value: object) -> bool | None:
    """What a label for KTO says of an answer; some write -1 and 1."""
    return False if str(value) == "-1" else truth(value)


@dataclass(frozen=True, slots=True)
class Gathered:
    """Every row of every file, in order: `validation` are those that are not trained on.

    `copies` has how often each of `rows` is trained on, and `not_taken` how many good rows the shares of their sources
    leave out. `shapes` counts the usable rows of each shape. `remarks` says what is not read or not trained on, a
    phrase for each.
    """

    rows: list[Row]
    copies: list[int]
    validation: list[Row]
    not_taken: int
    bad: list[BadRow]
    shapes: dict[str, int]
    remarks: list[str]

    @property
    def good_rows(self) -> int:
        return len(self.rows) + len(self.validation) + self.not_taken


def gather_rows(files: Sequence[DataFile], settings: DatasetSettings, *, chat: bool) -> Gathered:
    """All rows in memory. Raises DataError when there are none, or more bad ones than `bad_row_share` allows."""
    found_rows: list[tuple[Row, Use, Share | None]] = []
    bad: list[BadRow] = []
    shapes: Counter[str] = Counter()
    opened = [FileRows(file, settings, chat=chat) for file in selected(files, settings)]
    for file_rows in opened:
        for found in file_rows:
            if isinstance(found.row, BadRow):
                bad.append(found.row)
            else:
                found_rows.append((found.row, found.use, file_rows.file.share))
                shapes[found.shape] += 1
    total = len(bad) + len(found_rows)
    if total == 0:
        raise DataError("; ".join(["there are no rows to train on", *remarks_on(opened)]))
    copies, shared = _copies([(share, use) for _, use, share in found_rows], settings)
    taken = [(row, use, count) for (row, use, _), count in zip(found_rows, copies, strict=True) if count]
    training = [(row, count) for row, use, count in taken if use == "training"]
    if not training or len(bad) > settings.bad_row_share * total:
        allowed = f"at most {settings.bad_row_share:.0%} may be bad" if training else "none is left"
        shown = "".join(f"\n  {row}" for row in bad[:REASONS_SHOWN])
        more = f"\n  … and {len(bad) - REASONS_SHOWN:,} more" if len(bad) > REASONS_SHOWN else ""
        raise DataError(
            f"{len(bad):,} of {total:,} rows cannot be trained on, {allowed}:{shown}{more}",
            hint="correct these rows, or say what the columns are in DatasetConfig.columns",
        )
    return Gathered(
        rows=[row for row, _ in training],
        copies=[count for _, count in training],
        validation=[row for row, use, _ in taken if use == "validation"],
        not_taken=len(found_rows) - len(taken),
        bad=bad,
        shapes=dict(shapes),
        remarks=[*remarks_on(opened), *shared],
    )


def _copies(rows: Sequence[tuple[Share | None, Use]], settings: DatasetSettings) -> tuple[list[int], list[str]]:
    """How often each row is taken, and a phrase for each source that says so.

    The rows that a share takes are drawn with the seed, without `shuffle` they are the first ones. A validation row
    is never taken twice.
    """
    copies = [1] * len(rows)
    remarks = []
    of_share: dict[Share, list[int]] = defaultdict(list)
    for index, (share, _) in enumerate(rows):
        if share:
            of_share[share].append(index)
    for share, numbers in of_share.items():
        draw = random.Random(f"{settings.shuffle_seed} {share.source}")

        def drawn(count: int, among: list[int], draw: random.Random = draw) -> list[int]:
            return sorted(draw.sample(among, count)) if settings.shuffle else among[:count]

        kept = drawn(min(share.rows or len(numbers), len(numbers)), numbers)
        whole, part = divmod(share.weight or 1.0, 1)
        once_more = {*drawn(round(part * len(kept)), kept)}
        for index in numbers:
            copies[index] = 0
        for index in kept:
            count = int(whole) + (index in once_more)
            copies[index] = min(count, 1) if rows[index][1] == "validation" else count
        there = sum(copies[index] > 0 for index in numbers)
        times = sum(copies[index] for index in numbers)
        repeated = f", {times:,} times in all" if times != there else ""
        remarks.append(f"{share.source}: {there:,} of {_rows(len(numbers))} are taken{repeated}")
    return copies, remarks


def remarks_on(opened: Sequence[FileRows]) -> Iterator[str]:
    """What of files that have been read is not trained on, and is no bad row."""
    unread: Counter[str] = Counter()
    for file_rows in opened:
        unread.update(file_rows.unread)
        if file_rows.is_empty:
            yield f"{file_rows.file.source}: no rows"
        if count := file_rows.test_rows:
            yield f"{file_rows.file.source}: {_rows(count)} of {TEST_SPLIT} {'is' if count == 1 else 'are'} not read"
    if unread:
        names = [
            f"{name or 'one without a name'} ({_rows(count, 'turn' if '[]' in name else 'row')})"
            for name, count in unread.most_common()
        ]
        yield f"columns not read: {listed(names)}"


def _rows(count: int, word: str = "row") -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def selected(files: Sequence[DataFile], settings: DatasetSettings) -> Sequence[DataFile]:
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
        hint=f"there is {listed([file.source for file in files])}; without dataset_path every file is used",
    )


# ── split ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Split:
    """`duplicates` is how many rows repeat another one word for word; a row and its copies are on one side.
    `known_prompts` is how many held-out rows have a prompt that is trained on too, with another answer, and `leaked`
    how many are trained on word for word: only rows of a validation split can be."""

    train: list[Row]
    evaluation: list[Row]
    duplicates: int
    known_prompts: int
    leaked: int = 0
    is_given: bool = False  # by a validation split, and not taken from the training rows


def split_rows(
    rows: Sequence[Row], settings: DatasetSettings, validation: Sequence[Row] = (), copies: Sequence[int] | None = None
) -> Split:
    """The rows in training order, and those held out for evaluation.

    Equal rows, settings and seed give an equal order on every machine. Where there are `validation` rows, they are what
    is evaluated, and every other row is trained on. Else the last rows of that order are held out: of
    20 rows and more 5 %, at most 500, or what `train_fraction` leaves. Rows with the same prompt go together, whatever
    their answers, so that nothing held out was seen in training; a group of more rows than are still wanted is trained
    on instead. Where few prompts stand for most rows, only copies of a whole row go together. `copies`: how often each
    row is trained on.
    """
    order = [index for index in range(len(rows)) for _ in range(copies[index] if copies else 1)]
    if settings.shuffle:
        random.Random(settings.shuffle_seed).shuffle(order)
    contents = [_content_digest(row) for row in rows]
    prompts = [_prompt_digest(row) for row in rows]
    held_out: set[int] = set()
    if not validation:
        once = list(dict.fromkeys(order))
        wanted = _held_out_count(len(rows), settings.train_fraction)
        held_out = _hold_out(once, prompts, wanted)
        if 2 * len(held_out) < wanted:
            held_out = _hold_out(once, contents, wanted)
    train = [index for index in order if index not in held_out]
    evaluation = validation or [rows[index] for index in dict.fromkeys(order) if index in held_out]
    trained_contents = {contents[index] for index in train}
    trained_prompts = {prompts[index] for index in train}
    known = [row for row in evaluation if _prompt_digest(row) in trained_prompts]
    leaked = sum(_content_digest(row) in trained_contents for row in known)
    return Split(
        train=[rows[index] for index in train],
        evaluation=list(evaluation),
        duplicates=len(rows) - len(set(contents)),
        known_prompts=len(known) - leaked,
        leaked=leaked,
        is_given=bool(validation),
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
            content: list[Any] = [
                "conversation",
                row.messages,
                row.tools,
                sorted(row.not_learnt),
                row.template_arguments,
            ]
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
            return _digest(
                ["conversation", row.messages[: answers[-1] if answers else None], row.tools, row.template_arguments]
            )
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
