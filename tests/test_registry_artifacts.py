"""tuner/registry/artifacts.py, referrers.py and verify.py: what is said about an image, and whether it is true."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.fake_registry import FakeRegistry, fake_registry
from tests.registries import PASSWORD, USER, RunningRegistry, require
from tests.test_registry_image import ADAPTER, pack, write
from tests.test_registry_push import Recorder, client, push, registry
from tests.test_registry_robustness import deliver
from tuner.errors import ConfigError, DataError, InputMissingError, NotPushedError
from tuner.open_files import OpenDirectory
from tuner.reference import ImageReference, LayoutReference
from tuner.registry.artifacts import Artifact, modelpack_artifact, parse_lock, provenance_artifact, read_lock
from tuner.registry.image import Image, canonical_json, sha256_digest
from tuner.registry.push import push_layout, push_referrer
from tuner.registry.referrers import referrers_tag
from tuner.registry.verify import verify_image
from tuner.runspec import Silent

__all__ = ["registry"]  # a fixture

LOCK: dict[str, Any] = {
    "version": 1,
    "run_digest": "sha256:" + "1" * 64,
    "smoke": False,
    "method": "qlora",
    "preset": "phi-3-mini-4k-instruct",
    "name": "phi-run",
    "base_model": {"id": "microsoft/phi", "revision": "c0ffee", "digest": "sha256:" + "2" * 64},
    "datasets": [{"source": "https://a.b/train.parquet", "sha256": "3" * 64, "size_bytes": 5}],
    "rows": {"read": 5},
    "max_length": 512,
    "seed": 42,
    "config": {"LoraConfig": {"r": 16}},
    "versions": {"tuner": "0", "torch": "2"},
}
ANNOTATIONS = {
    "org.opencontainers.image.title": "phi-run",
    "tuner.run-digest": LOCK["run_digest"],
    "sh.kaito.model.name": LOCK["preset"],
    "tuner.base-model.digest": LOCK["base_model"]["digest"],
    "tuner.dataset-digests": "sha256:" + "3" * 64,
}
CONFIG = {"r": 16, "base_model_name_or_path": "microsoft/phi", "revision": "c0ffee"}


def make_image(directory: Path, *, lock: object = LOCK, config: object = CONFIG, **annotations: str) -> Image:
    files = {**ADAPTER, "adapter_config.json": json.dumps(config).encode(), "README.md": str(directory).encode()}
    if lock is not None:
        files["run.lock.json"] = json.dumps(lock).encode()
    return pack(write(directory / "adapter", files), annotations={**ANNOTATIONS, **annotations})


@pytest.fixture
def image(tmp_path: Path) -> Image:
    return make_image(tmp_path)


@pytest.fixture(params=["referrers API", "referrers tag"])
def fake(request: pytest.FixtureRequest) -> Iterator[FakeRegistry]:
    with fake_registry(knows_referrers=request.param == "referrers API") as running:
        yield running


# ── ModelPack ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_modelpack_sibling_has_the_images_layers_under_its_own_types(image: Image) -> None:
    artifact = modelpack_artifact(image)
    manifest = json.loads(artifact.manifest_bytes)
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    assert [layer["mediaType"] for layer in manifest["layers"]] == [
        "application/vnd.cncf.model.weight.config.v1.tar",
        "application/vnd.cncf.model.weight.config.v1.tar",
        "application/vnd.cncf.model.weight.v1.tar",
    ]
    assert [layer["digest"] for layer in manifest["layers"]] == [layer.digest for layer in image.layers]
    assert manifest["subject"]["digest"] == image.digest
    with artifact.blobs[0].open() as stream:
        config = json.loads(stream.readall())
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer.diff_id for layer in image.layers]}
    assert config["descriptor"]["name"] == "phi-run"


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_the_modelpack_sibling_says_how_its_layers_are_compressed(tmp_path: Path, compression: Any) -> None:
    packed = pack(write(tmp_path / "adapter", ADAPTER), compression=compression)
    layers = json.loads(modelpack_artifact(packed).manifest_bytes)["layers"]
    assert {layer["mediaType"].rpartition("+")[2] for layer in layers} == {compression}


@pytest.mark.registry
def test_the_modelpack_sibling_sends_no_layer_twice_and_skopeo_reads_it(
    registry: RunningRegistry, image: Image, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    deliver(adapter, registry.host, name="modelpack", modelpack=True)
    assert registry.tags("modelpack")[-2:] == ["v1", "v1-modelpack"]
    source = f"docker://{registry.host}/modelpack:v1-modelpack"
    raw = subprocess.run(
        [require("skopeo"), "inspect", "--raw", "--tls-verify=false", source], capture_output=True, check=True
    ).stdout
    assert json.loads(raw)["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"


# ── provenance ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_statement_says_what_the_adapter_was_made_of(image: Image) -> None:
    artifact = provenance_artifact(image, "a.b/phi", LOCK, runner_image="a.b/tuner@sha256:4", git_commit="abc")
    with artifact.blobs[1].open() as stream:
        statement = json.loads(stream.readall())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "a.b/phi", "digest": {"sha256": image.digest.removeprefix("sha256:")}}]
    definition, details = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert definition["resolvedDependencies"] == [
        {"name": "https://a.b/train.parquet", "digest": {"sha256": "3" * 64}},
        {"name": "microsoft/phi", "digest": {"sha256": "2" * 64, "gitCommit": "c0ffee"}},
        {"name": "source", "digest": {"gitCommit": "abc"}},
    ]
    assert definition["externalParameters"]["config"] == LOCK["config"]
    assert details["builder"] == {"id": "a.b/tuner@sha256:4", "version": LOCK["versions"]}
    assert details["metadata"] == {"invocationId": LOCK["run_digest"]}


def test_equal_runs_make_equal_statements(image: Image) -> None:
    one, other = (provenance_artifact(image, "a.b/phi", lock) for lock in (LOCK, dict(reversed(LOCK.items()))))
    assert one.manifest_bytes == other.manifest_bytes


def test_an_adapter_without_a_lock_has_no_provenance(tmp_path: Path) -> None:
    adapter = write(tmp_path / "adapter", ADAPTER)["README.md"].parent
    with pytest.raises(InputMissingError, match="nothing is known"):
        read_lock(OpenDirectory.at(adapter))
    with fake_registry() as fake, pytest.raises(NotPushedError, match=r"run\.lock\.json"):
        deliver(adapter, fake.host, provenance=True)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"run_digest": 1}'])
def test_a_lock_that_is_none_is_refused(content: bytes) -> None:
    with pytest.raises(ConfigError, match="here: not"):
        parse_lock(content, "here")


# ── referrers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def referrers(host: str, name: str, digest: str) -> list[dict[str, Any]]:
    """What a client finds: the registry's answer, or what is listed under the tag that stands for it."""
    accept = {"Accept": "application/vnd.oci.image.index.v1+json"}
    for path in (f"referrers/{digest}", f"manifests/{referrers_tag(digest)}"):
        url = f"http://{host}/v2/{name}/{path}"
        answer = requests.get(url, headers=accept, auth=(USER, PASSWORD), timeout=10)
        if answer.status_code == 200:
            return list(answer.json()["manifests"])
    return []


