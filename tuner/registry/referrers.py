"""Which manifests say something about an image: a registry's referrers, or the tag that stands for them.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md#referrers-tag-schema
"""

import json
from typing import Any

from tuner.errors import DataError
from tuner.registry.artifacts import Artifact
from tuner.registry.image import canonical_json
from tuner.registry.transport import INDEX_TYPE, RegistryClient


def find_referrers(client: RegistryClient, digest: str) -> list[dict[str, Any]]:
    """Descriptors of the manifests whose subject is `digest`, from either place. Not verified."""
    content = client.get_referrers(digest)
    if content is None:
        content = _tagged_index(client, digest)
    return [] if content is None else _entries(content, digest)


def add_to_referrers_tag(client: RegistryClient, artifact: Artifact) -> None:
    """Lists the artifact once under its subject's referrers tag: what a client must do where the registry does not.

    Two clients that do this at once can lose one entry; the specification has no remedy.
    """
    content = _tagged_index(client, artifact.subject_digest)
    entries = [] if content is None else _entries(content, artifact.subject_digest)
    if any(entry.get("digest") == artifact.digest for entry in entries):
        return
    index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": [*entries, artifact.descriptor]}
    client.upload_manifest(canonical_json(index), INDEX_TYPE, referrers_tag(artifact.subject_digest))


def referrers_tag(digest: str) -> str:
    """`sha256-0123…`"""
    return digest.replace(":", "-")


def _tagged_index(client: RegistryClient, digest: str) -> bytes | None:
    tag = referrers_tag(digest)
    return client.get_manifest(tag)[0] if client.manifest_digest(tag) else None


def _entries(content: bytes, digest: str) -> list[dict[str, Any]]:
    try:
        index = json.loads(content)
        if index["mediaType"] == INDEX_TYPE and all(isinstance(entry["digest"], str) for entry in index["manifests"]):
            return list(index["manifests"])
    except (ValueError, KeyError, TypeError, RecursionError):
        pass  # the same sentence as for another type
    raise DataError(
        f"{referrers_tag(digest)}: the referrers of the image are not an index",
        hint="something else was pushed under that tag; remove it",
    )
