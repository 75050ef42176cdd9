"""Files that another program may have put there, opened so that nothing it does has another file read in their place.

    with OpenDirectory.at(path) as directory:                  who named `path` made the links on the way to it
        adapter = directory.below("adapter-0123456789ab")      by its descriptor: below `path` no link is followed
        weights = adapter.file("adapter_model.safetensors")    held open: what was measured is what is read later

In a pod the trainer, which runs others' code, writes to a volume that the pusher reads, and only the pusher has the
push Secret mounted: a link to it must not end up in an image. So whoever holds a credential reads the files of others
through an OpenDirectory and nowhere by a path. It takes regular files of one name alone, and what the name leads to
afterwards does not matter.
"""

import errno
import hashlib
import os
import shlex
import stat
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tuner.durable import sync_open_directory
from tuner.errors import DataError, InputMissingError

_CHUNK_BYTES = 1 << 20
_TEXT_BYTES = 64 << 20  # more is no file of ours; a trainer's could be endless
# NONBLOCK: opening a FIFO would otherwise wait for somebody who writes to it.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_SHARE = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WRITE_ANEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class OpenFile:
    """A regular file, held open for as long as somebody has this value. `path` is for words: it is not opened again."""

    def __init__(self, descriptor: int, path: Path) -> None:
        """Takes the descriptor over. Raises DataError when it is of no regular file."""
        self.path = path
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise _refused(path, f"is {_kind_of(status)}")
        self.size_bytes, self.modified_at_s, self.names = status.st_size, status.st_mtime, status.st_nlink
        self._seen = _state(status)

    @classmethod
    def at(cls, path: Path) -> Self:
        """The file that a path leads to, through whatever links: for files that nobody else writes, or a user named."""
        try:
            return cls(os.open(path, _READ & ~os.O_NOFOLLOW), path)
        except OSError as error:
            raise _not_opened(path, error) from error

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills the view with what stands at `offset`. Raises DataError when the file has changed since it was opened.

        Any number of threads may read at once.
        """
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._descriptor, [view[done:]], offset + done)
            except OSError as error:  # as an OSError it would look like a broken network to an upload
                raise DataError(f"{self.path}: cannot be read any more: {error.strerror}") from error
            self.check_unchanged()
            if not count:
                raise DataError(f"{self.path}: is shorter than {offset + len(view):,} bytes")
            done += count

    def check_unchanged(self) -> None:
        """Raises DataError when its content is, or may be, another one than when it was opened."""
        if _state(os.fstat(self._descriptor)) != self._seen:
            raise DataError(f"{self.path}: changed while it was being read", hint="let it be and try again")

    def chunks(self) -> Iterator[memoryview]:
        """The whole content; a piece is good until the next one is asked for."""
        buffer = memoryview(bytearray(min(_CHUNK_BYTES, self.size_bytes)))
        for offset in range(0, self.size_bytes, _CHUNK_BYTES):
            chunk = buffer[: self.size_bytes - offset]
            self.read_into(chunk, offset)
            yield chunk

    def sha256(self) -> str:
        """In hexadecimal digits."""
        sha256 = hashlib.sha256()
        for chunk in self.chunks():
            sha256.update(chunk)
        return sha256.hexdigest()

    def content(self) -> bytes:
        """Of a small file. Raises DataError for one that is none."""
        if self.size_bytes > _TEXT_BYTES:
            raise DataError(f"{self.path}: has {self.size_bytes:,} bytes, and a file of this name has few")
        content = bytearray(self.size_bytes)
        if content:
            self.read_into(memoryview(content), 0)
        return bytes(content)


class OpenDirectory:
    """A directory, held by its descriptor until the block ends; files that were opened in it live on.

    A file is opened once: whoever asks for it again gets the same one. `path` is for words alone.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path = path
        self._descriptor = descriptor
        self._close = weakref.finalize(self, os.close, descriptor)
        self._files: dict[str, OpenFile] = {}

    @classmethod
    def at(cls, path: Path) -> Self:
        """The one that a user named or a volume is mounted at. Raises InputMissingError for what is no directory."""
        try:
            return cls(os.open(path, _DIRECTORY), path)
        except OSError as error:
            raise _not_opened(path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._close()

    def below(self, *names: str) -> "OpenDirectory":
        """The directory `names[0]/names[1]/…` in this one, itself when there is no name.

        Raises DataError when one of them is a link or would lead out, InputMissingError when it is not there.
        """
        here = OpenDirectory(os.dup(self._descriptor), self.path)
        for name in names:
            with here:
                here = here._directory(name)
        return here

    def file(self, name: str) -> OpenFile:
        """A regular file of one name. Raises DataError for a link and whatever else is none, InputMissingError."""
        if name not in self._files:
            path = self.path / _checked(name, self.path)
            try:
                descriptor = os.open(name, _READ, dir_fd=self._descriptor)
            except OSError as error:
                raise self._why_not(name, error) from error
            self._files[name] = _of_one_name(OpenFile(descriptor, path))
        return self._files[name]

    def names(self) -> list[str]:
        """Of whatever is in it, sorted."""
        return sorted(os.listdir(self._descriptor))  # noqa: PTH208  # pathlib knows no descriptors

    def directories(self) -> list[str]:
        """The names in it of directories, which a link to one is not."""
        return [name for name in self.names() if (found := self._look(name)) and stat.S_ISDIR(found.st_mode)]

    def has(self, name: str) -> bool:
        """Whether anything has that name, be it a link that leads nowhere."""
        return self._look(name) is not None

    def digests(self) -> dict[str, str]:
        """Name → sha256 of every file directly in it, sorted. Raises DataError when one is no regular file."""
        digests = {}
        for name in self.names():
            status = self._look(name)
            if status is not None and not stat.S_ISDIR(status.st_mode):
                digests[name] = self.file(name).sha256()
        return digests

    def write(self, name: str, content: bytes) -> None:
        """The file, whole or not at all and on the disk, instead of whatever has that name. Raises OSError."""
        temporary = f".{_checked(name, self.path)}.tmp"
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self._descriptor)
        with os.fdopen(os.open(temporary, _WRITE_ANEW, 0o666, dir_fd=self._descriptor), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        sync_open_directory(self._descriptor)

    def open_shared(self, name: str) -> int:
        """A descriptor to lock, or to add to, of a file that is made if it is not there: the caller closes it.

        Raises DataError for what is no regular file of one name.
        """
        path = self.path / _checked(name, self.path)
        try:
            descriptor = os.open(name, _SHARE, 0o660, dir_fd=self._descriptor)
        except OSError as error:
            raise self._why_not(name, error) from error
        file = _of_one_name(OpenFile(descriptor, path))
        return os.dup(file._descriptor)

    def _directory(self, name: str) -> "OpenDirectory":
        path = self.path / _checked(name, self.path)
        try:
            return OpenDirectory(os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._descriptor), path)
        except OSError as error:
            status = self._look(name)
            if status is None or stat.S_ISDIR(status.st_mode):
                raise _not_opened(path, error) from error
            raise DataError(f"{path}: is {_kind_of(status)}, where a directory is to be") from error

    def _look(self, name: str) -> os.stat_result | None:
        try:
            return os.stat(_checked(name, self.path), dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def _why_not(self, name: str, error: OSError) -> DataError | InputMissingError:
        """Of what the kernel did not open: what it is, for the sentence."""
        path, status = self.path / name, self._look(name)
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR) and status is not None:
            return _refused(path, f"is {_kind_of(status)}")
        return _not_opened(path, error)


def _checked(name: str, directory: Path) -> str:
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise DataError(f"{directory}: {name!r} is no name of anything in it")
    return name


def _of_one_name(file: OpenFile) -> OpenFile:
    if file.names == 0:
        raise InputMissingError(f"{file.path}: not there any more")
    if file.names > 1:
        raise _refused(file.path, f"has {file.names} names (hard links)")
    return file


def _state(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _kind_of(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "no file")


def _refused(path: Path, what: str) -> DataError:
    copied = shlex.join(["cp", "-rL", str(path.parent), f"{path.parent}-copy"])
    return DataError(
        f"{path}: {what}; only regular files of one name are read here, as a link may lead to a secret",
        hint=f"where what it leads to is meant, this makes a directory of plain files: {copied}",
    )


def _not_opened(path: Path, error: OSError) -> InputMissingError:
    if isinstance(error, FileNotFoundError):
        return InputMissingError(f"{path}: not there")
    return InputMissingError(f"{path}: cannot be read: {error.strerror}")
