"""A stream of bytes → the same bytes compressed, while they are read: nothing is kept on disk or in memory.

Reading it twice gives equal bytes, so a layer can be measured first and sent later. Another version of zlib or zstd may
give others: only uncompressed layers have the same digest everywhere.
"""

import io
import os
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

Compression = Literal["none", "gzip", "zstd"]

_CHUNK_BYTES = 1 << 20
_GZIP_LEVEL = 6
_GZIP_WBITS = 31  # a gzip header without a name or a time


class CompressedStream(io.RawIOBase):
    """`open_source()` compressed. Seeking starts again from the front, so it costs as much as reading up to there."""

    def __init__(self, open_source: Callable[[], io.RawIOBase], compression: Literal["gzip", "zstd"]) -> None:
        super().__init__()
        self._open_source = open_source
        self._pack = _gzip if compression == "gzip" else _zstd
        self._source: io.RawIOBase | None = None
        self._pieces: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")
        self._position = 0
        self._begin()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Only from the start: the size is known at the end."""
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation("a compressed stream is sought from its start")
        if offset < self._position:
            self._begin()
        buffer = bytearray(_CHUNK_BYTES)
        while self._position < offset:
            if not self.readinto(memoryview(buffer)[: offset - self._position]):
                break
        return self._position

    def readinto(self, buffer: "memoryview | bytearray") -> int:  # type: ignore[override]
        """As much as is ready; 0 at the end."""
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        memoryview(buffer)[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._position += count
        return count

    def close(self) -> None:
        if self._source is not None:
            self._source.close()
        super().close()

    def _begin(self) -> None:
        if self._source is not None:
            self._source.close()
        self._source = self._open_source()
        self._pieces, self._rest, self._position = self._pack(self._source), memoryview(b""), 0


def _chunks(source: io.RawIOBase) -> Iterator[memoryview]:
    buffer = bytearray(_CHUNK_BYTES)
    while count := source.readinto(buffer):
        yield memoryview(buffer)[:count]


def _gzip(source: io.RawIOBase) -> Iterator[bytes]:
    compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WBITS)
    for chunk in _chunks(source):
        yield compressor.compress(chunk)
    yield compressor.flush()


def _zstd(source: io.RawIOBase) -> Iterator[bytes]:
    """Arrow's level 1, which takes nearly all that there is to take off bfloat16 weights."""
    import pyarrow  # here, because it takes longer to import than all the rest

    sink = _Sink()
    with pyarrow.PythonFile(sink, mode="w") as file, pyarrow.CompressedOutputStream(file, "zstd") as packed:
        for chunk in _chunks(source):
            packed.write(chunk)
            yield sink.take()
    yield sink.take()


class _Sink:
    """Where pyarrow writes to."""

    closed = False

    def __init__(self) -> None:
        self._written: list[bytes] = []

    def write(self, content: bytes) -> int:
        self._written.append(bytes(content))
        return len(content)

    def flush(self) -> None:
        """pyarrow calls it."""

    def close(self) -> None:
        """pyarrow calls it, and what was written must stay."""

    def take(self) -> bytes:
        """All that was written since the last time."""
        taken = b"".join(self._written)
        self._written.clear()
        return taken
