"""A threaded HTTP server on loopback that answers as a test says, and remembers what it was asked.

with HttpServer() as server:
    server.serve("/train.parquet", Answer(body=data))
    server.serve("/flaky", Answer(status=503), Answer(body=data))  # in this order; the last one stays
    fetch(server.url + "/train.parquet")
    assert server.requests[0].headers["range"] == "bytes=10-"
"""

import hashlib
import re
import socket
import ssl
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """What one request gets.

    `truncate_to`: the headers promise the whole body, the connection ends after so many bytes of it.
    `stall_after`: after so many bytes nothing more comes until the server ends.
    `reset`: where it is cut short, the connection is reset, not closed.
    `drip_s`: it comes byte by byte, so many seconds apart.
    `ranges`: Range and If-Range are honoured, and the answer has an ETag (unless `headers` has its own).
    `careless`: ranges without a look at If-Range.
    `shift`: a range that begins so many bytes later (earlier) than asked for, and says so.
    `chunked`: no Content-Length. `unframed`: nor that, as HTTP/1.0 does: the connection's end is the body's.
    `raw`: these bytes, instead of everything.
    """

    body: bytes | Path = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    truncate_to: int | None = None
    stall_after: int | None = None
    reset: bool = False
    drip_s: float | None = None
    ranges: bool = True
    careless: bool = False
    shift: int = 0
    chunked: bool = False
    unframed: bool = False
    raw: bytes | None = None

    @classmethod
    def redirect(cls, location: str, status: int = 302) -> "Answer":
        return cls(status=status, headers={"Location": location})

    def content(self) -> bytes:
        return self.body.read_bytes() if isinstance(self.body, Path) else self.body


@dataclass(frozen=True)
class Request:
    """What a client asked; header names are in lower case."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]


class HttpServer:
    """`url` is its base, without a slash at the end; https with `tls`."""

    def __init__(self, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1", port: int = 0) -> None:
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._answers: dict[str, deque[Answer]] = {}
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server = type("Server", (ThreadingHTTPServer,), {"address_family": family, "request_queue_size": 64})
        self._server = server((address, port), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self.port: int = self._server.server_address[1]
        host = f"[{address}]" if ":" in address else address
        self.url = f"{'https' if tls else 'http'}://{host}:{self.port}"
        if tls:  # the handshake is a handler's work: one bad client must not stop the others
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)

    def serve(self, path: str, *answers: Answer | bytes | Path) -> str:
        """Set what `path` answers, in this order, the last one for ever; gives the path's URL."""
        wrapped = (Answer(body=answer) if isinstance(answer, bytes | Path) else answer for answer in answers)
        with self._lock:
            self._answers[path] = deque(wrapped)
        return self.url + path

    def count(self, path: str) -> int:
        return sum(request.path == path for request in self.requests)

    def counts(self) -> dict[str, int]:
        counts: dict[str, int] = defaultdict(int)
        for request in self.requests:
            counts[request.path] += 1
        return dict(counts)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        with self._lock:
            for connection in self._connections:  # a handler waits on a kept-alive connection otherwise
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self._thread.join()

    def _next_answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            answers = self._answers.get(request.path)
            if not answers:
                return Answer(status=404, body=b"not here", headers={"Content-Type": "text/plain"})
            return answers.popleft() if len(answers) > 1 else answers[0]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                with server._lock:
                    server._connections.add(self.connection)

            def finish(self) -> None:
                with server._lock:
                    server._connections.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def handle(self) -> None:
                with suppress(OSError):  # the client went away, or did not like our certificate: its business
                    super().handle()

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                headers = {name.lower(): value for name, value in self.headers.items()}
                answer = server._next_answer(Request(self.command, parts.path, parts.query, headers))
                self._answer(answer, headers)

            do_HEAD = do_GET

            def _answer(self, answer: Answer, asked: Mapping[str, str]) -> None:
                if answer.raw is not None:
                    self.close_connection = True
                    self.wfile.write(answer.raw)
                    return
                body = answer.content()
                status = answer.status
                headers = {"Content-Type": "application/octet-stream", **answer.headers}
                if answer.ranges and status == 200:
                    headers.setdefault("ETag", f'"{hashlib.sha256(body).hexdigest()[:16]}"')
                    headers.setdefault("Accept-Ranges", "bytes")
                    if asked.get("if-none-match") == headers["ETag"]:
                        status, body = 304, b""
                    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.get("range", ""))
                    may = answer.careless or asked.get("if-range", headers["ETag"]) == headers["ETag"]
                    if wanted and may:
                        first = max(0, int(wanted[1]) + answer.shift)
                        last = min(int(wanted[2] or len(body) - 1), len(body) - 1)
                        if first >= len(body):
                            status, body = 416, b""
                            headers.setdefault("Content-Range", f"bytes */{len(answer.content())}")
                        else:
                            status = 206
                            headers.setdefault("Content-Range", f"bytes {first}-{last}/{len(body)}")
                            body = body[first : last + 1]
                if answer.unframed:
                    self.protocol_version, self.close_connection = "HTTP/1.0", True
                self.send_response_only(status)
                headers.setdefault("Date", self.date_time_string())
                for name, value in headers.items():
                    self.send_header(name, value)
                if answer.chunked:
                    self.send_header("Transfer-Encoding", "chunked")
                elif status != 304 and not answer.unframed:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD" or status == 304:
                    return
                self._send(body, answer)

            def _send(self, body: bytes, answer: Answer) -> None:
                until = [limit for limit in (answer.truncate_to, answer.stall_after) if limit is not None]
                sent = body[: min(until)] if until else body
                if answer.drip_s is not None:
                    for at in range(len(sent)):
                        self.wfile.write(sent[at : at + 1])
                        if server.closing.wait(answer.drip_s):
                            return
                else:
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(sent), sent) if answer.chunked and sent else sent)
                self.wfile.flush()
                if answer.stall_after is not None:
                    server.closing.wait()
                if len(sent) < len(body):
                    self.close_connection = True
                    if answer.reset:  # closing with this set sends RST
                        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        self.connection.close()
                    else:
                        self.connection.shutdown(socket.SHUT_RDWR)
                elif answer.chunked:
                    self.wfile.write(b"0\r\n\r\n")

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name of the base class
                pass

        return Handler
