"""hf:// against a Hub on loopback; s3:// and its like through fsspec's own file systems under the real names."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.http_server import Answer, HttpServer
from tests.test_fetch import COMMIT, JSON_LINES, LOOPBACK, QUICK, Recording, a_spec, hub  # noqa: F401
from tuner.errors import ConfigError, DataError, DeniedError, InputMissingError, ServiceError, TunerError
from tuner.pipeline.fetch import fetch_sources
from tuner.runspec import FetchedFile, Secrets, UrlSource
from tuner.urls import Allowed, source_name, split_url, url_problem


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer() as server:
        yield server


def get(url: str, work_dir: Path, *, token: str | None = None, reporter: Recording | None = None) -> list[FetchedFile]:
    assert url_problem(url, Allowed(), stores=True) is None
    parts = split_url(url)
    source = UrlSource(name=source_name(0, url), url=parts.url, sha256=parts.options.sha256)
    said = reporter or Recording()
    return list(
        fetch_sources(a_spec(source, network=LOOPBACK), Secrets(hf_token=token), work_dir, said, transfer=QUICK)
    )


def names(files: list[FetchedFile]) -> list[str]:
    return [file.source.rsplit("/", 1)[-1] for file in files]


# ── which URLs ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "url", ["hf://datasets/o/n/t.parquet", "s3://b/t.parquet", "gs://b/t", "az://container/dir/*.parquet"]
)
def test_stores_are_for_boxes_only(url: str) -> None:
    assert url_problem(url, Allowed(), stores=True) is None
    assert "HTTP or HTTPS" in (url_problem(url, Allowed()) or "")


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("hf://models/o/n", "hf://datasets/"),
        ("hf://datasets/n", "hf://datasets/"),
        ("hf://o/n/t.parquet", "hf://datasets/"),
        ("s3://bucket", "bucket and path"),
        ("s3:///t", "bucket and path"),
        ("s3://key:hunter2@bucket/t", "user name"),
        ("s3://bucket/t?versionId=hunter2", "no query"),
    ],
)
def test_a_store_url_that_is_none_is_said(url: str, word: str) -> None:
    problem = url_problem(url, Allowed(), stores=True) or ""
    assert word in problem
    assert "hunter2" not in problem


# ── datasets on the Hub ──────────────────────────────────────────────────────────────────────────────────────────────


def publish(hub: HttpServer, files: dict[str, bytes], *, revision: str = "main") -> None:  # noqa: F811
    """Put the dataset org/rows on the Hub; parquet as LFS objects."""
    tree = []
    for name, data in files.items():
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"lfs": {"oid": digest, "size": len(data), "pointerSize": 130}} if name.endswith(".jsonl") else {}
        tree.append({"type": "file", "path": name, "size": len(data), "oid": digest[:40], **lfs})
        hub.serve(f"/datasets/org/rows/resolve/{COMMIT}/{name}", Answer(body=data))
    json_type = {"Content-Type": "application/json"}
    info = {"id": "org/rows", "sha": COMMIT, "siblings": []}
    hub.serve(f"/api/datasets/org/rows/revision/{revision}", Answer(body=json.dumps(info).encode(), headers=json_type))
    hub.serve(f"/api/datasets/org/rows/tree/{COMMIT}", Answer(body=json.dumps(tree).encode(), headers=json_type))


SHARDS = {
    "README.md": b"hello",
    "data/train-1.jsonl": b'{"text": "b"}\n',
    "data/train-0.jsonl": b'{"text": "a"}\n',
    "data/test-0.jsonl": b'{"text": "c"}\n',
    "data/.hidden.jsonl": b"{}\n",
    "extra/more.csv": b"a,b\n1,2\n",
}


def test_a_file_of_a_dataset_arrives_with_its_commit(hub: HttpServer, tmp_path: Path) -> None:  # noqa: F811
    publish(hub, SHARDS)
    (file,) = get("hf://datasets/org/rows/data/train-0.jsonl", tmp_path)
    assert file.source == f"hf://datasets/org/rows@{COMMIT}/data/train-0.jsonl"
    assert (tmp_path / file.path).read_bytes() == SHARDS["data/train-0.jsonl"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", ["train-0.jsonl", "train-1.jsonl", "more.csv"]),
        ("/data", ["train-0.jsonl", "train-1.jsonl"]),
        ("/data/", ["train-0.jsonl", "train-1.jsonl"]),
        ("/data/train-*.jsonl", ["train-0.jsonl", "train-1.jsonl"]),
        ("/**/*-0.jsonl", ["train-0.jsonl"]),
        ("/data/test-*.jsonl", ["test-0.jsonl"]),
        ("/*/more.csv", ["more.csv"]),
    ],
)
def test_a_directory_or_pattern_stands_for_its_files_in_order(
    hub: HttpServer,  # noqa: F811
    tmp_path: Path,
    path: str,
    expected: list[str],
) -> None:
    publish(hub, SHARDS)
    assert names(get(f"hf://datasets/org/rows{path}", tmp_path)) == expected


def test_a_revision_and_the_hubs_own_parquet_are_found(hub: HttpServer, tmp_path: Path) -> None:  # noqa: F811
    publish(hub, SHARDS, revision="v1.0")
    assert get("hf://datasets/org/rows@v1.0/data/test-0.jsonl", tmp_path)
    publish(hub, SHARDS, revision="refs%2Fconvert%2Fparquet")
    assert get("hf://datasets/org/rows@~parquet/data/test-0.jsonl", tmp_path)
    assert hub.count("/api/datasets/org/rows/revision/refs%2Fconvert%2Fparquet") == 1


def test_bytes_that_are_not_what_the_hub_said_are_refused(hub: HttpServer, tmp_path: Path) -> None:  # noqa: F811
    publish(hub, SHARDS)
    hub.serve(f"/datasets/org/rows/resolve/{COMMIT}/data/train-0.jsonl", b'{"text": "x"}\n')
    with pytest.raises(DataError, match="pins"):
        get("hf://datasets/org/rows/data/train-0.jsonl", tmp_path)


def test_what_is_there_at_this_commit_is_not_fetched_again(hub: HttpServer, tmp_path: Path) -> None:  # noqa: F811
    publish(hub, SHARDS)
    first = get("hf://datasets/org/rows/data", tmp_path)
    before = sum("/resolve/" in request.path for request in hub.requests)
    assert get("hf://datasets/org/rows/data", tmp_path) == first
    assert sum("/resolve/" in request.path for request in hub.requests) == before == 2


def test_the_token_goes_to_the_hub_and_not_where_the_hub_redirects(
    hub: HttpServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    publish(hub, SHARDS)
    with HttpServer() as store:
        store.serve("/blob", SHARDS["data/train-0.jsonl"])
        hub.serve(
            f"/datasets/org/rows/resolve/{COMMIT}/data/train-0.jsonl", Answer.redirect(f"{store.url}/blob?sig=hunter2")
        )
        get("hf://datasets/org/rows/data/train-0.jsonl", tmp_path, token="hf_mine")
        assert "authorization" not in store.requests[0].headers
    assert {request.headers.get("authorization") for request in hub.requests} == {"Bearer hf_mine"}


REFUSALS: list[tuple[Answer, type[TunerError], str]] = [
    (Answer(status=404, headers={"X-Error-Code": "RepoNotFound"}), InputMissingError, "datasets/org/rows: not found"),
    (Answer(status=404, headers={"X-Error-Code": "RevisionNotFound"}), InputMissingError, "no revision main"),
    (Answer(status=403, headers={"X-Error-Code": "GatedRepo"}), DeniedError, "gated"),
    (Answer(status=403), DeniedError, "403"),
    (Answer(status=503), ServiceError, "503"),
]


@pytest.mark.parametrize(("answer", "kind", "words"), REFUSALS)
def test_what_the_hub_refuses_is_said(
    hub: HttpServer,  # noqa: F811
    tmp_path: Path,
    answer: Answer,
    kind: type[TunerError],
    words: str,
) -> None:
    hub.serve("/api/datasets/org/rows/revision/main", answer)
    with pytest.raises(kind, match=words) as caught:
        get("hf://datasets/org/rows/data", tmp_path, token="hf_hunter2")
    assert "hunter2" not in f"{caught.value!r} {caught.value.hint}"


def test_a_path_with_no_data_is_missing(hub: HttpServer, tmp_path: Path) -> None:  # noqa: F811
    publish(hub, SHARDS)
    for path in ("/none.jsonl", "/none", "/none/*.jsonl"):
        with pytest.raises(InputMissingError, match="no such file"):
            get(f"hf://datasets/org/rows{path}", tmp_path)


# ── buckets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Bucket(MemoryFileSystem):  # type: ignore[misc]
    """fsspec's memory file system as a store: objects with ETags, and faults on demand."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    faults: ClassVar[list[Exception]] = []
    reads = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("s3://").strip("/")

    def put_object(self, path: str, data: bytes) -> None:
        self.store[path] = data

    def isfile(self, path: str) -> bool:
        return path in self.store

    def find(self, path: str, **kwargs: Any) -> list[str]:
        return sorted(name for name in self.store if name.startswith(f"{path}/"))

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._maybe_fail()
        data = self.store.get(path)
        if data is None:
            raise FileNotFoundError(path)
        return {"name": path, "size": len(data), "type": "file", "ETag": hashlib.md5(data).hexdigest()}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        type(self).reads += 1
        self._maybe_fail()
        return bytes(self.store[path][start:end])

    def _maybe_fail(self) -> None:
        if self.faults:
            raise self.faults.pop(0)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "faults", [])
    monkeypatch.setattr(Bucket, "reads", 0)
    fsspec.register_implementation("s3", Bucket, clobber=True)
    return Bucket(skip_instance_cache=True)


