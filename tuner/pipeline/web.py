"""GETs that go only where they may, and files behind URLs: their versions and ranges.

Names are resolved here and the very address that was checked is connected to. Behind a proxy the proxy resolves, so
only what a URL says can be checked; that is noted once.
"""

import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from types import TracebackType
from typing import Any, NoReturn, Self
from urllib.parse import parse_qs, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from tuner.content import WEB_PAGE_HINT
from tuner.errors import ConfigError, DataError, DeniedError, InputMissingError, ServiceError
from tuner.redaction import redact
from tuner.retry import Backoff, parse_http_date, retry_after_s
from tuner.runspec import Contract, Network, Reporter
from tuner.source_headers import SourceHeaders, headers_for
from tuner.urls import AddressRefusedError, Allowed, ConnectionPolicy, literal_address, redacted, url_problem

_MIB = 1024**2
_REDIRECTS = 5
_RETRIED_STATUSES = frozenset({408, 425, 429})  # and every 5xx
_WIRE_ERRORS = (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, httpcore2.ProxyError)
_BACKOFF = Backoff(0.5, 30.0)
_POLL_S = 0.2  # how soon a blocked read hears that it is no longer wanted


def resolve_name(host: str) -> Sequence[str]:
    """The addresses of a host name, in the order to try them. Raises OSError."""
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in answers))


@dataclass(frozen=True)
class Transfer:
    """How wide and how patient downloads are. `attempts` counts failures without progress in between.

    `slowest_bytes_per_s` over `stall_timeout_s`: a connection that gives less has stalled.
    """

    connections: int = 12  # of data files; the base weights have `hub_connections` beside them
    hub_connections: int = 4
    attempts: int = 5
    connect_timeout_s: float = 10
    stall_timeout_s: float = 30
    slowest_bytes_per_s: int = 1000
    backoff: Backoff = _BACKOFF
    longest_wait_s: float = 120  # a server that asks for more is down
    split_bytes: int = 32 * _MIB  # a larger file comes in parts where the server has ranges
    part_bytes: int = 16 * _MIB
    resolve: Callable[[str], Sequence[str]] = resolve_name

    @property
    def stall_bytes(self) -> float:
        """Fewer bytes than this are no progress."""
        return self.slowest_bytes_per_s * self.stall_timeout_s


DEFAULT_TRANSFER = Transfer()


# ── what a file's origin says ────────────────────────────────────────────────────────────────────────────────────────


