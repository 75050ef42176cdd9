"""tuner/registry/pull.py, layout.py and extract.py: what comes in, and what must not get out."""

import contextlib
import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.registries import (
    PASSWORD,
    USER,
    RunningRegistry,
    faulty,
    running_registry,
    running_token_server,
)
from tests.test_registry_image import ADAPTER, pack, write
from tests.test_registry_push import Recorder, client, push, skopeo
from tests.test_registry_tar import info, make_tar
from tuner.errors import ConfigError, DataError, InputMissingError, ServiceError, TunerError
from tuner.reference import ImageReference, LayoutReference
from tuner.registry.credentials import Credential
from tuner.registry.extract import Limits
from tuner.registry.image import Image, canonical_json, sha256_digest
from tuner.registry.layout import layout_digest
from tuner.registry.pull import Pulled, pull_image
from tuner.registry.push import push_layout
from tuner.runspec import Silent

TAR = "application/vnd.oci.image.layer.v1.tar"
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def image(tmp_path: Path) -> Image:
    files = write(tmp_path / "adapter", {**ADAPTER, "run.lock.json": str(tmp_path).encode()})
    return pack(files, annotations={"sh.kaito.model.name": "phi-3"})


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


# ── there and back ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def registry() -> Iterator[RunningRegistry]:
    with running_registry() as running:
        yield running


@pytest.mark.registry
def test_what_was_pushed_comes_back(registry: RunningRegistry, image: Image, tmp_path: Path) -> None:
    pushed = push(image, registry.host)
    with client(registry.host) as connected:
        reference = ImageReference(registry.host, "adapters/phi", "v1")
        recorder = Recorder()
        pulled = pull_image(reference, tmp_path / "out", connected, reporter=recorder)
    assert tree(tmp_path / "out") == tree(tmp_path / "adapter")
    assert pulled.digest == pushed.digest
    assert pulled.annotations == {"sh.kaito.model.name": "phi-3"}
    assert pulled.files == {
        name: hashlib.sha256(content).hexdigest() for name, content in tree(tmp_path / "adapter").items()
    }
    assert (recorder.steps[-1].done, recorder.steps[-1].unit) == (recorder.steps[-1].total, "B")


@pytest.mark.registry
def test_a_blob_that_is_corrupted_in_the_registry_is_refused(
    registry: RunningRegistry, image: Image, tmp_path: Path
) -> None:
    push(image, registry.host, name="corrupted")
    reference = ImageReference(registry.host, "corrupted", "v1")
    weights = image.layers[2].digest
    with faulty(registry) as proxy:

        def flip(method: str, path: str, body: bytes) -> bytes:
            return body[:-9000] + b"\xff" + body[-8999:] if path.endswith(weights) and method == "GET" else body

        proxy.change_answer = flip
        with client(proxy.host, name="corrupted") as connected, pytest.raises(DataError, match=weights):
            pull_image(reference, tmp_path / "out", connected, reporter=Silent())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.registry
def test_a_manifest_other_than_the_digest_asked_for_is_refused(
    registry: RunningRegistry, image: Image, tmp_path: Path
) -> None:
    push(image, registry.host, name="swapped")
    reference = ImageReference(registry.host, "swapped", digest=image.digest)
    with faulty(registry) as proxy, client(proxy.host, name="swapped") as connected:
        proxy.change_answer = lambda method, path, body: body.replace(b"phi-3", b"phi-4")
        with pytest.raises(DataError, match="not the one that was asked for"):
            pull_image(reference, tmp_path / "out", connected, reporter=Silent())


@pytest.mark.registry
def test_a_missing_image_is_input_missing(registry: RunningRegistry, tmp_path: Path) -> None:
    reference = ImageReference(registry.host, "nowhere", "v1")
    with client(registry.host, name="nowhere") as connected, pytest.raises(InputMissingError, match="nowhere"):
        pull_image(reference, tmp_path / "out", connected, reporter=Silent())


