"""tuner/registry/tar.py"""

import contextlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import DataError
from tuner.registry.tar import TarReader


def read(content: bytes) -> list[tuple[str, str, bytes, str]]:
    reader = TarReader(io.BytesIO(content))
    return [(member.name, member.kind, b"".join(reader.chunks()), member.link_target) for member in reader]


def info(name: str, kind: bytes = tarfile.REGTYPE, **attributes: object) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def make_tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for entry, content in entries:
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


NAMES = ["a", "dir/b.json", "d" * 90 + "/" + "f" * 90, "x" * 150 + "/" + "y" * 150, "ä/日本", "trailing space "]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names_of_every_format_are_read(form: int) -> None:
    names = [name for name in NAMES if form != tarfile.USTAR_FORMAT or len(name.encode()) < 250]
    content = make_tar(*((info(name), name.encode() * 300) for name in names), form=form)
    assert read(content) == [(name, "file", name.encode() * 300, "") for name in names]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_kinds_and_link_targets_are_told(form: int) -> None:
    content = make_tar(
        (info("d/", tarfile.DIRTYPE), b""),
        (info("s", tarfile.SYMTYPE, linkname="t" * 200), b""),
        (info("h", tarfile.LNKTYPE, linkname="a"), b""),
        (info("c", tarfile.CHRTYPE), b""),
        (info("p", tarfile.FIFOTYPE), b""),
        (info("a"), b"1"),
        form=form,
    )
    assert [(kind, target) for _, kind, _, target in read(content)] == [
        ("directory", ""),
        ("symbolic link", "t" * 200),
        ("hard link", "a"),
        ("special file", ""),
        ("special file", ""),
        ("file", ""),
    ]


def test_contents_that_nobody_reads_are_passed_over() -> None:
    content = make_tar((info("a"), b"1" * 1000), (info("b"), b"2"))
    assert [member.name for member in TarReader(io.BytesIO(content))] == ["a", "b"]


def test_an_end_without_a_mark_is_an_end() -> None:
    content = make_tar((info("a"), b"1"))
    assert read(content[:1024]) == [("a", "file", b"1", "")]


def resealed(header: bytes) -> bytes:
    """The header with the sum that its bytes have."""
    total = sum(header[:148]) + sum(header[156:512]) + 8 * 32
    return header[:148] + b"%06o\0 " % total + header[156:]


GOOD = make_tar((info("a"), b"1" * 600))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (GOOD[:700], "middle"),
        (GOOD[:300], "too early"),
        (GOOD[:1024] + GOOD[1024:1100], "middle"),
        (b"x" * 512, "malformed"),
        (b"b" + GOOD[1:], "add up"),
        (resealed(b"\xff" + GOOD[1:512]), "UTF-8"),
        (resealed(GOOD[:124] + b"9" * 11 + GOOD[135:512]), "malformed"),
        (resealed(GOOD[:124] + b"\xff" * 12 + GOOD[136:512]), "malformed"),
        (resealed(GOOD[:124] + b"77777777777\0" + GOOD[136:156] + b"x" + GOOD[157:512]), "takes"),
        (make_tar((info("p", tarfile.XHDTYPE), b"8 path=x\n")), "pax"),
        (make_tar((info("p", tarfile.XHDTYPE), b"99 path=x\n")), "pax"),
        (make_tar((info("p", tarfile.XHDTYPE), b"-1 path=x\n")), "malformed"),
        (make_tar((info("p", tarfile.XHDTYPE), b"11 size=-5\n"), (info("a"), b"")), "malformed"),
    ],
)
def test_broken_archives_are_refused(content: bytes, word: str) -> None:
    with pytest.raises(DataError, match=word):
        read(content)


def test_a_global_header_names_nothing() -> None:
    content = make_tar((info("g", tarfile.XGLTYPE), b"18 path=elsewhere\n"), (info("a"), b"1"))
    assert read(content) == [("a", "file", b"1", "")]


def test_attributes_that_are_no_text_do_no_harm() -> None:
    value = b"\x01\xff\xfe=\n"
    record = b"SCHILY.xattr.user.x=" + value + b"\n"
    content = make_tar((info("p", tarfile.XHDTYPE), b"%d %s" % (len(record) + 3, record)), (info("a"), b"1"))
    assert read(content) == [("a", "file", b"1", "")]


def test_sparse_files_are_special() -> None:
    content = make_tar((info("a", pax_headers={"GNU.sparse.major": "1"}), b"1"))
    assert [kind for _, kind, _, _ in read(content)] == ["special file"]


def test_sizes_beyond_octal_are_read() -> None:
    header = resealed(GOOD[:124] + b"\x80" + (600).to_bytes(11, "big") + GOOD[136:512])
    assert read(header + GOOD[512:]) == [("a", "file", b"1" * 600, "")]


@given(st.binary(max_size=3000), st.integers(0, len(GOOD)))
def test_any_bytes_are_read_or_refused(noise: bytes, start: int) -> None:
    with contextlib.suppress(DataError):
        read(GOOD[:start] + noise)


@given(
    st.lists(
        st.tuples(
            st.text(
                st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=200
            ).filter(lambda name: not name.endswith("/")),
            st.binary(max_size=1500),
        ),
        max_size=5,
    )
)
def test_what_is_written_comes_back(entries: list[tuple[str, bytes]]) -> None:
    content = make_tar(*((info(name), body) for name, body in entries))
    assert read(content) == [(name, "file", body, "") for name, body in entries]
