import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from tests.data_files import message_rows, write_data
from tests.http_server import Answer, HttpServer
from tests.hub import publish_model
from tests.test_registry_image import pack
from tuner.content import model_digest
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
from tuner.pipeline.download import format_bytes
from tuner.pipeline.fetch import announced_bytes, fetch, fetch_base_model, fetch_sources
from tuner.pipeline.web import Transfer, expired_at
from tuner.presets import Preset
from tuner.reference import LayoutReference
from tuner.registry.push import push_layout
from tuner.retry import Backoff
from tuner.runspec import (
    BaseModelSource,
    FetchedFile,
    FetchedModel,
    FileSource,
    HubModel,
    ImageModel,
    ImageSource,
    LocalModel,
    Network,
    Progress,
    RunSpec,
    Secrets,
    Silent,
    SmokeModel,
    Source,
    UrlSource,
    VolumeSource,
)
from tuner.training_settings import TrainingConfig
from tuner.urls import source_name, split_url

LOOPBACK = Network(allow_cidrs=("127.0.0.0/8",))
QUICK = Transfer(attempts=3, connect_timeout_s=2, stall_timeout_s=0.3, backoff=Backoff(0.01, 1))


@dataclass
class Recording:
    """A Reporter that remembers."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    progresses: list[Progress] = field(default_factory=list)

    def note(self, line: str) -> None:
        self.notes.append(line)

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)


def a_spec(
    *sources: Source,
    network: Network = LOOPBACK,
    base_model: BaseModelSource | None = None,
    trust_remote_code: bool = False,
) -> RunSpec:
    return RunSpec(
        name="test",
        method="qlora",
        preset=Preset(name="tiny", model_id="org/tiny"),
        preset_as_written="tiny",
        base_model=base_model or SmokeModel(),
        training=TrainingConfig.of("qlora", {}),
        sources=sources or (VolumeSource(path="/nowhere"),),
        destination={"kind": "directory", "path": "/tmp/out"},
        network=network,
        trust_remote_code=trust_remote_code,
    )


def url_sources(*urls: str) -> tuple[tuple[Source, ...], Secrets]:
    """As a Workspace's `urls` become sources."""
    sources = []
    queries = {}
    for index, url in enumerate(urls):
        parts = split_url(url)
        name = source_name(index, url)
        sources.append(
            UrlSource(name=name, url=parts.url, query_sha256=parts.query_sha256, sha256=parts.options.sha256)
        )
        queries[name] = parts.query
    return tuple(sources), Secrets(queries=queries)


@dataclass(frozen=True)
class Fetching:
    """Fetch URLs into one work directory, with what was said."""

    work_dir: Path
    reporter: Recording

    def __call__(
        self,
        *urls: str,
        network: Network = LOOPBACK,
        transfer: Transfer = QUICK,
        cancelled: threading.Event | None = None,
    ) -> tuple[FetchedFile, ...]:
        sources, secrets = url_sources(*urls)
        return fetch_sources(
            a_spec(*sources, network=network),
            secrets,
            self.work_dir,
            self.reporter,
            cancelled=cancelled,
            transfer=transfer,
        )

    def content(self, file: FetchedFile) -> bytes:
        return (self.work_dir / file.path).read_bytes()


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


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    write_data(path, message_rows(50))
    return path.read_bytes()


JSON_LINES = b'{"text": "one"}\n{"text": "two"}\n'


