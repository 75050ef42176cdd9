"""An image → a registry or a layout on disk.

Blobs first, then the manifest under its digest, then the tag: at no moment is there a tag whose blobs are missing,
and what is there already is not sent again.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tuner.errors import ConfigError, DeniedError, ServiceError
from tuner.reference import ImageReference, LayoutReference
from tuner.registry.artifacts import Artifact
from tuner.registry.image import MANIFEST_TYPE, Image
from tuner.registry.layout import layout_digest, write_layout
from tuner.registry.referrers import add_to_referrers_tag
from tuner.registry.transport import RegistryClient
from tuner.runspec import Progress, Reporter


@dataclass(frozen=True)
class Pushed:
    """`reference` names the image by digest: `registry/repository@sha256:…`, or `oci:DIR:TAG@sha256:…`.

    `bytes_sent` counts blobs, and what was sent twice twice.
    """

    reference: str
    tag: str
    digest: str
    previous_digest: str | None
    bytes_sent: int
    blobs_skipped: int


def push_image(
    image: Image,
    reference: ImageReference,
    client: RegistryClient,
    *,
    overwrite: bool = True,
    mount_from: str | None = None,
    on_previous: Callable[[str | None], None] = lambda _: None,
    reporter: Reporter,
) -> Pushed:
    """Pushes what is missing and moves the tag.

    Blobs are taken over from the repository `mount_from` of the same registry where that is possible; `on_previous`
    gets the tag's digest before anything is sent. Raises what RegistryClient raises, DataError when a file changes
    meanwhile, and ConfigError when the tag is another image's and may not be overwritten.
    """
    tag = reference.tag
    if tag is None:
        raise ConfigError(f"{reference}: can not push to a digest", hint="name a tag")
    client.for_push()
    client.insist()
    previous = client.manifest_digest(tag)
    on_previous(previous)
    _check_overwrite(str(reference), previous, image.digest, overwrite)
    done_bytes = bytes_sent = blobs_skipped = 0

    def report(position: int) -> None:
        reporter.progress(Progress("push", str(reference), done_bytes + position, image.size_bytes, "B"))

    report(0)
    for blob in image.blobs:
        if client.has_blob(blob.digest) or (mount_from and client.mount_blob(blob.digest, mount_from)):
            blobs_skipped += 1
        else:
            bytes_sent += client.upload_blob(blob, on_progress=report)
        done_bytes += blob.size_bytes
        report(0)
    client.upload_manifest(image.manifest_bytes, MANIFEST_TYPE, image.digest)
    by_digest = reference.with_digest(image.digest)
    try:
        client.upload_manifest(image.manifest_bytes, MANIFEST_TYPE, tag)
    except (DeniedError, ServiceError) as error:
        error.hint = f"the image itself is there, as {by_digest}; if the tag is locked, push to another one"
        raise
    now = client.manifest_digest(tag)
    if now != image.digest:
        reporter.warn(
            f"{reference}: somebody else has moved the tag meanwhile, to {now}; what was pushed here is {by_digest}"
        )
    return Pushed(str(by_digest), tag, image.digest, previous, bytes_sent, blobs_skipped)


def push_referrer(artifact: Artifact, client: RegistryClient, *, tag: str | None = None) -> str:
    """Pushes what is said about an image that is there, and returns its digest. Raises what `push_image` raises."""
    client.for_push()
    for blob in artifact.blobs:
        if not client.has_blob(blob.digest):
            client.upload_blob(blob, on_progress=lambda _: None)
    is_listed = client.upload_manifest(artifact.manifest_bytes, MANIFEST_TYPE, artifact.digest)
    if not is_listed:
        add_to_referrers_tag(client, artifact)
    if tag is not None:
        client.upload_manifest(artifact.manifest_bytes, MANIFEST_TYPE, tag)
    return artifact.digest


def push_layout(image: Image, reference: LayoutReference, *, overwrite: bool = True, reporter: Reporter) -> Pushed:
    """Writes the image into a layout on disk; the same answer and errors as `push_image`."""
    previous = layout_digest(reference)
    _check_overwrite(str(reference), previous, image.digest, overwrite)

    def report(position: int) -> None:
        reporter.progress(Progress("push", str(reference), position, image.size_bytes, "B"))

    report(0)
    written_bytes, kept_blobs = write_layout(image, reference, on_progress=report)
    return Pushed(
        str(reference.with_digest(image.digest)), reference.tag, image.digest, previous, written_bytes, kept_blobs
    )


def _check_overwrite(reference: str, previous: str | None, digest: str, overwrite: bool) -> None:
    if previous not in (None, digest) and not overwrite:
        raise ConfigError(
            f"{reference}: exists already with the digest {previous}",
            hint="choose another tag, or leave out --no-overwrite",
        )