@pytest.mark.registry
def test_pulling_tries_every_credential_and_then_none(image: Image, tmp_path: Path) -> None:
    with (
        running_token_server({USER: {"pull", "push"}, "": {"pull"}, "stranger": set()}) as tokens,
        running_registry(token_server=tokens) as registry,
    ):
        push(image, registry.host, Credential("k", USER, PASSWORD))
        reference = ImageReference(registry.host, "adapters/phi", "v1")
        wrong, stranger = Credential("k", USER, "hunter2"), Credential("k", "stranger", PASSWORD)
        with client(registry.host, wrong, stranger) as connected:
            pull_image(reference, tmp_path / "out", connected, reporter=Silent())
    assert tree(tmp_path / "out") == tree(tmp_path / "adapter")


@pytest.mark.registry
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_what_skopeo_compressed_is_read(image: Image, tmp_path: Path, compression: str) -> None:
    push_layout(image, LayoutReference(tmp_path / "plain", "v1"), reporter=Silent())
    skopeo(
        "--insecure-policy",
        "copy",
        "--dest-compress",
        f"--dest-compress-format={compression}",
        f"oci:{tmp_path}/plain:v1",
        f"oci:{tmp_path}/compressed:v1",
    )
    pulled = pull_image(LayoutReference(tmp_path / "compressed", "v1"), tmp_path / "out", reporter=Silent())
    assert tree(tmp_path / "out") == tree(tmp_path / "adapter")
    assert pulled.digest != image.digest


# ── layouts ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_layout_gives_back_what_was_written(image: Image, tmp_path: Path) -> None:
    reference = LayoutReference(tmp_path / "layout", "v1")
    pushed = push_layout(image, reference, reporter=Silent())
    pulled = pull_image(reference.with_digest(image.digest), tmp_path / "out", reporter=Silent())
    assert tree(tmp_path / "out") == tree(tmp_path / "adapter")
    assert pushed.reference == f"oci:{tmp_path}/layout:v1@{image.digest}"
    assert pushed.digest == pulled.digest == layout_digest(reference) == image.digest
    assert (pushed.previous_digest, pushed.bytes_sent) == (None, image.size_bytes)


def test_a_layout_keeps_its_other_tags_and_blobs(image: Image, tmp_path: Path) -> None:
    other = Image(image.manifest_bytes + b"\n", image.config, image.layers)
    for tag, one in [("v1", image), ("v2", image), ("v1", other)]:
        pushed = push_layout(one, LayoutReference(tmp_path / "layout", tag), reporter=Silent())
    assert (pushed.previous_digest, pushed.bytes_sent, pushed.blobs_skipped) == (image.digest, 0, 4)
    assert layout_digest(LayoutReference(tmp_path / "layout", "v1")) == other.digest
    assert layout_digest(LayoutReference(tmp_path / "layout", "v2")) == image.digest
    assert layout_digest(LayoutReference(tmp_path / "layout", "v3")) is None
    assert layout_digest(LayoutReference(tmp_path / "nowhere", "v1")) is None


def test_a_damaged_blob_of_a_layout_is_written_again(image: Image, tmp_path: Path) -> None:
    reference = LayoutReference(tmp_path / "layout", "v1")
    push_layout(image, reference, reporter=Silent())
    blob = tmp_path / "layout/blobs/sha256" / image.layers[0].digest.removeprefix("sha256:")
    blob.write_bytes(b"\0" * image.layers[0].size_bytes)
    with pytest.raises(DataError):
        pull_image(reference, tmp_path / "out", reporter=Silent())
    assert push_layout(image, reference, reporter=Silent()).bytes_sent == image.layers[0].size_bytes
    pull_image(reference, tmp_path / "out", reporter=Silent())


def test_a_layout_tag_is_kept_when_it_may_not_be_overwritten(image: Image, tmp_path: Path) -> None:
    reference = LayoutReference(tmp_path / "layout", "v1")
    push_layout(image, reference, reporter=Silent())
    other = Image(image.manifest_bytes + b"\n", image.config, image.layers)
    with pytest.raises(ConfigError, match=image.digest):
        push_layout(other, reference, overwrite=False, reporter=Silent())


