"""One URL or many → files on disk, whole and checked.

A download is `NAME.part` with `NAME.part.json` beside it until it is whole, checked and renamed to `NAME`;
`NAME.fetched.json` then says where it came from, so that the next run does not fetch it again. A killed run goes on
where it stopped. The server's word for a file (its ETag or Last-Modified) guards against joining two versions.
"""

import errno
import logging
import os
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import parse_qs, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2
from pydantic import ValidationError

from tuner.content import WEB_PAGE_HINT, check_readable, hash_file
from tuner.errors import (
    ConfigError,
    DataError,
    DeniedError,
    InputMissingError,
    InterruptedRunError,
    ServiceError,
    TunerError,
)
from tuner.runspec import Contract, FetchedFile, Progress, Reporter, UrlSource
from tuner.urls import Allowed, address_problem, redacted, url_problem

_MIB = 1024**2
_REDIRECTS = 5
_RETRIED_STATUSES = frozenset({408, 425, 429})  # and every 5xx
_SAVE_EVERY_BYTES = _MIB  # how much of a part a killed process fetches again
# Failures of a connection: a direct one speaks as httpcore2, a proxied one as httpx2.
_WIRE_ERRORS = (httpx2.TransportError, httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError)


def resolve_name(host: str) -> Sequence[str]:
    """The addresses of a host name, in the order to try them. Raises OSError."""
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in answers))


@dataclass(frozen=True)
class Transfer:
    """How wide and how patient downloads are. `attempts` counts failures without progress in between."""

    connections: int = 8
    attempts: int = 5
    connect_timeout_s: float = 10
    stall_timeout_s: float = 30
    backoff_s: float = 0.5  # doubled after every failure
    longest_wait_s: float = 120  # a server that asks for more is down
    split_bytes: int = 64 * _MIB  # a larger file comes in parts where the server has ranges
    part_bytes: int = 32 * _MIB
    resolve: Callable[[str], Sequence[str]] = resolve_name


DEFAULT_TRANSFER = Transfer()


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
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ConfigError(
            f"no disk space at {directory}: {format_bytes(shutil.disk_usage(directory).free)} left",
            hint="free some, or choose another --work-dir; what has arrived is kept",
        ) from error


# ── all at once ──────────────────────────────────────────────────────────────────────────────────────────────────────


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


def download_all(
    sources: Mapping[int, UrlSource],
    queries: Mapping[str, str],
    data_dir: Path,
    allowed: Allowed,
    ca_file: str | None,
    reporter: Reporter,
    *,
    cancelled: threading.Event | None = None,
    transfer: Transfer = DEFAULT_TRANSFER,
) -> tuple[dict[int, FetchedFile], dict[int, TunerError]]:
    """What arrived and what failed, by the sources' keys. One that fails does not stop the others.

    `queries`: source name → the secret query of its URL. Raises InterruptedRunError soon after `cancelled` is set.
    """
    arrived: dict[int, FetchedFile] = {}
    failed: dict[int, TunerError] = {}
    outcomes: SimpleQueue[tuple[int, FetchedFile | BaseException]] = SimpleQueue()
    stop = threading.Event()
    executor = ThreadPoolExecutor(max_workers=transfer.connections, thread_name_prefix="fetch")
    with _Web(allowed, ca_file, transfer, reporter) as web:
        shared = _Shared(data_dir, web, _Space(data_dir), transfer, reporter, stop, executor.submit)
        try:
            for key, source in sources.items():
                settle = partial(_put_outcome, outcomes, key)
                _Download(source, queries.get(source.name, ""), shared, settle).start()
            while len(arrived) + len(failed) < len(sources):
                if cancelled is not None and cancelled.is_set():
                    raise InterruptedRunError(
                        "stopped while fetching; what has arrived is kept", hint="run the same command again to go on"
                    )
                try:
                    key, outcome = outcomes.get(timeout=0.1)
                except Empty:
                    continue
                if isinstance(outcome, FetchedFile):
                    arrived[key] = outcome
                elif isinstance(outcome, TunerError):
                    failed[key] = outcome
                else:
                    raise outcome  # a bug of ours
        finally:
            stop.set()
            executor.shutdown(wait=True, cancel_futures=True)
    return arrived, failed


def _put_outcome(
    outcomes: SimpleQueue[tuple[int, FetchedFile | BaseException]], key: int, outcome: FetchedFile | BaseException
) -> None:
    outcomes.put((key, outcome))


