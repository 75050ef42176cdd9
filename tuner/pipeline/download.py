"""Files from elsewhere → files on disk, whole and checked.

A download is `NAME.part` with `NAME.part.json` beside it until it is whole, checked and renamed to `NAME`;
`NAME.fetched.json` then says where it came from, so that the next run does not fetch it again. A killed run goes on
where it stopped. What the origin says of a file's version guards against joining two.
"""

import errno
import gzip
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from tuner.content import check_readable, hash_file
from tuner.durable import sync_tree
from tuner.errors import ConfigError, DataError, InterruptedRunError, ServiceError, TunerError
from tuner.folder import Use
from tuner.pipeline.web import Answer, StaleError, Transfer, TransientError, Version
from tuner.retry import Retries
from tuner.runspec import Contract, FetchedFile, Progress, Reporter

_MIB = 1024**2
_SAVE_EVERY_BYTES = _MIB  # how much of a part a killed process fetches again
_MOST_PARTS = 256
_ROOM_BYTES = 64 * 1024
_POLL_S = 0.1
_FULL_DISK = {
    errno.ENOSPC: "no disk space",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or a limit allows",
}


def format_bytes(size: int) -> str:
    """`13.1 MB`: decimal units, as download tools show them."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} TB"


def no_space(directory: Path, needed_bytes: int, free_bytes: int) -> ConfigError:
    return ConfigError(
        f"no disk space at {directory}: need {format_bytes(needed_bytes)}, have {format_bytes(free_bytes)}",
        hint="free some, or choose another --work-dir; what has arrived is kept",
    )


@contextmanager
def disk_errors(directory: Path) -> Iterator[None]:
    """A full disk or quota in our words."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        free = format_bytes(shutil.disk_usage(directory).free)
        raise ConfigError(
            f"{_FULL_DISK[error.errno]} at {directory}: {free} left",
            hint="free some, or choose another --work-dir; what has arrived is kept",
        ) from error


def interrupted() -> InterruptedRunError:
    return InterruptedRunError(
        "stopped while fetching; what has arrived is kept", hint="run the same command again to go on"
    )


# ── all at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Origin(Protocol):
    """Where a file comes from. Both raise TransientError and TunerErrors; `open` also StaleError."""

    def open(
        self, at: int = 0, end: int | None = None, version: Version | None = None
    ) -> AbstractContextManager[Answer]:
        """Bytes `at` up to `end` of this version, or the whole file where that is not to be had or not asked for."""

    def is_unchanged(self, version: Version) -> bool: ...


@dataclass(frozen=True)
class Wanted:
    """One file to download as `name`. `url` and `query_sha256` say which data it is, and may be shown.

    `is_part`: one of the files that a folder or a pattern stands for, of which some may be empty.
    """

    name: str
    url: str
    query_sha256: str
    sha256: str | None
    origin: Origin
    use: Use = "training"
    is_part: bool = False


