"""A tar as it streams by → its members. Reads ustar, pax and GNU long names, and trusts nothing.

tarfile is not used for archives from outside: what it takes for safe depends on the patch release of Python
(CVE-2025-4517, CVE-2025-8194), and it seeks, resolves and keeps more than a stream of regular files needs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from tuner.errors import DataError

BLOCK_BYTES = 512
_HEADER_RECORDS_BYTES = 1 << 20  # pax records and long names of one member

Kind = Literal["file", "directory", "hard link", "symbolic link", "special file"]
_KINDS: dict[bytes, Kind] = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",  # "contiguous", which is a file
    b"1": "hard link",
    b"2": "symbolic link",
    b"5": "directory",
}


class ByteSource(Protocol):
    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end."""


@dataclass(frozen=True)
class Member:
    """One entry. The name is as written: it may be anything."""

    name: str
    kind: Kind
    size_bytes: int
    link_target: str


class TarReader:
    """The members of a tar in their order; the contents of the current one come from `chunks()`."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._left_bytes = 0  # of the current member
        self._padding_bytes = 0

    def __iter__(self) -> Iterator[Member]:
        records: dict[str, str] = {}
        while header := self._next_header():
            kind = header[156:157]
            size_bytes = _number(header[124:136])
            if kind in (b"x", b"g", b"L", b"K"):
                content = self._read_records(size_bytes)
                if kind == b"x":
                    records |= _parse_pax(content)
                elif kind != b"g":  # a global header may not name or size a member
                    records["path" if kind == b"L" else "linkpath"] = _text(content.rstrip(b"\0"))
                continue
            if any(key.startswith("GNU.sparse") for key in records):
                kind = b"S"
            if "size" in records:
                size_bytes = _decimal(records["size"])
            member = Member(
                name=records.get("path") or _name_of(header),
                kind=_KINDS.get(kind, "special file"),
                size_bytes=size_bytes,
                link_target=records.get("linkpath") or _text(_until_nul(header[157:257])),
            )
            records = {}
            # Links have no contents, whatever their size says; what old tars wrote there is passed over.
            self._begin(0 if kind in (b"1", b"2", b"5") else size_bytes)
            yield member
            for _ in self.chunks():
                pass

    def chunks(self) -> Iterator[bytes]:
        """What is left of the current member."""
        while self._left_bytes:
            chunk = self._source.read(min(self._left_bytes, 1 << 20))
            if not chunk:
                raise DataError("the tar ends in the middle of a file")
            self._left_bytes -= len(chunk)
            yield chunk
        self._read_exactly(self._padding_bytes)
        self._padding_bytes = 0

    def _begin(self, size_bytes: int) -> None:
        self._left_bytes = size_bytes
        self._padding_bytes = -size_bytes % BLOCK_BYTES

    def _next_header(self) -> bytes | None:
        header = self._source.read(BLOCK_BYTES)
        if header:
            header += self._read_exactly(BLOCK_BYTES - len(header))
        if not header.strip(b"\0"):  # the end mark, or an end without one
            return None
        written = _number(header[148:156])
        if written != sum(header[:148]) + sum(header[156:]) + 8 * ord(" "):
            raise DataError("a header of the tar does not add up")
        return header

    def _read_records(self, size_bytes: int) -> bytes:
        if size_bytes > _HEADER_RECORDS_BYTES:
            raise DataError(f"a name in the tar takes {size_bytes:,} bytes")
        self._begin(size_bytes)
        return b"".join(self.chunks())

    def _read_exactly(self, size_bytes: int) -> bytes:
        content = b""
        while len(content) < size_bytes:
            chunk = self._source.read(size_bytes - len(content))
            if not chunk:
                raise DataError("the tar ends too early")
            content += chunk
        return content


def _name_of(header: bytes) -> str:
    name = _until_nul(header[:100])
    prefix = _until_nul(header[345:500]) if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _parse_pax(content: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE\n`, again and again, where LENGTH counts the whole record.

    Only the values that mean something here are kept: extended attributes are bytes of any kind.
    """
    records: dict[str, str] = {}
    position, end = 0, len(content.rstrip(b"\0"))
    while position < end:
        space = content.find(b" ", position, position + 8)
        length = _decimal(_text(content[position:space])) if space > 0 else 0
        record = content[space + 1 : position + length]
        key, equals, value = record.partition(b"=")
        if not equals or position + length > end or not value.endswith(b"\n"):
            raise DataError("a pax header of the tar is malformed")
        name = _text(key)
        records[name] = _text(value[:-1]) if name in ("path", "linkpath", "size") else ""
        position += length
    return records


def _number(field: bytes) -> int:
    """Octal digits, or base 256 when the first bit is set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.translate(None, b"01234567"):
        raise DataError("a number in a header of the tar is malformed")
    return int(digits or b"0", 8)


def _decimal(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 20):
        raise DataError("a number in a pax header of the tar is malformed")
    return int(text)


def _until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise DataError("a name in the tar is not UTF-8") from error
