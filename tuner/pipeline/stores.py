"""hf://, s3://, gs:// and az:// URLs → the files they stand for: one file, a directory's, or what a pattern matches.

A dataset on the Hub becomes URLs at one commit, pinned where the Hub knows a digest, and comes as every URL does.
Buckets are read by fsspec's packages with whatever credentials those find in the environment.
"""

import importlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import urlsplit

from tuner.errors import ConfigError, DeniedError, InputMissingError, ServiceError, TunerError
from tuner.folder import Folder, Use, named_split_remark, nothing_to_train_on, sort_folder, sort_matches
from tuner.pipeline.download import Origin, Wanted
from tuner.pipeline.hub import dataset_files, patiently
from tuner.pipeline.web import Answer, StaleError, Transfer, TransientError, Version, Web, WebFile
from tuner.runspec import Reporter, UrlSource
from tuner.urls import STORE_PACKAGES, source_name

_BLOCK_BYTES = 4 * 1024**2
_PATTERN = frozenset("*?[")
# What says which version an object is, best first: names differ from store to store.
_VERSION_KEYS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)


def is_store(source: UrlSource) -> bool:
    return urlsplit(source.url).scheme in STORE_PACKAGES


def check_store(source: UrlSource) -> None:
    """ConfigError when the package that reads this URL is not installed."""
    scheme = urlsplit(source.url).scheme
    if scheme != "hf":
        _filesystem_class(source.url)


def _filesystem_class(url: str) -> Any:
    scheme = urlsplit(url).scheme
    try:
        return importlib.import_module("fsspec").get_filesystem_class(scheme)
    except (ImportError, ValueError):
        package = STORE_PACKAGES[scheme]
        raise ConfigError(
            f"{url}: {scheme}:// needs the package {package}, which is not installed", hint=f"pip install {package}"
        ) from None


def stored_files(
    index: int,
    source: UrlSource,
    web: Web,
    hf_token: str | None,
    transfer: Transfer,
    stop: threading.Event,
    reporter: Reporter,
) -> list[Wanted]:
    """The files that the index-th source stands for, sorted by path. Raises InputMissingError when there are none."""
    if source.url.startswith("hf:"):
        asked, files = dataset_files(source.url, hf_token, transfer, stop)
        by_path = {file.path: file for file in files}
        chosen = _choose(list(by_path), asked, source.url).used_for(source.use)
        found = [
            _Found(
                by_path[path].name,
                by_path[path].sha256,
                WebFile(web, by_path[path].url, "", shown=by_path[path].name),
                use,
            )
            for path, use in chosen.files
        ]
    else:
        try:
            chosen, found = patiently(lambda: _bucket_files(source.url, source.use), transfer, stop)
        except TransientError as error:
            raise ServiceError(f"{source.url}: {error.reason}", hint="run again: it goes on from here") from None
    for line in chosen.remarks():
        reporter.note(f"{source.url}: {line}")
    if source.use == "training" and len(found) == 1 and (remark := named_split_remark(found[0].url.rpartition("/")[2])):
        reporter.warn(f"{source.url}: {remark}")
    if source.sha256 and len(found) > 1:
        raise ConfigError(f"{source.url}: stands for {len(found)} files, and a pin is of one", hint="pin each file")
    return [
        Wanted(
            name=source.name if len(found) == 1 else f"{index:04d}-{source_name(count, file.url)}",
            url=file.url,
            query_sha256="",
            sha256=source.sha256 or file.sha256,
            origin=file.origin,
            use=file.use,
            is_part=len(found) > 1,
        )
        for count, file in enumerate(found)
    ]


@dataclass(frozen=True)
class _Found:
    url: str
    sha256: str | None
    origin: Origin
    use: Use