class TransientError(Exception):
    """Something that may pass: try again, after `wait_s` when the server named a time."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait_s = wait_s


class StaleError(Exception):
    """The origin has another version than the one begun, or cannot go on in the middle: begin anew."""


class Version(Contract):
    """Which bytes an origin has now. Equal validators mean equal bytes; None: the origin cannot promise that."""

    validator: str | None = None
    etag: str | None = None
    last_modified: str | None = None
    encoding: str | None = None  # the Content-Encoding that the bytes are in


@dataclass(frozen=True)
class Answer:
    """Bytes of a file from `start` on. `is_whole`: they are all of it, maybe of another version than asked for."""

    start: int
    is_whole: bool
    size_bytes: int | None  # of the whole file
    version: Version
    has_ranges: bool
    is_framed: bool  # False: only the end of the connection says where it ends
    chunks: Iterator[bytes] = field(repr=False)


# ── files behind URLs ────────────────────────────────────────────────────────────────────────────────────────────────


class WebFile:
    """A file behind an http(s) URL. `query` is secret."""

    def __init__(self, web: "Web", url: str, query: str, shown: str | None = None) -> None:
        self._web = web
        self._url = f"{url}?{query}" if query else url
        self._query = query
        self._shown = shown or url

    @contextmanager
    def open(self, at: int = 0, end: int | None = None, version: Version | None = None) -> Iterator[Answer]:
        """Bytes `at` up to `end` of this version, or the whole file where that is not to be had or not asked for.

        Raises TransientError, StaleError, and a TunerError for what no second try would change.
        """
        headers = {}
        if version:
            headers = {"Range": f"bytes={at}-{'' if end is None else end - 1}", "If-Range": str(version.validator)}
        with self._web.get(self._url, headers) as response:
            if response.status_code == 200:
                yield self._whole(response)
            elif version and response.status_code == 206:
                yield self._range(response, at, version)
            elif version and response.status_code == 416:
                # The file may have ended right here: how long it is was never said.
                if end is not None or response.headers.get("content-range", "").replace(" ", "") != f"bytes*/{at}":
                    raise StaleError
                yield Answer(at, False, at, version, False, True, iter(()))
            else:
                self._refuse(response)

    def is_unchanged(self, version: Version) -> bool:
        """Whether the server still has what it had then; True where it cannot be asked."""
        if version.etag:
            headers = {"If-None-Match": version.etag}
        elif version.last_modified:
            headers = {"If-Modified-Since": version.last_modified}
        else:
            return True
        with self._web.get(self._url, headers) as response:
            if response.status_code not in (200, 304):
                raise TransientError(f"the server answered {response.status_code}")
            return bool(response.status_code == 304)

    def _whole(self, response: httpx2.Response) -> Answer:
        headers = response.headers
        if headers.get("content-type", "").lower().startswith(("text/html", "application/xhtml")):
            raise DataError(f"{self._shown}: the server sent a web page", hint=WEB_PAGE_HINT)
        length = headers.get("content-length", "")
        is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        size = int(length) if length.isdecimal() and not is_chunked else None
        return Answer(
            start=0,
            is_whole=True,
            size_bytes=size,
            version=self._version(headers),
            has_ranges=headers.get("accept-ranges", "").lower() == "bytes",
            is_framed=is_chunked or size is not None,
            chunks=self._web.chunks(response),
        )

    def _range(self, response: httpx2.Response, at: int, version: Version) -> Answer:
        headers = response.headers
        span, _, total = headers.get("content-range", "").strip().removeprefix("bytes").strip().partition("/")
        if span.partition("-")[0] != str(at) or not total.isdecimal():
            raise StaleError
        # It has ranges, but may not have looked at If-Range.
        for asked, answered in (
            (version.etag, headers.get("etag")),
            (version.last_modified, headers.get("last-modified")),
        ):
            if asked == version.validator and answered not in (None, asked):
                raise StaleError
        if version.encoding != _encoding(headers):
            raise StaleError
        return Answer(at, False, int(total), version, True, True, self._web.chunks(response))

    def _version(self, headers: httpx2.Headers) -> Version:
        etag, last_modified = _kept(headers, "etag"), _kept(headers, "last-modified")
        encoding = _encoding(headers)
        if encoding not in (None, "gzip"):
            raise DataError(
                f"{self._shown}: the server sends it {encoding}-encoded, though asked not to",
                hint="store it without a Content-Encoding",
            )
        # A weak ETag says "means the same", not "the same bytes": RFC 9110 8.8.1 forbids it for ranges.
        is_strong = etag is not None and not etag.startswith("W/")
        validator = etag if is_strong else _strong_date(last_modified, headers.get("date"))
        return Version(validator=validator, etag=etag, last_modified=last_modified, encoding=encoding)

    def _refuse(self, response: httpx2.Response) -> NoReturn:
        status, url = response.status_code, self._shown
        if status in _RETRIED_STATUSES or status >= 500:
            raise TransientError(f"the server answered {status}", retry_after_s(response.headers))
        if status in (401, 403, 407):
            raise DeniedError(f"{url}: denied, the server answered {status}", hint=self._denied_hint())
        if status in (404, 410):
            raise InputMissingError(f"{url}: not found, the server answered {status}")
        expired = expired_at(self._query)
        raise InputMissingError(
            f"{url}: the server answered {status}", hint=_expired_hint(expired) if expired else None
        )

    def _denied_hint(self) -> str:
        if moment := expired_at(self._query):
            return _expired_hint(moment)
        if self._query:
            return "the URL's signature or token is not accepted: is it whole, and does it allow reading?"
        if self._web.sends_headers_to(self._url):
            return "the headers sent with it are not accepted: is the token still valid, and may it read this?"
        return "the file is private: use a signed URL, or give its token with --source-headers FILE"


def _kept(headers: httpx2.Headers, name: str) -> str | None:
    """A header that goes to the disk: not one that a server has made of the secret that it was sent."""
    value = headers.get(name)
    return value if value and redact(value) == value else None


def _encoding(headers: httpx2.Headers) -> str | None:
    encoding = headers.get("content-encoding", "").strip().lower()
    return {"": None, "identity": None, "x-gzip": "gzip", "aws-chunked": None}.get(encoding, encoding)


def _strong_date(last_modified: str | None, date: str | None) -> str | None:
    """Last-Modified, if the file cannot have changed again within that second: RFC 9110 8.8.2.2."""
    changed, now = parse_http_date(last_modified or ""), parse_http_date(date or "")
    return last_modified if changed and now and now > changed else None


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


# ── the wire ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Web:
    """GETs from where they may go, each hop with the headers that belong to it. Thread-safe.

    Once `stop` is set, what waits for the network gives up within a moment.
    """

    def __init__(
        self,
        network: Network,
        transfer: Transfer,
        reporter: Reporter,
        *,
        source_headers: Sequence[SourceHeaders] = (),
        stop: threading.Event,
    ) -> None:
        self._allowed = Allowed.of(network.allow_cidrs, network.allow_private_urls)
        self._ca_file = network.ca_file
        self._transfer = transfer
        self._reporter = reporter
        self._source_headers = tuple(source_headers)
        self._stop = stop
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

    def sends_headers_to(self, url: str) -> bool:
        """Whether some secret header belongs to this URL."""
        return bool(headers_for(url, self._source_headers))

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[httpx2.Response]:
        """The final answer to a GET, not yet read; every hop is judged. Raises TransientError when the wire fails."""
        shown = redacted(url)
        hop = url
        for _ in range(_REDIRECTS + 1):
            where = "" if hop == url else f"redirects to {redacted(hop)}: "
            if problem := url_problem(hop, self._allowed):
                raise ConfigError(f"{shown}: {where}{problem}")
            try:
                client = self._client(_proxy_for(hop))
                # For each hop anew: a secret never follows a redirect to where it does not belong.
                sent = {**headers, **headers_for(hop, self._source_headers)}
                response = client.send(client.build_request("GET", hop, headers=sent), stream=True)
            except httpx2.InvalidURL:
                raise ConfigError(f"{shown}: {where}invalid data source URL") from None
            except AddressRefusedError as error:
                raise ConfigError(f"{shown}: {where}{error}") from None
            except _WIRE_ERRORS as error:
                if isinstance(cause := _first_cause(error), ssl.SSLCertVerificationError):
                    hint = None
                    if cause.verify_code in _UNKNOWN_AUTHORITY:
                        hint = "--ca FILE trusts a certificate authority of your own"
                    if hint and self._ca_file:
                        hint = f"{self._ca_file} has not the authority that signed its certificate"
                    raise ServiceError(f"{shown}: {where}{_words(error)}", hint=hint) from error
                raise TransientError(f"cannot be reached: {_words(error)}") from error
            try:
                location = response.headers.get("location")
                if not (300 <= response.status_code < 400 and location):
                    yield response
                    return
            finally:
                response.close()
            try:
                following = urljoin(hop, location)
                is_downgrade = urlsplit(hop).scheme == "https" and urlsplit(following).scheme == "http"
            except ValueError:
                raise DataError(f"{shown}: redirects to what is no URL") from None
            if is_downgrade:
                raise ConfigError(f"{shown}: redirects from https to http, to {redacted(following)}")
            hop = following
        raise DataError(f"{shown}: redirects more than {_REDIRECTS} times", hint="use the address it ends at")

    def chunks(self, response: httpx2.Response) -> Iterator[bytes]:
        """The body as it is on the wire. Raises TransientError when it breaks off or stalls."""
        try:
            yield from response.iter_raw()
        except _WIRE_ERRORS as error:
            raise TransientError(f"the connection broke: {_words(error)}") from error

    def _client(self, proxy: str | None) -> httpx2.Client:
        with self._lock:
            if proxy not in self._clients:
                self._clients[proxy] = httpx2.Client(
                    transport=_Transport(self._pool(proxy, _tls_context(self._ca_file))),
                    timeout=httpx2.Timeout(self._transfer.stall_timeout_s, connect=self._transfer.connect_timeout_s),
                    headers={"User-Agent": "tuner", "Accept": "*/*", "Accept-Encoding": "identity"},
                    trust_env=False,  # it would look for proxies again, with rules of its own
                )
            return self._clients[proxy]

    def _pool(self, proxy: str | None, tls: ssl.SSLContext) -> httpcore2.ConnectionPool:
        settings: dict[str, Any] = {
            "ssl_context": tls,
            "max_connections": self._transfer.connections,
            "keepalive_expiry": 5,
            "network_backend": _WatchedNetwork(
                None if proxy else ConnectionPolicy(self._allowed), self._transfer, self._stop
            ),
        }
        if proxy is None:
            return httpcore2.ConnectionPool(**settings)
        parts = urlsplit(proxy)
        if parts.username:
            settings["proxy_auth"] = (unquote(parts.username), unquote(parts.password or ""))
        try:
            if parts.scheme in ("socks5", "socks5h"):
                pool: httpcore2.ConnectionPool = httpcore2.SOCKSProxy(proxy_url=redacted(proxy), **settings)
            elif parts.scheme in ("http", "https"):
                is_tls = parts.scheme == "https"
                pool = httpcore2.HTTPProxy(
                    proxy_url=redacted(proxy), proxy_ssl_context=tls if is_tls else None, **settings
                )
            else:
                raise ValueError(parts.scheme)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"the proxy {redacted(proxy)} cannot be used: {type(error).__name__}") from None
        self._reporter.note(
            f"downloads go through the proxy {redacted(proxy)}: it resolves names, so where they lead is not checked"
        )
        return pool


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment names for this URL (HTTPS_PROXY, ALL_PROXY, NO_PROXY, …)."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


# X509_V_ERR_* of OpenSSL: self-signed, or of an issuer that is not known. Others are an old date or another name.
_UNKNOWN_AUTHORITY = (18, 19, 20, 21)


@lru_cache(maxsize=4)  # reading all the certificates takes a while
def _tls_context(ca_file: str | None) -> ssl.SSLContext:
    context: ssl.SSLContext = httpx2.create_ssl_context()
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"{ca_file}: not a readable file of CA certificates") from error
    return context


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return error


def _words(error: Exception) -> str:
    name = type(error).__name__
    return {
        "ConnectTimeout": "no answer to the connection",
        "ReadTimeout": "nothing came for too long",
        "RemoteProtocolError": "it ended before the whole answer had come",
    }.get(name, str(error) or name)


class _WatchedNetwork(httpcore2.NetworkBackend):
    """Connects to the address that was checked, so that a name cannot change its mind in between.

    TLS still verifies the name: only the TCP connection knows the address. `policy` None: the connection is to a
    proxy, which the user named.
    """

    def __init__(self, policy: ConnectionPolicy | None, transfer: Transfer, stop: threading.Event) -> None:
        self._policy = policy
        self._transfer = transfer
        self._stop = stop
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
            if self._stop.is_set():
                break
            try:
                stream = self._plain.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return _WatchedStream(stream, self._transfer, self._stop)
        raise failure or httpcore2.ConnectError(f"the name {host} has no address")

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _checked_addresses(self, host: str) -> list[str]:
        """Those that may be connected to. AddressRefusedError when that is none of them, ConnectError for no name."""
        if self._policy is None:
            return [host]
        literal = literal_address(host)
        try:
            addresses = [literal] if literal else self._transfer.resolve(host)
        except OSError as error:
            raise httpcore2.ConnectError(f"the name {host} is not known: {error.strerror}") from error
        refusals = {address: self._policy.refusal(host, address) for address in addresses}
        if refusals and all(refusals.values()):
            raise AddressRefusedError(next(iter(refusals.values())))
        return [address for address, refusal in refusals.items() if refusal is None]


class _WatchedStream(httpcore2.NetworkStream):
    """A connection that gives up soon after `stop`, and on a server that sends a byte now and then."""

    def __init__(self, stream: httpcore2.NetworkStream, transfer: Transfer, stop: threading.Event) -> None:
        self._stream = stream
        self._transfer = transfer
        self._stop = stop
        self._window_end = math.inf  # until the answer's first byte
        self._window_bytes = 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            if self._stop.is_set():
                raise httpcore2.ReadError("stopped")
            try:
                chunk: bytes = self._stream.read(max_bytes, min(_POLL_S, max(0.001, deadline - time.monotonic())))
            except httpcore2.ReadTimeout:
                if time.monotonic() >= deadline:
                    raise
            else:
                self._count(len(chunk))
                return chunk

    def _count(self, size: int) -> None:
        now = time.monotonic()
        self._window_bytes += size
        if now > self._window_end and self._window_bytes < self._transfer.stall_bytes:
            raise httpcore2.ReadTimeout(f"{self._window_bytes} bytes in {self._transfer.stall_timeout_s:.0f} s")
        if now > self._window_end or self._window_end == math.inf:
            self._window_end, self._window_bytes = now + self._transfer.stall_timeout_s, 0

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._window_end, self._window_bytes = math.inf, 0  # a request: its answer may take its time
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, timeout)
        return _WatchedStream(stream, self._transfer, self._stop)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Body(httpx2.SyncByteStream):  # type: ignore[misc]  # httpx2 is Any to mypy here
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        self._stream.close()


class _Transport(httpx2.BaseTransport):  # type: ignore[misc]
    """httpx2's own transport, but that it has no way to say how connections are made."""

    def __init__(self, pool: httpcore2.ConnectionPool) -> None:
        self._pool = pool

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
