"""An OCI image layout on disk: the image that skopeo, podman and umoci read as `oci:DIR:TAG`.

https://github.com/opencontainers/image-spec/blob/main/image-layout.md
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tuner.durable import make_directories, replacing
from tuner.errors import ConfigError, DataError, InputMissingError, ServiceError
from tuner.reference import LayoutReference
from tuner.registry.image import MANIFEST_TYPE, Blob, Image, canonical_json

_INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
_REF_NAME = "org.opencontainers.image.ref.name"
_VERSION_FILE = "oci-layout"
_INDEX_FILE = "index.json"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """A layout to read from; it speaks like a registry."""

    directory: Path

    def get_manifest(self, name: str) -> tuple[bytes, str]:
        """The bytes of the manifest or index under a tag or digest, and their media type. Not verified."""
        entries = _read_index(self.directory)["manifests"]
        found = [entry for entry in entries if name in (_tag_of(entry), entry["digest"])]
        if len(entries) == 1 and _tag_of(entries[0]) is None and ":" not in name:
            found = entries  # a layout of one image that nobody tagged
        if not found and ":" in name:
            return self._path_of(name).read_bytes(), ""  # the manifest itself says its type
        if not found:
            tags = ", ".join(sorted(tag for entry in entries if (tag := _tag_of(entry)))) or "no tags"
            raise InputMissingError(f"oci:{self.directory}: no image is tagged {name!r}; there are: {tags}")
        return self._path_of(str(found[0]["digest"])).read_bytes(), str(found[0]["mediaType"])

    def download_blob(self, digest: str, size_bytes: int) -> Iterator[bytes]:
        """At most `size_bytes` of the blob, in pieces. Not verified."""
        with self._path_of(digest).open("rb") as file:
            while chunk := file.read(min(size_bytes, _CHUNK_BYTES)):
                size_bytes -= len(chunk)
                yield chunk

    def _path_of(self, digest: str) -> Path:
        path = _blob_path(self.directory, digest)
        if not path.is_file():
            raise DataError(f"oci:{self.directory}: the blob {digest} is missing")
        return path


def layout_digest(reference: LayoutReference) -> str | None:
    """The digest that the tag has now; None when the tag or the whole layout is not there yet."""
    if not (reference.path / _INDEX_FILE).is_file():
        return None
    for entry in _read_index(reference.path)["manifests"]:
        if _tag_of(entry) == reference.tag:
            return str(entry["digest"])
    return None


def write_layout(image: Image, reference: LayoutReference, *, on_progress: Callable[[int], None]) -> tuple[int, int]:
    """Writes the image beside what is there and points the tag at it, last. Returns the bytes of blobs written and
    how many blobs were there.

    A blob that is there and whole is kept; other tags stay. `on_progress` gets the bytes of the image that are done.
    """
    directory = reference.path
    names = [path.name for path in directory.iterdir() if path.name[0] != "."] if directory.is_dir() else []
    if names and _VERSION_FILE not in names:
        raise ConfigError(
            f"{reference.name}: {directory} has other files in it and is not an OCI layout",
            hint="name a directory that is empty or does not exist",
        )
    try:
        make_directories(directory)
        with _locked(directory):  # another process may add its own image now
            _write(directory / _VERSION_FILE, canonical_json({"imageLayoutVersion": "1.0.0"}))
            make_directories(directory / "blobs" / "sha256")
            written_bytes = kept_blobs = done_bytes = 0
            for blob in image.blobs:
                if _is_there(directory, blob):
                    kept_blobs += 1
                else:
                    _write_blob(directory, blob)
                    written_bytes += blob.size_bytes
                done_bytes += blob.size_bytes
                on_progress(done_bytes)
            _write(_blob_path(directory, image.digest), image.manifest_bytes)
            index = _with_image(_existing_index(directory), image, reference.tag)
            _write(directory / _INDEX_FILE, canonical_json(index))
    except (NotADirectoryError, FileExistsError) as error:
        raise ConfigError(
            f"{reference.name}: a file is where the layout's directory would be", hint="name another directory"
        ) from error
    except OSError as error:
        raise ServiceError(
            f"{reference.name}: can not be written: {error.strerror}", hint="free some space or name another directory"
        ) from error
    return written_bytes, kept_blobs


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One process at a time in here; the lock ends with the process that holds it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _with_image(index: dict[str, Any], image: Image, tag: str) -> dict[str, Any]:
    others = [entry for entry in index["manifests"] if _tag_of(entry) != tag]
    mine = {
        "mediaType": MANIFEST_TYPE,
        "digest": image.digest,
        "size": len(image.manifest_bytes),
        "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {_REF_NAME: tag},
    }
    return {**index, "manifests": [*others, mine]}


def _existing_index(directory: Path) -> dict[str, Any]:
    if (directory / _INDEX_FILE).is_file():
        return _read_index(directory)
    return {"schemaVersion": 2, "mediaType": _INDEX_TYPE, "manifests": []}


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / _INDEX_FILE
    try:
        index = json.loads(path.read_bytes())
        entries = index["manifests"]
        if all(isinstance(entry["digest"], str) and isinstance(entry["mediaType"], str) for entry in entries):
            return dict(index)
    except FileNotFoundError as error:
        raise InputMissingError(
            f"oci:{directory}: not an OCI image layout, there is no {_INDEX_FILE}", hint="write oci:DIR:TAG"
        ) from error
    except (ValueError, KeyError, TypeError):
        pass  # the same sentence as for the wrong types
    raise DataError(f"{path}: not the index of an OCI image layout")


def _tag_of(entry: dict[str, Any]) -> str | None:
    tag = (entry.get("annotations") or {}).get(_REF_NAME)
    return str(tag) if tag else None


def _blob_path(directory: Path, digest: str) -> Path:
    algorithm, _, encoded = digest.partition(":")
    if not (algorithm.isalnum() and encoded.isalnum()):
        raise DataError(f"oci:{directory}: {digest!r} is not a digest")
    return directory / "blobs" / algorithm / encoded


def _is_there(directory: Path, blob: Blob) -> bool:
    path = _blob_path(directory, blob.digest)
    if not path.is_file() or path.stat().st_size != blob.size_bytes:
        return False
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}" == blob.digest


def _write_blob(directory: Path, blob: Blob) -> None:
    sha256 = hashlib.sha256()
    with blob.open() as stream, replacing(_blob_path(directory, blob.digest)) as file:
        while chunk := stream.read(_CHUNK_BYTES):
            sha256.update(chunk)
            file.write(chunk)
        if f"sha256:{sha256.hexdigest()}" != blob.digest:
            raise DataError(f"the files of {blob.digest} have changed since it was built", hint="push again")


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)