def test_an_object_arrives(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put_object("b/dir/t.jsonl", JSON_LINES)
    (file,) = get("s3://b/dir/t.jsonl", tmp_path)
    assert (file.source, file.path) == ("s3://b/dir/t.jsonl", "data/0000-t.jsonl")
    assert (tmp_path / file.path).read_bytes() == JSON_LINES


def test_a_prefix_or_pattern_stands_for_its_objects(bucket: Bucket, tmp_path: Path) -> None:
    for name in SHARDS:
        bucket.put_object(f"b/{name}", SHARDS[name])
    assert names(get("s3://b/data", tmp_path)) == ["train-0.jsonl", "train-1.jsonl"]
    assert names(get("s3://b/data/train-*.jsonl", tmp_path)) == ["train-0.jsonl", "train-1.jsonl"]


def test_an_object_that_is_there_is_fetched_again_only_when_it_changed(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put_object("b/t.jsonl", JSON_LINES)
    first = get("s3://b/t.jsonl", tmp_path)
    reads = Bucket.reads
    assert get("s3://b/t.jsonl", tmp_path) == first
    assert Bucket.reads == reads
    bucket.put_object("b/t.jsonl", b'{"text": "new"}\n')
    assert get("s3://b/t.jsonl", tmp_path) != first


def test_an_object_that_changes_while_it_is_read_is_read_anew(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_object("b/t.jsonl", JSON_LINES)
    read, new = Bucket.cat_file, b'{"text": "six"}\n{"text": "two"}\n'

    def change_after_the_first_read(self: Bucket, path: str, start: int, end: int) -> bytes:
        data = read(self, path, start, end)
        self.put_object(path, new)
        return data

    monkeypatch.setattr(Bucket, "cat_file", change_after_the_first_read)
    (file,) = get("s3://b/t.jsonl", tmp_path)
    assert (tmp_path / file.path).read_bytes() == new


def test_a_store_that_fails_now_and_then_is_asked_again(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put_object("b/t.jsonl", JSON_LINES)
    bucket.faults += [TimeoutError("https://b/t?sig=hunter2"), OSError("x")]
    assert get("s3://b/t.jsonl", tmp_path)


class NoCredentialsError(Exception):
    pass


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (PermissionError("sig=hunter2"), DeniedError),
        (NoCredentialsError("sig=hunter2"), DeniedError),
        (ValueError("sig=hunter2"), ConfigError),
        (OSError("sig=hunter2"), ServiceError),
    ],
)
def test_what_a_store_raises_is_said_in_our_words(
    bucket: Bucket, tmp_path: Path, fault: Exception, kind: type[TunerError]
) -> None:
    bucket.put_object("b/t.jsonl", JSON_LINES)
    bucket.faults += [fault] * 9
    with pytest.raises(kind) as caught:
        get("s3://b/t.jsonl", tmp_path)
    assert "s3://b/t.jsonl" in caught.value.message
    assert "hunter2" not in f"{caught.value!r} {caught.value.hint} {caught.value.__cause__!r}"


def test_a_missing_object_is_missing(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match="s3://b/none"):
        get("s3://b/none.jsonl", tmp_path)


def test_a_pin_is_of_one_file(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put_object("b/d/1.jsonl", JSON_LINES)
    digest = hashlib.sha256(JSON_LINES).hexdigest()
    assert get(f"s3://b/d/1.jsonl#sha256={digest}", tmp_path)
    bucket.put_object("b/d/2.jsonl", JSON_LINES)
    with pytest.raises(ConfigError, match="2 files"):
        get(f"s3://b/d#sha256={digest}", tmp_path)


def test_a_package_that_is_not_installed_is_named_before_anything_is_fetched(
    server: HttpServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("gcsfs", "adlfs"):
        monkeypatch.setitem(__import__("sys").modules, package, None)
    urls = [server.serve("/t.jsonl", JSON_LINES), "gs://b/t.jsonl", "az://c/t.jsonl"]
    sources = [UrlSource(name=source_name(index, url), url=url) for index, url in enumerate(urls)]
    with pytest.raises(ConfigError) as caught:
        fetch_sources(a_spec(*sources), Secrets(), tmp_path, Recording(), transfer=QUICK)
    assert "gs:// needs the package gcsfs" in caught.value.message
    assert "az:// needs the package adlfs" in caught.value.message
    assert "pip install gcsfs" in (caught.value.hint or "")
    assert server.requests == []


def test_a_directory_on_disk_serves_as_a_store_too(tmp_path: Path) -> None:
    """fsspec's local file system under a store's name: its paths and versions look nothing like a bucket's."""
    from fsspec.implementations.local import LocalFileSystem

    class Disk(LocalFileSystem):  # type: ignore[misc]
        protocol = "gs"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("gs://").strip("/")

        def unstrip_protocol(self, name: str) -> str:
            return f"gs://{name.lstrip('/')}"

    fsspec.register_implementation("gs", Disk, clobber=True)
    data = tmp_path / "bucket"
    data.mkdir()
    (data / "a.jsonl").write_bytes(JSON_LINES)
    (data / "b.jsonl").write_bytes(b"{}\n")
    files = get(f"gs:/{data}", tmp_path / "work")
    assert names(files) == ["a.jsonl", "b.jsonl"]
    assert (tmp_path / "work" / files[0].path).read_bytes() == JSON_LINES
