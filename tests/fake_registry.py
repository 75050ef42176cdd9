"""A registry in this process that follows distribution-spec 1.1, for what Debian's docker-registry can not show.

    with fake_registry() as registry:
        push to f"{registry.host}/name:tag" over plain http

It is strict: a chunk out of order is 416, a manifest whose blobs are missing is 404, a wrong digest is 400.
https://github.com/opencontainers/distribution-spec/blob/v1.1.1/spec.md
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

from tests.registries import QuietHandler, running_server

_NAME = r"(?P<name>[a-z0-9]+(?:[._/-][a-z0-9]+)*)"
_ROUTES = {
    "upload": re.compile(rf"/v2/{_NAME}/blobs/uploads/(?P<key>[0-9]+)"),
    "uploads": re.compile(rf"/v2/{_NAME}/blobs/uploads/"),
    "blob": re.compile(rf"/v2/{_NAME}/blobs/(?P<key>sha256:[0-9a-f]{{64}})"),
    "manifest": re.compile(rf"/v2/{_NAME}/manifests/(?P<key>[^/]+)"),
    "referrers": re.compile(rf"/v2/{_NAME}/referrers/(?P<key>sha256:[0-9a-f]{{64}})"),
}
INDEX = "application/vnd.oci.image.index.v1+json"


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Received:
    """The bytes of an upload: their digest and number, and they themselves unless they are too many to keep."""

    def __init__(self, *, keep: bool) -> None:
        self._sha256 = hashlib.sha256()
        self._kept = bytearray() if keep else None
        self.size_bytes = 0

    def add(self, chunk: bytes) -> None:
        self._sha256.update(chunk)
        self.size_bytes += len(chunk)
        if self._kept is not None:
            self._kept += chunk

    @property
    def digest(self) -> str:
        return f"sha256:{self._sha256.hexdigest()}"

    @property
    def content(self) -> bytes:
        return bytes(self._kept or b"")


@dataclass
class Repository:
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)  # digest → bytes, media type
    tags: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeRegistry:
    """`break_after` and `answers` make it fail: after so many bytes of a PATCH, or with a status instead."""

    host: str = ""
    knows_referrers: bool = True
    knows_mount: bool = True
    keeps_blobs: bool = True
    least_chunk_bytes: int | None = None
    repositories: dict[str, Repository] = field(default_factory=dict)
    uploads: dict[str, tuple[str, Received]] = field(default_factory=dict)
    break_after: list[int] = field(default_factory=list)
    answers: list[tuple[str, str, int]] = field(default_factory=list)  # method, path expression, status
    log: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    received_bytes: int = 0
    on_request: Callable[[str, str], None] = lambda method, path: None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def missing_blobs(self) -> list[str]:
        """Digests that some tag needs and that are not there: must be empty at every moment."""
        with self.lock:
            return [
                needed
                for repository in self.repositories.values()
                for digest in repository.tags.values()
                for needed in _needed(repository.manifests[digest][0])
                if needed not in repository.blobs and needed not in repository.manifests
            ]


def _needed(manifest: bytes) -> list[str]:
    document = json.loads(manifest)
    if "manifests" in document:
        return [entry["digest"] for entry in document["manifests"]]
    return [document["config"]["digest"], *(layer["digest"] for layer in document["layers"])]


@contextlib.contextmanager
def fake_registry(**settings: object) -> Iterator[FakeRegistry]:
    """One that answers on loopback."""
    state = FakeRegistry(**settings)  # type: ignore[arg-type]

    class Handler(FakeHandler):
        registry = state

    with running_server(Handler) as host:
        state.host = host
        yield state


class FakeHandler(QuietHandler):
    registry: FakeRegistry
    _unread = 0

    def _route(self) -> None:
        state = self.registry
        self._unread = int(self.headers.get("Content-Length") or 0)
        parts = urlsplit(self.path)
        state.log.append((self.command, self.path, dict(self.headers)))
        state.on_request(self.command, self.path)
        for number, (method, expression, status) in enumerate(state.answers):
            if method == self.command and re.search(expression, self.path):
                del state.answers[number]
                self._body()
                self.reply(status, b"")
                return
        for what, expression in _ROUTES.items():
            found = re.fullmatch(expression, parts.path)
            if found:
                act = getattr(self, f"_{self.command.lower()}_{what}", None)
                if act is not None:
                    act(**found.groupdict(), query=parse_qs(parts.query, keep_blank_values=True))
                    return
        self._refuse(404, "UNSUPPORTED")

    do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _route

    def _refuse(self, status: int, code: str) -> None:
        self._body()
        self.reply(status, json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode())

    def _body(self) -> bytes:
        """What of the body nobody has read yet."""
        body, self._unread = self.rfile.read(self._unread), 0
        return body

    # ── blobs ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _post_uploads(self, name: str, query: dict[str, list[str]]) -> None:
        state = self.registry
        self._body()
        if "mount" in query and state.knows_mount:
            digest = query["mount"][0]
            source = state.repository(query.get("from", [""])[0])
            if digest in source.blobs:
                state.repository(name).blobs[digest] = source.blobs[digest]
                headers = {"Location": f"/v2/{name}/blobs/{digest}", "Docker-Content-Digest": digest}
                self.reply(201, b"", headers)
                return
        with state.lock:
            key = str(len(state.log))
            state.uploads[key] = name, Received(keep=state.keeps_blobs)
        headers = {"Location": f"/v2/{name}/blobs/uploads/{key}"}
        if state.least_chunk_bytes is not None:
            headers["OCI-Chunk-Min-Length"] = str(state.least_chunk_bytes)
        self.reply(202, b"", headers)

    def _upload(self, key: str) -> Received | None:
        name_and_upload = self.registry.uploads.get(key)
        return name_and_upload[1] if name_and_upload else None

    def _progress(self, name: str, key: str, upload: Received) -> dict[str, str]:
        return {
            "Location": f"/v2/{name}/blobs/uploads/{key}?at={upload.size_bytes}",
            "Range": f"0-{max(0, upload.size_bytes - 1)}",
        }

    def _get_upload(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        upload = self._upload(key)
        if upload is None:
            self._refuse(404, "BLOB_UPLOAD_UNKNOWN")
        else:
            self.reply(204, b"", self._progress(name, key, upload))

    def _patch_upload(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        state, upload = self.registry, self._upload(key)
        if upload is None:
            self._refuse(404, "BLOB_UPLOAD_UNKNOWN")
            return
        left = self._unread
        asked = self.headers.get("Content-Range")  # without one a body is a stream, which is added to what is there
        start = re.match(r"(\d+)-", asked or "")
        if asked is not None and (start is None or int(start.group(1)) != upload.size_bytes):
            self._body()
            self.reply(416, b"", self._progress(name, key, upload))
            return
        take = min(left, state.break_after.pop(0)) if state.break_after else left
        while take and (chunk := self.rfile.read(min(take, 1 << 20))):
            upload.add(chunk)
            state.received_bytes += len(chunk)
            take -= len(chunk)
            left -= len(chunk)
        self._unread = left
        if left:
            self._reset()
            return
        self.reply(202, b"", self._progress(name, key, upload))

    def _put_upload(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        state, upload = self.registry, self._upload(key)
        if upload is None:
            self._refuse(404, "BLOB_UPLOAD_UNKNOWN")
            return
        body = self._body()
        if body:
            upload.add(body)
            state.received_bytes += len(body)
        if upload.digest != query["digest"][0]:
            self._refuse(400, "DIGEST_INVALID")
            return
        with state.lock:
            del state.uploads[key]
            state.repository(name).blobs[upload.digest] = upload.content
        self.reply(201, b"", {"Location": f"/v2/{name}/blobs/{upload.digest}"})

    def _delete_upload(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        gone = self.registry.uploads.pop(key, None)
        self.reply(204 if gone else 404, b"")

    def _get_blob(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        content = self.registry.repository(name).blobs.get(key)
        if content is None:
            self._refuse(404, "BLOB_UNKNOWN")
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked:
            first = int(asked.group(1))
            headers = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
            self.reply(206, content[first:], headers)
        else:
            self.reply(200, content, {"Docker-Content-Digest": key})

    _head_blob = _get_blob

    # ── manifests ────────────────────────────────────────────────────────────────────────────────────────────────

    def _get_manifest(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        repository = self.registry.repository(name)
        digest = repository.tags.get(key, key)
        if digest not in repository.manifests:
            self._refuse(404, "MANIFEST_UNKNOWN")
            return
        content, media_type = repository.manifests[digest]
        self.reply(200, content, {"Content-Type": media_type, "Docker-Content-Digest": digest})

    _head_manifest = _get_manifest

    def _put_manifest(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        state, repository, content = self.registry, self.registry.repository(name), self._body()
        digest, document = sha256(content), json.loads(content)
        with state.lock:
            if ":" in key and key != digest:
                self._refuse(400, "DIGEST_INVALID")
                return
            if any(
                needed not in repository.blobs and needed not in repository.manifests for needed in _needed(content)
            ):
                self._refuse(404, "MANIFEST_BLOB_UNKNOWN")
                return
            repository.manifests[digest] = content, str(self.headers["Content-Type"])
            if ":" not in key:
                repository.tags[key] = digest
        headers = {"Docker-Content-Digest": digest, "Location": f"/v2/{name}/manifests/{digest}"}
        if "subject" in document and state.knows_referrers:
            headers["OCI-Subject"] = document["subject"]["digest"]
        self.reply(201, b"", headers)

    def _delete_manifest(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        repository = self.registry.repository(name)
        with self.registry.lock:
            gone = repository.manifests.pop(key, None)
            repository.tags = {tag: digest for tag, digest in repository.tags.items() if digest != key}
        self.reply(202 if gone else 404, b"")

    def _get_referrers(self, name: str, key: str, query: dict[str, list[str]]) -> None:
        if not self.registry.knows_referrers:
            self._refuse(404, "UNSUPPORTED")
            return
        found = []
        for digest, (content, media_type) in self.registry.repository(name).manifests.items():
            document = json.loads(content)
            if document.get("subject", {}).get("digest") == key:
                found.append(
                    {
                        "mediaType": media_type,
                        "digest": digest,
                        "size": len(content),
                        "artifactType": document.get("artifactType"),
                    }
                )
        index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": found}
        self.reply(200, json.dumps(index).encode(), {"Content-Type": INDEX})

    def _reset(self) -> None:
        self.close_connection = True
        linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
