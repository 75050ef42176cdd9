"""A directory whose power fails between any two operations: every state that the disk could be in afterwards.

What POSIX promises (fsync(2)) is that the contents of a file are on the disk once it was fsynced, and the names in a
directory once that was. Until then each name and each content may be the old or the new one, by itself. The operations
are those of this very process on a real file system: a directory is looked at before and after each call that changes
names or fsyncs, so what libraries write by other ways is seen, too.
"""

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pytest

_CALLS = ("fsync", "fdatasync", "rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link")
_ROOT = 0

Seen = TypeVar("Seen")
Names = dict[str, int]  # in a directory: name → number of a file or directory


@dataclass(frozen=True)
class Moment:
    """What there is, in memory and on the disk, when the power fails after `operation`."""

    operation: str
    names: dict[int, Names]  # directory → as every process sees it
    contents: dict[int, str]  # file → key of its bytes
    synced_names: dict[int, Names]
    synced_contents: dict[int, str]


# How the kernel may have chosen: of a name's (on the disk, in memory) the one that is left, None for no such name.
Choice = Callable[[int | None, int | None], int | None]
SYNCED = "nothing but what was fsynced"
_CHOICES: dict[str, tuple[Choice, bool]] = {
    SYNCED: (lambda old, new: old, False),
    "all of it": (lambda old, new: new, True),
    "every name, and no contents": (lambda old, new: new, False),
    "removals, and nothing new": (lambda old, new: new if new is None else old, False),
    "what is new, and no removals": (lambda old, new: old if new is None else new, False),
}


class Disk:
    """Records what happens below `root` while it is entered. What is there before is on the disk."""

    def __init__(self, root: Path, store: Path) -> None:
        self._root = root
        self._store = store  # the bytes of every file that there ever was, by key
        self._numbers: dict[tuple[int, int], int] = {}  # (device, inode) → our number, as inodes come back
        self._next = _ROOT
        self._synced_names: dict[int, Names] = {}
        self._synced_contents: dict[int, str] = {}
        self._patch = pytest.MonkeyPatch()
        self.moments: list[Moment] = []
        store.mkdir()

    def __enter__(self) -> "Disk":
        self._look("the beginning")
        first = self.moments[0]
        self._synced_names |= first.names
        self._synced_contents |= first.contents
        self.moments = []
        self._look("the beginning")
        for name in _CALLS:
            self._patch.setattr(os, name, self._recorded(name, getattr(os, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        self._look("the end")

    def _recorded(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            is_sync = name in ("fsync", "fdatasync")
            path = Path(f"/proc/self/fd/{args[0]}").readlink() if is_sync else args[0]
            self._look(f"before {name} {path}")
            result = call(*args, **kwargs)
            if is_sync:
                self._sync(os.fstat(args[0]))
            self._look(f"{name} {path}")
            return result

        return recorded

    def _sync(self, status: os.stat_result) -> None:
        self._look("before a sync")
        number = self._numbers.get((status.st_dev, status.st_ino))
        now = self.moments[-1]
        if number in now.names:
            self._synced_names[number] = now.names[number]
        elif number in now.contents:
            self._synced_contents[number] = now.contents[number]

    def _look(self, operation: str) -> None:
        names: dict[int, Names] = {}
        contents: dict[int, str] = {}
        seen: dict[tuple[int, int], int] = {}

        def number_of(status: os.stat_result) -> int:
            inode = (status.st_dev, status.st_ino)
            if inode not in self._numbers:
                self._numbers[inode] = self._next
                self._next += 1
            seen[inode] = self._numbers[inode]
            return seen[inode]

        def walk(directory: Path) -> int:
            number = number_of(directory.stat())
            names[number] = {}
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    names[number][entry.name] = walk(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    file = number_of(entry.stat(follow_symlinks=False))
                    names[number][entry.name] = file
                    contents[file] = self._kept(Path(entry.path))
            return number

        walk(self._root)
        self._numbers = seen
        moment = Moment(operation, names, contents, dict(self._synced_names), dict(self._synced_contents))
        if not self.moments or moment != replace(self.moments[-1], operation=operation):
            self.moments.append(moment)

    def _kept(self, path: Path) -> str:
        content = path.read_bytes()
        key = hashlib.blake2b(content, digest_size=16).hexdigest()
        kept = self._store / key
        if not kept.exists():
            kept.write_bytes(content)
        return key

    def cuts(self, random_ones: int = 2) -> Iterator["Cut"]:
        """Each moment, with each choice that the kernel may have made by then, in the order of time."""
        for number, moment in enumerate(self.moments):
            is_last = moment is self.moments[-1]
            for kept, (choice, with_contents) in _CHOICES.items():
                yield Cut(number, moment.operation, kept, is_last, _Tree(moment, choice, with_contents), self._store)
            for seed in range(random_ones):
                choice = _at_random(random.Random(f"{number} {seed}"))
                tree = _Tree(moment, choice, with_contents=False)
                yield Cut(number, moment.operation, f"chosen at random ({seed})", is_last, tree, self._store)

    def after_power_cuts(
        self, look: Callable[[Path], Seen], directory: Path, random_ones: int = 2
    ) -> list[tuple["Cut", Seen]]:
        """What `look` sees of what each power cut leaves of the root. It is asked once of what is left alike, and may
        change what it is given."""
        seen: dict[str, Seen] = {}
        cuts = list(self.cuts(random_ones))
        for cut in cuts:
            if cut.tree.key not in seen:
                root = directory / "after-a-power-cut"
                cut.make(root)
                seen[cut.tree.key] = look(root)
                shutil.rmtree(root)
        return [(cut, seen[cut.tree.key]) for cut in cuts]


@dataclass(frozen=True)
class Cut:
    """A power cut after operation `number`; `kept` says what of it had come to the disk."""

    number: int
    operation: str
    kept: str
    is_last: bool
    tree: "_Tree"
    store: Path

    def __str__(self) -> str:
        return f"after operation {self.number}, {self.operation}; on the disk was {self.kept}"

    def make(self, root: Path) -> None:
        """Make what is left. Its files are links to what all cuts share: to be replaced or removed, not written to."""
        for directory in self.tree.directories:
            (root / directory).mkdir()
        for name, key in self.tree.files.items():
            if key is None:
                (root / name).touch()
            else:
                os.link(self.store / key, root / name)


def _at_random(generator: random.Random) -> Choice:
    return lambda old, new: generator.choice((old, new))


@dataclass
class _Tree:
    moment: Moment
    choice: Choice
    with_contents: bool
    files: dict[str, str | None] = field(default_factory=dict)  # path → key; None: no contents came to the disk
    directories: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._walk(_ROOT, "")

    def _walk(self, directory: int, path: str) -> None:
        self.directories.append(path)
        old = self.moment.synced_names.get(directory, {})
        new = self.moment.names.get(directory, {} if directory in self.moment.synced_names else old)
        for name in sorted({*old, *new}):
            number = self.choice(old.get(name), new.get(name))
            if number is None:
                continue
            if number in self.moment.names or number in self.moment.synced_names:
                self._walk(number, f"{path}{name}/")
            elif self.with_contents and number in self.moment.contents:
                self.files[f"{path}{name}"] = self.moment.contents[number]
            else:
                self.files[f"{path}{name}"] = self.moment.synced_contents.get(number)

    @cached_property
    def key(self) -> str:
        return repr((sorted(self.files.items()), self.directories))
