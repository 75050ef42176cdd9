"""Files of an adapter → an OCI image as a value: its manifest, its config and its layers, byte for byte.

    manifest  application/vnd.oci.image.manifest.v1+json
      config  a real image config: architecture, os, rootfs, history, labels
      layers  1. data/adapter_config.json, data/README.md, …   small, differs in every run
              2. data/tokenizer.json, …                        the same for all adapters of a base
              3. data/adapter_model.safetensors                large
      annotations

Layers are tars that exist only as a plan: headers in memory, contents read from the files (and compressed, if that is
wanted) when somebody reads the layer. Nothing is written, and an upload may begin again anywhere. The files stay open
with the image: whatever their names lead to meanwhile, what is sent is what was measured.
Equal input gives equal bytes, so pushing twice uploads nothing.
https://github.com/opencontainers/image-spec/blob/main/layer.md
"""

import hashlib
import io
import json
import os
import tarfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import PurePosixPath
from types import MappingProxyType

from tuner.errors import DataError
from tuner.open_files import OpenFile
from tuner.registry.compression import CompressedStream, Compression

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"
TOP_DIRECTORY = "data"  # where KAITO's readers look

_EPOCH = datetime.fromtimestamp(0, UTC)
_CHUNK_BYTES = 1 << 20
_END_OF_TAR = bytes(2 * tarfile.BLOCKSIZE)

_LAYERS = ("records", "tokenizer", "weights")
_SUFFIXES: Mapping[Compression, str] = MappingProxyType({"none": "", "gzip": "+gzip", "zstd": "+zstd"})
_TOKENIZER_NAMES = frozenset(
    {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "merges.txt",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)


Part = bytes | OpenFile


@dataclass(frozen=True)
class Blob:
    """Bytes with a digest, some of which may still lie in open files."""

    media_type: str
    digest: str
    size_bytes: int
    parts: tuple[Part, ...] = field(repr=False)

    @property
    def descriptor(self) -> dict[str, object]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}

    def open(self) -> io.RawIOBase:
        """A seekable stream of the blob's bytes; reading it raises DataError when a file has changed."""
        return BlobStream(self.parts)


@dataclass(frozen=True)
class Layer(Blob):
    """A blob that is a tar of some of the files. `parts` and `diff_id` are the uncompressed tar's."""

    name: str
    diff_id: str
    compression: Compression

    def open(self) -> io.RawIOBase:
        if self.compression == "none":
            return super().open()
        return CompressedStream(super().open, self.compression)


@dataclass(frozen=True)
class Image:
    """A whole image. Its digest names every byte of it."""

    manifest_bytes: bytes = field(repr=False)
    config: Blob
    layers: tuple[Layer, ...]

    @property
    def digest(self) -> str:
        return sha256_digest(self.manifest_bytes)

    @property
    def config_bytes(self) -> bytes:
        with self.config.open() as stream:
            return stream.readall()

    @property
    def blobs(self) -> tuple[Blob, ...]:
        """All that must be there before the manifest, the small ones first."""
        return (self.config, *self.layers)

    @property
    def size_bytes(self) -> int:
        return sum(blob.size_bytes for blob in self.blobs)


def build_image(
    files: Mapping[str, OpenFile],
    *,
    annotations: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    created: datetime = _EPOCH,
    compression: Compression = "none",
) -> Image:
    """The image with `files` (name in the image, without `data/` → file) and the annotations on its manifest.

    `labels` are the config's and default to the annotations, because `docker inspect` shows labels only.
    `created` is every time stamp in it: the epoch, or what SOURCE_DATE_EPOCH says. Reads every file once, and twice
    where it is to be compressed.
    """
    for name in files:
        _check_name(name)
    annotations = dict(annotations or {})
    created_text = created.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    by_layer: dict[str, list[str]] = {layer: [] for layer in _LAYERS}
    for name in sorted(files):
        by_layer[_layer_of(name)].append(name)
    plan = {layer: names for layer, names in by_layer.items() if names}
    layers = tuple(
        _build_layer(layer, {name: files[name] for name in names}, created, compression)
        for layer, names in plan.items()
    )
    config_bytes = canonical_json(
        {
            "architecture": "amd64",
            "config": {"Labels": dict(annotations if labels is None else labels)},
            "created": created_text,
            "history": [{"created": created_text, "created_by": f"tuner: {layer}"} for layer in plan],
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
    )
    config = Blob(CONFIG_TYPE, sha256_digest(config_bytes), len(config_bytes), (config_bytes,))
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": config.descriptor,
        "layers": [layer.descriptor for layer in layers],
    }
    if annotations:
        manifest["annotations"] = annotations
    return Image(canonical_json(manifest), config, layers)


