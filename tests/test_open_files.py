"""tuner/open_files.py: what is opened in a directory that others write to, and what is not."""

import ast
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tuner
from tuner.errors import DataError, InputMissingError, TunerError
from tuner.open_files import OpenDirectory, OpenFile


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / "secret"
    path.parent.mkdir()
    path.write_text("s3cret")
    return path


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "place" / "below").mkdir(parents=True)
    (tmp_path / "place" / "file").write_bytes(b"content")
    return tmp_path / "place"


@pytest.fixture
def directory(place: Path) -> Iterator[OpenDirectory]:
    with OpenDirectory.at(place) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """Who opens a FIFO waits for ever."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


TRICKS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "link": (lambda path, secret: path.symlink_to(secret), "is a symbolic link"),
    "relative link": (lambda path, secret: path.symlink_to("../elsewhere/secret"), "is a symbolic link"),
    "link to itself": (lambda path, secret: path.symlink_to(path), "is a symbolic link"),
    "link to nothing": (lambda path, secret: path.symlink_to("nowhere"), "is a symbolic link"),
    "link to a FIFO": (lambda path, secret: (os.mkfifo(f"{path}.f"), path.symlink_to(f"{path}.f")), "a symbolic link"),
    "link of a process": (lambda path, secret: path.symlink_to("/proc/self/fd/0"), "is a symbolic link"),
    "hard link": (lambda path, secret: path.hardlink_to(secret), r"has 2 names \(hard links\)"),
    "FIFO": (lambda path, secret: os.mkfifo(path), "is a FIFO"),
    "socket": (lambda path, secret: make_socket(path), "is a socket"),
    "device": (lambda path, secret: os.mknod(path, 0o20666, os.makedev(1, 5)), "is a device"),
    "directory": (lambda path, secret: path.mkdir(), "is a directory"),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_what_is_no_regular_file_of_one_name_is_refused_at_once(
    directory: OpenDirectory, place: Path, secret: Path, trick: str
) -> None:
    make, said = TRICKS[trick]
    try:
        make(place / "tricky", secret)
    except PermissionError:
        pytest.skip("only root makes devices")
    with pytest.raises(DataError, match=said) as caught:
        directory.file("tricky")
    assert str(place / "tricky") in caught.value.message
    assert caught.value.exit_code == 65
    with pytest.raises(TunerError):
        os.close(directory.open_shared("tricky"))


@pytest.mark.parametrize("name", ["../elsewhere/secret", "..", ".", "", "below/../file", "/etc/passwd", "a\0b"])
def test_a_name_leads_nowhere_else(directory: OpenDirectory, secret: Path, name: str) -> None:
    for ask in (directory.file, directory.below, directory.has, directory.open_shared):
        with pytest.raises(DataError, match="is no name"):
            ask(name)
    with pytest.raises(DataError, match="is no name"):
        directory.write(name, b"")


@pytest.mark.parametrize("target", ["../elsewhere", "below", "nowhere", "/"])
def test_no_link_is_followed_on_the_way_down(directory: OpenDirectory, place: Path, secret: Path, target: str) -> None:
    (place / "link").symlink_to(target)
    (place / "below" / "link").symlink_to(secret.parent)
    for names in (("link",), ("link", "below"), ("below", "link"), ("below", "link", "secret")):
        with pytest.raises(DataError, match="link: is a symbolic link"):
            directory.below(*names)
    assert directory.directories() == ["below"]
    with pytest.raises(DataError, match="file: is a file"):
        directory.below("file")
    with pytest.raises(InputMissingError, match="not there"):
        directory.below("nowhere", "below")


def test_links_on_the_way_to_a_directory_are_those_of_whoever_named_it(place: Path) -> None:
    (place.parent / "link").symlink_to(place)
    with OpenDirectory.at(place.parent / "link") as directory:
        assert directory.file("file").content() == b"content"


def test_what_was_opened_is_what_is_read_whatever_its_names_lead_to_by_then(
    directory: OpenDirectory, place: Path, secret: Path
) -> None:
    file = directory.file("file")
    (place / "file").unlink()
    (place / "file").symlink_to(secret)
    place.rename(place.with_name("away"))
    place.symlink_to(secret.parent)
    assert directory.file("file") is file
    assert (file.size_bytes, file.content(), directory.names()) == (7, b"content", ["below", "file"])
    assert file.sha256() == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"


def test_a_file_outlives_its_directory_and_is_closed_with_the_last_who_has_it(place: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    with OpenDirectory.at(place) as directory:
        file = directory.file("file")
        directory.below("below")
    assert file.content() == b"content"
    del file
    assert descriptors() == before


@pytest.mark.parametrize("change", ["longer", "shorter", "other"])
def test_a_file_that_changes_is_noticed(directory: OpenDirectory, place: Path, change: str) -> None:
    file = directory.file("file")
    with (place / "file").open("r+b") as changed:
        changed.write(b"CONTENT and more" if change == "longer" else b"CONTENT")
        changed.truncate(3 if change == "shorter" else None)
    os.utime(place / "file", ns=(1, 1))
    with pytest.raises(DataError, match="changed while it was being read"):
        file.content()


def test_the_digests_are_of_files_and_a_link_among_them_is_refused(
    directory: OpenDirectory, place: Path, secret: Path
) -> None:
    assert directory.digests() == {"file": "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"}
    (place / "z").symlink_to(secret)
    with pytest.raises(DataError, match="z: is a symbolic link"):
        directory.digests()


def test_a_text_that_never_ends_is_not_read(directory: OpenDirectory, place: Path) -> None:
    with (place / "endless").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(DataError, match="1,000,000,000,000 bytes"):
        directory.file("endless").content()


@pytest.mark.parametrize("planted", ["name", ".name.tmp"])
@pytest.mark.parametrize("trick", ["link", "hard link", "FIFO"])
def test_what_is_written_goes_to_no_other_file(
    directory: OpenDirectory, place: Path, secret: Path, planted: str, trick: str
) -> None:
    TRICKS[trick][0](place / planted, secret)
    directory.write("name", b"ours")
    assert secret.read_text() == "s3cret"
    assert not (place / "name").is_symlink()
    assert (place / "name").read_bytes() == b"ours"
    assert directory.names() == ["below", "file", "name"]


def test_what_is_shared_is_made_once_and_added_to(directory: OpenDirectory, place: Path) -> None:
    for _ in range(2):
        with os.fdopen(directory.open_shared("starts"), "ab") as file:
            file.write(b".")
    assert (place / "starts").read_bytes() == b".."


def test_between_two_looks_of_many_threads_no_other_file_is_read(place: Path, secret: Path) -> None:
    """The file and a link to the secret change places as fast as they can."""
    over = threading.Event()

    def swap() -> None:
        number = 0
        while not over.is_set():
            new = place / f".{number % 2}"
            new.write_bytes(b"content") if number % 2 else new.symlink_to(secret)
            new.replace(place / "file")
            number += 1

    swapping = threading.Thread(target=swap)
    swapping.start()
    read, refused = set(), 0
    try:
        for _ in range(2000):
            with OpenDirectory.at(place) as directory:
                try:
                    read.add(directory.file("file").content())
                except DataError:
                    refused += 1
                except InputMissingError:  # it lost its last name between opening and looking
                    pass
    finally:
        over.set()
        swapping.join()
    assert read == {b"content"}
    assert refused


_WATCHED = """
import os, sys
from pathlib import Path
place, opened = sys.argv[1], []
def hear(event, given):
    if event == "open":
        opened.append(given)