def test_what_is_said_of_an_image_is_found_from_it(fake: FakeRegistry, image: Image, tmp_path: Path) -> None:
    for _ in range(2):  # again adds nothing
        deliver(tmp_path / "adapter", fake.host, modelpack=True, provenance=True)
    pushed = next(digest for tag, digest in fake.repository("adapters/phi").tags.items() if tag == "v1")
    found = referrers(fake.host, "adapters/phi", pushed)
    assert sorted(entry["artifactType"] for entry in found) == [
        "application/vnd.cncf.model.manifest.v1+json",
        "application/vnd.in-toto+json",
    ]
    assert (referrers_tag(pushed) in fake.repository("adapters/phi").tags) != fake.knows_referrers


@pytest.mark.registry
def test_a_registry_without_referrers_gets_the_tag(registry: RunningRegistry, image: Image) -> None:
    push(image, registry.host, name="referred")
    artifact = provenance_artifact(image, "a.b/phi", LOCK)
    with client(registry.host, name="referred") as connected:
        push_referrer(artifact, connected)
    assert [entry["digest"] for entry in referrers(registry.host, "referred", image.digest)] == [artifact.digest]
    assert referrers_tag(image.digest) in registry.tags("referred")


def test_something_else_under_the_referrers_tag_is_not_overwritten(image: Image) -> None:
    with fake_registry(knows_referrers=False) as fake, client(fake.host) as connected:
        push(image, fake.host)
        connected.for_push()
        connected.upload_manifest(image.manifest_bytes, "application/json", referrers_tag(image.digest))
        with pytest.raises(DataError, match="not an index"):
            push_referrer(provenance_artifact(image, "a.b/phi", LOCK), connected)


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def verify(image: Image, tmp_path: Path, reporter: Any = None) -> Any:
    reference = LayoutReference(tmp_path / "layout", "v1")
    push_layout(image, reference, reporter=Silent())
    return verify_image(reference, tmp_path / "verified", reporter=reporter or Silent())


def test_an_image_that_is_what_it_says_is_verified(image: Image, tmp_path: Path) -> None:
    verified = verify(image, tmp_path)
    assert verified.digest == image.digest
    assert verified.lock == LOCK
    assert set(verified.files) == {path.name for path in (tmp_path / "adapter").iterdir()}