@dataclass(frozen=True)
class _Shared:
    """What all downloads of a run have in common."""

    data_dir: Path
    web: "_Web"
    space: _Space
    transfer: Transfer
    reporter: Reporter
    stop: threading.Event
    submit: Callable[..., object]


# ── one download ─────────────────────────────────────────────────────────────────────────────────────────────────────


class _TransientError(Exception):
    """Something that may pass: try again, after `wait_s` when the server named a time."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_s = wait_s


class _StaleError(Exception):
    """The server has another version than the one begun, or cannot go on in the middle: begin anew."""


class _StoppedError(Exception):
    """This download needs no more bytes: another part failed, or the run was interrupted."""


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
    """NAME.part.json: what is in NAME.part, and of which version of the file."""

    url: str
    query_sha256: str
    validator: str | None
    size_bytes: int | None
    parts: tuple[tuple[int, int, int | None], ...]


class _Record(Contract):
    """NAME.fetched.json: where NAME came from."""

    url: str
    query_sha256: str
    sha256: str
    size_bytes: int
    etag: str | None
    last_modified: str | None


class _Download:
    """One URL on its way to a file; its parts run on the threads that all downloads share."""

    def __init__(
        self, source: UrlSource, query: str, shared: _Shared, settle: Callable[[FetchedFile | BaseException], None]
    ) -> None:
        """`settle` is called once, on some thread, with the file or with what went wrong."""
        self._source = source
        self._query = query  # secret
        self._settle = settle
        self._web = shared.web
        self._space = shared.space
        self._transfer = shared.transfer
        self._reporter = shared.reporter
        self._stop = shared.stop
        self._submit = shared.submit
        self._path = shared.data_dir / source.name
        self._part_path = shared.data_dir / f"{source.name}.part"
        self._partial_path = shared.data_dir / f"{source.name}.part.json"
        self._record_path = shared.data_dir / f"{source.name}.fetched.json"
        self._lock = threading.RLock()
        self._parts = [_Part(0, 0, None)]
        self._running = 0  # parts on a thread or waiting for one
        self._size: int | None = None
        self._promised = 0
        self._etag: str | None = None
        self._last_modified: str | None = None
        self._validator: str | None = None  # what If-Range sends
        self._may_split = True
        self._restarts = 0
        self._failure: BaseException | None = None
        self._stale = False

    def start(self) -> None:
        self._submit(self._begin)

    def _begin(self) -> None:
        try:
            if file := self._already_there():
                self._reporter.note(f"{self._source.name}: already there")
                self._settle(file)
                return
            self._load_partial()
            self._run(self._parts)
        except BaseException as error:
            self._settle(error)

    def _run(self, parts: list[_Part]) -> None:
        self._running = len(parts)
        for part in parts:
            self._submit(self._fill_part, part)

    def _fill_part(self, part: _Part) -> None:
        try:
            self._fill(part)
        except _StoppedError:
            pass
        except _StaleError:
            self._stale = True
        except BaseException as error:  # whatever it is, the main thread must hear of it
            self._failure = self._failure or error
        with self._lock:
            self._running -= 1
            is_last = self._running == 0
        if is_last:
            self._end()

    def _end(self) -> None:
        """All parts are at rest: the file is whole, has failed, or is begun anew."""
        try:
            if self._received() and not self._stale:
                with suppress(ConfigError):  # no space for that either: what was saved before is older, not wrong
                    self._save_partial()
            if self._failure:
                raise self._failure
            if self._stop.is_set():
                return
            if self._stale:
                self._begin_anew()
                return
            self._settle(self._finish())
        except BaseException as error:
            self._settle(error)

    def _begin_anew(self) -> None:
        self._restarts += 1
        if self._restarts > self._transfer.attempts:
            raise ServiceError(f"{self._source.url}: the file changes on the server faster than it downloads")
        self._stale = False
        self._may_split = False  # whatever confused the server, one plain GET does not
        self._discard()
        self._run(self._parts)

    # what an earlier run left

    def _already_there(self) -> FetchedFile | None:
        """The file of an earlier run, when it is the one asked for and the server has no newer one."""
        try:
            record = _Record.model_validate_json(self._record_path.read_text(encoding="utf-8"))
            size = self._path.stat().st_size
        except (FileNotFoundError, ValidationError):
            return None
        if (record.url, record.query_sha256) != (self._source.url, self._source.query_sha256):
            return None
        pin = self._source.sha256
        if size != record.size_bytes or (pin and pin != record.sha256) or hash_file(self._path) != record.sha256:
            return None
        if not pin and self._has_newer(record):
            return None
        return FetchedFile(
            source=self._source.url, path=str(self._path), sha256=record.sha256, size_bytes=record.size_bytes
        )

    def _has_newer(self, record: _Record) -> bool:
        headers = {}
        if record.etag:
            headers["If-None-Match"] = record.etag
        elif record.last_modified:
            headers["If-Modified-Since"] = record.last_modified
        else:
            return False
        try:
            with self._web.get(self._url(), headers) as response:
                if response.status_code in (200, 304):
                    return bool(response.status_code == 200)
                reason = f"the server answered {response.status_code}"
        except _TransientError as retry:
            reason = retry.reason
        # A file that is whole and known is better than none: an expired signature must not stop a resumed run.
        self._reporter.warn(f"{self._source.name}: already there, not compared with the server: {reason}")
        return False

    def _load_partial(self) -> None:
        """Go on from NAME.part when it belongs to this URL and the server can be asked for the same version."""
        try:
            kept = _Partial.model_validate_json(self._partial_path.read_text(encoding="utf-8"))
            on_disk = self._part_path.stat().st_size
        except (FileNotFoundError, ValidationError):
            self._discard()
            return
        mine = (kept.url, kept.query_sha256) == (self._source.url, self._source.query_sha256)
        written_to = max(at if at > start else 0 for start, at, _ in kept.parts)
        if not mine or kept.validator is None or written_to > on_disk:
            self._discard()
            return
        self._validator, self._size = kept.validator, kept.size_bytes
        self._parts = [_Part(*part) for part in kept.parts]
        if self._size is not None:
            self._promise(self._size - self._received())

    def _promise(self, size: int) -> None:
        self._space.promise(size - self._promised)
        self._promised = size

    def _discard(self) -> None:
        self._parts = [_Part(0, 0, None)]
        self._size = self._validator = self._etag = self._last_modified = None
        self._part_path.unlink(missing_ok=True)
        self._partial_path.unlink(missing_ok=True)

    def _save_partial(self) -> None:
        with self._lock, disk_errors(self._path.parent):
            _Partial(
                url=self._source.url,
                query_sha256=self._source.query_sha256,
                validator=self._validator,
                size_bytes=self._size,
                parts=tuple((part.start, part.at, part.end) for part in self._parts),
            ).save(self._partial_path)

    # bytes

    def _url(self) -> str:
        return f"{self._source.url}?{self._query}" if self._query else self._source.url

    def _fill(self, part: _Part) -> None:
        """Request the part until it is whole; attempts count anew whenever bytes arrived that were not there yet."""
        failures = 0
        furthest = part.at
        while True:
            try:
                self._request(part)
            except _TransientError as retry:
                self._save_partial()
                failures = 1 if part.at > furthest else failures + 1
                furthest = max(furthest, part.at)
                if failures >= self._transfer.attempts:
                    raise ServiceError(
                        f"{self._source.url}: {retry.reason}, {failures} times", hint="run again: it goes on from here"
                    ) from retry.__cause__
                wait_s = retry.wait_s
                if wait_s is None:
                    wait_s = self._transfer.backoff_s * 2 ** (failures - 1)
                elif wait_s > self._transfer.longest_wait_s:
                    raise ServiceError(
                        f"{self._source.url}: {retry.reason}, and asks to come back in {wait_s:.0f} s"
                    ) from retry.__cause__
                if self._stop.wait(wait_s):
                    raise _StoppedError from None
            else:
                return

    def _request(self, part: _Part) -> None:
        headers = {}
        is_ranged = self._validator is not None and (part.at > 0 or len(self._parts) > 1)
        if is_ranged:
            if part.is_whole:
                return
            last = "" if part.end is None else part.end - 1
            headers = {"Range": f"bytes={part.at}-{last}", "If-Range": str(self._validator)}
        with self._web.get(self._url(), headers) as response:
            if response.status_code == 200:
                if len(self._parts) > 1:
                    raise _StaleError
                self._accept(response, part)  # also when a range was asked for: another version, or no ranges here
            elif is_ranged and response.status_code == 206:
                self._check_range(response, part)
            elif is_ranged and response.status_code == 416:
                raise _StaleError
            else:
                self._refuse(response)
            self._write(response, part)

    def _accept(self, response: httpx2.Response, part: _Part) -> None:
        """Begin the file with the headers of an answer that holds all of it."""
        if response.headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml")):
            raise DataError(f"{self._source.url}: the server sent a web page", hint=WEB_PAGE_HINT)
        part.at = 0
        self._part_path.unlink(missing_ok=True)
        self._etag = response.headers.get("etag")
        self._last_modified = response.headers.get("last-modified")
        # A weak ETag says "means the same", not "the same bytes": RFC 9110 8.8.1 forbids it for ranges.
        is_strong = self._etag is not None and not self._etag.startswith("W/")
        self._validator = self._etag if is_strong else self._last_modified
        length = response.headers.get("content-length", "")
        self._size = part.end = int(length) if length.isdecimal() else None
        if self._size is None:
            self._save_partial()
            return
        self._promise(self._size)
        has_ranges = response.headers.get("accept-ranges", "").lower() == "bytes" and self._validator is not None
        if has_ranges and self._may_split and self._size > self._transfer.split_bytes:
            self._split(part, self._size)
        self._save_partial()

    def _split(self, first: _Part, size: int) -> None:
        """The answer that runs goes on as the first part; other connections ask for the others."""
        step = self._transfer.part_bytes
        others = [_Part(start, start, min(start + step, size)) for start in range(step, size, step)]
        with self._lock:
            first.end = min(step, size)
            self._parts = [first, *others]
            self._running += len(others)
        for part in others:
            self._submit(self._fill_part, part)

    def _check_range(self, response: httpx2.Response, part: _Part) -> None:
        span, _, total = response.headers.get("content-range", "").removeprefix("bytes ").partition("/")
        etag = response.headers.get("etag")
        if etag is not None and str(self._validator).startswith('"') and etag != self._validator:
            raise _StaleError  # it has ranges, but did not look at If-Range
        if span.split("-")[0] != str(part.at) or (self._size is not None and total not in (str(self._size), "*")):
            raise _StaleError
        self._etag, self._last_modified = etag, response.headers.get("last-modified")

    def _write(self, response: httpx2.Response, part: _Part) -> None:
        descriptor = os.open(self._part_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            saved_at = part.at
            for chunk in self._web.chunks(response):
                if self._stop.is_set() or self._failure or self._stale:
                    raise _StoppedError
                room = len(chunk) if part.end is None else part.end - part.at
                wanted = chunk[:room]
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
            if part.end is None:
                part.end = part.at
            elif part.at < part.end:
                raise _TransientError(f"the answer ended after {part.at} of {part.end} bytes")
        finally:
            os.close(descriptor)
        self._save_partial()

    def _received(self) -> int:
        return sum(part.at - part.start for part in self._parts)

    def _tell(self) -> None:
        self._reporter.progress(
            Progress(stage="fetch", task=self._source.name, done=self._received(), total=self._size, unit="B")
        )

    def _refuse(self, response: httpx2.Response) -> NoReturn:
        status, url = response.status_code, self._source.url
        if status in _RETRIED_STATUSES or status >= 500:
            raise _TransientError(
                f"the server answered {status}", _retry_after_s(response.headers.get("retry-after", ""))
            )
        if status in (401, 403, 407):
            raise DeniedError(f"{url}: denied, the server answered {status}", hint=_denied_hint(self._query))
        if status in (404, 410):
            raise InputMissingError(f"{url}: not found, the server answered {status}")
        expired = expired_at(self._query)
        raise InputMissingError(
            f"{url}: the server answered {status}", hint=_expired_hint(expired) if expired else None
        )

    # the whole file

    def _finish(self) -> FetchedFile:
        """Check the content, then give it its name."""
        url = self._source.url
        size = self._part_path.stat().st_size if self._part_path.exists() else 0
        try:
            if size == 0:
                raise DataError(f"{url}: the file is empty")
            if self._size is not None and size != self._size:
                raise DataError(f"{url}: {size} bytes arrived, the server promised {self._size}")
            check_readable(self._part_path, self._source.name, url)
            digest = hash_file(self._part_path)
            if self._source.sha256 and digest != self._source.sha256:
                raise DataError(
                    f"{url}: its sha256 is {digest}, the URL pins {self._source.sha256}",
                    hint="the file changed, or the pin is another file's",
                )
        except DataError:
            self._discard()  # going on from bad bytes would fail for ever
            raise
        _sync(self._part_path)
        self._record_path.unlink(missing_ok=True)
        self._part_path.replace(self._path)
        _Record(
            url=url,
            query_sha256=self._source.query_sha256,
            sha256=digest,
            size_bytes=size,
            etag=self._etag,
            last_modified=self._last_modified,
        ).save(self._record_path)
        self._partial_path.unlink(missing_ok=True)
        return FetchedFile(source=url, path=str(self._path), sha256=digest, size_bytes=size)


def _sync(path: Path) -> None:
    """On the disk itself: a node may vanish right after."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _retry_after_s(value: str) -> float | None:
    """Seconds from a Retry-After header, which holds seconds or a date; None when it holds neither."""
    if value.isdecimal():
        return float(value)
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())


