"""Real registries for tests: Debian's docker-registry on loopback, open, with htpasswd, tokens or TLS.

    with running_registry() as registry:
        push to f"{registry.host}/name:tag" over plain http

Everything is ended and removed by the context manager that started it. A missing program skips the test, and
fails it where CI=true.
"""

import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qs, urlsplit

import pytest

USER, PASSWORD = "tuner", "correct horse"
# `htpasswd -nbB tuner 'correct horse'` with cost 5: bcrypt is in no standard library.
_HTPASSWD = f"{USER}:$2y$05$Xq8ZrW3vT1uYbN5cKdLmPeXSJYT0AuTqKc8amm/R9cz42hp9/M1uO"


@dataclass(frozen=True)
class RunningRegistry:
    host: str
    storage: Path

    def blob_path(self, digest: str) -> Path:
        """Where the registry keeps a blob: tests damage it there."""
        encoded = digest.removeprefix("sha256:")
        return self.storage / "docker/registry/v2/blobs/sha256" / encoded[:2] / encoded / "data"

    def tags(self, repository: str) -> list[str]:
        directory = self.storage / "docker/registry/v2/repositories" / repository / "_manifests/tags"
        return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def require(program: str) -> str:
    """The program's path."""
    path = shutil.which(program)
    if path is None and os.environ.get("CI") == "true":
        pytest.fail(f"{program} is not installed: apt-get install docker-registry skopeo umoci openssl zsh")
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def docker_config(host: str, username: str = USER, password: str = PASSWORD) -> str:
    """The text of a config.json that logs in to `host`."""
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    return json.dumps({"auths": {host: {"auth": auth}}})


