"""Layers → files on disk, where nothing that a layer says can reach outside the directory.

Only regular files and directories are made, by descriptors of their parents, which are opened without following links;
no link is ever made, so none can be followed. Owners, modes, times and attributes are not taken over.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import DataError
from tuner.registry.tar import Member, TarReader
from tuner.runspec import Reporter

_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"


@dataclass(frozen=True)
class Limits:
    """What an image may take; the ratio counts from `ratio_from_bytes` on, small files compress well."""

    download_bytes: int = 512 << 30
    total_bytes: int = 512 << 30
    file_bytes: int = 128 << 30
    files: int = 100_000
    ratio: int = 200
    ratio_from_bytes: int = 10 << 20
    depth: int = 32
    path_bytes: int = 1024


class Extractor:
    """Applies layers, lowest first, to an empty directory that nobody else writes to.

    Only what is under `only_under` is kept, and stands without it; an empty string keeps everything, and so does
    `keep_others`, which only takes the prefix off where it is. A context manager: it holds the directory open.
    """

    def __init__(
        self, root: Path, only_under: str, limits: Limits, reporter: Reporter, *, keep_others: bool = False
    ) -> None:
        self._root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        self._only_under = tuple(part for part in only_under.split("/") if part)
        self._keep_others = keep_others
        self._limits = limits
        self._reporter = reporter
        self._layer = 0
        self._layer_of: dict[tuple[str, ...], int] = {}  # every path made, files and directories → its layer
        self._digests: dict[tuple[str, ...], str] = {}
        self._members = 0

    def __enter__(self) -> "Extractor":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._root_fd)

    @property
    def files(self) -> dict[str, str]:
        """Every file (relative to the directory) → its sha256."""
        return {"/".join(path): digest for path, digest in sorted(self._digests.items())}

    def apply(self, layer: TarReader) -> None:
        """Unpacks one layer over those before. Raises DataError for a name, link or size that is not allowed."""
        self._layer += 1
        for member in layer:
            full_path = self._check_name(member.name)
            path = self._inside(full_path)
            if path is None:
                continue
            self._members += 1
            if self._members > self._limits.files:
                raise DataError(f"the image has more than {self._limits.files:,} files")
            name = full_path[-1] if full_path else ""
            if name == _OPAQUE:
                self._clear(path[:-1])
            elif name.startswith(_WHITEOUT):
                self._remove((*path[:-1], name.removeprefix(_WHITEOUT)))
            elif member.kind == "file":
                self._check_size(member)
                self._add_file(path, layer.chunks())
            elif member.kind == "directory":
                self._make_directories(path)
            elif member.kind == "special file":
                raise DataError(f"{member.name!r} in the image is neither a file nor a directory")
            else:
                self._pass_over_link(member, full_path)

    def add_named_file(self, name: str, chunks: Iterable[bytes]) -> None:
        """Makes one file that is not in a tar. Raises DataError as `apply` does."""
        path = self._inside(self._check_name(name))
        if path is not None:
            self._add_file(path, chunks)

    def _add_file(self, path: tuple[str, ...], chunks: Iterable[bytes]) -> None:
        """The last of several files with one name stays."""
        if not path:
            raise DataError("a file in the image stands where its directory should be")
        if self._layer_of.get(path) == self._layer:
            self._reporter.warn(f"{'/'.join(path)} is in the image twice; the last one counts")
        self._make_directories(path[:-1])
        self._unlink_tree(path)
        parent_fd = self._open_directory(path[:-1])
        sha256 = hashlib.sha256()
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(path[-1], flags, 0o644, dir_fd=parent_fd), "wb") as file:
                for chunk in chunks:
                    sha256.update(chunk)
                    file.write(chunk)
        finally:
            os.close(parent_fd)
        self._layer_of[path] = self._layer
        self._digests[path] = sha256.hexdigest()

    def _inside(self, path: tuple[str, ...]) -> tuple[str, ...] | None:
        """The path below `only_under`; None for what is not there, or is `only_under`'s parent.

        A whiteout of `only_under` itself, or of a parent, empties what the layers before have put there.
        """
        depth = len(self._only_under)
        if path[:depth] == self._only_under:
            return path[depth:]
        parent, name = path[:-1], path[-1] if path else ""
        if name.startswith(_WHITEOUT) and parent == self._only_under[: len(parent)]:
            hidden = self._only_under[len(parent)]
            if name in (_OPAQUE, f"{_WHITEOUT}{hidden}"):
                self._clear(())
        return path if self._keep_others else None

    def _check_name(self, name: str) -> tuple[str, ...]:
        """The parts of a member's name. Raises DataError for one that no honest image has."""
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        reason = None
        if name.startswith("/"):
            reason = "is absolute"
        elif ".." in parts:
            reason = "leads out of its directory"
        elif any(ord(character) < 32 or ord(character) == 127 for character in name):
            reason = "has control characters"
        elif len(parts) > self._limits.depth or len(name.encode()) > self._limits.path_bytes:
            reason = "is too long"
        elif any(len(part.encode()) > 255 for part in parts):
            reason = "has a part that is too long"
        if reason:
            raise DataError(f"the name {name[:100]!r} in the image {reason}; nothing was unpacked")
        return parts

    def _check_size(self, member: Member) -> None:
        if member.size_bytes > self._limits.file_bytes:
            raise DataError(
                f"{member.name!r} in the image has {member.size_bytes:,} bytes; "
                f"at most {self._limits.file_bytes:,} are allowed"
            )

    def _pass_over_link(self, member: Member, path: tuple[str, ...]) -> None:
        """A link inside is left out with a warning, one that leads out condemns the image."""
        # a hard link's target counts from the image's root, as does an absolute symbolic one's
        from_root = member.kind == "hard link" or member.link_target.startswith("/")
        resolved: list[str] = [] if from_root else list(path[:-1])
        for part in member.link_target.split("/"):
            if part == "..":
                if not resolved:
                    break
                resolved.pop()
            elif part not in ("", "."):
                resolved.append(part)
        else:
            if tuple(resolved[: len(self._only_under)]) == self._only_under:
                self._reporter.warn(f"{member.name} is a {member.kind} to {member.link_target!r}: left out")
                return
        raise DataError(f"{member.name!r} in the image is a {member.kind} to {member.link_target[:100]!r}, outside")

    # ── the directory ────────────────────────────────────────────────────────────────────────────────────────────

    def _open_directory(self, path: Sequence[str]) -> int:
        """A descriptor of a directory below the root, reached without following a link."""
        fd = os.dup(self._root_fd)
        for part in path:
            try:
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            finally:
                os.close(fd)
            fd = below
        return fd

    def _make_directories(self, path: tuple[str, ...]) -> None:
        for depth in range(1, len(path) + 1):
            part = path[:depth]
            if part in self._digests:  # a file of a layer below, or of this one, gives way
                self._unlink_tree(part)
            if part not in self._layer_of:
                parent_fd = self._open_directory(part[:-1])
                try:
                    os.mkdir(part[-1], 0o755, dir_fd=parent_fd)
                finally:
                    os.close(parent_fd)
            self._layer_of[part] = self._layer

    def _remove(self, path: tuple[str, ...]) -> None:
        """A whiteout: hides what layers below have put there, never what this layer puts there."""
        if self._layer_of.get(path, self._layer) < self._layer:
            self._unlink_tree(path)
        elif path in self._layer_of:
            self._clear(path)

    def _clear(self, path: tuple[str, ...]) -> None:
        """Removes from a directory what layers below have put there."""
        below = [
            other
            for other, layer in self._layer_of.items()
            if len(other) > len(path) and other[: len(path)] == path and layer < self._layer
        ]
        for other in sorted(below, key=len):
            if other in self._layer_of:  # not gone with its parent
                self._unlink_tree(other)

    def _unlink_tree(self, path: tuple[str, ...]) -> None:
        """Removes a file, or a directory with all that is in it, if it is there."""
        if path not in self._layer_of:
            return
        parent_fd = self._open_directory(path[:-1])
        try:
            if path in self._digests:
                os.unlink(path[-1], dir_fd=parent_fd)
            else:
                shutil.rmtree(path[-1], dir_fd=parent_fd)
        finally:
            os.close(parent_fd)
        for other in [other for other in self._layer_of if other[: len(path)] == path]:
            del self._layer_of[other]
            self._digests.pop(other, None)
