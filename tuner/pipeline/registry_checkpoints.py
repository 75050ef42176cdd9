"""A run's newest checkpoint, in the registry that its adapter goes to: what is on a machine's own disk dies with it.

    trainer     writes and seals checkpoint-N ──► pusher    packages it, and moves the tag checkpoint-RUN
    preflight   of the pod that replaces it: pulls the tag ──► trainer goes on from there

In a pod the trainer has no credential and knows nothing of it; on a box a thread beside it is the pusher. What is
pulled is taken for what its seal says.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tuner.durable import make_directories, move
from tuner.errors import DataError, InputMissingError, TunerError
from tuner.open_files import OpenDirectory, OpenFile
from tuner.pipeline.checkpoints import CHECKPOINTS, LEVERS, SEAL, is_whole, sealed_files
from tuner.pipeline.download import format_bytes
from tuner.reference import ImageReference
from tuner.registry import client_for
from tuner.registry.image import build_image
from tuner.registry.pull import pull_image
from tuner.registry.push import push_image
from tuner.runspec import ImageDestination, Reporter, RunSpec, Secrets, Silent

LAST_S = 25.0  # for the last one, of the grace that the trainer has left
_LOOK_EACH_S, _AGAIN_AFTER_S, _WITHIN_S = 5.0, 60.0, 600.0
_FOLDER, _STEP, _RUN = "tuner.checkpoint.folder", "tuner.checkpoint.step", "tuner.run-digest"


def checkpoint_reference(spec: RunSpec) -> ImageReference:
    """`REGISTRY/REPOSITORY:checkpoint-RUN`: a tag for each run, in the repository that its credential may push to."""
    if not isinstance(spec.destination, ImageDestination):
        raise TypeError("only an image has a registry beside it")
    reference = spec.destination.reference
    return ImageReference(
        reference.registry, reference.repository, f"checkpoint-{spec.digest.removeprefix('sha256:')[:12]}"
    )


@dataclass
class Uploads:
    """The pusher's part. Whatever fails is a warning: training goes on, and the next checkpoint is tried."""

    spec: RunSpec
    open_work_dir: Callable[[], OpenDirectory]
    secrets: Callable[[], Secrets]
    reporter: Reporter
    _uploaded: tuple[int, str] | None = None
    _next_look: float = 0.0
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock)

    def look(self) -> None:
        """Upload the newest checkpoint that is not there yet; does nothing when it has just looked."""
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK_EACH_S
        if not self._upload(_WITHIN_S):
            self._next_look = time.monotonic() + _AGAIN_AFTER_S

    def finish(self) -> None:
        """The last one, in the seconds that are left."""
        self._upload(LAST_S)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Uploads in a thread of its own while the block trains, and the last one when it is interrupted."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_LOOK_EACH_S / 5):
                self.look()

        thread = threading.Thread(target=watch, name="checkpoints", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            over.set()
            thread.join(LAST_S)
            self.finish()
            raise
        over.set()  # the checkpoints of a finished training are gone: what is on its way is of no use

    def forget(self) -> None:
        """The adapter is pushed: its checkpoint is of no use any more."""
        reference = checkpoint_reference(self.spec)
        try:
            with client_for(
                reference, self.spec.network, self.secrets().push_docker_configs(), reporter=Silent()
            ) as client:
                client.finish_within(LAST_S)
                digest = client.manifest_digest(str(reference.tag))
                if digest is None or client.delete_manifest(digest):
                    return
        except TunerError:
            pass
        self.reporter.note(f"{reference} is of no use any more; the registry lets nobody delete it with this Secret")

    def _upload(self, within_s: float) -> bool:
        """Whether all is there that could be."""
        with self._one_at_a_time:
            return self._upload_newest(within_s)

    def _upload_newest(self, within_s: float) -> bool:
        try:
            with self.open_work_dir() as work:
                newest = _newest_sealed(work)
                if newest is None or newest == self._uploaded:
                    return True
                files = _files_of(*newest, work)  # open from here on: the trainer may take its own away at any time
        except InputMissingError:  # there is none yet, or it was taken away meanwhile: then there is a newer one
            return True
        except DataError as error:
            self.reporter.warn(f"no checkpoint is kept in the registry: {error}")
            return False
        if files is None:
            return True
        step, folder = newest
        began = time.monotonic()
        try:
            sent = self._push(step, folder, files, within_s)
        except (TunerError, OSError) as error:
            self.reporter.warn(f"checkpoint-{step} could not be kept in the registry: {error}")
            return False
        self._uploaded = newest
        self.reporter.note(
            f"checkpoint-{step} is in the registry: {format_bytes(sent)} in {time.monotonic() - began:.0f} s"
        )
        return True

    def _push(self, step: int, folder: str, files: Mapping[str, OpenFile], within_s: float) -> int:
        about = {_FOLDER: folder, _STEP: str(step), _RUN: self.spec.digest}
        reference = checkpoint_reference(self.spec)
        image = build_image(files, annotations=about)
        with client_for(
            reference, self.spec.network, self.secrets().push_docker_configs(), reporter=Silent()
        ) as client:
            client.finish_within(within_s)
            return push_image(image, reference, client, reporter=Silent()).bytes_sent


def _newest_sealed(work: OpenDirectory) -> tuple[int, str] | None:
    """Its step, and the folder that it is in."""
    if not work.has(CHECKPOINTS):
        return None
    sealed = []
    with work.below(CHECKPOINTS) as checkpoints:
        for folder in checkpoints.directories():
            with checkpoints.below(folder) as steps:
                for name in steps.directories():
                    found = re.fullmatch(r"checkpoint-(\d+)", name)
                    with steps.below(name) as checkpoint:
                        if found and checkpoint.has(SEAL):
                            sealed.append((int(found[1]), folder))
    return max(sealed, default=None)


def _files_of(step: int, folder: str, work: OpenDirectory) -> dict[str, OpenFile] | None:
    """Name in the image → file; None when the checkpoint is not whole."""
    name = f"checkpoint-{step}"
    with work.below(CHECKPOINTS, folder) as steps, steps.below(name) as checkpoint:
        sealed = sealed_files(checkpoint)
        decided = {LEVERS: steps.file(LEVERS)} if steps.has(LEVERS) else {}
    return sealed and {f"{name}/{each}": file for each, file in sealed.items()} | decided


def restore(spec: RunSpec, secrets: Secrets, work_dir: Path, reporter: Reporter) -> int | None:
    """Put the registry's checkpoint where the trainer looks for one; its step, or None where there is none.

    One that is there already is newer, or the same. A damaged one is as good as none. Raises what a registry says that
    is down or refuses: to begin anew for that would cost hours.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    with OpenDirectory.at(work_dir) as work:
        if _newest_sealed(work):
            return None
    reference = checkpoint_reference(spec)
    fetched = work_dir / ".restored"
    shutil.rmtree(fetched, ignore_errors=True)
    make_directories(work_dir)
    try:
        with client_for(reference, spec.network, secrets.push_docker_configs(), reporter=reporter) as client:
            client.finish_within(_WITHIN_S)
            if client.manifest_digest(str(reference.tag)) is None:
                return None
            pulled = pull_image(reference, fetched, client, reporter=reporter)
        folder, step = pulled.annotations.get(_FOLDER, ""), pulled.annotations.get(_STEP, "")
        checkpoint = fetched / f"checkpoint-{step}"
        named = re.fullmatch(r"[0-9a-f]{12}(-\d{1,3})?", folder) and step.isdecimal()
        if pulled.annotations.get(_RUN) != spec.digest or not named or not is_whole(checkpoint):
            raise DataError(f"{reference}: not a whole checkpoint of this run")
        target = work_dir / CHECKPOINTS / folder
        make_directories(target)
        for path in (fetched / LEVERS, checkpoint):
            if path.exists():
                move(path, target / path.name)
    except (DataError, InputMissingError) as error:
        reporter.warn(f"{error.message}: beginning anew")
        return None
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
    reporter.note(f"the checkpoint of step {step} is back from the registry")
    return int(step)
