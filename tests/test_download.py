"""Never a wrong file under the final name: faults of servers, disks and processes, alone and in any mixture."""

import contextlib
import gzip
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http_server import Answer, HttpServer
from tests.test_fetch import JSON_LINES, LOOPBACK, QUICK, Fetching, Recording, a_spec, json_lines, url_sources
from tuner.errors import (
    ConfigError,
    DataError,
    DeniedError,
    InputMissingError,
    InterruptedRunError,
    ServiceError,
    TunerError,
)
from tuner.pipeline import download
from tuner.pipeline.fetch import fetch, fetch_sources
from tuner.pipeline.web import Transfer
from tuner.retry import Backoff
from tuner.runspec import HubModel, Network, Secrets, Silent, UrlSource
from tuner.urls import source_name

ROOT = Path(__file__).parent.parent
IN_PARTS = replace(QUICK, split_bytes=1_000_000, part_bytes=500_000)


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer() as server:
        yield server


@pytest.fixture
def reporter() -> Recording:
    return Recording()


@pytest.fixture
def fetching(tmp_path: Path, reporter: Recording) -> Fetching:
    return Fetching(tmp_path / "work", reporter)


def left(fetching: Fetching) -> set[str]:
    return {path.name for path in (fetching.work_dir / "data").iterdir()}


# ── odd servers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_body_that_only_the_connections_end_ends_arrives_with_a_warning(
    server: HttpServer, fetching: Fetching, reporter: Recording
) -> None:
    url = server.serve("/t.jsonl", Answer(body=JSON_LINES, unframed=True, ranges=False))
    assert fetching.content(fetching(url)[0]) == JSON_LINES
    assert "did not say how long" in reporter.warnings[0]


def test_a_pin_is_proof_for_such_a_body(server: HttpServer, fetching: Fetching, reporter: Recording) -> None:
    url = server.serve("/t.jsonl", Answer(body=JSON_LINES, unframed=True, truncate_to=16), JSON_LINES)
    pinned = f"{url}#sha256={hashlib.sha256(JSON_LINES).hexdigest()}"
    with pytest.raises(DataError, match="pins"):
        fetching(pinned)
    assert fetching.content(fetching(pinned)[0]) == JSON_LINES
    assert reporter.warnings == []