def test_an_image_in_a_registry_is_verified(image: Image, tmp_path: Path) -> None:
    with fake_registry() as fake:
        push(image, fake.host)
        with client(fake.host) as connected:
            reference = ImageReference(fake.host, "adapters/phi", "v1")
            verified = verify_image(reference, tmp_path / "verified", connected, reporter=Silent())
    assert verified.annotations == ANNOTATIONS


@pytest.mark.parametrize(
    ("annotations", "what"),
    [
        ({"tuner.run-digest": "sha256:0"}, "annotation tuner.run-digest is 'sha256:0'"),
        ({"tuner.dataset-digests": "sha256:0"}, "annotation tuner.dataset-digests"),
        ({"tuner.base-model.digest": "sha256:0"}, "annotation tuner.base-model.digest"),
        ({"sh.kaito.model.name": "other"}, "annotation sh.kaito.model.name"),
    ],
)
def test_an_annotation_against_the_lock_is_named(tmp_path: Path, annotations: dict[str, str], what: str) -> None:
    with pytest.raises(DataError, match=what):
        verify(make_image(tmp_path, **annotations), tmp_path)


def test_all_contradictions_are_named_at_once(tmp_path: Path) -> None:
    image = make_image(tmp_path, config={"base_model_name_or_path": "other/model", "revision": "bad"})
    with pytest.raises(DataError, match=r"base model is 'other/model'.*revision is 'bad'"):
        verify(image, tmp_path)


@pytest.mark.parametrize(
    ("config", "what"), [([], "not a JSON object"), ({"base_model_name_or_path": "/mnt/x"}, "another machine")]
)
def test_a_config_that_no_reader_can_use_is_named(tmp_path: Path, config: object, what: str) -> None:
    with pytest.raises(DataError, match=what):
        verify(make_image(tmp_path, config=config), tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    image = pack(write(tmp_path / "adapter", {"adapter_config.json": canonical_json(CONFIG)}))
    with pytest.raises(DataError, match=r"no adapter_model\.safetensors"):
        verify(image, tmp_path)


def test_an_image_of_another_program_has_no_lock_and_that_is_said(tmp_path: Path) -> None:
    reporter = Recorder()
    assert verify(make_image(tmp_path, lock=None), tmp_path, reporter).lock is None
    assert "no run.lock.json" in reporter.warnings[0]


def test_a_broken_lock_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the lock of a run"):
        verify(make_image(tmp_path, lock=[]), tmp_path)


@pytest.mark.parametrize("says", ["the same", "another run", "other data", "another image", "another program's words"])
def test_a_statement_beside_the_image_is_compared_with_its_lock(fake: FakeRegistry, tmp_path: Path, says: str) -> None:
    image = make_image(tmp_path)
    lock, subject = LOCK, image
    if says == "another run":
        lock = LOCK | {"run_digest": "sha256:" + "9" * 64}
    elif says == "other data":
        lock = LOCK | {"datasets": []}
    elif says == "another image":
        subject = make_image(tmp_path / "other")
    artifact = provenance_artifact(subject, "a.b/phi", lock, git_commit="abc")
    if says == "another image":  # a statement that is filed under this one
        manifest = json.loads(artifact.manifest_bytes)
        manifest["subject"] = {**manifest["subject"], "digest": image.digest, "size": len(image.manifest_bytes)}
        artifact = replace(artifact, manifest_bytes=canonical_json(manifest), subject_digest=image.digest)
    elif says == "another program's words":
        artifact = with_statement(artifact, {"predicate": {"buildDefinition": {"buildType": "https://other/v1"}}})
    push(image, fake.host)
    with client(fake.host) as connected:
        push_referrer(artifact, connected)
        reference = ImageReference(fake.host, "adapters/phi", "v1")
        if says in ("the same", "another program's words"):
            assert verify_image(reference, tmp_path / "verified", connected, reporter=Silent()).digest == image.digest
        else:
            with pytest.raises(DataError, match="its provenance statement says other things than its run"):
                verify_image(reference, tmp_path / "verified", connected, reporter=Silent())


def with_statement(artifact: Artifact, statement: object) -> Artifact:
    """The artifact with other content in its layer."""
    content = canonical_json(statement)
    blob = replace(artifact.blobs[1], digest=sha256_digest(content), size_bytes=len(content), parts=(content,))
    manifest = json.loads(artifact.manifest_bytes)
    manifest["layers"][0] |= {"digest": blob.digest, "size": blob.size_bytes}
    return replace(artifact, manifest_bytes=canonical_json(manifest), blobs=(artifact.blobs[0], blob))