@contextlib.contextmanager
def running_registry(
    *, htpasswd: bool = False, token_server: "TokenServer | None" = None, tls: "Tls | None" = None
) -> Iterator[RunningRegistry]:
    """A registry of its own on a free port; it answers when this yields."""
    program = require("docker-registry")
    with tempfile.TemporaryDirectory(prefix="tuner-registry-") as name:
        directory, port = Path(name), _free_port()
        storage = directory / "storage"
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
            "http": {"addr": f"127.0.0.1:{port}"},
        }
        if htpasswd:
            (directory / "htpasswd").write_text(_HTPASSWD + "\n")
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(directory / "htpasswd")}}
        if token_server is not None:
            config["auth"] = {
                "token": {
                    "realm": token_server.url,
                    "service": token_server.service,
                    "issuer": token_server.issuer,
                    "rootcertbundle": str(token_server.certificate),
                }
            }
        if tls is not None:
            config["http"]["tls"] = {"certificate": str(tls.certificate), "key": str(tls.key)}
        (directory / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        with (directory / "log").open("wb") as log:
            process = subprocess.Popen(
                [program, "serve", str(directory / "config.yml")],
                stdout=log,
                stderr=log,
                env={**os.environ, "OTEL_TRACES_EXPORTER": "none"},
            )
        try:
            _wait_until_up(port, tls, process, directory / "log")
            yield RunningRegistry(f"127.0.0.1:{port}", storage)
        finally:
            process.terminate()
            process.wait(timeout=10)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _wait_until_up(port: int, tls: "Tls | None", process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        context = ssl.create_default_context(cafile=str(tls.certificate)) if tls else None
        connection = (
            http.client.HTTPSConnection("127.0.0.1", port, context=context)
            if context
            else http.client.HTTPConnection("127.0.0.1", port)
        )
        try:
            connection.request("GET", "/v2/")
            connection.getresponse().read()
        except OSError:
            time.sleep(0.02)
        else:
            return
        finally:
            connection.close()
    pytest.fail(f"docker-registry did not start: {log.read_text()[-2000:]}")


@dataclass(frozen=True)
class Tls:
    """A key and the certificate that it signed itself, for 127.0.0.1."""

    key: Path
    certificate: Path


def make_certificate(directory: Path) -> Tls:
    pair = Tls(directory / "key.pem", directory / "certificate.pem")
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tests -addext subjectAltName=IP:127.0.0.1".split()
    files = ["-keyout", str(pair.key), "-out", str(pair.certificate)]
    subprocess.run([require("openssl"), *request, *files], check=True, capture_output=True)
    return pair


# ── tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class TokenServer:
    """Hands out what a registry with token authentication accepts, and remembers every request.

    `actions` is what each user may do: {"reader": {"pull"}}. The user "" is anybody.
    """

    url: str
    certificate: Path
    actions: dict[str, set[str]]
    passwords: dict[str, str]
    refresh_tokens: dict[str, str]
    lifetime_s: int = 300
    service: str = "tests"
    issuer: str = "tests-issuer"
    knows_post: bool = True
    requests: list[dict[str, list[str]]] = field(default_factory=list)


@contextlib.contextmanager
def running_token_server(
    actions: Mapping[str, set[str]], *, refresh_tokens: Mapping[str, str] | None = None
) -> Iterator[TokenServer]:
    """A token server on loopback; every user's password is PASSWORD, `refresh_tokens` are token → user."""
    with tempfile.TemporaryDirectory(prefix="tuner-tokens-") as name:
        pair = make_certificate(Path(name))
        state = TokenServer(
            url="",
            certificate=pair.certificate,
            actions=dict(actions),
            passwords=dict.fromkeys(actions, PASSWORD),
            refresh_tokens=dict(refresh_tokens or {}),
        )

        class Handler(QuietHandler):
            def do_GET(self) -> None:
                self._answer(parse_qs(urlsplit(self.path).query), None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                if not state.knows_post:
                    self.reply(404, b"")
                    return
                form = parse_qs(body)
                scopes = [scope for value in form.get("scope", []) for scope in value.split()]
                self._answer({**form, "scope": scopes}, state.refresh_tokens.get(form["refresh_token"][0]))

            def _answer(self, query: dict[str, list[str]], user: str | None) -> None:
                state.requests.append({**query, "method": [self.command]})
                if user is None:
                    user = self._basic_user()
                if user is None:
                    self.reply(401, json.dumps({"errors": [{"code": "UNAUTHORIZED", "message": "who?"}]}).encode())
                    return
                access = []
                for scope in query.get("scope", []):
                    kind, repository, asked = scope.split(":")
                    granted = sorted(set(asked.split(",")) & state.actions.get(user, set()))
                    access.append({"type": kind, "name": repository, "actions": granted})
                token = _sign({"access": access, "sub": user}, state, pair)
                self.reply(200, json.dumps({"token": token, "expires_in": state.lifetime_s}).encode())

            def _basic_user(self) -> str | None:
                header = self.headers.get("Authorization")
                if header is None:
                    return "" if "" in state.actions else None
                user, _, password = base64.b64decode(header.removeprefix("Basic ")).decode().partition(":")
                if password in state.refresh_tokens:
                    return state.refresh_tokens[password]
                return user if state.passwords.get(user) == password else None

        with running_server(Handler) as host:
            state.url = f"http://{host}/token"
            yield state


def _sign(claims: Mapping[str, object], state: TokenServer, pair: Tls) -> str:
    """A JWT as the registry wants it: RS256, with the certificate in its header."""

    def encoded(content: bytes) -> str:
        return base64.urlsafe_b64encode(content).decode().rstrip("=")

    der = ssl.PEM_cert_to_DER_cert(pair.certificate.read_text())
    header = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(der).decode()]}
    now = int(time.time())
    times = {"iat": now, "nbf": now - 60, "exp": now + state.lifetime_s, "jti": os.urandom(8).hex()}
    payload = {"iss": state.issuer, "aud": state.service, **times, **claims}
    signed = f"{encoded(json.dumps(header).encode())}.{encoded(json.dumps(payload).encode())}"
    signature = subprocess.run(
        [require("openssl"), "dgst", "-sha256", "-sign", str(pair.key)],
        input=signed.encode(),
        capture_output=True,
        check=True,
    ).stdout
    return f"{signed}.{encoded(signature)}"


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Fault:
    """What happens instead, `times` times, to requests whose method and path match.

    Without a status the connection breaks: before the request is passed on, after `cut_body` bytes of its body, after
    `cut_answer` bytes of the answer's, or `after` the registry has done it, and not before `hang_s` have passed.
    """

    method: str
    path: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    times: int = 1
    after: bool = False
    hang_s: float = 0
    cut_body: int | None = None
    cut_answer: int | None = None


@dataclass
class FaultyRegistry:
    """A proxy before a registry: `faults` are used up in their order, `log` has every request that came in."""

    host: str
    faults: list[Fault] = field(default_factory=list)
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    change_answer: Callable[[str, str, bytes], bytes] = lambda method, path, body: body


class HasHost(Protocol):
    @property
    def host(self) -> str: ...


@contextlib.contextmanager
def faulty(registry: HasHost) -> Iterator[FaultyRegistry]:
    """Requests to it go to `registry`, but for the faults."""
    state = FaultyRegistry(host="")

    class Handler(QuietHandler):
        def _pass_on(self) -> None:
            state.log.append((self.command, self.path, dict(self.headers)))
            fault = self._take_fault()
            if fault is not None and fault.cut_body is not None:
                self._cut(fault)
                return
            if fault is not None and not fault.after and fault.cut_answer is None:
                self._fail(fault)
                return
            body = self.read_body()
            upstream = http.client.HTTPConnection(registry.host)
            try:
                # The same Host, so that the Location of an upload leads here again.
                headers = {
                    name: ", ".join(self.headers.get_all(name, []))  # skopeo has a line for each Accept
                    for name in self.headers
                    if name != "Transfer-Encoding"
                }
                upstream.request(self.command, self.path, body=body, headers=headers)
                answer = upstream.getresponse()
                content = state.change_answer(self.command, self.path, answer.read())
                if fault is not None and fault.cut_answer is None:
                    self._fail(fault)
                    return
                headers = {
                    name: value
                    for name, value in answer.getheaders()
                    if name.lower() not in ("content-length", "connection", "transfer-encoding", "date")
                }
                length = answer.getheader("Content-Length") if self.command == "HEAD" else None
                if fault is not None:
                    length, content = str(len(content)), content[: fault.cut_answer]
                    self.close_connection = True
                self.reply(answer.status, content, headers, length=length)
            finally:
                upstream.close()

        do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _pass_on

        def _take_fault(self) -> Fault | None:
            for fault in state.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, self.path):
                    fault.times -= 1
                    return fault
            return None

        def _cut(self, fault: Fault) -> None:
            """Part of the body reaches the registry, then both connections break."""
            upstream = http.client.HTTPConnection(registry.host)
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            body = self.read_body()
            for name, value in self.headers.items():
                if name not in ("Transfer-Encoding", "Content-Length"):
                    upstream.putheader(name, value)
            upstream.putheader("Content-Length", str(len(body)))
            upstream.endheaders()
            upstream.send(body[: fault.cut_body])
            time.sleep(0.05)  # the registry writes what it has got
            upstream.close()
            self._fail(replace(fault, cut_body=None))

        def _fail(self, fault: Fault) -> None:
            self.close_connection = True
            time.sleep(fault.hang_s)
            if fault.status is None:
                # a reset, not a polite end
                linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                return
            if not fault.after:
                self.read_body()
            self.reply(fault.status, fault.body, fault.headers)

    with running_server(Handler) as host:
        state.host = host
        yield state


class QuietHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Tests read what they need from the server's state."""

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(
        self, status: int, body: bytes, headers: Mapping[str, str] | None = None, *, length: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def running_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The host and port of an HTTP server on loopback."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Connections that a test breaks on purpose."""

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
