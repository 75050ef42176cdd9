"""What is pushed beside an image, about the same blobs: a ModelPack manifest and a provenance statement. Pure.

Both name the image as their `subject`, so a registry lists them as its referrers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tuner.errors import ConfigError, InputMissingError
from tuner.open_files import OpenDirectory
from tuner.records import LOCK
from tuner.registry.image import (
    LAYER_TYPE,
    MANIFEST_TYPE,
    TOP_DIRECTORY,
    Blob,
    Image,
    canonical_json,
    sha256_digest,
)

# https://github.com/modelpack/model-spec/blob/main/docs/spec.md
MODELPACK_TYPE = "application/vnd.cncf.model.manifest.v1+json"
_MODELPACK_CONFIG = "application/vnd.cncf.model.config.v1+json"
_MODELPACK_LAYERS = {
    "records": "application/vnd.cncf.model.weight.config.v1.tar",
    "tokenizer": "application/vnd.cncf.model.weight.config.v1.tar",
    "weights": "application/vnd.cncf.model.weight.v1.tar",
}
_MODELPACK_PATH = "org.cncf.model.filepath"

# https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md
IN_TOTO_TYPE = "application/vnd.in-toto+json"
_STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
_PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE = "tuner/fine-tune/v1"
_SOURCE = "source"  # the repository of the code that trained
_EMPTY_TYPE = "application/vnd.oci.empty.v1+json"
_EMPTY = b"{}"


@dataclass(frozen=True)
class Artifact:
    """A manifest and the blobs it needs, some of which the image already has."""

    manifest_bytes: bytes = field(repr=False)
    artifact_type: str
    subject_digest: str
    blobs: tuple[Blob, ...]

    @property
    def digest(self) -> str:
        return sha256_digest(self.manifest_bytes)

    @property
    def descriptor(self) -> dict[str, object]:
        """As a registry's list of referrers has it."""
        return {
            "mediaType": MANIFEST_TYPE,
            "digest": self.digest,
            "size": len(self.manifest_bytes),
            "artifactType": self.artifact_type,
        }


def modelpack_artifact(image: Image) -> Artifact:
    """The image's layers once more as a ModelPack model: other media types, a config of its own, no other bytes."""
    annotations = json.loads(image.manifest_bytes).get("annotations", {})
    described = {
        "name": annotations.get("org.opencontainers.image.title"),
        "description": annotations.get("org.opencontainers.image.description"),
        "revision": annotations.get("tuner.run-digest"),
    }
    config = _small_blob(
        _MODELPACK_CONFIG,
        canonical_json(
            {
                "descriptor": {key: value for key, value in described.items() if value},
                "config": {"architecture": "transformer", "format": "safetensors"},
                "modelfs": {"type": "layers", "diffIds": [layer.diff_id for layer in image.layers]},
            }
        ),
    )
    layers = [
        {
            **layer.descriptor,
            "mediaType": _MODELPACK_LAYERS[layer.name] + layer.media_type.removeprefix(LAYER_TYPE),
            "annotations": {_MODELPACK_PATH: TOP_DIRECTORY},
        }
        for layer in image.layers
    ]
    return _artifact(MODELPACK_TYPE, config, layers, annotations, image, (config, *image.layers))


def provenance_artifact(
    image: Image,
    name: str,
    lock: Mapping[str, Any],
    *,
    runner_image: str | None = None,
    git_commit: str | None = None,
) -> Artifact:
    """An unsigned in-toto statement on what the image called `name` was made of, from its run.lock.json."""
    content = canonical_json(_statement(image.digest, name, lock, runner_image, git_commit))
    statement = _small_blob(IN_TOTO_TYPE, content)
    layer = {**statement.descriptor, "annotations": {"in-toto.io/predicate-type": _PREDICATE_TYPE}}
    empty = _small_blob(_EMPTY_TYPE, _EMPTY)
    return _artifact(IN_TOTO_TYPE, empty, [layer], {}, image, (empty, statement))


def contradicts_lock(statement: object, digest: str, lock: Mapping[str, Any]) -> bool:
    """Whether a provenance statement is one of tuner's, and says of the image what its lock does not."""
    try:
        definition = statement["predicate"]["buildDefinition"]  # type: ignore[index]
        if definition["buildType"] != _BUILD_TYPE:
            return False
        expected = _statement(digest, "", lock, None, None)
        materials = [each for each in definition["resolvedDependencies"] if each["name"] != _SOURCE]
        said = (
            [each["digest"] for each in statement["subject"]],  # type: ignore[index]
            statement["predicate"]["runDetails"]["metadata"],  # type: ignore[index]
            definition | {"resolvedDependencies": materials},
        )
    except (KeyError, TypeError):
        return False
    predicate = expected["predicate"]
    wanted = ([each["digest"] for each in expected["subject"]], predicate["runDetails"]["metadata"])
    return said != (*wanted, predicate["buildDefinition"])


def read_lock(adapter: OpenDirectory) -> dict[str, Any]:
    """run.lock.json of an adapter that tuner trained. Raises InputMissingError, ConfigError, DataError for a link."""
    path = adapter.path / LOCK
    if not adapter.has(LOCK):
        raise InputMissingError(f"{path}: not there, so nothing is known about how the adapter was made")
    return parse_lock(adapter.file(LOCK).content(), str(path))


def parse_lock(content: bytes, place: str) -> dict[str, Any]:
    """The object in a run.lock.json; `place` is for the error."""
    try:
        lock = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON") from error
    if not isinstance(lock, dict) or not isinstance(lock.get("run_digest"), str):
        raise ConfigError(f"{place}: not the lock of a run")
    return lock


def _statement(
    image_digest: str, name: str, lock: Mapping[str, Any], runner_image: str | None, git_commit: str | None
) -> dict[str, Any]:
    base = lock.get("base_model")
    materials = [{"name": data["source"], "digest": {"sha256": data["sha256"]}} for data in lock.get("datasets", [])]
    if base:
        # every weight file's sha256 goes into this digest
        weights = str(base["digest"]).removeprefix("sha256:")
        revision = {"gitCommit": base["revision"]} if base.get("revision") else {}
        title = base.get("id") or base.get("title") or "base model"
        materials.append({"name": title, "digest": {"sha256": weights, **revision}})
    versions = lock.get("versions", {})
    builder: dict[str, Any] = {"id": runner_image or "tuner", "version": versions}
    if git_commit:
        materials.append({"name": _SOURCE, "digest": {"gitCommit": git_commit}})
    return {
        "_type": _STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": image_digest.removeprefix("sha256:")}}],
        "predicateType": _PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    key: lock.get(key) for key in ("preset", "method", "config", "seed", "max_length", "smoke")
                },
                "internalParameters": {"rows": lock.get("rows", {})},
                "resolvedDependencies": materials,
            },
            "runDetails": {"builder": builder, "metadata": {"invocationId": lock["run_digest"]}},
        },
    }


def _artifact(
    artifact_type: str,
    config: Blob,
    layers: list[dict[str, object]],
    annotations: Mapping[str, str],
    image: Image,
    blobs: tuple[Blob, ...],
) -> Artifact:
    manifest: dict[str, object] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": artifact_type,
        "config": config.descriptor,
        "layers": layers,
        "subject": {"mediaType": MANIFEST_TYPE, "digest": image.digest, "size": len(image.manifest_bytes)},
    }
    if annotations:
        manifest["annotations"] = dict(annotations)
    return Artifact(canonical_json(manifest), artifact_type, image.digest, blobs)


def _small_blob(media_type: str, content: bytes) -> Blob:
    return Blob(media_type, sha256_digest(content), len(content), (content,))
