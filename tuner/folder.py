"""A folder's paths → which of its files are data, and of which split: told by names alone, here or in a store.

Splits are named as on the Hugging Face Hub: https://huggingface.co/docs/hub/datasets-file-names-and-splits
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from tuner.errors import InputMissingError

Use = Literal["training", "validation"]
SplitName = Literal["train", "validation", "test"]

_DATA_ENDINGS = (".parquet", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".arrow", ".feather", ".txt", ".text")
# What describes data, a model or a tokenizer, wherever it lies.
_SIDECARS = frozenset(
    {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "croissant.json"}
)
_SIDECAR_BEGINNINGS = ("readme", "license", "licence", "requirements.txt")
_CACHE_OF_DATASETS = re.compile(r"cache-[0-9a-f]+(_\d+_of_\d+)?\.arrow")  # what Dataset.map keeps beside its data
# A file whose folder, with all below it, is something else.
_MARKS: Mapping[str, str] = MappingProxyType(
    {
        "adapter_config.json": "an adapter",
        "fetched.json": "a work directory of tuner",
        "prepared.json": "a work directory of tuner",
        "trainer_state.json": "a checkpoint",
        "oci-layout": "an OCI image layout",
        "tokenizer_config.json": "a model",
        "tokenizer.json": "a model",
        "model.safetensors.index.json": "a model",
    }
)
_KEYWORDS: Mapping[SplitName, tuple[str, ...]] = MappingProxyType(
    {
        "train": ("train", "training"),
        "validation": ("validation", "valid", "dev", "val"),
        "test": ("test", "testing", "eval", "evaluation"),
    }
)
_SPLIT_OF_KEYWORD = {word: split for split, words in _KEYWORDS.items() for word in words}
TEST_SPLIT = "a test split"
_SEPARATORS = re.compile(r"[-._ 0-9]+")


@dataclass(frozen=True)
class Folder:
    """A folder's data files by what they are for, sorted; `left_out` has what is none, and why: (path, reason)."""

    training: tuple[str, ...]
    validation: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def files(self) -> tuple[tuple[str, Use], ...]:
        """All files to read, sorted by path."""
        files: list[tuple[str, Use]] = [(path, "training") for path in self.training]
        files += [(path, "validation") for path in self.validation]
        return tuple(sorted(files))

    def used_for(self, use: Use) -> "Folder":
        """The folder of a source that is only for evaluation: then all its splits are."""
        if use == "training":
            return self
        tests = [path for path, reason in self.left_out if reason == TEST_SPLIT]
        left_out = tuple((path, reason) for path, reason in self.left_out if reason != TEST_SPLIT)
        return Folder((), tuple(sorted((*self.training, *self.validation, *tests))), left_out)

    def below(self, prefix: str) -> "Folder":
        """The same files as paths from further up."""
        return Folder(
            tuple(prefix + path for path in self.training),
            tuple(prefix + path for path in self.validation),
            tuple((prefix + path, reason) for path, reason in self.left_out),
        )

    def remarks(self) -> Iterator[str]:
        """What somebody should know who thinks that every file is trained on: a phrase for each reason."""
        if self.validation:
            yield f"{_some(self.validation)} evaluated on and not trained on (a validation split)"
        by_reason: dict[str, list[str]] = {}
        for path, reason in self.left_out:
            by_reason.setdefault(reason, []).append(path)
        for reason, paths in by_reason.items():
            yield f"{_some(paths)} not read ({reason})"


def read_folder(directory: Path, source: str, work_dir: Path | None = None, use: Use = "training") -> Folder:
    """What a directory holds; a work directory within it is none of that. `source` is for messages.

    Raises InputMissingError when there is nothing in it to train on.
    """
    if not directory.is_dir():
        raise InputMissingError(f"{source}: no directory at {directory}")
    if not os.access(directory, os.R_OK | os.X_OK):  # to whom it would seem empty
        raise InputMissingError(f"{source}: cannot be read: Permission denied")
    ours = work_dir and work_dir.absolute()
    if ours and (ours == directory.absolute() or not ours.is_relative_to(directory.absolute())):
        ours = None
    folder = sort_folder(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and not (ours and path.absolute().is_relative_to(ours))
    ).used_for(use)
    if not (folder.training or (use == "validation" and folder.validation)):
        raise nothing_to_train_on(folder, source)
    return folder