class _Space:
    """What is free on the disk of a directory, less what downloads were promised. Thread-safe."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._free = shutil.disk_usage(directory).free
        self._promised = 0
        self._lock = threading.Lock()

    def promise(self, size: int) -> None:
        """ConfigError when all that was promised does not fit."""
        with self._lock:
            self._promised += size
            promised = self._promised
        if promised > self._free:
            raise no_space(self._directory, promised, self._free)


@dataclass(frozen=True)
class _Shared:
    """What all downloads of a run have in common."""

    data_dir: Path
    space: _Space
    transfer: Transfer
    reporter: Reporter
    stop: threading.Event
    connections: threading.BoundedSemaphore


def download_all(
    wanted: Sequence[Wanted],
    data_dir: Path,
    reporter: Reporter,
    *,
    cancelled: threading.Event,
    stop: threading.Event,
    transfer: Transfer,
) -> tuple[dict[str, FetchedFile], dict[str, TunerError]]:
    """What arrived and what failed, by name. One that fails does not stop the others.

    Raises InterruptedRunError soon after `cancelled` is set; `stop` is set in the end, however it ends.
    """
    arrived: dict[str, FetchedFile] = {}
    failed: dict[str, TunerError] = {}
    shared = _Shared(
        data_dir, _Space(data_dir), transfer, reporter, stop, threading.BoundedSemaphore(transfer.connections)
    )
    executor = ThreadPoolExecutor(max_workers=transfer.connections, thread_name_prefix="fetch")
    try:
        running = {executor.submit(_Download(each, shared).run): each.name for each in wanted}
        while running:
            if cancelled.is_set():
                raise interrupted()
            done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
            for task in done:
                name = running.pop(task)
                try:
                    arrived[name] = task.result()
                except TunerError as error:
                    failed[name] = error
    finally:
        stop.set()
        executor.shutdown(wait=True, cancel_futures=True)
    return arrived, failed


# ── one download ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _StoppedError(Exception):
    """No more bytes are needed: another part failed, or the run was interrupted."""


@dataclass
class _Part:
    """Bytes `start` up to `end` of the file (None: its length is unknown); `at` is the next one to come."""

    start: int
    at: int
    end: int | None

    @property
    def is_whole(self) -> bool:
        return self.end is not None and self.at >= self.end


class _Partial(Contract):
    """NAME.part.json: what is in NAME.part, and of which version of the file.

    `boot`: in which life of this machine it was written; None: all of it is on the disk itself. After a power cut
    nobody knows which of the pages that were only in memory got there.
    """

    url: str
    query_sha256: str
    version: Version
    size_bytes: int | None
    parts: tuple[tuple[int, int, int | None], ...]
    boot: str | None

    @property
    def is_sound(self) -> bool:
        """Whether the parts lie one after the other and make up the file."""
        ends = [end for _, _, end in self.parts]
        starts = [start for start, _, _ in self.parts]
        return (
            bool(self.parts)
            and starts == [0, *ends[:-1]]
            and ends[-1] == self.size_bytes
            and all(start <= at and (end is None or at <= end) for start, at, end in self.parts)
        )


class _Record(Contract):
    """NAME.fetched.json: where NAME came from."""

    url: str
    query_sha256: str
    sha256: str
    size_bytes: int
    version: Version


class _Download:
    """One file on its way to the disk."""

    def __init__(self, wanted: Wanted, shared: _Shared) -> None:
        self._wanted = wanted
        self._shared = shared
        self._transfer = shared.transfer
        self._path = shared.data_dir / wanted.name
        self._part_path = shared.data_dir / f"{wanted.name}.part"
        self._partial_path = shared.data_dir / f"{wanted.name}.part.json"
        self._decoded_path = shared.data_dir / f"{wanted.name}.decoded"
        self._record_path = shared.data_dir / f"{wanted.name}.fetched.json"
        self._lock = threading.Lock()
        self._parts = [_Part(0, 0, None)]
        self._size: int | None = None
        self._version = Version()
        self._is_framed = True
        self._promised = 0
        self._may_split = True
        self._told = False
        self._failure: BaseException | None = None  # the first of some part: the others stop
        self._pool: ThreadPoolExecutor
        self._tasks: list[Future[None]] = []

    def run(self) -> FetchedFile:
        if file := self._already_there():
            self._shared.reporter.note(f"{self._wanted.name}: already there")
            return file
        self._load_partial()
        for _ in range(self._transfer.attempts + 1):
            try:
                self._fill_all()
                return self._finish()
            except StaleError:
                self._may_split = False  # whatever confused the server, one plain GET does not
                self._discard()
        raise ServiceError(f"{self._wanted.url}: the file changes on the server faster than it downloads")

    # what an earlier run left

    def _already_there(self) -> FetchedFile | None:
        """The file of an earlier run, when it is the one asked for and the origin has no newer one."""
        wanted = self._wanted
        try:
            record = _Record.model_validate_json(self._record_path.read_bytes())
            size = self._path.stat().st_size
        except (FileNotFoundError, ValidationError):
            return None
        if (record.url, record.query_sha256) != (wanted.url, wanted.query_sha256):
            return None
        pin = wanted.sha256
        if size != record.size_bytes or (pin and pin != record.sha256) or hash_file(self._path) != record.sha256:
            return None
        if not pin:
            try:
                with self._shared.connections:
                    if not wanted.origin.is_unchanged(record.version):
                        return None
            except TransientError as retry:
                # A file that is whole and known is better than none: an expired signature must not stop a resumed run.
                self._shared.reporter.warn(
                    f"{wanted.name}: already there, not compared with the server: {retry.reason}"
                )
        return FetchedFile(source=wanted.url, path=str(self._path), sha256=record.sha256, size_bytes=size)

    def _load_partial(self) -> None:
        """Go on from NAME.part when it belongs to this URL and the origin can be asked for the same version."""
        try:
            kept = _Partial.model_validate_json(self._partial_path.read_bytes())
            on_disk = self._part_path.stat().st_size
        except (FileNotFoundError, ValidationError):
            self._discard()
            return
        is_mine = (kept.url, kept.query_sha256) == (self._wanted.url, self._wanted.query_sha256)
        is_on_disk = kept.boot in (None, _boot()) and kept.is_sound
        written_to = max((at for start, at, _ in kept.parts if at > start), default=0)
        if not is_mine or not is_on_disk or kept.version.validator is None or written_to > on_disk:
            self._discard()
            return
        self._version, self._size = kept.version, kept.size_bytes
        self._parts = [_Part(*part) for part in kept.parts]
        if self._size is not None:
            self._promise(self._size - self._received())

    def _promise(self, size: int) -> None:
        self._shared.space.promise(size - self._promised)
        self._promised = size

    def _discard(self) -> None:
        self._parts = [_Part(0, 0, None)]
        self._size, self._version = None, Version()
        for path in (self._part_path, self._partial_path, self._decoded_path):
            path.unlink(missing_ok=True)

    def _save_partial(self, *, is_on_disk: bool = False) -> None:
        with self._lock, disk_errors(self._path.parent):
            _Partial(
                url=self._wanted.url,
                query_sha256=self._wanted.query_sha256,
                version=self._version,
                size_bytes=self._size,
                parts=tuple((part.start, part.at, part.end) for part in self._parts),
                boot=None if is_on_disk else _boot(),
            ).save(self._partial_path, durably=is_on_disk)

    # bytes

    def _fill_all(self) -> None:
        """Every part, several at a time. Raises what the first that failed raised."""
        self._failure = None
        self._tasks = []
        with ThreadPoolExecutor(self._transfer.connections, "part") as self._pool:
            for part in self._parts:
                self._tasks.append(self._pool.submit(self._fill_part, part))
            for task in self._tasks:  # it grows when the first answer is split
                task.result()
        if self._failure is None:
            return
        if self._received() and not isinstance(self._failure, StaleError):
            self._keep()
        raise self._failure

    def _keep(self) -> None:
        """Put what has arrived where the next run finds it; all parts are at rest."""
        try:
            sync_tree(self._part_path)
            self._save_partial(is_on_disk=True)
        except (ConfigError, OSError):  # a full disk: a little of what came last makes room for saying what is there
            last = max((part for part in self._parts if part.at > part.start), key=lambda part: part.at)
            last.at = max(last.start, last.at - _ROOM_BYTES)
            with suppress(ConfigError, OSError):  # what was saved before is older, not wrong
                os.truncate(self._part_path, last.at)
                self._save_partial()

    def _fill_part(self, part: _Part) -> None:
        try:
            self._fill(part)
        except BaseException as error:  # whatever it is, it is raised again where this download is waited for
            with self._lock:
                self._failure = self._failure or error

    def _fill(self, part: _Part) -> None:
        """Request the part until it is whole; attempts count anew whenever bytes arrived that were not there yet."""
        retries = Retries(self._transfer.backoff, attempts=self._transfer.attempts)
        furthest = part.at
        while not part.is_whole:
            self._check_wanted()
            try:
                with self._shared.connections:
                    self._request(part)
            except TransientError as retry:
                self._check_wanted()
                if part.at > furthest + self._transfer.stall_bytes:
                    retries.progressed()
                furthest = max(furthest, part.at)
                wait_s = retries.next_wait_s()
                if wait_s is None:
                    hint = "run again: it goes on from here"
                    if not self._received():
                        hint = "is the address right, and the network up? then run again"
                    raise ServiceError(
                        f"{self._wanted.url}: {retry.reason}, {retries.failures} times", hint=hint
                    ) from retry.__cause__
                if retry.wait_s is not None:  # the server knows when, also when that is at once: tries are few
                    wait_s = retry.wait_s
                    if wait_s > self._transfer.longest_wait_s:
                        raise ServiceError(
                            f"{self._wanted.url}: {retry.reason}, and asks to come back in {wait_s:.0f} s"
                        ) from retry.__cause__
                self._tell_of_retry(retry.reason)
                self._pause(wait_s)

    def _tell_of_retry(self, reason: str) -> None:
        """Once a file, as each try may take a while in which nothing seems to happen."""
        with self._lock:
            was_told, self._told = self._told, True
        if not was_told:
            self._shared.reporter.warn(f"{self._wanted.url}: {reason}; trying again")

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._check_wanted()
            self._shared.stop.wait(min(left, _POLL_S))

    def _check_wanted(self) -> None:
        if self._shared.stop.is_set() or self._failure:
            raise _StoppedError

    def _request(self, part: _Part) -> None:
        can_go_on = self._version.validator is not None and (part.at > 0 or len(self._parts) > 1)
        with self._wanted.origin.open(part.at, part.end, self._version if can_go_on else None) as answer:
            if answer.is_whole:  # also when a range was asked for: another version, or no ranges here
                if len(self._parts) > 1:
                    raise StaleError
                self._accept(answer, part)
            elif self._size is None:
                self._size = part.end = answer.size_bytes
            elif answer.size_bytes not in (None, self._size):
                raise StaleError
            self._write(answer, part)

    def _accept(self, answer: Answer, part: _Part) -> None:
        """Begin the file with an answer that holds all of it."""
        part.at = 0
        self._part_path.unlink(missing_ok=True)
        self._version, self._is_framed = answer.version, answer.is_framed
        self._size = part.end = answer.size_bytes
        if self._size is not None:
            self._promise(self._size)
            can_split = answer.has_ranges and answer.version.validator is not None and self._may_split
            if can_split and self._size > self._transfer.split_bytes:
                self._split(part, self._size)
        self._save_partial()

    def _split(self, first: _Part, size: int) -> None:
        """The answer that runs goes on as the first part; other connections ask for the others."""
        step = max(self._transfer.part_bytes, -(-size // _MOST_PARTS))
        others = [_Part(start, start, min(start + step, size)) for start in range(step, size, step)]
        with self._lock:
            first.end = min(step, size)
            self._parts = [first, *others]
        self._tasks += [self._pool.submit(self._fill_part, part) for part in others]

    def _write(self, answer: Answer, part: _Part) -> None:
        descriptor = os.open(self._part_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            saved_at = part.at
            for chunk in answer.chunks:
                self._check_wanted()
                room = len(chunk) if part.end is None else part.end - part.at
                wanted = memoryview(chunk)[:room]
                with disk_errors(self._path.parent):
                    while wanted:
                        written = os.pwrite(descriptor, wanted, part.at)
                        wanted = wanted[written:]
                        part.at += written
                self._tell()
                if part.at - saved_at >= _SAVE_EVERY_BYTES:
                    self._save_partial()
                    saved_at = part.at
                if len(chunk) > room:  # the first part of a split file: its answer holds the whole file
                    break
        finally:
            os.close(descriptor)
        if part.end is None:
            part.end = self._size = part.at
        elif part.at < part.end:
            raise TransientError(f"the answer ended after {part.at} of {part.end} bytes")
        self._save_partial()

    def _received(self) -> int:
        return sum(part.at - part.start for part in self._parts)

    def _tell(self) -> None:
        self._shared.reporter.progress(
            Progress(stage="fetch", task=self._wanted.name, done=self._received(), total=self._size, unit="B")
        )

    # the whole file

    def _finish(self) -> FetchedFile:
        """Check the content, then give it its name."""
        wanted, url = self._wanted, self._wanted.url
        size = self._part_path.stat().st_size if self._part_path.exists() else 0
        try:
            if size != self._size:
                raise DataError(f"{url}: {size} bytes are on the disk, {self._size} arrived")
            if size == 0 and not wanted.is_part:
                raise DataError(f"{url}: the file is empty")
            whole = self._decoded()
            check_readable(whole, wanted.name, url, may_be_empty=wanted.is_part)
            digest = hash_file(whole)
            if wanted.sha256 and digest != wanted.sha256:
                raise DataError(
                    f"{url}: its sha256 is {digest}, the URL pins {wanted.sha256}",
                    hint="the file changed, or the pin is another file's",
                )
        except DataError:
            self._discard()  # going on from bad bytes would fail for ever
            raise
        if not self._is_framed and not wanted.sha256:
            self._shared.reporter.warn(
                f"{url}: the server did not say how long the file is; only #sha256= would prove that it is whole"
            )
        size = whole.stat().st_size
        sync_tree(whole)
        self._record_path.unlink(missing_ok=True)
        whole.replace(self._path)
        record = _Record(
            url=url, query_sha256=wanted.query_sha256, sha256=digest, size_bytes=size, version=self._version
        )
        record.save(self._record_path)
        self._partial_path.unlink(missing_ok=True)
        self._part_path.unlink(missing_ok=True)
        return FetchedFile(source=url, path=str(self._path), sha256=digest, size_bytes=size)

    def _decoded(self) -> Path:
        """NAME.part, or what it holds when the server sent it with a Content-Encoding.

        Ranges, lengths and ETags are of the encoded bytes, so those are what is downloaded. Servers also say gzip of a
        file that is a .gz itself: that stays as it is.
        """
        if self._version.encoding is None or self._wanted.name.lower().endswith((".gz", ".gzip", ".tgz")):
            return self._part_path
        decoded = self._decoded_path
        try:
            with disk_errors(decoded.parent), gzip.open(self._part_path) as packed, decoded.open("wb") as file:
                while chunk := packed.read(_MIB):
                    self._check_wanted()
                    file.write(chunk)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{self._wanted.url}: sent with Content-Encoding gzip, and it is no gzip") from error
        except BaseException:
            decoded.unlink(missing_ok=True)
            raise
        return decoded


def _boot() -> str:
    """Another one after every start of the machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
