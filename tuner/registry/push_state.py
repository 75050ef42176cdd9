"""A push that can be finished later: what it needs is written down before its first byte goes out.

    DIR/push-state.json   where to, how, and which digest must come out
    DIR/adapter-…/        the files: the image is made of them again, byte for byte

The registry itself knows which blobs it has, so nothing else needs to be kept.
"""

import contextlib
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tuner.errors import ConfigError, DataError, InputMissingError, InterruptedRunError, NotPushedError, TunerError
from tuner.open_files import OpenDirectory
from tuner.reference import ImageReference
from tuner.registry import client_for
from tuner.registry.artifacts import modelpack_artifact, provenance_artifact, read_lock
from tuner.registry.compression import Compression
from tuner.registry.image import Image
from tuner.registry.push import Pushed, push_image, push_referrer
from tuner.runspec import Contract, Network, Reference, Reporter
from tuner.signals import handling

if TYPE_CHECKING:
    from tuner.registry.transport import Patience

PUSH_STATE = "push-state.json"
PUSH_DEADLINE_S = 30 * 60.0  # on a box somebody waits


class PushOptions(Contract):
    """What a push does beside sending the image."""

    compression: Compression = "none"
    chunk_bytes: int | None = Field(default=None, ge=1, description="None: each blob in one request")
    deadline_s: float = Field(default=PUSH_DEADLINE_S, gt=0)
    mount_from: str | None = Field(default=None, description="a repository of the same registry with some of the blobs")
    modelpack: bool = Field(default=False, description="a ModelPack manifest beside the image")
    provenance: bool = Field(default=False, description="an unsigned in-toto statement as a referrer")
    runner_image: str | None = Field(default=None, description="for the statement: what trained")
    git_commit: str | None = Field(default=None, description="for the statement: of the code that trained")


class PushState(Contract):
    """push-state.json. No secret is in it: credentials are looked for again."""

    version: Literal[1] = 1
    adapter_dir: str = Field(description="relative to this file")
    reference: Reference
    digest: str = Field(description="the image's: the files must still give it")
    overwrite: bool = True
    network: Network = Network()
    options: PushOptions = PushOptions()
    previous_digest: str | None = Field(default=None, description="what the tag had when the push began")
    began: bool = Field(default=False, description="whether the registry has said what the tag had")
    pushed: bool = False

    def open_adapter(self, directory: OpenDirectory) -> OpenDirectory:
        """Where the files are, given the directory of this file: below it, as whoever can write there could name any
        other. Raises DataError and InputMissingError."""
        return directory.below(*Path(self.adapter_dir).parts)

    def check_image(self, image: Image, adapter: OpenDirectory) -> None:
        """Raises DataError when the files no longer give what was being pushed."""
        if image.digest != self.digest:
            raise DataError(
                f"{adapter.path}: its files have changed since the push began: they give {image.digest}, not "
                f"{self.digest}",
                hint=f"if that is meant: {shlex.join(['tuner', 'push', str(adapter.path), str(self.reference)])}",
            )


def load_push_state(directory: OpenDirectory) -> PushState:
    """What `tuner push --resume DIRECTORY` finishes. Raises InputMissingError when nothing was begun there."""
    if not directory.has(PUSH_STATE):
        raise InputMissingError(
            f"{directory.path / PUSH_STATE}: not there, so no push was begun from {directory.path}",
            hint="name the work directory of the run, or push an adapter directory: tuner push DIR IMAGE",
        )
    return PushState.load_from(directory, PUSH_STATE)


def push_resumably(
    image: Image,
    reference: ImageReference,
    *,
    adapter: OpenDirectory,
    directory: OpenDirectory,
    overwrite: bool = True,
    network: Network,
    docker_configs: Sequence[str],
    options: PushOptions,
    reporter: Reporter,
    patience: "Patience | None" = None,
) -> Pushed:
    """Pushes; whatever happens meanwhile leaves `directory` so that `tuner push --resume` finishes.

    `image` is that of `adapter`. Raises NotPushedError with that command, and InterruptedRunError for SIGTERM and
    SIGINT, after the registry was asked to forget what is half sent.
    """
    state = PushState(
        adapter_dir=os.path.relpath(adapter.path.absolute(), directory.path.absolute()),
        reference=reference,
        digest=image.digest,
        overwrite=overwrite,
        network=network,
        options=options,
    )
    state = _take_up(state, directory)
    _save(state, directory, reporter)
    try:
        with (
            interrupted_by_signals(),
            client_for(
                reference,
                network,
                docker_configs,
                chunk_bytes=options.chunk_bytes,
                patience=patience,
                reporter=reporter,
            ) as client,
        ):
            client.finish_within(options.deadline_s)

            def on_previous(digest: str | None) -> None:
                nonlocal state
                if not state.began:
                    state = state.model_copy(update={"previous_digest": digest, "began": True})
                    _save(state, directory, reporter)
                elif digest not in (state.previous_digest, image.digest):
                    reporter.warn(
                        f"{reference}: somebody else has moved the tag since the push began, "
                        f"from {state.previous_digest or 'nothing'} to {digest or 'nothing'}"
                    )

            pushed = push_image(
                image,
                reference,
                client,
                overwrite=overwrite,
                mount_from=options.mount_from,
                on_previous=on_previous,
                reporter=reporter,
            )
            if options.modelpack:
                push_referrer(modelpack_artifact(image), client, tag=f"{reference.tag}-modelpack")
            if options.provenance:
                statement = provenance_artifact(
                    image,
                    reference.name,
                    read_lock(adapter),
                    runner_image=options.runner_image,
                    git_commit=options.git_commit,
                )
                push_referrer(statement, client)
    except InterruptedRunError:
        raise
    except TunerError as error:
        command = shlex.join(["tuner", "push", "--resume", str(directory.path)])
        advice = f"; {error.hint}" if error.hint else ""
        raise NotPushedError(
            f"trained, but not pushed: {error.message}",
            hint=f"the adapter is kept in {adapter.path}; finish with: {command}{advice}",
        ) from error
    _save(state.model_copy(update={"pushed": True}), directory, reporter)
    return pushed


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """In here SIGTERM and SIGINT raise InterruptedRunError, so that what was begun is taken back; the second kills."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        raise InterruptedRunError(
            f"stopped by {signal.Signals(number).name} while pushing; what has arrived is not sent again"
        )

    with handling(stop):
        yield


def _take_up(state: PushState, directory: OpenDirectory) -> PushState:
    """The same, with what an unfinished push of the same image to the same place already knew."""
    try:
        before = PushState.load_from(directory, PUSH_STATE)
    except (InputMissingError, ConfigError, DataError):  # what is no plain file is replaced by one
        return state
    if before.pushed or (before.reference, before.digest) != (state.reference, state.digest):
        return state
    return state.model_copy(update={"previous_digest": before.previous_digest, "began": before.began})


def _save(state: PushState, directory: OpenDirectory, reporter: Reporter) -> None:
    """A full disk must not keep an adapter from leaving it."""
    try:
        state.save_in(directory, PUSH_STATE)
    except OSError as error:
        reporter.warn(
            f"{directory.path / PUSH_STATE}: can not be written: {error.strerror}; the push goes on without it"
        )
