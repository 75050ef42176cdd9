"""An image or artifact, from a registry or a layout on disk → files in a directory, every byte verified.

Three kinds are read: images whose files are under `/data` (adapters, KAITO's data images), an index of those, and
artifacts whose layers are the files themselves, which is how `oras push` writes and KAITO ships base weights.
"""

import hashlib
import json
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tuner.durable import make_directories, move
from tuner.errors import ConfigError, DataError, ServiceError
from tuner.reference import ImageReference, LayoutReference
from tuner.registry.extract import Extractor, Limits
from tuner.registry.image import TOP_DIRECTORY, sha256_digest
from tuner.registry.layout import Layout
from tuner.registry.tar import TarReader
from tuner.runspec import Progress, Reporter

_INDEX_TYPES = frozenset(
    {
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    }
)
_MANIFEST_TYPES = frozenset(
    {
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)
_CONFIG_TYPES = frozenset(
    {
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    }
)
_TITLE = "org.opencontainers.image.title"
_UNPACK = "io.deis.oras.content.unpack"  # "true" on what oras made of a directory
_MANIFEST_BYTES = 4 << 20
_CONFIG_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20

# Media type of a layer → how it is compressed. Encrypted and foreign layers are not here.
_COMPRESSIONS = {
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}


class ImageSource(Protocol):
    """A registry or a layout. Neither is trusted."""

    def get_manifest(self, name: str) -> tuple[bytes, str]: ...
    def download_blob(self, digest: str, size_bytes: int) -> Iterator[bytes]: ...


@dataclass(frozen=True)
class Pulled:
    """`digest` is what the reference named; `files` are names in the directory → sha256."""

    digest: str
    files: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class _Descriptor:
    media_type: str
    digest: str
    size_bytes: int
    title: str | None
    unpack: bool

    @property
    def compression(self) -> str | None:
        return _COMPRESSIONS.get(self.media_type)


@dataclass(frozen=True)
class _Manifest:
    """`diff_ids` is None for an artifact, whose layers are not a file system."""

    digest: str
    layers: tuple[_Descriptor, ...]
    diff_ids: tuple[str, ...] | None
    annotations: Mapping[str, str]


def pull_image(
    reference: ImageReference | LayoutReference,
    target: Path,
    client: ImageSource | None = None,
    *,
    limits: Limits | None = None,
    only_under: str = TOP_DIRECTORY,
    reporter: Reporter,
) -> Pulled:
    """The files under `only_under` of the image, in `target` without that prefix; an empty string takes all.

    `target` must not exist or be empty, and appears whole or not at all. A layout needs no client.
    Raises DataError for anything that is not what its digest says or that an honest image would not have,
    InputMissingError when there is no such image, and what the client raises.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target}: exists and is not an empty directory", hint="name another one, or empty it")
    if isinstance(reference, LayoutReference):
        source: ImageSource = Layout(reference.path)
    elif client is None:
        raise ValueError(f"{reference}: a registry needs a client")
    else:
        source = client
    limits = limits or Limits()
    try:
        top_digest, manifest = _resolve(reference, source)
        total_bytes = sum(layer.size_bytes for layer in manifest.layers)
        if total_bytes > limits.download_bytes:
            raise DataError(f"{total_bytes:,} bytes to download; at most {limits.download_bytes:,} are allowed")
        _check_space(target, total_bytes)
        files = _unpack_beside(target, manifest, source, limits, only_under, reporter, str(reference))
    except DataError as error:
        raise DataError(f"{reference}: {error.message}", hint=error.hint) from error
    return Pulled(top_digest, files, manifest.annotations)


def image_bytes(reference: ImageReference | LayoutReference, source: ImageSource) -> int:
    """How large its layers are, as its manifest says. Raises what `pull_image` raises."""
    return sum(layer.size_bytes for layer in _resolve(reference, source)[1].layers)


# ── manifests ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _resolve(reference: ImageReference | LayoutReference, source: ImageSource) -> tuple[str, _Manifest]:
    """The digest that the reference names and the manifest for linux/amd64 below it."""
    content, media_type = source.get_manifest(reference.digest or str(reference.tag))
    digest = sha256_digest(content)
    if reference.digest is not None and _digest_like(reference.digest, content) != reference.digest:
        raise DataError(f"the manifest is {digest}, not the one that was asked for")
    document = _parse_object(content, "manifest")
    media_type = str(document.get("mediaType") or media_type)
    manifest_digest = digest
    if media_type in _INDEX_TYPES:
        chosen = _parse_descriptor(_choose_platform(_objects(document, "manifests")))
        content, _ = source.get_manifest(chosen.digest)
        _check_content(content, chosen, "manifest")
        document = _parse_object(content, "manifest")
        media_type = str(document.get("mediaType") or chosen.media_type)
        manifest_digest = chosen.digest
    if media_type not in _MANIFEST_TYPES:
        raise DataError(f"a {media_type[:100] or 'document without a media type'} is not an image")
    layers = tuple(_parse_descriptor(layer) for layer in _objects(document, "layers"))
    return digest, _Manifest(
        digest=manifest_digest,
        layers=layers,
        diff_ids=_diff_ids(document, layers, source),
        annotations=_strings(document.get("annotations")),
    )


def _choose_platform(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """linux/amd64, or the only one there is: data and adapters run nowhere."""
    platforms: list[tuple[str, dict[str, Any]]] = []
    for entry in entries:
        platform = entry.get("platform")
        parts = platform if isinstance(platform, dict) else {}
        name = f"{parts.get('os', '?')}/{parts.get('architecture', '?')}"
        if name != "unknown/unknown":  # how builders mark attestations
            platforms.append((name, entry))
    for name, entry in platforms:
        if name == "linux/amd64":
            return entry
    if len(platforms) == 1:
        return platforms[0][1]
    names = ", ".join(name for name, _ in platforms) or "nothing"
    raise DataError(f"the index has no image for linux/amd64; it has {names}"[:500])


def _diff_ids(document: dict[str, Any], layers: tuple[_Descriptor, ...], source: ImageSource) -> tuple[str, ...] | None:
    """The digests of the uncompressed layers; None where the config is none of an image."""
    config = _parse_descriptor(_object(document.get("config"), "config"))
    if config.media_type not in _CONFIG_TYPES:
        return None
    if config.size_bytes > _CONFIG_BYTES:
        raise DataError(f"its config has {config.size_bytes:,} bytes")
    content = b"".join(_verified(source.download_blob(config.digest, config.size_bytes), config, lambda _: None))
    rootfs = _parse_object(content, "config").get("rootfs")
    diff_ids = rootfs.get("diff_ids") if isinstance(rootfs, dict) else None
    if not diff_ids:  # `{}` stands for "no config" in some artifacts
        return None
    if not isinstance(diff_ids, list) or len(diff_ids) != len(layers):
        raise DataError(f"its config does not fit its {len(layers)} layers")
    return tuple(str(diff_id) for diff_id in diff_ids)


def _parse_object(content: bytes, what: str) -> dict[str, Any]:
    if len(content) > max(_MANIFEST_BYTES, _CONFIG_BYTES):
        raise DataError(f"its {what} has {len(content):,} bytes")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its {what} is not JSON") from error
    return _object(document, what)


def _object(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"its {what} is malformed")
    return value


def _objects(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    values = document.get(key)
    if not isinstance(values, list):
        raise DataError(f"its {key} are malformed")
    return [_object(value, key) for value in values]


def _strings(value: object) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()} if isinstance(value, dict) else {}


def _parse_descriptor(value: dict[str, Any]) -> _Descriptor:
    digest, size_bytes = value.get("digest"), value.get("size")
    if not isinstance(digest, str) or not isinstance(size_bytes, int) or size_bytes < 0:
        raise DataError("a descriptor in it is malformed")
    algorithm, _, encoded = digest.partition(":")
    if algorithm not in ("sha256", "sha512") or not encoded.isalnum() or not encoded.isascii():
        raise DataError(f"it has a digest that is not verified here: {digest[:100]!r}")
    annotations = _strings(value.get("annotations"))
    return _Descriptor(
        media_type=str(value.get("mediaType", "")),
        digest=digest,
        size_bytes=size_bytes,
        title=annotations.get(_TITLE),
        unpack=annotations.get(_UNPACK) == "true",
    )


def _digest_like(digest: str, content: bytes) -> str:
    algorithm = digest.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


def _check_content(content: bytes, descriptor: _Descriptor, what: str) -> None:
    if len(content) != descriptor.size_bytes or _digest_like(descriptor.digest, content) != descriptor.digest:
        raise DataError(f"its {what} is not {descriptor.digest}")


# ── layers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _unpack_beside(
    target: Path,
    manifest: _Manifest,
    source: ImageSource,
    limits: Limits,
    only_under: str,
    reporter: Reporter,
    task: str,
) -> dict[str, str]:
    """Unpacks into a directory beside the target and renames it when everything has been verified."""
    _check_layers(manifest)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        make_directories(target.parent)
        temporary.mkdir(mode=0o755)
        keep_others = manifest.diff_ids is None  # an artifact's files have no common root
        with Extractor(temporary, only_under, limits, reporter, keep_others=keep_others) as extractor:
            _Unpacking(manifest, source, limits, reporter, task).run(extractor)
            files = extractor.files
        if not files:
            place = f"under /{only_under}" if only_under else "in it"
            raise DataError(f"no files {place}", hint="an image for KAITO has its files in /data")
        move(temporary, target)  # over an empty directory, if there is one
    except (NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"{target}: a file is where a directory would be", hint="name another directory") from error
    except OSError as error:
        raise ServiceError(f"{target}: can not be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return files


def _check_space(target: Path, needed_bytes: int) -> None:
    """Raises ServiceError when not even what is to be downloaded fits; unpacked it may be more."""
    existing = next(parent for parent in target.absolute().parents if parent.is_dir())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise ServiceError(
            f"{target}: {needed_bytes:,} bytes are to be fetched, and {free_bytes:,} are free there",
            hint="free some space or name another directory",
        )


def _check_layers(manifest: _Manifest) -> None:
    """Before anything large is fetched: can all of it be read?"""
    for layer in manifest.layers:
        if (manifest.diff_ids is not None or layer.unpack) and layer.compression is None:
            raise DataError(f"a layer is {layer.media_type[:100]!r}, which is not read here")
    if manifest.diff_ids is None and not any(layer.title for layer in manifest.layers):
        raise DataError("neither an image nor an artifact with named files")


class _Unpacking:
    """One pull under way: counts what came in and what it unpacked to, over all layers."""

    def __init__(self, manifest: _Manifest, source: ImageSource, limits: Limits, reporter: Reporter, task: str) -> None:
        self._manifest = manifest
        self._source = source
        self._limits = limits
        self._reporter = reporter
        self._task = task
        self._read_bytes = 0
        self._unpacked_bytes = 0

    def run(self, extractor: Extractor) -> None:
        diff_ids = self._manifest.diff_ids
        for index, layer in enumerate(self._manifest.layers):
            if diff_ids is not None:
                self._unpack(layer, diff_ids[index], extractor)
            elif layer.title and layer.unpack:
                self._unpack(layer, None, extractor)
            elif layer.title:
                extractor.add_named_file(layer.title, self._within_limits(self._blob(layer)))
            else:
                self._reporter.warn(f"{self._task}: the layer {layer.digest} has no file name; left out")

    def _unpack(self, layer: _Descriptor, diff_id: str | None, extractor: Extractor) -> None:
        unpacked = self._within_limits(_decompress(self._blob(layer), str(layer.compression)))
        stream = _ChunkStream(_verified_diff(unpacked, diff_id))
        extractor.apply(TarReader(stream))
        while stream.read(_CHUNK_BYTES):  # what follows the end of the tar is part of both digests
            pass

    def _blob(self, layer: _Descriptor) -> Iterator[bytes]:
        return _verified(self._source.download_blob(layer.digest, layer.size_bytes), layer, self._progress)

    def _progress(self, size_bytes: int) -> None:
        self._read_bytes += size_bytes
        total_bytes = sum(layer.size_bytes for layer in self._manifest.layers)
        self._reporter.progress(Progress("fetch", self._task, self._read_bytes, total_bytes, "B"))

    def _within_limits(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        limits = self._limits
        for chunk in chunks:
            self._unpacked_bytes += len(chunk)
            if self._unpacked_bytes > limits.total_bytes:
                raise DataError(f"it unpacks to more than {limits.total_bytes:,} bytes")
            if self._unpacked_bytes > max(limits.ratio_from_bytes, limits.ratio * self._read_bytes):
                raise DataError(f"it unpacks to more than {limits.ratio} times its size")
            yield chunk


class _ChunkStream:
    """Pieces of any size, read in pieces of another."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    @property
    def closed(self) -> bool:
        """pyarrow asks."""
        return False

    def close(self) -> None:
        """pyarrow calls it, and the rest must stay readable."""

    def read(self, size: int = _CHUNK_BYTES, /) -> bytes:
        """Up to `size` bytes; none at the end."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        taken, self._rest = self._rest[:size], self._rest[size:]
        return bytes(taken)


def _verified(chunks: Iterator[bytes], descriptor: _Descriptor, count: Callable[[int], None]) -> Iterator[bytes]:
    """The same pieces; raises DataError at the first byte too many, and at the end for a wrong digest or size."""
    hashed = hashlib.new(descriptor.digest.partition(":")[0])
    size_bytes = 0
    for chunk in chunks:
        size_bytes += len(chunk)
        if size_bytes > descriptor.size_bytes:
            break
        hashed.update(chunk)
        count(len(chunk))
        yield chunk
    if size_bytes != descriptor.size_bytes:
        comparison = "more" if size_bytes > descriptor.size_bytes else "less"
        raise DataError(f"the blob {descriptor.digest} has {comparison} than its {descriptor.size_bytes:,} bytes")
    if not descriptor.digest.endswith(f":{hashed.hexdigest()}"):
        raise DataError(f"the blob {descriptor.digest} has other content than its digest says")


def _verified_diff(chunks: Iterator[bytes], diff_id: str | None) -> Iterator[bytes]:
    """The same pieces; raises DataError at the end when the config names another digest for them."""
    hashed = hashlib.sha256()
    for chunk in chunks:
        hashed.update(chunk)
        yield chunk
    if diff_id is not None and diff_id != f"sha256:{hashed.hexdigest()}":
        raise DataError(f"a layer unpacks to sha256:{hashed.hexdigest()}, its config says {diff_id[:100]}")


def _decompress(chunks: Iterator[bytes], compression: str) -> Iterator[bytes]:
    if compression == "gzip":
        return _gunzip(chunks)
    return _unzstd(chunks) if compression == "zstd" else chunks


def _gunzip(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """In pieces of bounded size; several gzip members in a row are one stream."""
    decompressor = zlib.decompressobj(wbits=31)
    fresh = True  # between two members
    for chunk in chunks:
        data = chunk
        while data:
            try:
                unpacked = decompressor.decompress(data, _CHUNK_BYTES)
            except zlib.error as error:
                raise DataError("a layer is not gzip, or broken") from error
            fresh = False
            if unpacked:
                yield unpacked
            data = decompressor.unconsumed_tail
            if decompressor.eof:
                data = decompressor.unused_data
                decompressor = zlib.decompressobj(wbits=31)
                fresh = True
    if not fresh:
        raise DataError("a gzip layer ends too early")


def _unzstd(chunks: Iterator[bytes]) -> Iterator[bytes]:
    import pyarrow  # here, because it takes longer to import than all the rest

    compressed = _ChunkStream(chunks)
    try:
        with pyarrow.CompressedInputStream(pyarrow.PythonFile(compressed, mode="r"), "zstd") as stream:
            while unpacked := stream.read(_CHUNK_BYTES):
                yield unpacked
    except OSError as error:
        raise DataError("a layer is not zstd, or broken") from error
    while compressed.read(_CHUNK_BYTES):  # so that its digest is verified too
        pass