def json_lines(size: int) -> bytes:
    line = b'{"text": "' + b"x" * 1013 + b'"}\n'
    return line * (size // len(line))


# ── what arrives ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_url_arrives_and_is_named_with_its_digest(server: HttpServer, fetching: Fetching, parquet: bytes) -> None:
    urls = [server.serve(f"/{name}.parquet", parquet) for name in "abc"]
    files = fetching(*urls)
    assert [file.source for file in files] == urls
    assert [fetching.content(file) for file in files] == [parquet] * 3
    assert {(file.sha256, file.size_bytes) for file in files} == {(hashlib.sha256(parquet).hexdigest(), len(parquet))}
    assert [file.path for file in files] == ["data/0000-a.parquet", "data/0001-b.parquet", "data/0002-c.parquet"]


def test_urls_with_equal_basenames_both_arrive(server: HttpServer, fetching: Fetching) -> None:  # KAITO fault 4
    first = server.serve("/one/train.jsonl", b'{"text": "first"}\n')
    second = server.serve("/two/train.jsonl", b'{"text": "second"}\n')
    files = fetching(first, second)
    assert [fetching.content(file) for file in files] == [b'{"text": "first"}\n', b'{"text": "second"}\n']


def test_the_query_reaches_the_server_byte_for_byte(server: HttpServer, fetching: Fetching) -> None:
    query = "sp=r&sig=a%2Bb%2F%3D&x=a+b&download=true"
    fetching(f"{server.serve('/t.jsonl', JSON_LINES)}?{query}")
    assert server.requests[0].query == query


def test_a_redirect_is_followed(server: HttpServer, fetching: Fetching) -> None:
    server.serve("/real.jsonl", JSON_LINES)
    server.serve("/hop", Answer.redirect("/real.jsonl?sig=b", status=307))
    files = fetching(server.serve("/t.jsonl", Answer.redirect(f"{server.url}/hop")))
    assert fetching.content(files[0]) == JSON_LINES


def test_a_body_without_a_length_arrives(server: HttpServer, fetching: Fetching) -> None:
    files = fetching(server.serve("/t.jsonl", Answer(body=JSON_LINES, chunked=True)))
    assert fetching.content(files[0]) == JSON_LINES


def test_a_pin_that_fits_is_accepted_and_one_that_does_not_is_bad_data(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", JSON_LINES)
    fetching(f"{url}#sha256={hashlib.sha256(JSON_LINES).hexdigest()}")
    with pytest.raises(DataError, match="pins"):
        fetching(f"{url}#sha256={'0' * 64}")


def test_progress_counts_bytes_up_to_the_size(server: HttpServer, fetching: Fetching, reporter: Recording) -> None:
    fetching(server.serve("/t.jsonl", JSON_LINES))
    last = reporter.progresses[-1]
    assert (last.stage, last.task, last.unit) == ("fetch", "0000-t.jsonl", "B")
    assert (last.done, last.total) == (len(JSON_LINES), len(JSON_LINES))


def test_the_stage_ends_with_one_line_of_numbers(server: HttpServer, tmp_path: Path, reporter: Recording) -> None:
    sources, secrets = url_sources(server.serve("/t.jsonl", JSON_LINES))
    spec = a_spec(*sources)
    fetched = fetch(spec, secrets, tmp_path, reporter, transfer=QUICK)
    assert fetched.run_digest == spec.digest
    assert fetched.base_model is None
    assert len(reporter.notes) == 1
    assert reporter.notes[0].startswith("fetched 1 file, 32 B, ")


def test_sizes_are_written_as_download_tools_do() -> None:
    sizes = [999, 1000, 13_100_000, 999_960, 7_640_000_000, 2_000_000_000_000]
    assert [format_bytes(size) for size in sizes] == ["999 B", "1.0 kB", "13.1 MB", "1.0 MB", "7.6 GB", "2.0 TB"]


# ── parts, resuming, retrying ────────────────────────────────────────────────────────────────────────────────────────


def test_a_large_file_comes_in_parts_over_several_connections(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(2_000_000)
    url = server.serve("/t.jsonl", body)
    files = fetching(url, transfer=replace(QUICK, split_bytes=1_000_000, part_bytes=300_000))
    assert fetching.content(files[0]) == body
    ranges = sorted(request.headers.get("range", "") for request in server.requests)
    assert len(ranges) == 7
    assert ranges[0] == ""
    assert "bytes=300000-599999" in ranges


def test_a_server_that_says_ranges_but_has_none_is_asked_once_more(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(1_500_000)
    liar = Answer(body=body, ranges=False, headers={"Accept-Ranges": "bytes", "ETag": '"x"'})
    files = fetching(server.serve("/t.jsonl", liar), transfer=replace(QUICK, split_bytes=1_000_000, part_bytes=500_000))
    assert fetching.content(files[0]) == body


def test_a_broken_connection_is_gone_on_with(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(300_000)
    url = server.serve("/t.jsonl", Answer(body=body, truncate_to=100_000), Answer(body=body))
    files = fetching(url)
    assert fetching.content(files[0]) == body
    assert [request.headers.get("range") for request in server.requests] == [None, f"bytes=100000-{len(body) - 1}"]
    assert server.requests[1].headers["if-range"].startswith('"')


def test_a_truncated_body_is_retried_and_then_a_service_error(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", Answer(body=JSON_LINES, truncate_to=10, ranges=False))
    with pytest.raises(ServiceError, match="3 times"):
        fetching(url)
    assert server.count("/t.jsonl") == QUICK.attempts
    assert not (fetching.work_dir / "data" / "0000-t.jsonl").exists()


def test_a_file_that_changed_between_two_requests_is_begun_anew(server: HttpServer, fetching: Fetching) -> None:
    old, new = json_lines(300_000), b'{"text": "new"}\n' * 10_000
    files = fetching(server.serve("/t.jsonl", Answer(body=old, truncate_to=100_000), Answer(body=new)))
    assert fetching.content(files[0]) == new


def test_two_versions_are_not_joined_by_a_server_that_ignores_if_range(server: HttpServer, fetching: Fetching) -> None:
    old, new = json_lines(300_000), b'{"text": "new"}\n' * 10_000
    careless = Answer(
        status=206, body=new[100_000:], headers={"Content-Range": f"bytes 100000-159999/{len(new)}", "ETag": '"new"'}
    )
    files = fetching(server.serve("/t.jsonl", Answer(body=old, truncate_to=100_000), careless, Answer(body=new)))
    assert fetching.content(files[0]) == new


def test_without_etag_or_date_a_broken_download_starts_over(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(300_000)
    url = server.serve(
        "/t.jsonl", Answer(body=body, truncate_to=100_000, ranges=False), Answer(body=body, ranges=False)
    )
    assert fetching.content(fetching(url)[0]) == body
    assert "range" not in server.requests[1].headers


def test_a_stalled_connection_is_given_up_and_gone_on_with(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(300_000)
    files = fetching(server.serve("/t.jsonl", Answer(body=body, stall_after=100_000), Answer(body=body)))
    assert fetching.content(files[0]) == body
    assert server.requests[1].headers["range"].startswith("bytes=100000-")


KILLED_DOWNLOAD = """
    import sys
    from pathlib import Path
    from tests.test_fetch import Fetching, Recording
    from tuner.pipeline.web import Transfer
    Fetching(Path(sys.argv[2]), Recording())(sys.argv[1], transfer=Transfer(stall_timeout_s=60))
"""


def test_a_killed_download_resumes(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(4_000_000)
    url = server.serve("/t.jsonl", Answer(body=body, stall_after=3_000_000), Answer(body=body))
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED_DOWNLOAD), url, str(fetching.work_dir)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": "."},
    )
    state = fetching.work_dir / "data" / "0000-t.jsonl.part.json"
    deadline = time.monotonic() + 30
    try:
        while not (state.exists() and json.loads(state.read_text())["parts"][0][1] > 2_000_000):
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    files = fetching(url)
    assert fetching.content(files[0]) == body
    start = int(server.requests[1].headers["range"].removeprefix("bytes=").split("-")[0])
    assert 2_000_000 < start <= 3_000_000


def test_parts_that_were_interrupted_resume_each_where_it_stopped(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(2_000_000)
    in_parts = replace(QUICK, split_bytes=1_000_000, part_bytes=500_000, attempts=1)
    url = server.serve("/t.jsonl", Answer(body=body), Answer(status=503), Answer(status=503), Answer(status=503))
    with pytest.raises(ServiceError):
        fetching(url, transfer=in_parts)
    server.serve("/t.jsonl", body)
    asked_before = len(server.requests)
    files = fetching(url, transfer=in_parts)
    assert fetching.content(files[0]) == body
    again = server.requests[asked_before:]
    assert again
    assert all("range" in request.headers for request in again)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server: HttpServer, fetching: Fetching, status: int) -> None:
    files = fetching(server.serve("/t.jsonl", Answer(status=status), Answer(status=status), Answer(body=JSON_LINES)))
    assert fetching.content(files[0]) == JSON_LINES


def test_that_a_server_is_asked_again_is_said_once_and_why(
    server: HttpServer, fetching: Fetching, reporter: Recording
) -> None:
    url = server.serve("/t.jsonl", Answer(status=503), Answer(status=502), Answer(body=JSON_LINES))
    fetching(url)
    (line,) = reporter.warnings
    assert line.startswith(f"{url}: ")
    assert line.endswith("503; trying again")


def in_a_minute() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)


def a_moment_ago() -> str:
    return format_datetime(datetime.now(UTC) - timedelta(seconds=60), usegmt=True)


@pytest.mark.parametrize("value", ["0", a_moment_ago()])
def test_retry_after_decides_how_long_to_wait(server: HttpServer, fetching: Fetching, value: str) -> None:
    busy = Answer(status=503, headers={"Retry-After": value})
    fetching(
        server.serve("/t.jsonl", busy, Answer(body=JSON_LINES)),
        transfer=replace(QUICK, backoff=Backoff(1_000_000, 1_000_000)),
    )
    assert server.count("/t.jsonl") == 2


@pytest.mark.parametrize(("value", "seconds"), [(lambda: "3600", r"3600"), (in_a_minute, r"(60|5\d)")])
def test_a_server_that_asks_for_too_much_patience_is_down(
    server: HttpServer, fetching: Fetching, value: Callable[[], str], seconds: str
) -> None:
    with pytest.raises(ServiceError, match=f"come back in {seconds} s"):
        fetching(
            server.serve("/t.jsonl", Answer(status=503, headers={"Retry-After": value()})),
            transfer=replace(QUICK, longest_wait_s=20),
        )
    assert server.count("/t.jsonl") == 1


def test_an_unreachable_server_is_a_service_error(fetching: Fetching) -> None:
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ServiceError, match="cannot be reached"):
            fetching(f"http://127.0.0.1:{taken.getsockname()[1]}/t.jsonl")


def test_cancelling_stops_soon_and_keeps_what_arrived(server: HttpServer, fetching: Fetching) -> None:
    body = json_lines(300_000)
    url = server.serve("/t.jsonl", Answer(body=body, stall_after=100_000), Answer(body=body))
    cancelled = threading.Event()
    part = fetching.work_dir / "data" / "0000-t.jsonl.part"

    def cancel_once_bytes_came() -> None:
        while not (part.exists() and part.stat().st_size == 100_000):
            time.sleep(0.01)
        cancelled.set()

    watcher = threading.Thread(target=cancel_once_bytes_came)
    watcher.start()
    with pytest.raises(InterruptedRunError):
        fetching(url, cancelled=cancelled, transfer=replace(QUICK, stall_timeout_s=1))
    watcher.join()
    assert fetching.content(fetching(url)[0]) == body
    assert server.requests[1].headers["range"].startswith("bytes=100000-")


# ── what is already there ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_is_there_is_asked_about_but_not_fetched_again(
    server: HttpServer, fetching: Fetching, reporter: Recording
) -> None:
    url = server.serve("/t.jsonl", JSON_LINES)
    first = fetching(url)
    assert fetching(url) == first
    assert "if-none-match" in server.requests[1].headers
    assert reporter.notes == ["0000-t.jsonl: already there"]


def test_a_file_that_changed_on_the_server_is_fetched_again(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", JSON_LINES)
    fetching(url)
    server.serve("/t.jsonl", b'{"text": "new"}\n')
    assert fetching.content(fetching(url)[0]) == b'{"text": "new"}\n'


def test_a_file_that_changed_on_disk_is_fetched_again(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", JSON_LINES)
    (fetching.work_dir / fetching(url)[0].path).write_bytes(JSON_LINES.replace(b"one", b"two"))
    assert fetching.content(fetching(url)[0]) == JSON_LINES


def test_another_url_of_the_same_name_is_fetched(server: HttpServer, fetching: Fetching) -> None:
    fetching(server.serve("/a/t.jsonl", JSON_LINES))
    assert fetching.content(fetching(server.serve("/b/t.jsonl", b"{}\n"))[0]) == b"{}\n"


def test_a_renewed_signature_names_the_same_file(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", Answer(body=JSON_LINES, ranges=False))
    fetching(f"{url}?sig=one")
    fetching(f"{url}?sig=two")
    assert server.count("/t.jsonl") == 1


def test_an_expired_signature_does_not_lose_a_file_that_is_there(
    server: HttpServer, fetching: Fetching, reporter: Recording
) -> None:
    url = server.serve("/t.jsonl", Answer(body=JSON_LINES), Answer(status=403))
    assert fetching(url) == fetching(url)
    assert "not compared" in reporter.warnings[0]


# ── what bad input gets ──────────────────────────────────────────────────────────────────────────────────────────────


BAD_ANSWERS: list[tuple[str, Answer, type[TunerError], str]] = [
    ("t.jsonl", Answer(status=404), InputMissingError, "404"),
    ("t.jsonl", Answer(status=410), InputMissingError, "410"),
    ("t.jsonl", Answer(status=401), DeniedError, "401"),
    ("t.jsonl", Answer(status=403), DeniedError, "403"),
    ("t.jsonl", Answer(status=400), InputMissingError, "400"),
    ("t.jsonl", Answer(status=301), InputMissingError, "301"),
    ("t.jsonl", Answer(status=204, ranges=False), InputMissingError, "204"),
    ("t.jsonl", Answer(status=503), ServiceError, "503"),
    ("t.jsonl", Answer(body=b""), DataError, "empty"),
    ("t.jsonl", Answer(body=b"<p>hi", headers={"Content-Type": "text/html; charset=utf-8"}), DataError, "web page"),
    ("t.jsonl", Answer(body=b"\n<!DOCTYPE html><html>"), DataError, "web page"),
    ("t.csv", Answer(body=b"<HTML><body>"), DataError, "web page"),
    ("t.parquet", Answer(body=b'{"a": 1}'), DataError, "not a parquet file; it looks like JSON"),
    ("t.parquet", Answer(body=b"PAR1 and no more"), DataError, "cut short"),
    ("t.parquet", Answer(body=b"PAR1....\x08\0\0\0PAR1"), DataError, "footer"),
    ("t.parquet", Answer(body=b"version https://git-lfs.github.com/spec/v1\n"), DataError, "Git LFS pointer"),
    ("t.jsonl", Answer(body=b"a,b\n1,2\n"), DataError, "not JSON"),
    ("t.json", Answer(body=b"<?xml version='1.0'?><Error/>"), DataError, "XML"),
]


@pytest.mark.parametrize(("name", "answer", "kind", "word"), BAD_ANSWERS)
def test_a_bad_answer_is_said_with_its_url_and_its_exit_code(
    server: HttpServer, fetching: Fetching, name: str, answer: Answer, kind: type[TunerError], word: str
) -> None:
    url = server.serve(f"/{name}", answer)
    with pytest.raises(kind) as caught:
        fetching(f"{url}?sig=SECRET")
    assert word in caught.value.message
    assert url in caught.value.message
    assert list((fetching.work_dir / "data").glob(f"0000-{name}")) == []


def test_bad_content_is_not_gone_on_from(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", b"no json\n")
    with pytest.raises(DataError):
        fetching(url)
    server.serve("/t.jsonl", JSON_LINES)
    assert fetching.content(fetching(url)[0]) == JSON_LINES


def test_a_truncated_parquet_file_is_bad_data(server: HttpServer, fetching: Fetching, parquet: bytes) -> None:
    with pytest.raises(DataError, match="cut short"):
        fetching(server.serve("/t.parquet", parquet[:-10]))


def test_all_failing_urls_are_in_one_error_of_the_first_kind(server: HttpServer, fetching: Fetching) -> None:
    good = server.serve("/good.jsonl", JSON_LINES)
    denied = server.serve("/denied.jsonl", Answer(status=403))
    with pytest.raises(InputMissingError) as caught:
        fetching(good, f"{server.url}/missing.jsonl", denied)
    assert "2 inputs failed" in caught.value.message
    assert f"{server.url}/missing.jsonl: not found" in caught.value.message
    assert f"{denied}: denied" in caught.value.message
    assert good not in caught.value.message


def test_too_many_redirects_are_bad_data(server: HttpServer, fetching: Fetching) -> None:
    with pytest.raises(DataError, match="redirects more than 5 times"):
        fetching(server.serve("/t.jsonl", Answer.redirect("/t.jsonl")))


@pytest.mark.parametrize(
    "query",
    [
        "sv=2024-11-04&se=2020-01-01T00%3A00%3A00Z&sig=SECRET",
        "X-Amz-Date=20200101T000000Z&X-Amz-Expires=3600&X-Amz-Signature=SECRET",
        "X-Goog-Date=20200101T000000Z&X-Goog-Expires=3600&X-Goog-Signature=SECRET",
        "Expires=1577836800&Signature=SECRET",
    ],
)
def test_a_refused_url_whose_signature_expired_says_when(server: HttpServer, fetching: Fetching, query: str) -> None:
    with pytest.raises(DeniedError) as caught:
        fetching(f"{server.serve('/t.jsonl', Answer(status=403))}?{query}")
    assert "expired at 2020-01-01" in (caught.value.hint or "")


def test_a_signature_that_lasts_is_not_said_to_have_expired() -> None:
    assert expired_at("se=2100-01-01T00:00:00Z&sig=s") is None
    assert expired_at("se=soon&sig=s") is None
    assert expired_at("download=true") is None


def test_no_disk_space_is_said_before_the_bytes_come(
    server: HttpServer, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = download.shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"no disk space at .*: need 32 B, have 10 B"):
        fetching(server.serve("/t.jsonl", JSON_LINES))


def test_a_disk_that_fills_up_is_said_and_the_part_is_kept(
    server: HttpServer, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json_lines(300_000)
    url = server.serve("/t.jsonl", body)
    write = os.pwrite

    def write_until_full(descriptor: int, chunk: bytes, at: int) -> int:
        if at >= 100_000:
            raise OSError(28, "No space left on device")
        return write(descriptor, chunk, at)

    with monkeypatch.context() as full:
        full.setattr(download.os, "pwrite", write_until_full)
        with pytest.raises(ConfigError, match="no disk space"):
            fetching(url)
    files = fetching(url)
    assert fetching.content(files[0]) == body
    assert "range" in server.requests[1].headers


# ── the guard ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "location",
    ["http://169.254.169.254/latest/meta-data", "http://[::ffff:a9fe:a9fe]/", "http://metadata.google.internal/"],
)
def test_a_redirect_to_a_metadata_address_is_refused(
    server: HttpServer, fetching: Fetching, location: str
) -> None:  # KAITO fault 23
    with pytest.raises(ConfigError, match="redirects to"):
        fetching(server.serve("/t.jsonl", Answer.redirect(location)))


def test_loopback_is_refused_unless_allowed(server: HttpServer, fetching: Fetching) -> None:
    url = server.serve("/t.jsonl", JSON_LINES)
    with pytest.raises(ConfigError, match="loopback"):
        fetching(url, network=Network())
    assert server.requests == []
    assert fetching(url, network=Network(allow_private_urls=True))


def resolving_to(*addresses: str) -> Transfer:
    def resolve(host: str) -> Sequence[str]:
        assert host == "data.example"
        return addresses

    return replace(QUICK, resolve=resolve)


def test_a_name_that_resolves_to_loopback_is_refused_unless_allowed(server: HttpServer, fetching: Fetching) -> None:
    server.serve("/t.jsonl", JSON_LINES)
    url = f"http://data.example:{server.port}/t.jsonl"
    with pytest.raises(ConfigError, match=r"data.example resolves to a forbidden address: 127.0.0.1 is a loopback"):
        fetching(url, network=Network(), transfer=resolving_to("127.0.0.1"))
    assert server.requests == []
    fetching(url, network=LOOPBACK, transfer=resolving_to("127.0.0.1"))
    assert server.requests[0].headers["host"] == f"data.example:{server.port}"


def test_a_name_that_resolves_to_metadata_is_never_allowed(fetching: Fetching) -> None:
    everything = Network(allow_cidrs=("0.0.0.0/0",), allow_private_urls=True)
    with pytest.raises(ConfigError, match="never"):
        fetching("http://data.example/t.jsonl", network=everything, transfer=resolving_to("169.254.169.254"))


def test_of_several_addresses_only_the_allowed_ones_are_connected_to(server: HttpServer, fetching: Fetching) -> None:
    server.serve("/t.jsonl", JSON_LINES)
    url = f"http://data.example:{server.port}/t.jsonl"
    assert fetching(url, transfer=resolving_to("169.254.169.254", "127.0.0.1"))


def test_a_name_is_resolved_by_us_for_every_connection(server: HttpServer, fetching: Fetching) -> None:
    """The address that was checked is the one connected to: a second answer of the name server changes nothing."""
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])
    server.serve("/t.jsonl", Answer(body=JSON_LINES, truncate_to=10), Answer(body=JSON_LINES))
    with pytest.raises(ConfigError, match="metadata"):
        fetching(
            f"http://data.example:{server.port}/t.jsonl", transfer=replace(QUICK, resolve=lambda host: next(answers))
        )


def test_an_unknown_name_is_a_service_error(fetching: Fetching) -> None:
    def resolve(host: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with pytest.raises(ServiceError, match=r"the name data\.example is not known"):
        fetching("http://data.example/t.jsonl", transfer=replace(QUICK, resolve=resolve))


def test_behind_a_proxy_names_go_to_the_proxy_and_that_is_said_once(
    server: HttpServer, fetching: Fetching, reporter: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("http://", "http://user:hunter2@"))
    server.serve("/a.jsonl", JSON_LINES)
    server.serve("/b.jsonl", JSON_LINES)
    files = fetching("http://data.example/a.jsonl", "http://data.example/b.jsonl")
    assert [fetching.content(file) for file in files] == [JSON_LINES, JSON_LINES]
    assert len(reporter.notes) == 1
    assert server.url in reporter.notes[0]
    assert "hunter2" not in reporter.notes[0]


def test_behind_a_proxy_a_forbidden_literal_is_still_refused(
    server: HttpServer, fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    with pytest.raises(ConfigError, match="never"):
        fetching("http://169.254.169.254/t.jsonl")
    assert server.requests == []


def test_no_proxy_hosts_are_resolved_and_checked_by_us(fetching: Fetching, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "data.example")
    with pytest.raises(ConfigError, match="loopback"):
        fetching("http://data.example/t.jsonl", network=Network(), transfer=resolving_to("127.0.0.1"))


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "answers",
    [
        [Answer(body=JSON_LINES)],
        [Answer(status=403)],
        [Answer(status=503)],
        [Answer(body=JSON_LINES, truncate_to=3, ranges=False)],
        [Answer.redirect("http://169.254.169.254/?sig=hunter2")],
        [Answer.redirect("http://[bad/?sig=hunter2")],
        [Answer(body=b"sig=hunter2")],
    ],
)
def test_a_token_in_a_query_is_in_no_output_and_on_no_disk(
    server: HttpServer,
    fetching: Fetching,
    reporter: Recording,
    answers: list[Answer],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:  # KAITO fault 29
    caplog.set_level(0)
    said = ""
    try:
        fetching(f"{server.serve('/t.jsonl', *answers)}?sig=hunter2&se=2020-01-01")
    except TunerError as error:
        said = f"{error.message} {error.hint} {error!r} {error.__cause__!r}"
    captured = capfd.readouterr()
    everything = "\n".join(
        [said, *reporter.notes, *reporter.warnings, repr(reporter.progresses), caplog.text, captured.out, captured.err]
    )
    assert "hunter2" not in everything
    on_disk = [path for path in fetching.work_dir.rglob("*") if path.is_file()]
    assert not any(b"hunter2" in path.read_bytes() for path in on_disk)


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for data.example that only whoever is told of it trusts."""
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-days", "2", "-subj", "/CN=data.example", "-addext", "subjectAltName=DNS:data.example"),
            *("-keyout", str(path), "-out", str(path.with_suffix(".crt"))),
        ],
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[HttpServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with HttpServer(context) as server:
        server.serve("/t.jsonl", JSON_LINES)
        yield server


def trusting(certificate: Path) -> Network:
    return Network(allow_cidrs=("127.0.0.0/8",), ca_file=str(certificate))


def test_tls_verifies_the_name_though_the_address_is_connected_to(
    tls_server: HttpServer, fetching: Fetching, certificate: Path
) -> None:
    url = f"https://data.example:{tls_server.port}/t.jsonl"
    assert fetching(url, network=trusting(certificate), transfer=resolving_to("127.0.0.1"))


def test_a_certificate_for_another_name_is_refused(
    tls_server: HttpServer, fetching: Fetching, certificate: Path
) -> None:
    transfer = replace(QUICK, resolve=lambda host: ["127.0.0.1"], attempts=1)
    with pytest.raises(ServiceError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        fetching(f"https://other.example:{tls_server.port}/t.jsonl", network=trusting(certificate), transfer=transfer)
    assert tls_server.requests == []
    assert caught.value.hint is None  # another authority would not help
    unknown = Network(allow_cidrs=("127.0.0.0/8",))
    with pytest.raises(ServiceError, match="CERTIFICATE_VERIFY_FAILED") as caught:
        fetching(f"https://data.example:{tls_server.port}/t.jsonl", network=unknown, transfer=transfer)
    assert caught.value.hint == "--ca FILE trusts a certificate authority of your own"


def test_a_redirect_from_https_to_http_is_refused(
    tls_server: HttpServer, server: HttpServer, fetching: Fetching, certificate: Path
) -> None:
    tls_server.serve("/t.jsonl", Answer.redirect(server.serve("/t.jsonl", JSON_LINES)))
    with pytest.raises(ConfigError, match="from https to http"):
        fetching(
            f"https://data.example:{tls_server.port}/t.jsonl",
            network=trusting(certificate),
            transfer=resolving_to("127.0.0.1"),
        )


# ── files and volumes ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_is_used_in_place(tmp_path: Path, reporter: Recording) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(JSON_LINES)
    source = FileSource(name="0000-mine.jsonl", path=str(path), sha256=hashlib.sha256(JSON_LINES).hexdigest())
    (file,) = fetch_sources(a_spec(source), Secrets(), tmp_path / "work", reporter)
    assert file == FetchedFile(source=str(path), path=str(path), sha256=source.sha256, size_bytes=len(JSON_LINES))


def test_a_file_that_changed_since_the_plan_is_bad_data(tmp_path: Path, reporter: Recording) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(JSON_LINES)
    with pytest.raises(DataError, match="changed"):
        fetch_sources(
            a_spec(FileSource(name="0000-mine.jsonl", path=str(path), sha256="0" * 64)), Secrets(), tmp_path, reporter
        )


@pytest.mark.parametrize("name", ["missing.jsonl", "directory"])
def test_a_missing_file_or_a_directory_is_a_missing_input(tmp_path: Path, reporter: Recording, name: str) -> None:
    (tmp_path / "directory").mkdir()
    source = FileSource(name="x", path=str(tmp_path / name), sha256="0" * 64)
    with pytest.raises(InputMissingError, match=name):
        fetch_sources(a_spec(source), Secrets(), tmp_path / "work", reporter)


def test_every_data_file_of_a_volume_is_used_in_order(tmp_path: Path, reporter: Recording) -> None:
    volume = tmp_path / "volume"
    for name in (
        "b/2.jsonl",
        "a.jsonl",
        "b/1.jsonl.gz",
        ".cache/x.jsonl",
        "_SUCCESS",
        "README.md",
        "dataset_info.json",
    ):
        path = volume / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JSON_LINES if not name.endswith(".gz") else b"\x1f\x8b0000")
    files = fetch_sources(a_spec(VolumeSource(path=str(volume))), Secrets(), tmp_path / "work", reporter)
    assert [file.path for file in files] == [str(volume / name) for name in ("a.jsonl", "b/1.jsonl.gz", "b/2.jsonl")]
    assert [file.source for file in files] == [file.path for file in files]  # and not the directory's name


def test_what_of_a_volume_is_not_trained_on_is_said(tmp_path: Path, reporter: Recording) -> None:
    for name in ("train.jsonl", "test.jsonl", "dev.jsonl", "old/adapter_config.json", "old/metrics.jsonl"):
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JSON_LINES)
    files = fetch_sources(a_spec(VolumeSource(path=str(tmp_path / "d"))), Secrets(), tmp_path / "work", reporter)
    assert [(Path(file.path).name, file.use) for file in files] == [
        ("dev.jsonl", "validation"),
        ("train.jsonl", "training"),
    ]
    assert reporter.notes == [
        f"{tmp_path}/d: dev.jsonl is evaluated on and not trained on (a validation split)",
        f"{tmp_path}/d: old is not read (an adapter)",
        f"{tmp_path}/d: test.jsonl is not read (a test split)",
    ]


def test_a_work_directory_within_the_data_is_no_data(tmp_path: Path, reporter: Recording) -> None:
    (tmp_path / "rows.jsonl").write_bytes(JSON_LINES)
    work_dir = tmp_path / "tuner-work"
    (work_dir / "data").mkdir(parents=True)
    (work_dir / "data" / "0001-rows.jsonl").write_bytes(JSON_LINES)
    files = fetch_sources(a_spec(VolumeSource(path=str(tmp_path))), Secrets(), work_dir, reporter)
    assert [file.source for file in files] == [str(tmp_path / "rows.jsonl")]


def test_a_volume_of_a_test_split_only_is_a_missing_input(tmp_path: Path, reporter: Recording) -> None:
    (tmp_path / "test.jsonl").write_bytes(JSON_LINES)
    with pytest.raises(InputMissingError, match=r"no file in it to train on: test\.jsonl is not read \(a test split\)"):
        fetch_sources(a_spec(VolumeSource(path=str(tmp_path))), Secrets(), tmp_path / "work", reporter)


def test_a_file_that_is_named_itself_is_used_and_a_test_splits_name_warned_of(
    tmp_path: Path, reporter: Recording
) -> None:
    path = tmp_path / "test.jsonl"
    path.write_bytes(JSON_LINES)
    source = FileSource(name="x", path=str(path), sha256=hashlib.sha256(JSON_LINES).hexdigest())
    assert len(fetch_sources(a_spec(source), Secrets(), tmp_path / "work", reporter)) == 1
    assert reporter.warnings == [f"{path}: is named as a test split, and is trained on, as it was named itself"]


def test_an_empty_part_of_a_volume_is_fetched_and_an_empty_file_is_not(tmp_path: Path, reporter: Recording) -> None:
    (tmp_path / "part-0.jsonl").write_bytes(JSON_LINES)
    (tmp_path / "part-1.jsonl").write_bytes(b"")
    files = fetch_sources(a_spec(VolumeSource(path=str(tmp_path))), Secrets(), tmp_path / "work", reporter)
    assert [(file.size_bytes, file.is_part) for file in files] == [(len(JSON_LINES), True), (0, True)]
    alone = FileSource(name="x", path=str(tmp_path / "part-1.jsonl"), sha256=hashlib.sha256(b"").hexdigest())
    with pytest.raises(DataError, match=r"part-1\.jsonl: the file is empty"):
        fetch_sources(a_spec(alone), Secrets(), tmp_path / "work", reporter)


def test_a_volume_of_files_without_endings_is_used_whole(tmp_path: Path, reporter: Recording) -> None:
    (tmp_path / "part-00000").write_bytes(JSON_LINES)
    files = fetch_sources(a_spec(VolumeSource(path=str(tmp_path))), Secrets(), tmp_path / "work", reporter)
    assert [file.sha256 for file in files] == [hashlib.sha256(JSON_LINES).hexdigest()]


def test_an_empty_or_missing_volume_is_a_missing_input(tmp_path: Path, reporter: Recording) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputMissingError, match="2 inputs failed"):
        fetch_sources(
            a_spec(VolumeSource(path=str(tmp_path / "empty")), VolumeSource(path=str(tmp_path / "none"))),
            Secrets(),
            tmp_path / "work",
            reporter,
        )


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def a_layout(tmp_path: Path, files: dict[str, bytes]) -> str:
    """`oci:DIR:v1` with these files under /data."""
    paths = {name: tmp_path / "image-files" / name for name in files}
    for name, content in files.items():
        paths[name].parent.mkdir(parents=True, exist_ok=True)
        paths[name].write_bytes(content)
    reference = LayoutReference(tmp_path / "layout", "v1", None)
    push_layout(pack(paths), reference, reporter=Silent())
    return str(reference)


def test_the_data_files_of_an_image_arrive(tmp_path: Path, reporter: Recording) -> None:
    reference = a_layout(tmp_path, {"b.jsonl": JSON_LINES, "a.jsonl": b"{}\n", "README.md": b"hello"})
    files = fetch_sources(a_spec(ImageSource(reference=reference)), Secrets(), tmp_path / "work", reporter)
    assert [file.path for file in files] == ["data/0000-image/a.jsonl", "data/0000-image/b.jsonl"]
    assert [file.source for file in files] == [f"{reference}/a.jsonl", f"{reference}/b.jsonl"]
    assert (tmp_path / "work" / files[1].path).read_bytes() == JSON_LINES


def test_an_image_that_is_there_is_pulled_again_only_when_its_tag_moved(tmp_path: Path, reporter: Recording) -> None:
    spec = a_spec(ImageSource(reference=a_layout(tmp_path, {"a.jsonl": JSON_LINES})))
    first = fetch_sources(spec, Secrets(), tmp_path / "work", reporter)
    assert fetch_sources(spec, Secrets(), tmp_path / "work", reporter) == first
    assert len([note for note in reporter.notes if "already there" in note]) == 1
    a_layout(tmp_path, {"a.jsonl": b"{}\n"})
    (moved,) = fetch_sources(spec, Secrets(), tmp_path / "work", reporter)
    assert moved.size_bytes == 3


# ── base models ──────────────────────────────────────────────────────────────────────────────────────────────────────

COMMIT = "c" * 40


def safetensors(size: int = 64) -> bytes:
    """One tensor of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def model_content() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "phi3", "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3"}}',
        "model.safetensors": safetensors(),
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
    }


def write_model(directory: Path, content: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def hub(server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HttpServer:
    """A Hugging Face Hub on loopback with an empty cache here."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # what HF_ENDPOINT sets before the first import
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return server


def publish(hub: HttpServer, content: dict[str, bytes], *, model_id: str = "org/tiny") -> None:
    publish_model(hub, content, model_id, COMMIT)


def fetch_hub_model(
    tmp_path: Path, reporter: Recording, *, token: str | None = None, revision: str = "main"
) -> FetchedModel:
    spec = a_spec(base_model=HubModel(id="org/tiny", revision=revision))
    fetched = fetch_base_model(spec, Secrets(hf_token=token), tmp_path / "work", reporter, transfer=QUICK)
    assert fetched is not None
    return fetched


def test_a_hub_model_arrives_at_its_commit_without_pickles_and_code(
    hub: HttpServer, tmp_path: Path, reporter: Recording
) -> None:
    left_out = {
        "pytorch_model.bin": b"x",
        "modeling_phi3.py": b"x",
        "consolidated.safetensors": safetensors(),
        "onnx/model.json": b"{}",
        "README.md": b"x",
    }
    publish(hub, model_content() | left_out)
    model = fetch_hub_model(tmp_path, reporter)
    assert (model.id, model.revision) == ("org/tiny", COMMIT)
    assert sorted(path.name for path in Path(model.path).iterdir()) == sorted(model_content())
    assert model.digest == model_digest(write_model(tmp_path / "copy", model_content()))
    assert reporter.progresses[-1].done == reporter.progresses[-1].total


def test_a_fetched_hub_model_is_not_fetched_again(hub: HttpServer, tmp_path: Path, reporter: Recording) -> None:
    publish(hub, model_content())
    first = fetch_hub_model(tmp_path, reporter)
    weights = f"/org/tiny/resolve/{COMMIT}/model.safetensors"
    before = sum(request.path == weights and request.method == "GET" for request in hub.requests)
    assert fetch_hub_model(tmp_path, reporter) == first
    assert sum(request.path == weights and request.method == "GET" for request in hub.requests) == before == 1


def test_weights_that_broke_off_are_gone_on_with(
    hub: HttpServer, tmp_path: Path, reporter: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = model_content() | {"model.safetensors": safetensors(200_000)}
    publish(hub, content)
    whole = hub._answers[f"/org/tiny/resolve/{COMMIT}/model.safetensors"][0]
    hub.serve(f"/org/tiny/resolve/{COMMIT}/model.safetensors", whole, replace(whole, truncate_to=100_000), whole)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    model = fetch_hub_model(tmp_path, reporter)
    assert (Path(model.path) / "model.safetensors").read_bytes() == content["model.safetensors"]
    assert any(request.headers.get("range", "").startswith("bytes=100000-") for request in hub.requests)


def test_only_the_runs_own_token_is_sent(
    hub: HttpServer, tmp_path: Path, reporter: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    publish(hub, model_content())
    fetch_hub_model(tmp_path, reporter)
    assert {request.headers.get("authorization") for request in hub.requests} == {None}
    fetch_hub_model(tmp_path, reporter, token="hf_mine")
    assert "Bearer hf_mine" in {request.headers.get("authorization") for request in hub.requests}


def test_the_token_stays_with_the_hub_where_that_redirects_to_a_storage(
    hub: HttpServer, tmp_path: Path, reporter: Recording
) -> None:
    """As it does with weights: the address there is signed."""
    content = model_content()
    publish(hub, content)
    with HttpServer() as storage:
        for name, data in content.items():
            path = f"/org/tiny/resolve/{COMMIT}/{name}"
            headers = dict(hub._answers[path][0].headers)
            storage.serve(f"/{name}", Answer(body=data, headers=headers))
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": headers["ETag"]}
            hub.serve(
                path, Answer(status=302, headers={**headers, **linked, "Location": f"{storage.url}/{name}?sig=1"})
            )
        model = fetch_hub_model(tmp_path, reporter, token="hf_mine")
        assert (Path(model.path) / "model.safetensors").read_bytes() == content["model.safetensors"]
        assert storage.requests
        assert {request.headers.get("authorization") for request in storage.requests} == {None}
    assert {request.headers.get("authorization") for request in hub.requests} == {"Bearer hf_mine"}


HUB_REFUSALS: list[tuple[Answer, type[TunerError], str]] = [
    (Answer(status=404, headers={"X-Error-Code": "RepoNotFound"}), InputMissingError, "not found on the Hub"),
    (Answer(status=401, headers={"X-Error-Code": "RepoNotFound"}), InputMissingError, "not found on the Hub"),
    (Answer(status=404, headers={"X-Error-Code": "RevisionNotFound"}), InputMissingError, "no revision main"),
    (Answer(status=403, headers={"X-Error-Code": "GatedRepo"}), DeniedError, "gated"),
    (Answer(status=401, headers={"X-Error-Code": "GatedRepo"}), DeniedError, "gated"),
    (Answer(status=403), DeniedError, "403"),
    (Answer(status=503), ServiceError, "503"),
]


@pytest.mark.parametrize(("answer", "kind", "words"), HUB_REFUSALS)
def test_what_the_hub_refuses_is_said_with_its_exit_code(
    hub: HttpServer, tmp_path: Path, reporter: Recording, answer: Answer, kind: type[TunerError], words: str
) -> None:
    hub.serve("/api/models/org/tiny/revision/main", answer)
    with pytest.raises(kind, match=words) as caught:
        fetch_hub_model(tmp_path, reporter, token="hf_secret")
    assert "hf_secret" not in f"{caught.value.message} {caught.value.hint}"


def test_a_gated_model_says_where_to_accept_its_licence(hub: HttpServer, tmp_path: Path, reporter: Recording) -> None:
    hub.serve("/api/models/org/tiny/revision/main", Answer(status=403, headers={"X-Error-Code": "GatedRepo"}))
    with pytest.raises(DeniedError) as caught:
        fetch_hub_model(tmp_path, reporter)
    assert "https://huggingface.co/org/tiny" in (caught.value.hint or "")
    assert "HF_TOKEN" in (caught.value.hint or "")


def test_a_busy_hub_is_asked_again(hub: HttpServer, tmp_path: Path, reporter: Recording) -> None:
    publish(hub, model_content())
    path = "/api/models/org/tiny/revision/main"
    hub.serve(path, Answer(status=503), hub._answers[path][0])
    assert fetch_hub_model(tmp_path, reporter)


def test_a_repository_of_pickles_is_refused_before_any_download(
    hub: HttpServer, tmp_path: Path, reporter: Recording
) -> None:
    publish(hub, {"config.json": b"{}", "pytorch_model.bin": b"x", "tokenizer.json": b"{}"})
    with pytest.raises(ConfigError, match="pickled"):
        fetch_hub_model(tmp_path, reporter)
    assert [request.path for request in hub.requests] == ["/api/models/org/tiny/revision/main"]


def test_weights_that_do_not_fit_the_disk_are_refused_before_any_download(
    hub: HttpServer, tmp_path: Path, reporter: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, model_content())
    usage = download.shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="no disk space"):
        fetch_hub_model(tmp_path, reporter)
    assert len(hub.requests) == 1


def test_offline_the_cache_is_used_or_the_model_is_missing(
    hub: HttpServer, tmp_path: Path, reporter: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub, model_content())
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(InputMissingError, match="HF_HUB_OFFLINE is set"):
            fetch_hub_model(tmp_path, reporter)
    online = fetch_hub_model(tmp_path, reporter)
    asked = len(hub.requests)
    with monkeypatch.context() as offline:
        offline.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert fetch_hub_model(tmp_path, reporter) == online
    assert len(hub.requests) == asked


def test_an_unreachable_hub_is_a_service_error(
    hub: HttpServer, tmp_path: Path, reporter: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ServiceError, match="cannot be reached") as caught:
            fetch_hub_model(tmp_path, reporter)
    assert caught.value.hint == "is the network up? run again: it goes on from here"
    (warning,) = reporter.warnings  # once, whatever the number of tries
    assert warning.endswith("the Hub cannot be reached or is busy; trying again")


def test_a_broken_hub_does_not_matter_when_the_cache_has_the_model(
    hub: HttpServer, tmp_path: Path, reporter: Recording
) -> None:
    publish(hub, model_content())
    online = fetch_hub_model(tmp_path, reporter)
    hub.serve("/api/models/org/tiny/revision/main", Answer(status=503))
    assert fetch_hub_model(tmp_path, reporter) == online
    assert "the Hub answered 503" in reporter.warnings[-1]


def a_local_model(directory: Path) -> LocalModel:
    return LocalModel(path=str(directory), sha256=model_digest(directory), id="org/tiny")


def test_a_local_model_is_used_in_place(tmp_path: Path, reporter: Recording) -> None:
    model = a_local_model(write_model(tmp_path / "model", model_content()))
    fetched = fetch_base_model(a_spec(base_model=model), Secrets(), tmp_path / "work", reporter)
    assert fetched == FetchedModel(path=model.path, id="org/tiny", revision=None, digest=model.sha256)


def test_a_local_model_that_changed_since_the_plan_is_bad_data(tmp_path: Path, reporter: Recording) -> None:
    model = a_local_model(write_model(tmp_path / "model", model_content()))
    (tmp_path / "model" / "tokenizer.json").write_bytes(b"[]")
    with pytest.raises(DataError, match="changed"):
        fetch_base_model(a_spec(base_model=model), Secrets(), tmp_path / "work", reporter)


def without(name: str) -> dict[str, bytes]:
    return {other: data for other, data in model_content().items() if other != name}


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}).encode()
BAD_MODELS: list[tuple[dict[str, bytes], type[TunerError], str]] = [
    (without("config.json"), InputMissingError, "no config.json"),
    (without("tokenizer.json"), InputMissingError, "no tokenizer"),
    (without("model.safetensors"), ConfigError, "no weights"),
    (without("model.safetensors") | {"pytorch_model.bin": b"x"}, ConfigError, "pickled"),
    (model_content() | {"config.json": b"{"}, DataError, "not JSON"),
    (model_content() | {"model.safetensors": safetensors()[:-1]}, DataError, "cut short"),
    (model_content() | {"model.safetensors": b"12345678"}, DataError, "not a whole safetensors file"),
    (model_content() | {"model.safetensors.index.json": INDEX}, InputMissingError, "1 of 2 weight files"),
    (model_content() | {"config.json": b'{"model_type": "own", "auto_map": {}}'}, ConfigError, "not trusted"),
]


@pytest.mark.parametrize(("content", "kind", "words"), BAD_MODELS)
def test_a_directory_that_is_no_whole_safe_model_is_refused(
    tmp_path: Path, reporter: Recording, content: dict[str, bytes], kind: type[TunerError], words: str
) -> None:
    model = a_local_model(write_model(tmp_path / "model", content))
    with pytest.raises(kind, match=words):
        fetch_base_model(a_spec(base_model=model), Secrets(), tmp_path / "work", reporter)


def test_code_of_a_models_own_is_accepted_when_asked_for(tmp_path: Path, reporter: Recording) -> None:
    content = model_content() | {"config.json": b'{"model_type": "own", "auto_map": {}}'}
    spec = a_spec(base_model=a_local_model(write_model(tmp_path / "model", content)), trust_remote_code=True)
    assert fetch_base_model(spec, Secrets(), tmp_path / "work", reporter)


def test_a_model_in_an_image_is_found_in_it(tmp_path: Path, reporter: Recording) -> None:
    reference = a_layout(tmp_path, {f"phi/{name}": data for name, data in model_content().items()})
    spec = a_spec(base_model=ImageModel(reference=reference, id="org/tiny", revision=COMMIT))
    model = fetch_base_model(spec, Secrets(), tmp_path / "work", reporter)
    assert model is not None
    assert (model.id, model.revision) == ("org/tiny", COMMIT)
    assert model.path == "weights/data/phi"
    assert model.digest == model_digest(write_model(tmp_path / "copy", model_content()))


def test_an_image_without_a_model_is_a_missing_input(tmp_path: Path, reporter: Recording) -> None:
    spec = a_spec(base_model=ImageModel(reference=a_layout(tmp_path, {"a.txt": b"x"})))
    with pytest.raises(InputMissingError, match=r"config\.json"):
        fetch_base_model(spec, Secrets(), tmp_path / "work", reporter)


# ── for a pod: places of their own, and a look without a download ────────────────────────────────────────────────────


def test_data_and_weights_go_where_a_pod_has_room_for_them(
    server: HttpServer, tmp_path: Path, reporter: Recording
) -> None:
    url = server.serve("/a.jsonl", JSON_LINES)
    reference = a_layout(tmp_path, model_content())
    spec = a_spec(UrlSource(name="a.jsonl", url=url), base_model=ImageModel(reference=reference))
    places = {"data_dir": tmp_path / "data", "weights_dir": tmp_path / "weights"}
    fetched = fetch(spec, Secrets(), tmp_path / "work", reporter, **places)
    assert [file.path for file in fetched.files] == [str(tmp_path / "data" / "a.jsonl")]
    assert fetched.base_model is not None
    assert Path(fetched.base_model.path).is_relative_to(tmp_path / "weights")
    assert fetch(spec, Secrets(), tmp_path / "work", reporter, **places) == fetched


def test_weights_that_another_run_reads_stay_when_their_tag_moves_on(tmp_path: Path, reporter: Recording) -> None:
    reference = a_layout(tmp_path, model_content())
    spec = a_spec(base_model=ImageModel(reference=reference))

    def weights() -> FetchedModel:
        found = fetch_base_model(spec, Secrets(), tmp_path / "work", reporter, weights_dir=tmp_path / "shared")
        assert found is not None
        return found

    first = weights()
    a_layout(tmp_path, model_content() | {"model.safetensors": safetensors(100)})
    second = weights()
    assert first.path != second.path
    assert model_digest(Path(first.path)) == first.digest != second.digest


def test_a_tokenizer_comes_without_its_weights(hub: HttpServer, tmp_path: Path, reporter: Recording) -> None:
    publish(hub, model_content())
    spec = a_spec(base_model=HubModel(id="org/tiny", revision="main"))
    model = fetch_base_model(
        spec, Secrets(), tmp_path / "work", reporter, tokenizer_only=True, weights_dir=tmp_path / "w", transfer=QUICK
    )
    assert model is not None
    names = {path.name for path in Path(model.path).iterdir()}
    assert names == model_content().keys() - {"model.safetensors"}
    in_image = a_spec(base_model=ImageModel(reference="reg.example/m:1"))
    assert fetch_base_model(in_image, Secrets(), tmp_path / "work", reporter, tokenizer_only=True) is None


def test_sources_say_their_size_without_being_read(server: HttpServer, tmp_path: Path, reporter: Recording) -> None:
    big = server.serve("/big.jsonl", Answer(body=JSON_LINES * 1000, stall_after=10))  # who reads on waits for ever
    (tmp_path / "volume").mkdir()
    (tmp_path / "volume" / "a.jsonl").write_bytes(b"12345")
    (tmp_path / "volume" / "README.md").write_bytes(b"not data")
    spec = a_spec(UrlSource(name="big.jsonl", url=big), VolumeSource(path=str(tmp_path / "volume")))
    assert announced_bytes(spec, Secrets(), reporter, transfer=QUICK) == len(JSON_LINES) * 1000 + 5
    image = a_spec(ImageSource(reference=a_layout(tmp_path, {"a.jsonl": bytes(5000)})))
    assert (announced_bytes(image, Secrets(), reporter, transfer=QUICK) or 0) > 0


def test_a_source_that_does_not_say_its_size_leaves_it_unknown(server: HttpServer, reporter: Recording) -> None:
    url = server.serve("/a.jsonl", Answer(body=JSON_LINES, chunked=True))
    spec = a_spec(UrlSource(name="a.jsonl", url=url))
    assert announced_bytes(spec, Secrets(), reporter, transfer=QUICK) is None


def test_asking_for_sizes_finds_every_source_that_is_not_to_be_had(server: HttpServer, reporter: Recording) -> None:
    denied = server.serve("/denied.jsonl", Answer(status=403))
    down = server.serve("/down.jsonl", Answer(status=503))
    spec = a_spec(UrlSource(name="d", url=denied), UrlSource(name="e", url=down))
    with pytest.raises(DeniedError, match="2 inputs failed") as raised:
        announced_bytes(spec, Secrets(), reporter, transfer=QUICK)
    assert "denied.jsonl" in raised.value.message
    assert "down.jsonl: the server answered 503" in raised.value.message
