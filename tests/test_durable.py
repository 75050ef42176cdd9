"""What is written outlives a power cut at any moment: whole, or as it was before."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from power_cuts import Disk, Seen

from tuner.durable import make_directories, move, remove, replacing, sync_directory, sync_tree, write_text
from tuner.open_files import OpenFile
from tuner.pipeline.checkpoints import is_whole, seal
from tuner.reference import LayoutReference
from tuner.registry.image import build_image
from tuner.registry.layout import layout_digest, write_layout
from tuner.registry.pull import pull_image
from tuner.registry.push_state import PUSH_STATE, PushState
from tuner.runspec import Contract, Silent


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "disk"
    directory.mkdir()
    return directory


def seen(root: Path, act: Callable[[], object], look: Callable[[Path], Seen]) -> tuple[list[Seen], list[Seen]]:
    """What `look` sees of what power cuts leave of the root while `act` runs, and after it has returned."""
    with Disk(root, root.parent / "store") as disk:
        act()
    found = disk.after_power_cuts(look, root.parent)
    return [value for _, value in found], [value for cut, value in found if cut.is_last]


def read(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


# ── the functions themselves ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_written_file_is_the_old_one_or_the_new_one_and_afterwards_the_new_one(root: Path) -> None:
    (root / "file").write_text("old")
    during, after = seen(root, lambda: write_text(root / "file", "new"), lambda left: read(left / "file"))
    assert (set(during), set(after)) == ({"old", "new"}, {"new"})


def test_what_power_cuts_do_to_a_file_that_is_only_renamed_is_seen(root: Path) -> None:
    """The disk of these tests can lose something: all they say rests on that."""

    def careless() -> None:
        (root / "new").write_text("new")
        (root / "new").replace(root / "file")

    (root / "file").write_text("old")
    assert set(seen(root, careless, lambda left: read(left / "file"))[0]) == {"old", "new", ""}


def test_a_writer_that_raises_leaves_the_file_and_nothing_beside_it(root: Path) -> None:
    (root / "file").write_text("old")

    def fail() -> None:
        with replacing(root / "file") as file:
            file.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert [path.name for path in root.iterdir()] == ["file"]
    assert read(root / "file") == "old"


def test_what_a_killed_writer_left_is_no_obstacle_and_a_link_in_its_place_is_not_followed(root: Path) -> None:
    (root / "elsewhere").write_text("mine")
    (root / ".file.tmp").symlink_to(root / "elsewhere")
    write_text(root / "file", "new")
    assert (read(root / "file"), read(root / "elsewhere")) == ("new", "mine")
    assert not (root / "file").is_symlink()


def test_a_removed_file_does_not_come_back(root: Path) -> None:
    (root / "file").write_text("old")
    remove(root / "none")
    assert set(seen(root, lambda: remove(root / "file"), lambda left: read(left / "file"))[1]) == {None}


def test_a_moved_directory_has_all_that_is_in_it(root: Path) -> None:
    def make() -> None:
        make_directories(root / "a/b")
        (root / "a/b/deep").mkdir()
        (root / "a/b/deep/file").write_text("contents")
        (root / "a/b/link").symlink_to("/nowhere")
        make_directories(root / "c")
        move(root / "a/b", root / "c/d")

    def look(left: Path) -> tuple[bool, str | None, bool]:
        return (left / "c/d").exists(), read(left / "c/d/deep/file"), (left / "a/b").exists()

    during, after = seen(root, make, look)
    assert {contents for is_there, contents, _ in during if is_there} == {"contents"}
    assert set(after) == {(True, "contents", False)}


def test_directories_are_made_with_those_above_them_and_what_is_a_file_is_said(root: Path) -> None:
    assert all(seen(root, lambda: make_directories(root / "a/b/c"), lambda left: (left / "a/b/c").is_dir())[1])
    make_directories(root / "a/b/c")
    (root / "file").touch()
    for path in (root / "file", root / "file/below"):
        with pytest.raises(FileExistsError):
            make_directories(path)


def test_a_relative_directory_is_made_where_the_process_stands(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    make_directories(Path("a/b"))
    assert (root / "a/b").is_dir()


@pytest.mark.parametrize("number", ["EINVAL", "EIO"])
def test_a_file_system_without_fsync_of_directories_is_taken_as_it_is_and_a_broken_one_is_not(
    number: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def refuse(descriptor: int) -> None:
        raise OSError(getattr(errno, number), "no")

    monkeypatch.setattr(os, "fsync", refuse)
    if number == "EINVAL":
        sync_directory(root)
    else:
        with pytest.raises(OSError, match="no"):
            sync_directory(root)
    (root / "file").touch()
    with pytest.raises(OSError, match="no"):
        sync_tree(root / "file")


# ── those who write with them ────────────────────────────────────────────────────────────────────────────────────────


class Word(Contract):
    said: str


def test_a_contract_is_the_old_one_or_the_new_one(root: Path) -> None:
    Word(said="old").save(root / "word.json")
    during, after = seen(
        root, lambda: Word(said="new").save(root / "word.json"), lambda left: Word.load(left / "word.json").said
    )
    assert (set(during), set(after)) == ({"old", "new"}, {"new"})


def test_a_push_state_is_there_once_it_was_saved(root: Path) -> None:
    state = PushState(adapter_dir="adapter", reference="registry.example.com/a:1", digest="sha256:0")
    _, after = seen(root, lambda: state.save(root / PUSH_STATE), lambda left: read(left / PUSH_STATE))
    assert {PushState.model_validate_json(text or "") for text in after} == {state}


def test_a_sealed_checkpoint_is_there_and_whole(root: Path) -> None:
    def save() -> None:
        begin = root / "checkpoints/of-a-run"
        make_directories(begin)
        (begin / "checkpoint-3").mkdir()
        for name in ("optimizer.pt", "trainer_state.json"):
            (begin / "checkpoint-3" / name).write_text(name)
        seal(begin / "checkpoint-3", unlogged_loss=0.0, last_logged_step=3)

    during, after = seen(root, save, lambda left: is_whole(left / "checkpoints/of-a-run/checkpoint-3"))
    assert (set(during), set(after)) == ({False, True}, {True})


def adapter(directory: Path) -> dict[str, OpenFile]:
    directory.mkdir()
    files = {"adapter_config.json": json.dumps({"r": 16}), "adapter_model.safetensors": "weights" * 5000}
    for name, text in files.items():
        (directory / name).write_text(text)
    return {name: OpenFile.at(directory / name) for name in files}


def test_a_layout_whose_tag_is_there_has_the_whole_image_and_can_be_written_again_after_any_power_cut(
    root: Path, tmp_path: Path
) -> None:
    image = build_image(adapter(tmp_path / "adapter"))
    reference = LayoutReference(root / "new/layout", "v1")
    pulled = tmp_path / "pulled"

    def look(left: Path) -> bool:
        there = LayoutReference(left / "new/layout", "v1")
        is_tagged = layout_digest(there) is not None
        if is_tagged:
            pull_image(there, pulled, reporter=Silent())
            shutil.rmtree(pulled)
        write_layout(image, there, on_progress=lambda done: None)
        pull_image(there, pulled, reporter=Silent())
        shutil.rmtree(pulled)
        return is_tagged

    during, after = seen(root, lambda: write_layout(image, reference, on_progress=lambda done: None), look)
    assert set(during) == {False, True}
    assert all(after)


def test_what_is_pulled_is_whole_or_not_there(root: Path, tmp_path: Path) -> None:
    files = adapter(tmp_path / "adapter")
    image = build_image(files | {"deep/er/notes.txt": files["adapter_config.json"]})
    reference = LayoutReference(tmp_path / "layout", "v1")
    write_layout(image, reference, on_progress=lambda done: None)
    during, after = seen(
        root,
        lambda: pull_image(reference, root / "to/pulled", reporter=Silent()),
        lambda left: _files(left / "to/pulled") if (left / "to/pulled").exists() else None,
    )
    whole = _files(root / "to/pulled")
    assert len(whole) == 3
    assert all(left in (None, whole) for left in during)
    assert all(left == whole for left in after)


def _files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
