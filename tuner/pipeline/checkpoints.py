"""Recovery checkpoints on disk: sealed when whole, of one run each, and what a full disk does to them."""

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tuner.durable import make_directories, sync_directory, sync_tree
from tuner.errors import ConfigError, InputMissingError, cut
from tuner.open_files import OpenDirectory, OpenFile
from tuner.pipeline.adapter import file_digests, write_json
from tuner.runspec import Reporter, RunSpec

CHECKPOINTS = "checkpoints"  # in the work directory
LEVERS = "levers.json"  # beside the checkpoints: what was decided when the run began
SEAL = "seal.json"  # the last file of a checkpoint: what the others must be
_RUN = "run.json"  # whose they are
_SHOWN_CHANGES = 5


def seal(checkpoint: Path, *, unlogged_loss: float, last_logged_step: int, evaluation_due: bool = False) -> None:
    """Put the checkpoint on the disk for good, then say in its last file what it consists of.

    `evaluation_due`: its step is to be evaluated before the next one; a run was stopped in the middle of that.
    """
    sync_tree(checkpoint)
    sync_directory(checkpoint.parent)
    contents = {
        "files": file_digests(checkpoint),
        "unlogged_loss": unlogged_loss,
        "last_logged_step": last_logged_step,
        "evaluation_due": evaluation_due,
    }
    write_json(checkpoint / SEAL, contents)


def read_seal(checkpoint: Path) -> dict[str, Any]:
    """What seal() has written. Raises OSError and ValueError where there is none."""
    contents: dict[str, Any] = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    return contents


def is_whole(checkpoint: Path) -> bool:
    """Whether every file is there as it was sealed."""
    try:
        sealed = read_seal(checkpoint)["files"]
    except (OSError, ValueError):
        return False
    found = file_digests(checkpoint)
    del found[SEAL]
    return bool(found == sealed)


def sealed_files(checkpoint: OpenDirectory) -> dict[str, OpenFile] | None:
    """Name → file of a whole checkpoint, its seal with them, held open as they were sealed; None for one not whole.

    For who may not trust whoever wrote it: raises DataError when one of them is no plain file.
    """
    try:
        sealed = json.loads(checkpoint.file(SEAL).content())["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    found = checkpoint.digests()
    del found[SEAL]
    return {name: checkpoint.file(name) for name in (*found, SEAL)} if found == sealed else None


def by_step(directory: Path) -> dict[int, Path]:
    """Step → checkpoint, whole or not, ascending."""
    return dict(sorted((int(path.name.rpartition("-")[2]), path) for path in directory.glob("checkpoint-*")))


def newest_checkpoint(directory: Path, reporter: Reporter) -> Path | None:
    """The newest whole checkpoint. Damaged ones that are newer are removed, so that they are written anew."""
    for step, path in reversed(by_step(directory).items()):
        if is_whole(path):
            return path
        reporter.warn(f"the checkpoint of step {step} was not written whole: going back to the one before")
        shutil.rmtree(path)
    return None


# ── a full disk ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """What is written in the block is `path`, which is taken away again when the disk does not hold it: what was there
    before is what to go on from. Raises ConfigError, as for any other full disk."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        kept = [step for step, checkpoint in by_step(path.parent).items() if is_whole(checkpoint)]
        raise ConfigError(
            f"{path.parent}: the disk is full, so {path.name} could not be written; "
            + (f"the checkpoint of step {kept[-1]} is kept" if kept else "there is none before it"),
            hint="free some space; the same command goes on from what is kept",
        ) from error


def _is_full(error: Exception) -> bool:
    """Python says so itself; safetensors in words of Rust; torch only that its writer failed."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    said = str(error)
    return (
        any(f"(os error {number})" in said for number in (errno.ENOSPC, errno.EDQUOT))
        or "PytorchStreamWriter" in said
        or "inline_container" in said
    )


# ── whose they are ───────────────────────────────────────────────────────────────────────────────────────────────────


def begin(directory: Path, spec: RunSpec) -> None:
    """Say whose checkpoints come here."""
    make_directories(directory)
    if not (directory / _RUN).is_file():
        spec.save(directory / _RUN)


def check_unfinished(spec: RunSpec, work_dir: Path) -> None:
    """Raises ConfigError when another run than this was interrupted in this work directory, with what has changed
    since: who changed a setting by mistake would lose hours without a word.

    In a pod each run has a work directory of its own.
    """
    for directory in sorted((work_dir / CHECKPOINTS).glob("*")):
        steps = list(by_step(directory))
        if not steps:
            continue
        try:
            before = RunSpec.load(directory / _RUN)
        except (ConfigError, InputMissingError):  # of an older version of tuner, which named nobody
            continue
        if before.digest != spec.digest:
            raise ConfigError(
                f"{directory}: has a checkpoint of run {before.digest[7:19]} after step {steps[-1]}, and this is run "
                f"{spec.digest[7:19]}: {changes(before, spec)}",
                hint=f"to go on with that run undo the change; to begin anew delete {directory} or give another "
                "--work-dir",
            )


def changes(before: RunSpec, now: RunSpec) -> str:
    """`LoraConfig.r 16 → 32, sources`: what makes them two runs."""
    said = []
    sections_before = before.training.sections()
    for section, settings in now.training.sections().items():
        for key in sorted({*settings, *sections_before[section]}):
            old, new = sections_before[section].get(key), settings.get(key)
            if old != new:
                said.append(f"{section}.{key} {_short(old)} → {_short(new)}")
    old_inputs, new_inputs = before.inputs(), now.inputs()
    said += [name for name in new_inputs if name != "training" and old_inputs.get(name) != new_inputs[name]]
    more = len(said) - _SHOWN_CHANGES
    return ", ".join(said[:_SHOWN_CHANGES]) + (f" and {more} more" if more > 0 else "") or "another version of tuner"


def _short(value: object) -> str:
    text = "unset" if value is None else " ".join(str(value).split())
    return cut(text, 30)
