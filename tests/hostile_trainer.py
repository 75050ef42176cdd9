"""A trainer that wants the pusher's Secret in what is pushed. Runs in tests, and as the trainer's container of a pod:

python tests/hostile_trainer.py link|race|fifo|directory
"""

import json
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from tuner import pod
from tuner.pipeline.checkpoints import CHECKPOINTS, LEVERS, seal
from tuner.pipeline.run import FETCHED, TRAINED, inputs_digest
from tuner.pipeline.turns import Finished, Turns
from tuner.runspec import Fetched, RunSpec, Trained

FOLDER = "0123456789ab"
CARD, WEIGHTS = "README.md", "adapter_model.safetensors"
# What of an adapter, a checkpoint and a work directory a pusher has reason to open.
OF_ADAPTER = (CARD, WEIGHTS, "adapter_config.json", "run.lock.json", "metrics.jsonl", "tokenizer.json")
OF_CHECKPOINT = ("optimizer.pt", WEIGHTS, "seal.json")
OF_WORK = (TRAINED, FETCHED, "push-state.json", ".push-state.json.tmp")


def leave_adapter(spec: RunSpec, work_dir: Path) -> Trained:
    """An adapter as a trainer leaves it, small and whole."""
    from tuner.pipeline.adapter import file_digests

    inputs = inputs_digest(Fetched.load(work_dir / FETCHED))
    adapter = work_dir / f"adapter-{inputs[:12]}"
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir(parents=True)
    (adapter / CARD).write_text("# Card\n")
    (adapter / "metrics.jsonl").write_text("")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "adapter_config.json").write_text('{"r": 16, "lora_alpha": 32}')
    lock = {"name": spec.name, "preset": "phi-3", "method": "qlora", "smoke": True, "run_digest": spec.digest}
    figures = {"eval_loss_after": None}
    (adapter / "run.lock.json").write_text(json.dumps({**lock, "base_model": None, "datasets": [], "figures": figures}))
    ones = np.full(8, 0x3F80, np.uint16).tobytes()
    entry = {"dtype": "BF16", "shape": [8], "data_offsets": [0, len(ones)]}
    header = json.dumps({"a.lora_B.weight": entry}).encode()
    (adapter / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + ones)
    trained = Trained(
        run_digest=spec.digest,
        inputs_digest=inputs,
        adapter_dir=adapter.name,
        files=file_digests(adapter),
        steps=1,
        epochs=1,
        examples=1,
        tokens=1,
        train_seconds=1,
        first_train_loss=1,
        last_train_loss=1,
        eval_loss_before=None,
        eval_loss_after=None,
        train_rows=1,
        eval_rows=0,
        kept_step=1,
        modules={},
        trainable_parameters=1,
        total_parameters=1,
    )
    trained.save(work_dir / TRAINED)
    return trained


def leave_checkpoint(work_dir: Path) -> Path:
    made = work_dir / CHECKPOINTS / FOLDER / "checkpoint-5"
    made.mkdir(parents=True)
    (made.parent / LEVERS).write_text("{}")
    (made / "optimizer.pt").write_bytes(bytes(100))
    (made / WEIGHTS).write_bytes(b"weights")
    seal(made, unlogged_loss=0.0, last_logged_step=5)
    return made


def finish(trained: Trained, directory: Path = pod.RUN_DIR) -> None:
    Turns(directory).finish(Finished(run_digest=trained.run_digest, inputs_digest=trained.inputs_digest))


# ── tricks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tricks:
    """What can be planted on a volume so that `secret` is read in its place."""

    def __init__(self, work_dir: Path, adapter: Path, run_dir: Path, secret: Path, chance: random.Random) -> None:
        checkpoint = work_dir / CHECKPOINTS / FOLDER / "checkpoint-5"
        self._secret, self._chance = secret, chance
        self._files = [
            *(adapter / name for name in OF_ADAPTER),
            *(checkpoint / name for name in OF_CHECKPOINT),
            checkpoint.parent / LEVERS,
            *(work_dir / name for name in OF_WORK),
            *(run_dir / name for name in (pod.TRAINED, pod.PUSH_STARTS, pod.PUSHED)),
        ]
        self._directories = [adapter, checkpoint, checkpoint.parent, work_dir / CHECKPOINTS, work_dir, work_dir.parent]
        self._decoys = work_dir.parent.parent / ".decoys"

    def play(self) -> str:
        """One of them, somewhere; says which."""
        trick: Callable[[], str] = self._chance.choice(
            [self._link, self._link, self._hard_link, self._fifo, self._swap]
        )
        with suppress(OSError):  # another one has moved the place away
            return trick()
        return "nothing"

    def _link(self) -> str:
        path = self._chance.choice(self._files)
        _instead(path, lambda new: new.symlink_to(self._secret))
        return f"link {path.name}"

    def _hard_link(self) -> str:
        path = self._chance.choice(self._files)
        _instead(path, lambda new: new.hardlink_to(self._secret))
        return f"hard link {path.name}"

    def _fifo(self) -> str:
        path = self._chance.choice(self._files)
        _instead(path, os.mkfifo)
        return f"FIFO {path.name}"

    def _swap(self) -> str:
        """A directory becomes a link to one of the same names, in which all files, or only one, are the secret."""
        path = self._chance.choice(self._directories)
        decoy = self._decoys / f"{path.name}-{self._chance.randrange(10**9)}"
        shutil.copytree(path, decoy, symlinks=True)
        files = sorted(each for each in decoy.rglob("*") if each.is_file() and not each.is_symlink())
        for each in files if self._chance.random() < 0.5 else self._chance.sample(files, min(1, len(files))):
            each.unlink()
            each.symlink_to(self._secret)
        _instead(path, lambda new: new.symlink_to(decoy))
        return f"directory {path.name}"


def _instead(path: Path, make: Callable[[Path], object]) -> None:
    """At once, where the kernel can: a reader finds the old or the new one."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    make(new)
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f".{path.name}.old-{random.randrange(10**9)}"))
    new.replace(path)


# ── as a container ───────────────────────────────────────────────────────────────────────────────────────────────────


def main(attack: str) -> None:
    spec = RunSpec.load(pod.SPEC_FILE)
    work_dir, secret = pod.work_dir(spec), pod.PUSH_SECRET_DIR / ".dockerconfigjson"
    trained = leave_adapter(spec, work_dir)
    adapter = work_dir / trained.adapter_dir
    card = adapter / CARD
    match attack:
        case "link":
            card.unlink()
            card.symlink_to(secret)
        case "fifo":
            card.unlink()
            os.mkfifo(card)
        case "directory":  # everything is read through a link, and one file of it is the secret's
            elsewhere = pod.results_dir(spec) / "elsewhere"
            work_dir.parent.rename(elsewhere)
            work_dir.parent.symlink_to(elsewhere)
            there = elsewhere / work_dir.name / trained.adapter_dir / CARD
            there.unlink()
            there.symlink_to(secret)
        case "race":  # the card is itself and the secret by turns, for as long as the pusher works
            threading.Thread(target=_race, args=(card, secret), daemon=True).start()
    finish(trained)
    with suppress(Exception):
        Turns().wait_for_push()


def _race(card: Path, secret: Path) -> None:
    good, bad = card.with_name(".good"), card.with_name(".bad")
    content = card.read_bytes()
    while True:
        good.write_bytes(content)
        good.replace(card)
        bad.symlink_to(secret)
        bad.replace(card)


if __name__ == "__main__":
    main(sys.argv[1])