def expired_at(query: str, now: datetime | None = None) -> datetime | None:
    """When the signature in a URL's query ended, if that is past: Azure's `se`, AWS's and Google's dates."""
    values = {name.lower(): found[0] for name, found in parse_qs(query).items()}
    end: datetime | None = None
    with suppress(ValueError, OverflowError):
        if "se" in values:
            end = datetime.fromisoformat(values["se"])
        for cloud in ("x-amz", "x-goog"):
            if f"{cloud}-date" in values and f"{cloud}-expires" in values:
                begin = datetime.strptime(values[f"{cloud}-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                end = begin + timedelta(seconds=int(values[f"{cloud}-expires"]))
        if end is None and values.get("expires", "").isdecimal():
            end = datetime.fromtimestamp(int(values["expires"]), UTC)
    if end is None:
        return None
    end = end if end.tzinfo else end.replace(tzinfo=UTC)
    return end if end < (now or datetime.now(UTC)) else None


def _expired_hint(moment: datetime) -> str:
    return f"the URL's signature expired at {moment:%Y-%m-%d %H:%M} UTC; make a new one"


def _denied_hint(query: str) -> str:
    if moment := expired_at(query):
        return _expired_hint(moment)
    if query:
        return "the URL's signature or token is not accepted: is it whole, and does it allow reading?"
    return "the file is private: use a signed URL"


# ── the wire ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _ForbiddenError(Exception):
    """A name resolved to addresses that may not be connected to."""


class _Web:
    """GETs that go only where they may. Thread-safe.

    Without a proxy we resolve names ourselves and connect to the very address that was checked. Behind one the proxy
    resolves, so only what a URL says can be checked; that is noted once.
    """

    def __init__(self, allowed: Allowed, ca_file: str | None, transfer: Transfer, reporter: Reporter) -> None:
        self._allowed = allowed
        self._transfer = transfer
        self._reporter = reporter
        self._tls = _tls_context(ca_file)
        self._clients: dict[str | None, httpx2.Client] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        for name in ("httpx2", "httpcore2"):
            logging.getLogger(name).setLevel(logging.WARNING)  # they log URLs whole, signatures included
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for client in self._clients.values():
            client.close()

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The final answer to a GET, not yet read; every hop is judged. Raises _TransientError when the wire fails."""
        shown = redacted(url)
        hop = url
        for _ in range(_REDIRECTS + 1):
            if problem := url_problem(hop, self._allowed):
                where = "" if hop == url else f"redirects to {redacted(hop)}: "
                raise ConfigError(f"{shown}: {where}{problem}")
            try:
                client = self._client(_proxy_for(hop))
                response = client.send(client.build_request("GET", hop, headers=headers), stream=True)
            except httpx2.InvalidURL:
                raise ConfigError(f"{shown}: invalid data source URL") from None
            except _ForbiddenError as error:
                where = "" if hop == url else f"redirects to {redacted(hop)}: "
                raise ConfigError(f"{shown}: {where}{error}") from None
            except _WIRE_ERRORS as error:
                raise _TransientError(f"cannot be reached: {_words(error)}") from error
            try:
                location = response.headers.get("location")
                if not (300 <= response.status_code < 400 and location):
                    yield response
                    return
            finally:
                response.close()
            try:
                following = urljoin(hop, location)
            except ValueError:
                raise DataError(f"{shown}: redirects to what is no URL") from None
            if urlsplit(hop).scheme == "https" and urlsplit(following).scheme == "http":
                raise ConfigError(f"{shown}: redirects from https to http, to {redacted(following)}")
            hop = following
        raise DataError(f"{shown}: redirects more than {_REDIRECTS} times", hint="use the address it ends at")

    def chunks(self, response: httpx2.Response) -> Iterator[bytes]:
        """The body as it is on the wire. Raises _TransientError when it breaks off or stalls."""
        try:
            yield from response.iter_raw()
        except _WIRE_ERRORS as error:
            raise _TransientError(f"the connection broke: {_words(error)}") from error

    def _client(self, proxy: str | None) -> httpx2.Client:
        with self._lock:
            if proxy not in self._clients:
                timeout = httpx2.Timeout(self._transfer.stall_timeout_s, connect=self._transfer.connect_timeout_s)
                headers = {"User-Agent": "tuner", "Accept": "*/*", "Accept-Encoding": "identity"}
                if proxy is None:
                    network = _CheckedNetwork(self._allowed, self._transfer.resolve)
                    transport = _DirectTransport(network, self._tls, self._transfer.connections)
                    # trust_env would look for proxies again, with rules of its own
                    client = httpx2.Client(transport=transport, timeout=timeout, headers=headers, trust_env=False)
                else:
                    client = self._proxied(proxy, timeout, headers)
                self._clients[proxy] = client
            return self._clients[proxy]

    def _proxied(self, proxy: str, timeout: httpx2.Timeout, headers: Mapping[str, str]) -> httpx2.Client:
        try:
            client = httpx2.Client(proxy=proxy, verify=self._tls, timeout=timeout, headers=headers, trust_env=False)
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise ConfigError(f"the proxy {redacted(proxy)} cannot be used: {type(error).__name__}") from None
        self._reporter.note(
            f"downloads go through the proxy {redacted(proxy)}: it resolves names, so where they lead is not checked"
        )
        return client


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment names for this URL (HTTPS_PROXY, ALL_PROXY, NO_PROXY, …)."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    context: ssl.SSLContext = httpx2.create_ssl_context()
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{ca_file}: not a readable file of CA certificates") from error
    return context


def _words(error: Exception) -> str:
    name = type(error).__name__
    return {
        "ConnectTimeout": "no answer to the connection",
        "ReadTimeout": "nothing came for too long",
        "RemoteProtocolError": "it ended before the whole answer had come",
    }.get(name, str(error) or name)


class _CheckedNetwork(httpcore2.NetworkBackend):
    """Connects to the address that was checked, so that a name cannot change its mind in between.

    TLS still verifies the name: only the TCP connection knows the address.
    """

    def __init__(self, allowed: Allowed, resolve: Callable[[str], Sequence[str]]) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._plain = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        failure: Exception | None = None
        for address in self._checked_addresses(host):
            try:
                return self._plain.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore2.ConnectError(f"the name {host} has no address")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _checked_addresses(self, host: str) -> list[str]:
        """Those that may be connected to. Raises _ForbiddenError when all are refused, ConnectError for no name."""
        try:
            addresses, by_name = [str(ip_address(host))], False
        except ValueError:
            by_name = True
            try:
                addresses = list(self._resolve(host))
            except OSError as error:
                raise httpcore2.ConnectError(f"the name {host} is not known: {error.strerror}") from error
        problems = [address_problem(address, self._allowed, by_name=by_name) for address in addresses]
        if addresses and all(problems):
            raise _ForbiddenError(f"the name {host} resolves to {problems[0]}" if by_name else problems[0])
        return [address for address, problem in zip(addresses, problems, strict=True) if problem is None]


class _Body(httpx2.SyncByteStream):  # type: ignore[misc]  # httpx2 is Any to mypy here
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()


class _DirectTransport(httpx2.BaseTransport):  # type: ignore[misc]
    """httpx2's own transport, but that it has no way to say how connections are made."""

    def __init__(self, network: httpcore2.NetworkBackend, tls: ssl.SSLContext, connections: int) -> None:
        self._pool = httpcore2.ConnectionPool(
            ssl_context=tls, max_connections=connections, keepalive_expiry=5, network_backend=network
        )

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        answer = self._pool.handle_request(
            httpcore2.Request(
                method=request.method,
                url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        return httpx2.Response(
            status_code=answer.status,
            headers=answer.headers,
            stream=_Body(answer.stream),
            extensions=answer.extensions,
        )

    def close(self) -> None:
        self._pool.close()