def test_a_body_of_unknown_length_that_broke_off_is_gone_on_with(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(300_000)
    broken = Answer(body=body, chunked=True, truncate_to=100_000)
    files = fetching(server.serve("/t.jsonl", broken, Answer(body=body, chunked=True)))
    assert fetching.content(files[0]) == body
    assert server.requests[1].headers["range"] == "bytes=100000-"


def test_416_where_a_file_of_unknown_length_ended_is_its_end(
    server: HttpServer, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process died after the last byte and before it had learnt that it was the last."""
    url = server.serve("/t.jsonl", Answer(body=JSON_LINES, chunked=True))

    def die(self: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(download._Download, "_finish", die)
        with pytest.raises(KeyboardInterrupt):
            fetching(url)
    state = fetching.work_dir / "data" / "0000-t.jsonl.part.json"
    kept = json.loads(state.read_text())
    state.write_text(json.dumps(kept | {"size_bytes": None, "parts": [[0, len(JSON_LINES), None]]}))
    assert fetching.content(fetching(url)[0]) == JSON_LINES
    assert [request.headers.get("range") for request in server.requests] == [None, f"bytes={len(JSON_LINES)}-"]


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-199999/300032", "bytes 100001-300031/300032", "bytes 100000-300031/300033", "bytes 100000-300031/*",
     "", "items 100000-300031/300032", "bytes */300032", "bytes 99999999999999999999-1/2", "\u00b2"],
)  # fmt: skip
def test_a_wrong_content_range_is_not_believed(server: HttpServer, fetching: Fetching, content_range: str) -> None:
    body = json_lines(300_000)[:300_032]
    body += b"\n" * (300_032 - len(body))
    wrong = Answer(body=body, headers={"Content-Range": content_range})
    files = fetching(server.serve("/t.jsonl", Answer(body=body, truncate_to=100_000), wrong, Answer(body=body)))
    assert fetching.content(files[0]) == body


def test_a_range_that_begins_elsewhere_is_not_joined(server: HttpServer, fetching: Fetching) -> None:
    body = bytes(range(32, 127)) * 3000
    shifted = Answer(body=body, shift=7)
    files = fetching(server.serve("/t.txt", Answer(body=body, truncate_to=100_000), shifted, Answer(body=body)))
    assert fetching.content(files[0]) == body


def test_an_etag_that_changes_between_parts_begins_the_file_anew(server: HttpServer, fetching: Fetching) -> None:
    old, new = json_lines(2_000_000), b'{"text": "new"}\n' * 130_000
    for careless in (False, True):
        later = Answer(body=new, careless=careless)
        url = server.serve(f"/{careless}.jsonl", Answer(body=old), Answer(body=old), later)
        assert fetching.content(fetching(url, transfer=IN_PARTS)[0]) == new


def test_a_file_that_never_stays_the_same_is_given_up(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(300_000)
    answers = [
        Answer(body=body, careless=True, truncate_to=9000, headers={"ETag": f'"{number}"'}) for number in range(50)
    ]
    with pytest.raises(ServiceError, match="faster than it downloads"):
        fetching(server.serve("/t.jsonl", *answers))


def test_a_date_of_this_very_second_is_no_promise_of_equal_bytes(server: HttpServer, fetching: Fetching) -> None:
    now = format_datetime(datetime.now(UTC), usegmt=True)
    body = json_lines(300_000)
    headers = {"Last-Modified": now, "Date": now}
    broken = Answer(body=body, truncate_to=100_000, ranges=False, headers=headers)
    fetching(server.serve("/t.jsonl", broken, Answer(body=body, ranges=False)))
    assert "range" not in server.requests[1].headers


def test_an_older_date_is_one(server: HttpServer, fetching: Fetching) -> None:
    now = datetime.now(UTC)
    body = json_lines(300_000)
    headers = {
        "Last-Modified": format_datetime(now - timedelta(seconds=60), usegmt=True),
        "Date": format_datetime(now, usegmt=True),
    }
    broken = Answer(body=body, truncate_to=100_000, ranges=False, headers=headers)
    fetching(server.serve("/t.jsonl", broken, Answer(body=body, ranges=False)))
    assert server.requests[1].headers["if-range"] == headers["Last-Modified"]


def test_gzip_as_an_encoding_is_taken_off_and_size_and_digest_are_the_files(
    server: HttpServer, fetching: Fetching
) -> None:
    body = json_lines(300_000)
    packed = gzip.compress(body)
    encoded = Answer(body=packed, headers={"Content-Encoding": "gzip"})
    url = server.serve("/t.jsonl", replace(encoded, truncate_to=500), encoded)
    (file,) = fetching(f"{url}#sha256={hashlib.sha256(body).hexdigest()}")
    assert fetching.content(file) == body
    assert (file.size_bytes, file.sha256) == (len(body), hashlib.sha256(body).hexdigest())
    assert server.requests[0].headers["accept-encoding"] == "identity"
    assert server.requests[1].headers["range"] == f"bytes=500-{len(packed) - 1}"
    assert left(fetching) == {"0000-t.jsonl", "0000-t.jsonl.fetched.json"}


def test_a_gz_file_that_is_also_called_encoded_stays_as_it_is(server: HttpServer, fetching: Fetching) -> None:
    packed = gzip.compress(JSON_LINES)
    url = server.serve("/t.jsonl.gz", Answer(body=packed, headers={"Content-Encoding": "x-gzip"}))
    assert fetching.content(fetching(url)[0]) == packed


@pytest.mark.parametrize(
    ("headers", "words"),
    [({"Content-Encoding": "br"}, "br-encoded"), ({"Content-Encoding": "gzip"}, "is no gzip")],
)
def test_an_encoding_that_cannot_be_taken_off_is_bad_data(
    server: HttpServer, fetching: Fetching, headers: dict[str, str], words: str
) -> None:
    url = server.serve("/t.jsonl", Answer(body=JSON_LINES, headers=headers))
    with pytest.raises(DataError, match=words):
        fetching(url)
    server.serve("/t.jsonl", JSON_LINES)
    assert fetching.content(fetching(url)[0]) == JSON_LINES


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 300_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 60_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x15\x03\x01\x00\x02\x02\x16",
        b"",
    ],
)
def test_what_is_no_http_is_a_service_error(server: HttpServer, fetching: Fetching, raw: bytes) -> None:
    with pytest.raises(ServiceError, match="3 times"):
        fetching(server.serve("/t.jsonl", Answer(raw=raw, body=b"")))
    assert "0000-t.jsonl" not in left(fetching)


def test_a_server_that_drips_is_given_up_and_gone_on_with(server: HttpServer, fetching: Fetching) -> None:
    drip = Answer(body=json_lines(300_000), drip_s=0.02)
    url = server.serve("/t.jsonl", drip, Answer(body=drip.body))
    assert fetching.content(fetching(url)[0]) == drip.body
    assert server.count("/t.jsonl") == 2


def test_a_server_that_only_drips_is_down(server: HttpServer, fetching: Fetching) -> None:
    with pytest.raises(ServiceError, match="nothing came for too long, 3 times"):
        fetching(server.serve("/t.jsonl", Answer(body=json_lines(300_000), drip_s=0.02)))


def test_redirects_in_a_circle_end(server: HttpServer, fetching: Fetching) -> None:
    server.serve("/b", Answer.redirect("/a"))
    with pytest.raises(DataError, match="redirects more than 5 times"):
        fetching(server.serve("/a", Answer.redirect("/b")))
    assert len(server.requests) == 6


@pytest.mark.parametrize("server_is_ahead", [timedelta(days=400), timedelta(days=-400)])
def test_retry_after_is_read_by_the_servers_clock(
    server: HttpServer, fetching: Fetching, server_is_ahead: timedelta
) -> None:
    there = datetime.now(UTC) + server_is_ahead
    dates = {
        "Date": format_datetime(there, usegmt=True),
        "Retry-After": format_datetime(there + timedelta(seconds=300), usegmt=True),
    }
    with pytest.raises(ServiceError, match="come back in 300 s"):
        fetching(server.serve("/t.jsonl", Answer(status=503, headers=dates)))


@pytest.mark.parametrize("value", ["-1", "soon", "Mon, 99 Foo 2026 00:00:00 GMT", "\u00b9", "1e3"])
def test_a_retry_after_that_says_nothing_is_passed_over(server: HttpServer, fetching: Fetching, value: str) -> None:
    busy = Answer(status=503, headers={"Retry-After": value})
    assert fetching(server.serve("/t.jsonl", busy, Answer(body=JSON_LINES)))


def test_an_ipv6_literal_is_connected_to(tmp_path: Path) -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").read_text().strip():
        pytest.skip("no IPv6 here")
    with HttpServer(address="::1") as server:
        url = server.serve("/t.jsonl", JSON_LINES)
        fetching = Fetching(tmp_path, Recording())
        assert fetching(url, network=Network(allow_cidrs=("::1/128",)))
        with pytest.raises(ConfigError, match="loopback"):
            fetching(url, network=Network())


def test_a_name_with_letters_beyond_ascii_is_asked_for_as_dns_has_it(server: HttpServer, fetching: Fetching) -> None:
    asked: list[str] = []

    def resolve(host: str) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    server.serve("/t.jsonl", JSON_LINES)
    fetching(f"http://b\u00fccher.example:{server.port}/t.jsonl", transfer=replace(QUICK, resolve=resolve))
    assert asked == ["xn--bcher-kva.example"]
    assert server.requests[0].headers["host"] == f"xn--bcher-kva.example:{server.port}"


def test_a_name_that_dns_cannot_have_is_a_config_error(fetching: Fetching) -> None:
    with pytest.raises(ConfigError, match="invalid"):
        fetching("http://a\u2260b\u200d.example/t.jsonl")


# ── secret headers ───────────────────────────────────────────────────────────────────────────────────────────────────


def fetch_with_headers(server: HttpServer, work_dir: Path, url: str, document: object) -> None:
    (source,), secrets = url_sources(url)
    secrets = replace(secrets, source_headers=(json.dumps(document),))
    fetch_sources(a_spec(source, network=LOOPBACK), secrets, work_dir, Recording(), transfer=QUICK)


def test_headers_go_to_their_url_and_not_along_with_a_redirect(server: HttpServer, tmp_path: Path) -> None:
    with HttpServer() as other:
        other.serve("/t.jsonl", JSON_LINES)
        server.serve("/private/hop", Answer.redirect("/public/hop"))
        server.serve("/public/hop", Answer.redirect(f"{other.url}/t.jsonl"))
        document = {f"{server.url}/private/": {"bearer": "hunter2"}}
        fetch_with_headers(server, tmp_path, f"{server.url}/private/hop", document)
        assert [request.headers.get("authorization") for request in server.requests] == ["Bearer hunter2", None]
        assert "authorization" not in other.requests[0].headers
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_every_part_has_the_headers(server: HttpServer, tmp_path: Path) -> None:
    url = server.serve("/t.jsonl", Answer(body=json_lines(300_000), truncate_to=1000), json_lines(300_000))
    fetch_with_headers(server, tmp_path, url, {server.url: {"username": "me", "password": "x"}})
    assert [request.headers["authorization"] for request in server.requests] == ["Basic bWU6eA=="] * 2


def test_headers_that_are_refused_are_said_to_be(server: HttpServer, tmp_path: Path) -> None:
    url = server.serve("/t.jsonl", Answer(status=401))
    with pytest.raises(DeniedError) as caught:
        fetch_with_headers(server, tmp_path, url, {server.url: {"bearer": "hunter2"}})
    assert "headers sent with it" in (caught.value.hint or "")
    assert "hunter2" not in f"{caught.value!r} {caught.value.hint}"


# ── any mixture of faults ────────────────────────────────────────────────────────────────────────────────────────────

TINY_PARTS = Transfer(
    connections=4, attempts=3, connect_timeout_s=2, stall_timeout_s=0.1, slowest_bytes_per_s=10,
    backoff=Backoff(0.001, 1), split_bytes=2000, part_bytes=700,
)  # fmt: skip
SIZES = st.sampled_from([1, 2, 699, 700, 1999, 2000, 2001, 2800, 5000])
FAULTS = st.one_of(
    st.builds(Answer, truncate_to=st.integers(0, 5000), reset=st.booleans(), chunked=st.booleans()),
    st.builds(Answer, truncate_to=st.integers(0, 5000), careless=st.booleans()),
    st.builds(Answer, shift=st.sampled_from([-700, -1, 1, 700])),
    st.builds(Answer, status=st.sampled_from([403, 404, 408, 416, 429, 500, 503])),
    st.builds(Answer, ranges=st.just(False), truncate_to=st.integers(0, 5000)),
    st.builds(Answer, careless=st.just(True)),
    st.builds(Answer, chunked=st.just(True)),
    st.builds(
        Answer,
        raw=st.sampled_from([b"", b"junk\r\n\r\n", b"HTTP/1.1 206 Partial Content\r\nContent-Length: 3\r\n\r\nabc"]),
    ),
    st.builds(Answer, headers=st.just({"Accept-Ranges": "bytes", "ETag": 'W/"weak"'})),
    st.builds(Answer, headers=st.just({"Content-Range": "bytes 0-1/2"})),
    st.just(Answer()),
)
STALL = st.builds(Answer, stall_after=st.integers(0, 5000))


def body_of(version: int, size: int) -> bytes:
    """Bytes of which every window tells the version and the place; nothing that looks like another kind of file."""
    return b"v" + random.Random(version).randbytes(size - 1).replace(b"\0", b"\1")


class DeadError(BaseException):
    """This process is no more."""


@contextlib.contextmanager
def dying_after(operations: int | None) -> Iterator[None]:
    """After so many writes, renames and removals nothing reaches the disk any more; the last write only in half."""
    if operations is None:
        yield
        return
    left_over, lock = [operations], threading.Lock()

    def alive() -> bool:
        with lock:
            left_over[0] -= 1
            return left_over[0] >= 0

    def guarded(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if not alive():
                raise DeadError
            return function(*args, **kwargs)

        return call

    pwrite = os.pwrite

    def half(descriptor: int, chunk: bytes, at: int) -> int:
        if not alive():
            pwrite(descriptor, chunk[: len(chunk) // 2], at)
            raise DeadError
        return pwrite(descriptor, chunk, at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download.os, "pwrite", half)
        for name in ("replace", "unlink", "write_text"):
            patch.setattr(Path, name, guarded(getattr(Path, name)))
        with contextlib.suppress(DeadError):
            yield


@pytest.fixture(scope="module")
def shared_server() -> Iterator[HttpServer]:
    with HttpServer() as server:
        yield server


def check_any_mixture(
    server: HttpServer, work_dir: Path, size: int, runs: list[tuple[list[tuple[int, Answer]], int | None]]
) -> None:
    name = work_dir.name
    url = f"{server.url}/{name}.txt"
    path = work_dir / "data" / source_name(0, url)
    source = UrlSource(name=source_name(0, url), url=url)
    versions = [body_of(version, size + version) for version in range(2)]
    last = versions[0]
    for faults, dies_after in [*runs, ([(1, Answer())], None), ([(0, Answer())], None)]:
        answers = [replace(answer, body=versions[version]) for version, answer in faults]
        server.serve(f"/{name}.txt", *answers, versions[faults[-1][0] if faults else 0])
        last = versions[faults[-1][0] if faults else 0]
        with dying_after(dies_after), contextlib.suppress(TunerError):
            fetch_sources(a_spec(source), Secrets(), work_dir, Silent(), transfer=TINY_PARTS)
        if path.exists():
            assert path.read_bytes() in versions
    record = json.loads(path.with_name(f"{path.name}.fetched.json").read_text())
    # What came without ETag and date cannot be compared with what the server has now.
    assert path.read_bytes() == last or (record["version"]["etag"] is None and path.read_bytes() in versions)


RUNS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 1), FAULTS), max_size=7), st.none() | st.integers(0, 60)
    ),
    max_size=3,
)  # fmt: skip
COUNT = iter(range(10**9))


@given(size=SIZES, runs=RUNS)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_after_any_mixture_of_faults_the_file_is_exactly_one_version(
    shared_server: HttpServer, tmp_path: Path, size: int, runs: list
) -> None:
    check_any_mixture(shared_server, tmp_path / f"w{next(COUNT)}", size, runs)


@pytest.mark.long
@given(
    size=SIZES,
    runs=st.lists(
        st.tuples(st.lists(st.tuples(st.integers(0, 1), FAULTS | STALL), max_size=9), st.none() | st.integers(0, 60)),
        max_size=4,
    ),
)
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
def test_after_many_mixtures_of_faults_the_file_is_exactly_one_version(
    shared_server: HttpServer, tmp_path: Path, size: int, runs: list
) -> None:
    check_any_mixture(shared_server, tmp_path / f"w{next(COUNT)}", size, runs)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3000) | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["parts", "version"]), inner),
        max_leaves=8,
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_state_that_some_hand_left_makes_a_wrong_file(
    shared_server: HttpServer, tmp_path: Path, parts: object
) -> None:
    body = body_of(0, 2800)
    name = f"s{next(COUNT)}"
    url = shared_server.serve(f"/{name}.txt", body)
    data = tmp_path / name / "data"
    data.mkdir(parents=True)
    file_name = source_name(0, url)
    (data / f"{file_name}.part").write_bytes(b"x" * 100)
    etag = f'"{hashlib.sha256(b"another").hexdigest()[:16]}"'
    state = {
        "url": url, "query_sha256": "", "version": {"validator": etag, "etag": etag},
        "size_bytes": 2800, "parts": parts, "boot": None,
    }  # fmt: skip
    (data / f"{file_name}.part.json").write_text(json.dumps(state))
    source = UrlSource(name=file_name, url=url)
    (file,) = fetch_sources(a_spec(source), Secrets(), tmp_path / name, Silent(), transfer=TINY_PARTS)
    assert (tmp_path / name / file.path).read_bytes() == body


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────

CHILD = """
    import resource, sys
    from pathlib import Path
    from tuner.errors import TunerError
    from tuner.pipeline.fetch import fetch
    from tuner.pipeline.web import Transfer
    from tuner.presets import Preset
    from tuner.retry import Backoff
    from tuner.runspec import Network, RunSpec, Secrets, Silent, SmokeModel, UrlSource
    from tuner.training_settings import TrainingConfig
    work_dir, limit, *urls = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    spec = RunSpec(
        name="test", method="qlora", preset=Preset(name="tiny", model_id="org/tiny"), preset_as_written="tiny",
        base_model=SmokeModel(), training=TrainingConfig.of("qlora", {}),
        sources=tuple(UrlSource(name=f"{i:04d}-t.jsonl", url=url) for i, url in enumerate(urls)),
        destination={"kind": "directory", "path": "/tmp/out"}, network=Network(allow_cidrs=("127.0.0.0/8",)),
    )
    transfer = Transfer(
        attempts=2, stall_timeout_s=60, backoff=Backoff(0.01, 1), split_bytes=1_000_000, part_bytes=2_000_000,
    )
    print("ready", flush=True)
    try:
        for file in fetch(spec, Secrets(), Path(work_dir), Silent(), transfer=transfer).files:
            print(file.sha256, flush=True)
    except TunerError as error:
        print(type(error).__name__, error, flush=True)
"""


@contextlib.contextmanager
def child(work_dir: Path, *urls: str, file_limit: int = 0, wrapper: tuple[str, ...] = ()) -> Iterator[subprocess.Popen]:
    """A process that fetches, already past its imports."""
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", textwrap.dedent(CHILD), str(work_dir), str(file_limit), *urls],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kill_and_fetch_again(server: HttpServer, fetching: Fetching, rounds: int, seed: int) -> None:
    chance = random.Random(seed)
    bodies = [json_lines(30_000_000), json_lines(9_000_000).replace(b"x", b"y")]
    urls = [server.serve(f"/{number}/t.jsonl", body) for number, body in enumerate(bodies)]
    for _ in range(rounds):
        for path in (fetching.work_dir / "data").glob("*.json" if chance.random() < 0.3 else "*.fetched.json"):
            path.unlink()
        with child(fetching.work_dir, *urls) as process:
            time.sleep(chance.uniform(0, 0.35))
            process.send_signal(signal.SIGKILL)
        for number, body in enumerate(bodies):
            path = fetching.work_dir / "data" / f"{number:04d}-t.jsonl"
            assert not path.exists() or path.read_bytes() == body
    files = fetching(*urls, transfer=IN_PARTS)
    assert [fetching.content(file) for file in files] == bodies


def test_killed_at_random_moments_and_run_again_it_is_the_same_bytes(server: HttpServer, fetching: Fetching) -> None:
    kill_and_fetch_again(server, fetching, 4, seed=1)


@pytest.mark.long
def test_killed_at_many_random_moments_it_is_the_same_bytes(server: HttpServer, fetching: Fetching) -> None:
    kill_and_fetch_again(server, fetching, 60, seed=2)


def test_a_second_process_waits_for_the_first_and_goes_on_when_it_dies(server: HttpServer, tmp_path: Path) -> None:
    body = json_lines(900_000)
    url = server.serve("/t.jsonl", Answer(body=body, stall_after=500_000), Answer(body=body))
    sources, secrets = url_sources(url)
    reporter = Recording()
    part = tmp_path / "data" / "0000-t.jsonl.part"
    with child(tmp_path, url) as first:
        wait_until(lambda: part.exists() and part.stat().st_size == 500_000)
        cancelled = threading.Event()
        timer = threading.Timer(0.3, cancelled.set)
        timer.start()
        with pytest.raises(InterruptedRunError):
            fetch(a_spec(*sources), secrets, tmp_path, reporter, cancelled=cancelled, transfer=QUICK)
        timer.join()
        assert "another process is fetching" in reporter.notes[0]
        assert server.count("/t.jsonl") == 1
        timer = threading.Timer(0.3, first.kill)
        timer.start()
        fetched = fetch(a_spec(*sources), secrets, tmp_path, reporter, transfer=QUICK)
        timer.join()
    assert (tmp_path / fetched.files[0].path).read_bytes() == body


def test_two_processes_at_once_leave_one_whole_file(server: HttpServer, tmp_path: Path) -> None:
    body = json_lines(9_000_000)
    url = server.serve("/t.jsonl", body)
    with child(tmp_path, url) as first, child(tmp_path, url) as second:
        said = [process.stdout.read() for process in (first, second) if process.stdout]
    digest = hashlib.sha256(body).hexdigest()
    assert said == [f"{digest}\n", f"{digest}\n"]


def test_after_a_restart_of_the_machine_nothing_half_is_trusted(
    server: HttpServer, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json_lines(3_000_000)
    url = server.serve("/t.jsonl", Answer(body=body, stall_after=1_500_000))
    with child(fetching.work_dir, url):
        state = fetching.work_dir / "data" / "0000-t.jsonl.part.json"
        wait_until(lambda: state.exists() and json.loads(state.read_text())["parts"][0][1] > 1_000_000)
    server.serve("/t.jsonl", body)
    monkeypatch.setattr(download, "_boot", lambda: "another")
    asked = len(server.requests)
    assert fetching.content(fetching(url)[0]) == body
    assert "range" not in server.requests[asked].headers


def test_what_was_stopped_in_order_is_gone_on_with_after_a_restart(
    server: HttpServer, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json_lines(300_000)
    url = server.serve("/t.jsonl", Answer(body=body, truncate_to=100_000), Answer(status=403), Answer(body=body))
    with pytest.raises(DeniedError):
        fetching(url)
    monkeypatch.setattr(download, "_boot", lambda: "another")
    assert fetching.content(fetching(url)[0]) == body
    assert server.requests[2].headers["range"].startswith("bytes=100000-")


def test_a_limit_on_file_sizes_is_said_and_what_arrived_is_kept(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(900_000)
    url = server.serve("/t.jsonl", body)
    with child(fetching.work_dir, url, file_limit=300_000) as process:
        said = process.stdout.read() if process.stdout else ""
    assert "ConfigError the file is larger than" in said
    assert fetching.content(fetching(url)[0]) == body
    assert server.requests[1].headers["range"].startswith("bytes=300000-")


FULL_DISK = (
    'mount -t tmpfs -o size=2m tmpfs "$0" && head -c 1200000 /dev/zero > "$0/ballast" || exit 99; '
    'shift 0; "$@"; rm "$0/ballast"; "$@"; ls "$0/data"'
)


def test_a_disk_that_is_full_in_the_middle_is_said_and_with_space_it_goes_on(
    server: HttpServer, tmp_path: Path
) -> None:
    """A real file system of 2 MB, in a mount namespace of its own; the length is unknown, so nothing warns before."""
    body = json_lines(1_500_000)
    url = server.serve("/t.jsonl", Answer(body=body, chunked=True))
    fetching_in_it = [sys.executable, "-c", textwrap.dedent(CHILD), str(tmp_path), "0", url]
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, str(tmp_path), *fetching_in_it],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
        check=False,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("no mounts here")
    lines = done.stdout.splitlines()
    assert lines[1].startswith("ConfigError no disk space")
    assert lines[3] == hashlib.sha256(body).hexdigest()
    assert lines[4:] == ["0000-t.jsonl", "0000-t.jsonl.fetched.json"]
    assert "range" in server.requests[1].headers


# ── side by side ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_more_connections_than_asked_for_are_open(server: HttpServer, fetching: Fetching) -> None:
    open_now, most, lock = [0], [0], threading.Lock()
    answer = server._next_answer

    def counted(request):  # type: ignore[no-untyped-def]
        with lock:
            open_now[0] += 1
            most[0] = max(most[0], open_now[0])
        time.sleep(0.005)
        with lock:
            open_now[0] -= 1
        return answer(request)

    server._next_answer = counted  # type: ignore[method-assign]
    urls = [server.serve(f"/{number}.jsonl", json_lines(50_000)) for number in range(6)]
    fetching(*urls, transfer=replace(QUICK, connections=3, split_bytes=20_000, part_bytes=5000))
    assert most[0] == 3


def test_what_fails_first_stops_the_other(server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that never end, and a base model that is not there."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    url = server.serve("/t.jsonl", Answer(body=json_lines(300_000), stall_after=1000))
    sources, secrets = url_sources(url)
    spec = a_spec(*sources, base_model=HubModel(id="org/none", revision="main"))
    with pytest.raises(InputMissingError, match="org/none"):
        fetch(spec, secrets, tmp_path / "work", Recording(), transfer=replace(QUICK, stall_timeout_s=600))


def test_a_blocked_read_hears_of_a_stop(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", Answer(body=json_lines(300_000), stall_after=1000))
    cancelled = threading.Event()
    timer = threading.Timer(0.2, cancelled.set)
    timer.start()
    with pytest.raises(InterruptedRunError):
        fetching(url, cancelled=cancelled, transfer=replace(QUICK, stall_timeout_s=600))
    timer.join()


def test_a_wait_that_a_server_asked_for_hears_of_a_stop(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", Answer(status=503, headers={"Retry-After": "100"}))
    cancelled = threading.Event()
    timer = threading.Timer(0.2, cancelled.set)
    timer.start()
    with pytest.raises(InterruptedRunError):
        fetching(url, cancelled=cancelled)
    timer.join()
