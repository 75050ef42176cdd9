"""Files that outlive a power cut, or a machine that vanishes: what these functions return from is on the disk itself.

What is written stays in the kernel's memory for up to half a minute, and gets to the disk in an order of the kernel's
own: a file may have its new name before it has its contents, and another be gone before either. fsync of a file brings
its contents there, fsync of a directory the names in it (fsync(2)). So whoever removes what went before, or says that
all is there, does that after one of these has returned. Tests cut the power between any two operations
(tests/power_cuts.py).
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# Some network file systems know no fsync of a directory, and some directories may be written but not read: nothing more
# can be done there. https://github.com/postgres/postgres/blob/REL_17_0/src/common/file_utils.c#L379
_NO_SYNC_OF_DIRECTORIES = frozenset({errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES})


@contextmanager
def replacing(path: Path, *, durably: bool = True) -> Iterator[BinaryIO]:
    """A file to write into, which has `path`'s name after the block: whole, or as before where the block raises.

    Not `durably`: whole for every other process, and after a power cut perhaps empty. One writer at a time.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a writer that was killed, or a link to somewhere else
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if durably:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durably:
        sync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def move(source: Path, target: Path) -> None:
    """Give a file or a directory, with all that is in it, another name on the same file system."""
    sync_tree(source)
    source.replace(target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    path.unlink(missing_ok=True)
    sync_directory(path.parent)


def make_directories(path: Path) -> None:
    """Make a directory and those above it, where they are not there. Raises what Path.mkdir raises."""
    if path.is_dir():
        return
    make_directories(path.parent)
    path.mkdir(exist_ok=True)  # another process may have been quicker
    sync_directory(path.parent)


def sync_tree(path: Path) -> None:
    """Bring a file to the disk, or a directory with everything below it. Links are names, and not followed."""
    if not path.is_dir():
        _sync_file(path)
        return
    for directory, _, names in os.walk(path, topdown=False):
        for name in names:
            _sync_file(Path(directory, name))
        sync_directory(Path(directory))


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk, where its file system can."""
    try:
        _sync(path, os.O_DIRECTORY)
    except OSError as error:
        if error.errno not in _NO_SYNC_OF_DIRECTORIES:
            raise


def sync_open_directory(descriptor: int) -> None:
    """The same for a directory that is open."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC_OF_DIRECTORIES:
            raise


def _sync_file(path: Path) -> None:
    if not path.is_symlink():
        _sync(path, os.O_NOFOLLOW)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