def canonical_json(value: object) -> bytes:
    """The one spelling of a value: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def sha256_digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def measure(stream: io.RawIOBase) -> tuple[str, int]:
    """Digest and size of the rest of a stream."""
    sha256 = hashlib.sha256()
    buffer = bytearray(_CHUNK_BYTES)
    size_bytes = 0
    while count := stream.readinto(buffer):
        sha256.update(memoryview(buffer)[:count])
        size_bytes += count
    return f"sha256:{sha256.hexdigest()}", size_bytes


class BlobStream(io.RawIOBase):
    """The parts of a blob, one after another, as one seekable stream."""

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self._parts = parts
        sizes = (len(part) if isinstance(part, bytes) else part.size_bytes for part in parts)
        self._starts = list(accumulate(sizes, initial=0))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        """Fills as much of the buffer as one part has; 0 at the end."""
        if self._position >= self._starts[-1]:
            return 0
        # bisect_right passes over empty parts, which begin where their successor does
        index = bisect_right(self._starts, self._position) - 1
        offset = self._position - self._starts[index]
        wanted = min(len(buffer), self._starts[index + 1] - self._position)
        view = memoryview(buffer)[:wanted]
        part = self._parts[index]
        if isinstance(part, bytes):
            view[:] = part[offset : offset + wanted]
        else:
            part.read_into(view, offset)
        self._position += wanted
        return wanted


def _build_layer(layer: str, files: Mapping[str, OpenFile], created: datetime, compression: Compression) -> Layer:
    """The tar of some files: `data/` and every directory below it, then each file, in the order of the names."""
    mtime_s = int(created.timestamp())
    placed = {f"{TOP_DIRECTORY}/{name}": file for name, file in files.items()}
    directories = {str(parent) for name in placed for parent in PurePosixPath(name).parents} - {"."}
    parts: list[Part] = []
    for name in sorted({*placed, *directories}):
        if name in directories:
            parts.append(_header(name, tarfile.DIRTYPE, 0, mtime_s))
            continue
        file = placed[name]
        padding = bytes(-file.size_bytes % tarfile.BLOCKSIZE)
        parts += [_header(name, tarfile.REGTYPE, file.size_bytes, mtime_s), file, padding]
    parts.append(_END_OF_TAR)
    with BlobStream(parts) as stream:
        diff_id, size_bytes = measure(stream)
    plain = Layer(LAYER_TYPE, diff_id, size_bytes, tuple(parts), layer, diff_id, compression)
    if compression == "none":
        return plain
    with plain.open() as packed:
        digest, size_bytes = measure(packed)
    return replace(plain, media_type=LAYER_TYPE + _SUFFIXES[compression], digest=digest, size_bytes=size_bytes)


def _header(name: str, kind: bytes, size_bytes: int, mtime_s: int) -> bytes:
    """One header of the same bytes on every machine: no owner, fixed modes, pax records only where ustar ends."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mtime = kind, size_bytes, mtime_s
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def _layer_of(name: str) -> str:
    base = PurePosixPath(name).name
    if base.endswith(".safetensors"):
        return "weights"
    return "tokenizer" if base in _TOKENIZER_NAMES else "records"


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == "." or not name.isprintable():
        raise DataError(f"{name!r}: not a file name that an image can have")