def test_a_directory_with_other_files_is_no_place_for_a_layout(image: Image, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not an OCI layout"):
        push_layout(image, LayoutReference(tmp_path, "v1"), reporter=Silent())


def test_a_file_that_changed_leaves_no_tag_in_the_layout(image: Image, tmp_path: Path) -> None:
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(DataError, match="changed"):
        push_layout(image, LayoutReference(tmp_path / "layout", "v1"), reporter=Silent())
    assert layout_digest(LayoutReference(tmp_path / "layout", "v1")) is None
    assert not list((tmp_path / "layout").rglob("*.partial"))


def test_tags_that_are_there_are_named_when_one_is_not(image: Image, tmp_path: Path) -> None:
    push_layout(image, LayoutReference(tmp_path / "layout", "v1"), reporter=Silent())
    with pytest.raises(InputMissingError, match=r"'v2'.*v1"):
        pull_image(LayoutReference(tmp_path / "layout", "v2"), tmp_path / "out", reporter=Silent())
    with pytest.raises(InputMissingError, match="not an OCI image layout"):
        pull_image(LayoutReference(tmp_path / "nowhere", "v2"), tmp_path / "out", reporter=Silent())


# ── images of others ─────────────────────────────────────────────────────────────────────────────────────────────────


class Made:
    """A layout made by hand, as an attacker would."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs/sha256").mkdir(parents=True)
        (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def blob(self, content: bytes, media_type: str, **more: object) -> dict[str, object]:
        digest = sha256_digest(content)
        (self.directory / "blobs/sha256" / digest.removeprefix("sha256:")).write_bytes(content)
        return {"mediaType": media_type, "digest": digest, "size": len(content), **more}

    def image(
        self, *layers: tuple[bytes, str], diff_ids: list[str] | None = None, **config: object
    ) -> dict[str, object]:
        descriptors = [self.blob(content, media_type) for content, media_type in layers]
        if diff_ids is None:
            diff_ids = [sha256_digest(unpacked(content, media_type)) for content, media_type in layers]
        rootfs = {"type": "layers", "diff_ids": diff_ids}
        config_blob = self.blob(
            canonical_json({"architecture": "amd64", "os": "linux", "rootfs": rootfs, **config}),
            "application/vnd.oci.image.config.v1+json",
        )
        return self.manifest(config_blob, descriptors)

    def manifest(self, config: dict[str, object], layers: list[dict[str, object]]) -> dict[str, object]:
        document = {"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers}
        return self.blob(canonical_json(document), MANIFEST)

    def tag(self, descriptor: dict[str, object]) -> LayoutReference:
        entry = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": "v1"}}
        index = {"schemaVersion": 2, "manifests": [entry]}
        (self.directory / "index.json").write_bytes(canonical_json(index))
        return LayoutReference(self.directory, "v1")


def unpacked(content: bytes, media_type: str) -> bytes:
    if media_type.endswith("gzip"):
        return gzip.decompress(content)
    if media_type.endswith("zstd"):
        with pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd") as stream:
            return bytes(stream.read())
    return content


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path / "made")


def pull(reference: LayoutReference, reporter: Silent | None = None, **options: object) -> Pulled:
    target = reference.path.parent / "out"
    return pull_image(reference, target, reporter=reporter or Silent(), **options)  # type: ignore[arg-type]


def pull_layers(made: Made, *layers: bytes, reporter: Silent | None = None, **options: object) -> dict[str, bytes]:
    pull(made.tag(made.image(*((layer, TAR) for layer in layers))), reporter, **options)
    return tree(made.directory.parent / "out")


def file(name: str, content: bytes = b"1") -> tuple[tarfile.TarInfo, bytes]:
    return info(name), content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    return info(name, kind, linkname=target), b""


def test_only_what_is_under_data_is_taken(made: Made) -> None:
    layer = make_tar(file("etc/passwd"), link("bin/sh", "/bin/busybox"), file("data/a/b.json"), file("database"))
    assert pull_layers(made, layer) == {"a/b.json": b"1"}


def test_another_directory_or_everything_can_be_asked_for(made: Made) -> None:
    reference = made.tag(made.image((make_tar(file("x/y/a"), file("b")), TAR)))
    assert set(pull(reference, only_under="x/y").files) == {"a"}
    (made.directory.parent / "out").rename(made.directory.parent / "first")
    assert set(pull(reference, only_under="").files) == {"x/y/a", "b"}


def test_leading_dots_are_no_part_of_a_name(made: Made) -> None:
    assert pull_layers(made, make_tar((info("./", tarfile.DIRTYPE), b""), file("./data/./a"))) == {"a": b"1"}


def test_upper_layers_win(made: Made) -> None:
    assert pull_layers(made, make_tar(file("data/a", b"old")), make_tar(file("data/a", b"new"))) == {"a": b"new"}


def test_a_file_may_become_a_directory_and_back(made: Made) -> None:
    first = make_tar(file("data/a"), file("data/b/x"))
    second = make_tar(file("data/a/x"), file("data/b"))
    assert pull_layers(made, first, second) == {"a/x": b"1", "b": b"1"}


def test_whiteouts_remove_what_was_below(made: Made) -> None:
    first = make_tar(file("data/a"), file("data/b"), file("data/d/x"), file("data/d/y"))
    second = make_tar(file("data/.wh.a", b""), file("data/.wh.d", b""), file("data/d/z"), file("data/.wh.nothing", b""))
    assert pull_layers(made, first, second) == {"b": b"1", "d/z": b"1"}


def test_a_whiteout_spares_its_own_layer_in_any_order(made: Made) -> None:
    first = make_tar(file("data/d/x"), file("data/d/e/x"))
    second = make_tar(file("data/d/z"), file("data/d/e/z"), file("data/d/.wh..wh..opq", b""), file("data/.wh.d", b""))
    assert pull_layers(made, first, second) == {"d/z": b"1", "d/e/z": b"1"}


@pytest.mark.parametrize("name", [".wh.data", ".wh..wh..opq", "data/.wh..wh..opq"])
def test_whiteouts_of_data_itself_count(made: Made, name: str) -> None:
    assert pull_layers(made, make_tar(file("data/a")), make_tar(file(name, b""), file("data/b"))) == {"b": b"1"}


def test_the_last_of_two_with_one_name_counts_and_is_warned_about(made: Made) -> None:
    recorder = Recorder()
    layer = make_tar(file("data/a", b"1"), file("data/a", b"2"))
    assert pull_layers(made, layer, reporter=recorder) == {"a": b"2"}
    assert len(recorder.warnings) == 1


def test_links_inside_are_left_out_with_a_warning(made: Made) -> None:
    recorder = Recorder()
    layer = make_tar(
        file("data/a"),
        link("data/s", "a"),
        link("data/d/s", "../a"),
        link("data/absolute", "/data/a"),
        link("data/h", "data/a", tarfile.LNKTYPE),
    )
    assert pull_layers(made, layer, reporter=recorder) == {"a": b"1"}
    assert len(recorder.warnings) == 4


def test_modes_and_owners_are_not_taken_over(made: Made) -> None:
    entry = info("data/a", mode=0o6777, uid=12345)
    pull_layers(made, make_tar((info("data", tarfile.DIRTYPE, mode=0), b""), (entry, b"1")))
    status = (made.directory.parent / "out/a").stat()
    assert (status.st_mode & 0o7133, status.st_uid) == (0, os.getuid())


EVIL = {
    "dot dot": make_tar(file("data/../../evil")),
    "dot dot outside data": make_tar(file("../evil"), file("data/a")),
    "absolute": make_tar(file("/evil"), file("data/a")),
    "absolute below data": make_tar(file("/data/a")),
    "symbolic link out": make_tar(link("data/s", "../../evil"), file("data/a")),
    "absolute symbolic link": make_tar(link("data/s", "/etc/passwd"), file("data/a")),
    "hard link out": make_tar(link("data/h", "../evil", tarfile.LNKTYPE), file("data/a")),
    "hard link to the root": make_tar(link("data/h", "/etc/passwd", tarfile.LNKTYPE), file("data/a")),
    "data is a link": make_tar(link("data", ".."), file("data/evil")),
    "device": make_tar((info("data/c", tarfile.CHRTYPE), b""), file("data/a")),
    "fifo": make_tar((info("data/p", tarfile.FIFOTYPE), b""), file("data/a")),
    "control characters": make_tar(file("data/a\x1b[2Jb")),
    "data is a file": make_tar(file("data")),
    "too deep": make_tar(file("data/" + "d/" * 40 + "a")),
    "a part too long": make_tar(file("data/" + "d" * 256)),
    "a name too long": make_tar(file("data/" + ("d" * 200 + "/") * 6 + "a")),
}


@pytest.mark.parametrize("name", EVIL)
def test_an_evil_image_is_refused_and_leaves_nothing(made: Made, tmp_path: Path, name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError):
        pull_layers(made, EVIL[name])
    after = [path for path in tmp_path.rglob("*") if "made" not in path.parts]
    assert after == [path for path in before if "made" not in path.parts]


def test_writing_through_a_link_of_a_layer_below_stays_inside(made: Made, tmp_path: Path) -> None:
    layers = [make_tar(link("data/s", "."), file("data/a")), make_tar(file("data/s/evil"))]
    assert pull_layers(made, *layers) == {"a": b"1", "s/evil": b"1"}
    assert not (tmp_path / "out/s").is_symlink()


def test_the_archive_of_cve_2025_4517_changes_nothing_outside(made: Made, tmp_path: Path) -> None:
    """A chain of links so long that resolving it stops before it is seen to leave the directory."""
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    component = "d" * 247
    entries = []
    path = "data"
    for letter in "abcdefghijklmnop":
        entries += [(info(f"{path}/{component}", tarfile.DIRTYPE), b""), link(f"{path}/{letter}", component)]
        path = f"{path}/{letter}"
    long_link = "/".join(["data", *"abcdefghijklmnop", "l" * 254])
    entries += [link(long_link, "../" * 16), link("data/escape", f"{long_link}/../../outside")]
    entries += [link("data/flag", "escape/outside", tarfile.LNKTYPE), file("data/flag", b"overwritten")]
    with contextlib.suppress(DataError):  # refused or harmless, both are well
        pull_layers(made, make_tar(*entries), limits=Limits(path_bytes=1 << 20, depth=1000))
    assert outside.read_text() == "untouched"


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(content, asbytes=True))


@pytest.mark.parametrize(
    ("limits", "word"),
    [
        (Limits(total_bytes=1000), "unpacks to more than 1,000 bytes"),
        (Limits(file_bytes=1000), "at most 1,000"),
        (Limits(files=2), "more than 2 files"),
        (Limits(download_bytes=1000), "to download"),
    ],
)
def test_limits_hold(made: Made, limits: Limits, word: str) -> None:
    layer = make_tar(file("data/a", b"1" * 2000), file("data/b"), file("data/c"))
    with pytest.raises(DataError, match=word):
        pull_layers(made, layer, limits=limits)


@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_a_bomb_is_stopped_early(made: Made, compress: object) -> None:
    content = compress(make_tar(file("data/a", bytes(30 << 20))))  # type: ignore[operator]
    media_type = f"{TAR}+{'zstd' if compress is zstd else 'gzip'}"
    reference = made.tag(made.image((content, media_type), diff_ids=["sha256:" + "0" * 64]))
    with pytest.raises(DataError, match="200 times"):
        pull(reference)


@pytest.mark.parametrize(
    "content",
    [
        b"not compressed",
        gzip.compress(make_tar(file("data/a")))[:-9],
        gzip.compress(make_tar(file("data/a"))) + b"rest",
    ],
)
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_broken_compression_is_refused(made: Made, content: bytes, compression: str) -> None:
    reference = made.tag(made.image((content, f"{TAR}+{compression}"), diff_ids=["sha256:" + "0" * 64]))
    with pytest.raises(DataError):
        pull(reference)


def test_several_gzip_members_are_one_layer(made: Made) -> None:
    layer = make_tar(file("data/a", os.urandom(5000)))
    content = gzip.compress(layer[:3000]) + gzip.compress(layer[3000:])
    assert pull(made.tag(made.image((content, f"{TAR}+gzip")))).files.keys() == {"a"}


def test_a_wrong_diff_id_is_refused(made: Made) -> None:
    reference = made.tag(made.image((make_tar(file("data/a")), TAR), diff_ids=["sha256:" + "0" * 64]))
    with pytest.raises(DataError, match="its config says"):
        pull(reference)
    assert not (made.directory.parent / "out").exists()


@pytest.mark.parametrize("change", [b"", b"x"])
def test_a_blob_of_another_size_is_refused(made: Made, change: bytes) -> None:
    layer = make_tar(file("data/a"))
    reference = made.tag(made.image((layer, TAR)))
    path = made.directory / "blobs/sha256" / sha256_digest(layer).removeprefix("sha256:")
    path.write_bytes(layer[:-1] + change)
    with pytest.raises(DataError, match="blob"):
        pull(reference)


def platform(architecture: str) -> dict[str, object]:
    return {"platform": {"os": "linux", "architecture": architecture}}


def test_an_index_gives_linux_amd64(made: Made) -> None:
    arm = made.image((make_tar(file("data/arm")), TAR)) | platform("arm64")
    amd = made.image((make_tar(file("data/amd")), TAR)) | platform("amd64")
    index = made.blob(canonical_json({"schemaVersion": 2, "mediaType": INDEX, "manifests": [arm, amd]}), INDEX)
    pulled = pull(made.tag(index))
    assert pulled.files.keys() == {"amd"}
    assert pulled.digest == index["digest"]


def test_an_index_of_one_gives_that_and_attestations_do_not_count(made: Made) -> None:
    arm = made.image((make_tar(file("data/arm")), TAR)) | platform("arm64")
    attestation = made.image((make_tar(file("data/no")), TAR)) | {
        "platform": {"os": "unknown", "architecture": "unknown"}
    }
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [attestation, arm]}
    assert pull(made.tag(made.blob(canonical_json(index), INDEX))).files.keys() == {"arm"}


def test_an_index_of_other_platforms_names_them(made: Made) -> None:
    one = made.image((make_tar(file("data/a")), TAR))
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [one | platform("arm64"), one | platform("s390x")]}
    with pytest.raises(DataError, match="linux/arm64, linux/s390x"):
        pull(made.tag(made.blob(canonical_json(index), INDEX)))


def titled(made: Made, name: str, content: bytes, media_type: str = TAR, **more: str) -> dict[str, object]:
    return made.blob(content, media_type, annotations={"org.opencontainers.image.title": name, **more})


def test_an_artifacts_layers_are_its_files(made: Made) -> None:
    """As `oras push` writes, which calls everything a tar by default."""
    empty = made.blob(b"{}", "application/vnd.oci.empty.v1+json")
    directory = titled(
        made,
        "tokenizer",
        gzip.compress(make_tar(file("tokenizer/vocab.json", b"3"))),
        f"{TAR}+gzip",
        **{"io.deis.oras.content.unpack": "true"},
    )
    layers = [titled(made, "config.json", b"1"), titled(made, "data/model.safetensors", b"2", "x/y"), directory]
    pull(made.tag(made.manifest(empty, layers)))
    assert tree(made.directory.parent / "out") == {
        "config.json": b"1",
        "model.safetensors": b"2",
        "tokenizer/vocab.json": b"3",
    }


@pytest.mark.parametrize("name", ["/etc/evil", "../evil", "a/../../evil", "", "."])
def test_an_artifact_may_not_name_files_elsewhere(made: Made, name: str) -> None:
    empty = made.blob(b"{}", "application/vnd.oci.empty.v1+json")
    with pytest.raises(DataError):
        pull(made.tag(made.manifest(empty, [titled(made, name, b"1")])))


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "text/html",
    ],
)
def test_layers_that_cannot_be_read_are_refused_before_any_is_fetched(made: Made, media_type: str) -> None:
    with pytest.raises(DataError, match=media_type.split("/")[-1].replace("+", r"\+")):
        pull(made.tag(made.image((b"x", media_type), diff_ids=["sha256:" + "0" * 64])))


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"mediaType": "text/html"},
        {"mediaType": MANIFEST},
        {"mediaType": MANIFEST, "layers": "x", "config": {}},
        {"mediaType": MANIFEST, "layers": ["x"], "config": {}},
        {"mediaType": MANIFEST, "layers": [{"digest": 1, "size": 1}], "config": {}},
        {"mediaType": MANIFEST, "layers": [{"digest": "sha256:a/../b", "size": 1}], "config": {}},
        {"mediaType": MANIFEST, "layers": [{"digest": "sha256:ab", "size": -1}], "config": {}},
        {"mediaType": MANIFEST, "layers": [], "config": {"digest": "md5:ab", "size": 1}},
        {"mediaType": INDEX, "manifests": []},
        {"mediaType": INDEX, "manifests": [1]},
    ],
)
def test_malformed_manifests_are_refused(made: Made, document: dict[str, object]) -> None:
    with pytest.raises(DataError):
        pull(made.tag(made.blob(json.dumps(document).encode(), "")))


def test_an_image_without_data_says_where_files_belong(made: Made) -> None:
    with pytest.raises(DataError, match="no files under /data"):
        pull_layers(made, make_tar(file("other/a")))


def test_a_directory_with_files_is_not_overwritten(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    with pytest.raises(ConfigError, match="not an empty directory"):
        pull_layers(made, make_tar(file("data/a")))


def test_an_empty_directory_is_filled(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert pull_layers(made, make_tar(file("data/a"))) == {"a": b"1"}


NAMES = st.lists(
    st.sampled_from(["data", "..", ".", "a", "b", ".wh.a", ".wh..wh..opq", "", "é"]), min_size=1, max_size=5
).map("/".join)
ENTRIES = st.tuples(NAMES, st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE]), NAMES)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.lists(ENTRIES, max_size=6), min_size=1, max_size=3))
def test_no_image_reaches_outside_or_leaves_a_link(
    tmp_path_factory: pytest.TempPathFactory, layers: list[list[tuple[str, bytes, str]]]
) -> None:
    directory = tmp_path_factory.mktemp("any")
    made = Made(directory / "made")
    tars = [
        make_tar(
            *(
                (info(name, kind, linkname=target), b"1" if kind == tarfile.REGTYPE else b"")
                for name, kind, target in layer
            )
        )
        for layer in layers
    ]
    try:
        pulled = pull(made.tag(made.image(*((content, TAR) for content in tars))))
    except TunerError:
        assert sorted(path.name for path in directory.iterdir()) == ["made"]
        return
    assert sorted(path.name for path in directory.iterdir()) == ["made", "out"]
    assert not [path for path in (directory / "out").rglob("*") if path.is_symlink()]
    assert set(tree(directory / "out")) == set(pulled.files)


# ── disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_image_larger_than_the_disk_is_refused_before_it_is_fetched(image: Image, tmp_path: Path) -> None:
    weights = image.layers[2]
    manifest = json.loads(image.manifest_bytes)
    manifest["layers"][2]["size"] = 400 << 40
    huge = Image(canonical_json(manifest), image.config, image.layers)
    push_layout(huge, LayoutReference(tmp_path / "layout", "v1"), reporter=Silent())
    limits = Limits(download_bytes=1 << 60)
    assert weights.size_bytes < 1 << 30
    with pytest.raises(ServiceError, match="are free there"):
        pull_image(LayoutReference(tmp_path / "layout", "v1"), tmp_path / "out", limits=limits, reporter=Silent())


def test_writers_to_one_layout_keep_each_others_images(image: Image, tmp_path: Path) -> None:
    def write_tag(number: int) -> None:
        push_layout(image, LayoutReference(tmp_path / "layout", f"v{number}"), reporter=Silent())

    write_tag(0)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_tag, range(1, 17)))
    digests = [layout_digest(LayoutReference(tmp_path / "layout", f"v{number}")) for number in range(17)]
    assert digests == [image.digest] * 17