def _choose(paths: Sequence[str], asked: str, url: str) -> Folder:
    """The one path that was asked for, what the pattern matches, or the data files below the directory."""
    asked = asked.rstrip("/")
    if asked in paths:
        return Folder((asked,), (), ())
    if _PATTERN & set(asked):
        chosen = sort_matches(path for path in paths if _matches(path, asked))
    else:
        below = f"{asked}/" if asked else ""
        chosen = sort_folder(path.removeprefix(below) for path in paths if path.startswith(below)).below(below)
        if chosen.left_out and not chosen.training:
            raise nothing_to_train_on(chosen, url)
    if not chosen.training:
        raise InputMissingError(f"{url}: there is no such file, and no data file below it")
    return chosen


def _matches(path: str, pattern: str) -> bool:
    """As a shell with globstar: `*` stays within a directory, `**` does not."""
    names, parts = path.split("/"), pattern.split("/")
    if "**" not in parts:
        return len(names) == len(parts) and all(map(fnmatchcase, names, parts))
    at = parts.index("**")
    if not all(map(fnmatchcase, names[:at], parts[:at])) or len(names) < at:
        return False
    rest = "/".join(parts[at + 1 :])
    return any(_matches("/".join(names[skip:]), rest) for skip in range(at, len(names)))


# ── buckets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _bucket_files(url: str, use: Use) -> tuple[Folder, list[_Found]]:
    with _store_errors(url):
        filesystem = _filesystem_class(url)(skip_instance_cache=True)
        asked = str(filesystem._strip_protocol(url))  # how this package writes paths
        directory = asked
        while _PATTERN & set(directory):
            directory = directory.rpartition("/")[0]
        if directory == asked and filesystem.isfile(asked):
            paths = [asked]
        else:
            paths = [str(path) for path in filesystem.find(directory)]
    chosen = _choose(paths, asked, url).used_for(use)
    return chosen, [
        _Found(str(filesystem.unstrip_protocol(path)), None, BucketFile(filesystem, path, url), use)
        for path, use in chosen.files
    ]


class BucketFile:
    """An object in a bucket, read in blocks."""

    def __init__(self, filesystem: Any, path: str, shown: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._shown = shown

    @contextmanager
    def open(self, at: int = 0, end: int | None = None, version: Version | None = None) -> Iterator[Answer]:
        size, now = self._look()
        if version and now.validator != version.validator:
            raise StaleError
        yield Answer(
            start=at,
            is_whole=version is None,
            size_bytes=size,
            version=now,
            has_ranges=True,
            is_framed=True,
            chunks=self._chunks(at, size if end is None else end, now),
        )

    def is_unchanged(self, version: Version) -> bool:
        return self._look()[1] == version

    def _look(self) -> tuple[int, Version]:
        with _store_errors(self._shown):
            self._filesystem.invalidate_cache()
            facts = self._filesystem.info(self._path)
        known = next((key for key in _VERSION_KEYS if facts.get(key)), None)
        size = int(facts["size"])
        return size, Version(validator=f"{known} {facts[known]} {size}" if known else None)

    def _chunks(self, at: int, end: int, version: Version) -> Iterator[bytes]:
        for start in range(at, end, _BLOCK_BYTES):
            with _store_errors(self._shown):
                block: bytes = self._filesystem.cat_file(self._path, start, min(start + _BLOCK_BYTES, end))
            # A range cannot be asked for by version here: what was read between two equal looks is of one.
            if self._look()[1] != version:
                raise StaleError
            yield block


@contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Whatever these packages raise, in our words; theirs may name signed addresses."""
    try:
        yield
    except (TunerError, StaleError, TransientError):
        raise
    except FileNotFoundError:
        raise InputMissingError(f"{url}: there is no such file") from None
    except Exception as error:
        kind = type(error).__name__
        if isinstance(error, PermissionError) or "Credential" in kind or "Auth" in kind:
            raise DeniedError(
                f"{url}: denied ({kind})",
                hint="which credentials are used is for the environment to say: docs/data-sources.md",
            ) from None
        if isinstance(error, ValueError | TypeError):
            raise ConfigError(
                f"{url}: the store cannot be opened ({kind})", hint="is the environment for it set?"
            ) from None
        raise TransientError(f"the store failed ({kind})") from None