sys.addaudithook(hear)
from tuner.cli import main
code = main(["push", *sys.argv[2:]])
names = {path.name for path in Path(place).rglob("*")}
loose = sorted({str(path) for path, _, flags in opened if isinstance(path, str) and os.path.basename(path) in names
                and not flags & os.O_NOFOLLOW and not flags & os.O_DIRECTORY})
print(code, len(opened) > 10, loose, sep="|")
"""


def test_a_push_opens_nothing_of_the_directory_in_a_way_that_follows_links(tmp_path: Path) -> None:
    """Whatever code a push goes through, now or later: CPython tells of every open."""
    from test_package import adapter

    made = adapter(tmp_path / "work" / "adapter")
    layout = f"oci:{tmp_path}/layout:1"
    command = [sys.executable, "-c", _WATCHED, str(tmp_path / "work"), str(made), layout]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0|True|[]", done.stderr


# What only who holds a credential runs on the files of others. image.py opens blobs, and has no Path to open.
CREDENTIAL_HOLDERS = {
    "registry/image.py": {"open"},
    "registry/artifacts.py": set(),
    "registry/push.py": set(),
    "registry/push_state.py": set(),
    "pipeline/package.py": {"OpenDirectory.at"},
    "pipeline/registry_checkpoints.py": {"OpenDirectory.at"},
    "pipeline/turns.py": {"OpenDirectory.at"},
}
BY_PATH = {
    "open",
    "at",
    "memmap",
    "copyfile",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "iterdir",
    "glob",
}


@pytest.mark.parametrize("name", CREDENTIAL_HOLDERS)
def test_no_module_of_a_credential_holder_opens_a_file_by_its_path(name: str) -> None:
    tree = ast.parse((Path(tuner.__file__).parent / name).read_text())
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    by_path = {call for call in calls if call.rpartition(".")[2] in BY_PATH}
    assert calls
    assert {call for call in by_path if not {call, call.rpartition(".")[2]} & CREDENTIAL_HOLDERS[name]} == set()


def test_a_file_that_a_user_names_may_be_a_link(place: Path) -> None:
    (place / "link").symlink_to("file")
    assert OpenFile.at(place / "link").content() == b"content"
    with pytest.raises(DataError, match="is a directory"):
        OpenFile.at(place / "below")
    with pytest.raises(InputMissingError, match="nowhere: not there"):
        OpenFile.at(place / "nowhere")


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "adapter_model.safetensors", "run.lock.json"])
@pytest.mark.parametrize("trick", ["link", "hard link", "FIFO"])
def test_a_push_of_a_directory_with_a_link_says_which_why_and_what_helps(
    tmp_path: Path, secret: Path, capsys: pytest.CaptureFixture[str], name: str, trick: str
) -> None:
    from test_package import adapter

    from tuner.cli import main

    made = adapter(tmp_path / "adapter")
    (made / name).unlink()
    TRICKS[trick][0](made / name, secret)
    assert main(["push", str(made), f"oci:{tmp_path}/layout:1"]) == 65
    said = capsys.readouterr().err
    assert f"{made / name}: {TRICKS[trick][1].replace(chr(92), '')}" in said
    assert "a link may lead to a secret" in said
    assert f"cp -rL {made} {made}-copy" in said
    assert not (tmp_path / "layout").exists()


def test_what_helps_does_help_with_the_links_of_a_cache(tmp_path: Path) -> None:
    """As the Hugging Face cache has its files."""
    from test_package import adapter

    from tuner.cli import main

    made = adapter(tmp_path / "adapter")
    (made / "tokenizer.json").rename(tmp_path / "blob")
    (made / "tokenizer.json").symlink_to("../blob")
    subprocess.run(["cp", "-rL", str(made), f"{made}-copy"], check=True)
    assert main(["push", f"{made}-copy", f"oci:{tmp_path}/layout:1"]) == 0
