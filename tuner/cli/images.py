"""`tuner push`, `tuner verify`, `tuner pull` and `tuner merge`."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli import completion
from tuner.cli.common import check_digest_file, open_talk, print_result, push_options, registry_network
from tuner.cli.flags import command, other, registry
from tuner.cli.options import BaseModel, LoginFlags, NoOverwrite, PushFlags
from tuner.errors import DataError, UsageError

if TYPE_CHECKING:
    from tuner.reference import ImageReference, LayoutReference
    from tuner.registry.push import Pushed
    from tuner.talk import Talk


Image = Annotated[str, typer.Argument(metavar="IMAGE", help="registry/name:tag or oci:DIR:TAG")]


@command(
    "push",
    example="tuner push tuner-work/my-run/adapter-0123456789ab myregistry.azurecr.io/adapter:1",
)
def push(
    directory: Annotated[
        Path | None,
        typer.Argument(metavar="DIR", help="an adapter directory", autocompletion=completion.adapters),
    ],
    image: Annotated[str | None, typer.Argument(metavar="IMAGE", help="registry/name:tag or oci:DIR:TAG")],
    resume: Annotated[
        Path | None,
        registry(
            "--resume",
            metavar="DIR",
            help="finish the push that push-state.json there began",
            autocompletion=completion.work_directories,
        ),
    ],
    login: LoginFlags,
    no_overwrite: NoOverwrite,
    flags: PushFlags,
) -> None:
    """Package an adapter directory and push it; equal files give the digest that the run would have pushed."""
    from tuner.open_files import OpenDirectory
    from tuner.pipeline.package import changed_files, open_adapter
    from tuner.pipeline.run import deliver, resume_push
    from tuner.records import LOCK
    from tuner.request import docker_configs_for, parse_output
    from tuner.runspec import DirectoryDestination

    if resume:
        if directory or image:
            raise UsageError("--resume DIR knows what to push and where", hint=f"tuner push --resume {resume}")
        with open_talk() as talk, OpenDirectory.at(resume) as work:
            pushed = resume_push(work, docker_configs_for(login.docker_config, os.environ), talk)
            _say_pushed(pushed, talk)
        print_result(pushed.reference, flags.digest_file, None)
        return
    if directory is None or image is None:
        raise UsageError("give DIR and IMAGE, or --resume DIR", hint="tuner push ./adapter myregistry.azurecr.io/a:1")
    destination = parse_output(image, overwrite=not no_overwrite)
    if isinstance(destination, DirectoryDestination):
        raise UsageError(f"{image} names no registry", hint="registry/name:tag, or oci:DIR:TAG for a layout on disk")
    check_digest_file(flags.digest_file, destination)
    with open_talk() as talk, open_adapter(directory) as adapter, OpenDirectory.at(adapter.path.parent) as beside:
        credentials = docker_configs_for(login.docker_config, os.environ)
        network = registry_network(login)
        pushed = deliver(adapter, beside, destination, network, credentials, talk, options=push_options(flags))
        if changed := changed_files(adapter):
            talk.warn(
                f"{', '.join(changed)}: not as {LOCK} says, so `tuner verify` refuses the image; without that file it "
                "is an adapter of your own"
            )
        _say_pushed(pushed, talk)
    print_result(pushed.reference, flags.digest_file, None)


def _say_pushed(pushed: "Pushed", talk: "Talk") -> None:
    talk.note(f"pushed {pushed.bytes_sent:,} bytes" + (", the rest was there" if pushed.blobs_skipped else ""))


@command(
    "verify",
    example="tuner verify myregistry.azurecr.io/adapter:1",
)
def verify(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE|DIR",
            help="registry/name:tag, oci:DIR:TAG or a directory",
            autocompletion=completion.adapters,
        ),
    ],
    load: Annotated[
        Path | None, registry("--load", metavar="DIR", help="load it with PEFT on the base model in DIR too")
    ],
    allow_unlocked: Annotated[
        bool, other("--allow-unlocked", help="pass what has no run.lock.json, or one without digests of the files")
    ],
    login: LoginFlags,
) -> None:
    """Check an adapter: every file is the one that its run left, they agree with each other, the weights are sound."""
    from tempfile import TemporaryDirectory

    from tuner.content import check_model_directory
    from tuner.pipeline.adapter import check_weights
    from tuner.reference import LayoutReference, names_registry
    from tuner.registry import client_for
    from tuner.registry.verify import verify_directory, verify_image
    from tuner.request import docker_configs_for

    is_image = image.startswith("oci:") or names_registry(image) or not Path(image).is_dir()
    reference = _image_argument(image) if is_image else None
    if load:
        load = load.expanduser()
        check_model_directory(load, f"--load {load}", trust_remote_code=False)
    with open_talk() as talk, TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter" if reference else Path(image)
        if reference is None:
            verified = verify_directory(directory, digest_tensors=check_weights, reporter=talk)
        elif isinstance(reference, LayoutReference):
            verified = verify_image(reference, directory, digest_tensors=check_weights, reporter=talk)
        else:
            credentials = docker_configs_for(login.docker_config, os.environ)
            with client_for(reference, registry_network(login), credentials, reporter=talk) as client:
                verified = verify_image(reference, directory, client, digest_tensors=check_weights, reporter=talk)
        if load:
            _load_with_peft(directory, load)
        if verified.unchecked and not allow_unlocked:
            raise DataError(
                f"{image}: cannot be verified: {verified.unchecked}",
                hint="--allow-unlocked passes it: nothing else is wrong with it",
            )
        if verified.canary:
            talk.note(f"canary: {verified.canary}")
        what = "agree with each other" if verified.unchecked else "are those that the run left"
        talk.note(f"{len(verified.files)} files {what}" + (", and PEFT loads them" if load else ""))
    print(reference.with_digest(verified.digest) if reference and verified.digest else image)


def _image_argument(image: str) -> "ImageReference | LayoutReference":
    """What IMAGE names. Raises UsageError for a path of this machine, ConfigError for what names no registry."""
    from tuner.reference import names_registry, parse_destination
    from tuner.request import check_names_registry

    if not image.startswith("oci:") and not names_registry(image) and Path(image).exists():
        raise UsageError(f"{image} is a file or directory here, and no image", hint="a layout on disk is oci:DIR:TAG")
    reference = parse_destination(image)
    check_names_registry(reference, "IMAGE")
    return reference


def _load_with_peft(adapter: Path, base: Path) -> None:
    from tuner.pipeline.libraries import check_packages, quiet

    check_packages()
    quiet()
    from tuner.pipeline.model import load_adapter

    load_adapter(base, adapter)


@command(
    "pull",
    example="tuner pull myregistry.azurecr.io/adapter:1 ./adapter",
)
def pull(
    image: Image,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="must not be there yet")],
    login: LoginFlags,
) -> None:
    """Fetch an adapter or data image and unpack its /data, every digest checked."""
    from tuner.reference import LayoutReference
    from tuner.registry import client_for
    from tuner.registry.pull import pull_image
    from tuner.request import docker_configs_for

    reference = _image_argument(image)
    with open_talk() as talk:
        if isinstance(reference, LayoutReference):
            pulled = pull_image(reference, directory, reporter=talk)
        else:
            credentials = docker_configs_for(login.docker_config, os.environ)
            with client_for(reference, registry_network(login), credentials, reporter=talk) as client:
                pulled = pull_image(reference, directory, client, reporter=talk)
        talk.note(f"pulled {len(pulled.files)} files to {directory}")
    print(reference.with_digest(pulled.digest))


@command(
    "merge",
    example="tuner merge tuner-work/my-run/adapter-0123456789ab ./merged",
)
def merge(
    adapter: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="an adapter directory that tuner wrote", autocompletion=completion.adapters),
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="a new directory")],
    base_model: BaseModel,
) -> None:
    """Add an adapter to its base, decoded as in training; says how far the logits are from the adapter's."""
    from tuner.pipeline.libraries import check_packages, quiet

    check_packages()
    quiet()
    from tuner.pipeline.merge import merge as merge_adapter

    with open_talk() as talk:
        merge_adapter(adapter, target, base_model.expanduser() if base_model else None, talk)
    print(target)