def sort_folder(paths: Iterable[str]) -> Folder:
    """Which of the files at these paths, relative to the folder, are data. Hidden ones are left out without a word."""
    names = sorted(paths)
    foreign = _foreign_folders(names)
    left_out: dict[str, str] = {}
    data = []
    for path in names:
        if not is_data_name(path):
            continue
        inside = next((folder for folder in _ancestors(path) if folder in foreign), None)
        if inside is None:
            data.append(path)
        else:
            left_out[inside or path] = foreign[inside]
    named = named_as_data(data)
    if named:
        left_out |= {path: "no ending of data" for path in data if path not in set(named)}
    training: list[str] = []
    validation: list[str] = []
    for path, split in _splits(named or data):
        if split == "test":
            left_out[path] = TEST_SPLIT
        else:
            (validation if split == "validation" else training).append(path)
    return Folder(tuple(training), tuple(validation), tuple(left_out.items()))


def sort_matches(paths: Iterable[str]) -> Folder:
    """The files that a pattern was written for; where it matches nothing but other splits, those are meant."""
    names = sorted(paths)
    told = dict(_splits(names))
    if all(split in ("validation", "test") for split in told.values()):
        return Folder(tuple(names), (), ())
    return Folder(
        tuple(path for path in names if told[path] in (None, "train")),
        tuple(path for path in names if told[path] == "validation"),
        tuple((path, TEST_SPLIT) for path in names if told[path] == "test"),
    )


def _splits(paths: Sequence[str]) -> Iterator[tuple[str, SplitName | None]]:
    """Each path with its split. A word that stands within a name tells only where there is a train split, too:
    unit-test-questions.jsonl is often no test split."""
    told = [(path, split_of(path)) for path in paths]
    has_train = any(split == "train" for _, split in told)
    for path, split in told:
        yield path, split if has_train or split_of(path, at_start=True) else None


def split_of(path: str, *, at_start: bool = False) -> SplitName | None:
    """The split that a folder of the path names, else its file's name; the innermost folder counts.

    `at_start`: the word must be what the name begins with.
    """
    *folders, name = path.split("/")
    plain = plain_name(name)
    stem = plain.rpartition(".")[0] or plain
    for part in (*reversed(folders), stem):
        if found := split_word(part, at_start=at_start):
            return found
    return None


def split_word(name: str, *, at_start: bool = False) -> SplitName | None:
    """The split that a word of this name means."""
    words = [word for word in _SEPARATORS.split(name.lower()) if word]
    found = [_SPLIT_OF_KEYWORD[word] for word in (words[:1] if at_start else words) if word in _SPLIT_OF_KEYWORD]
    return "train" if "train" in found else next(iter(found), None)


def is_data_name(path: str) -> bool:
    """Whether a file at this path below a folder of data may be data: not hidden, not what describes them."""
    *_, name = parts = path.split("/")
    return (
        name not in _SIDECARS
        and not any(part.startswith((".", "_")) for part in parts)
        and not name.lower().startswith(_SIDECAR_BEGINNINGS)
        and not _CACHE_OF_DATASETS.fullmatch(name)
    )


def plain_name(name: str) -> str:
    """In lower case and without the ending of a compression."""
    lower = name.lower()
    return lower.removesuffix(".gz").removesuffix(".zst")


def named_as_data(paths: Sequence[str]) -> list[str]:
    """Those whose ending is one of data."""
    return [path for path in paths if plain_name(path).endswith(_DATA_ENDINGS)]


def nothing_to_train_on(folder: Folder, source: str) -> InputMissingError:
    """What to raise of a folder without a file to train on."""
    remarks = "; ".join(folder.remarks())
    if not remarks:
        return InputMissingError(
            f"{source}: no data file in it", hint="a data file's name does not begin with . or _, nor is it a README"
        )
    return InputMissingError(
        f"{source}: no file in it to train on: {remarks}", hint="a file that is named itself is trained on"
    )


def named_split_remark(name: str) -> str | None:
    """What to say of a file that was named itself, and by its name is of a split that is not trained on."""
    split = split_of(name, at_start=True)
    if split in (None, "train"):
        return None
    return f"is named as a {split} split, and is trained on, as it was named itself"


def _foreign_folders(paths: Sequence[str]) -> dict[str, str]:
    """The folders that hold something else, by what they hold. "" is the folder itself."""
    found = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name in _MARKS:
            found[folder] = _MARKS[name]
    return found


def _ancestors(path: str) -> list[str]:
    """`a/b/c.json` → "", a, a/b."""
    return ["", *accumulate(path.split("/")[:-1], lambda folder, name: f"{folder}/{name}")]


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
    return f"{', '.join(paths[:3])}{more} {'is' if len(paths) == 1 else 'are'}"
