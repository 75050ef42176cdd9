"""tuner/registry/image.py"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.registries import require
from tuner.errors import DataError, InputMissingError
from tuner.open_files import OpenFile
from tuner.reference import LayoutReference
from tuner.registry.compression import Compression
from tuner.registry.image import BlobStream, Image, build_image, measure, sha256_digest
from tuner.registry.pull import pull_image
from tuner.registry.push import push_layout
from tuner.runspec import Silent

ADAPTER = {
    "adapter_config.json": b'{"r": 16}',
    "README.md": b"# Card\n",
    "metrics.jsonl": b"",
    "tokenizer.json": b"{}" * 700,
    "chat_template.jinja": "{{ 'ä' }}".encode(),
    "adapter_model.safetensors": bytes(range(256)) * 5000,
}


def write(directory: Path, files: dict[str, bytes]) -> dict[str, Path]:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return {name: directory / name for name in files}


def pack(files: Mapping[str, Path], **options: Any) -> Image:
    return build_image({name: OpenFile.at(path) for name, path in files.items()}, **options)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return write(tmp_path / "adapter", ADAPTER)


def contents(image: Image) -> list[dict[str, bytes]]:
    """Of each layer, as tarfile reads it."""
    layers = []
    for layer in image.layers:
        with layer.open() as stream, tarfile.open(fileobj=io.BytesIO(stream.read())) as tar:
            layers.append({m.name: tar.extractfile(m).read() for m in tar if m.isfile()})  # type: ignore[union-attr]
    return layers


def test_the_layers_are_records_tokenizer_and_weights_under_data(files: dict[str, Path]) -> None:
    assert contents(pack(files)) == [
        {
            "data/README.md": ADAPTER["README.md"],
            "data/adapter_config.json": ADAPTER["adapter_config.json"],
            "data/metrics.jsonl": b"",
        },
        {
            "data/chat_template.jinja": ADAPTER["chat_template.jinja"],
            "data/tokenizer.json": ADAPTER["tokenizer.json"],
        },
        {"data/adapter_model.safetensors": ADAPTER["adapter_model.safetensors"]},
    ]


def test_a_layer_without_files_is_left_out(files: dict[str, Path]) -> None:
    image = pack({"adapter_config.json": files["adapter_config.json"]})
    assert len(image.layers) == 1


def test_every_entry_is_free_of_owner_time_and_umask(files: dict[str, Path]) -> None:
    for layer in pack(files).layers:
        with layer.open() as stream, tarfile.open(fileobj=io.BytesIO(stream.read())) as tar:
            members = tar.getmembers()
        assert [member.name for member in members] == sorted(member.name for member in members)
        assert {(m.uid, m.gid, m.uname, m.gname, m.mtime) for m in members} == {(0, 0, "", "", 0)}
        assert {(m.isdir(), m.mode) for m in members} == {(True, 0o755), (False, 0o644)}


def test_digests_and_sizes_are_those_of_the_bytes(files: dict[str, Path]) -> None:
    image = pack(files)
    manifest = json.loads(image.manifest_bytes)
    assert image.digest == sha256_digest(image.manifest_bytes)
    assert manifest["config"]["digest"] == sha256_digest(image.config_bytes)
    assert len(image.layers) == 3
    for descriptor, layer in zip(manifest["layers"], image.layers, strict=True):
        with layer.open() as stream:
            content = stream.read()
        assert descriptor == {
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": sha256_digest(content),
            "size": len(content),
        }


def test_the_config_is_a_complete_image_config(files: dict[str, Path]) -> None:
    """KAITO fault 27: its config lacks architecture, os and rootfs.type, and umoci refuses it."""
    image = pack(files, annotations={"sh.kaito.model.name": "phi-3"})
    config = json.loads(image.config_bytes)
    assert config["architecture"] == "amd64"
    assert config["os"] == "linux"
    assert config["rootfs"] == {"type": "layers", "diff_ids": [layer.digest for layer in image.layers]}
    assert len(config["history"]) == len(image.layers)
    assert config["created"] == "1970-01-01T00:00:00Z"
    assert config["config"]["Labels"] == {"sh.kaito.model.name": "phi-3"}


def test_annotations_are_on_the_manifest(files: dict[str, Path]) -> None:
    manifest = json.loads(pack(files, annotations={"sh.kaito.model.name": "phi-3"}).manifest_bytes)
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["annotations"] == {"sh.kaito.model.name": "phi-3"}


def test_created_is_every_time_stamp(files: dict[str, Path]) -> None:
    image = pack(files, created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    assert json.loads(image.config_bytes)["created"] == "2026-01-02T03:04:05Z"
    with image.layers[0].open() as stream, tarfile.open(fileobj=io.BytesIO(stream.read())) as tar:
        assert {member.mtime for member in tar} == {1767323045}


_PRINT_DIGEST = """
import os, sys, time
from pathlib import Path
os.umask(int(sys.argv[2], 8))
time.tzset()
from tuner.open_files import OpenFile
from tuner.registry.image import build_image
files = {p.name: OpenFile.at(p) for p in Path(sys.argv[1]).iterdir()}
print(build_image(files, annotations={"b": "ä", "a": "1"}).digest)
"""


def test_equal_files_give_equal_bytes_on_any_machine(tmp_path: Path) -> None:
    digests = set()
    for number, (umask, zone, seed) in enumerate([("022", "UTC", "1"), ("077", "Asia/Tokyo", "2")]):
        files = write(tmp_path / str(number), dict(sorted(ADAPTER.items(), reverse=bool(number))))
        for path in files.values():
            path.chmod(0o600 if number else 0o755)
            os.utime(path, (number, number))
        digests.add(
            subprocess.run(
                [sys.executable, "-c", _PRINT_DIGEST, str(tmp_path / str(number)), umask],
                env={**os.environ, "TZ": zone, "PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
    assert len(digests) == 1


def test_another_card_changes_only_the_small_layer(files: dict[str, Path]) -> None:
    before = pack(files)
    files["README.md"].write_text("# Another card\n")
    after = pack(files)
    assert [a.digest == b.digest for a, b in zip(before.layers, after.layers, strict=True)] == [False, True, True]


def test_long_names_and_directories_are_kept(tmp_path: Path) -> None:
    name = "d" * 120 + "/ä/" + "f" * 120 + ".json"
    image = pack(write(tmp_path / "x", {name: b"1"}))
    assert contents(image) == [{f"data/{name}": b"1"}]


@pytest.mark.parametrize("change", ["content", "shorter"])
def test_a_file_that_changes_after_hashing_is_noticed(files: dict[str, Path], change: str) -> None:
    image = pack(files)
    path = files["adapter_model.safetensors"]
    if change == "content":
        path.write_bytes(path.read_bytes()[::-1])
        os.utime(path, ns=(1, 1))
    else:
        path.write_bytes(b"1")
    with image.layers[2].open() as stream, pytest.raises(DataError, match=r"adapter_model\.safetensors"):
        stream.read()


@pytest.mark.parametrize("change", ["gone", "another file", "a link to another file"])
def test_what_was_measured_is_what_is_read_whatever_its_name_leads_to_by_then(
    files: dict[str, Path], tmp_path: Path, change: str
) -> None:
    image = pack(files)
    path, other = files["adapter_model.safetensors"], tmp_path / "other"
    size, times = path.stat().st_size, path.stat().st_mtime_ns
    other.write_bytes(b"x" * size)
    os.utime(other, ns=(times, times))
    path.unlink()
    if change == "another file":
        other.rename(path)
    elif change != "gone":
        path.symlink_to(other)
    assert contents(image)[2] == {"data/adapter_model.safetensors": ADAPTER["adapter_model.safetensors"]}


def test_a_file_that_changes_while_it_is_read_is_noticed(files: dict[str, Path]) -> None:
    image = pack(files)
    path = files["adapter_model.safetensors"]
    with image.layers[2].open() as stream:
        stream.read(4096)
        with path.open("r+b") as file:
            file.truncate(10_000)
        with pytest.raises(DataError, match="changed"):
            stream.read()


# ── compression ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_compressed_layer_has_the_digest_of_what_is_sent_and_the_diff_id_of_what_it_holds(
    files: dict[str, Path], compression: Compression
) -> None:
    plain, packed = pack(files), pack(files, compression=compression)
    assert len(packed.layers) == 3
    for plain_layer, layer in zip(plain.layers, packed.layers, strict=True):
        with layer.open() as stream:
            content = stream.readall()
        assert (layer.digest, layer.size_bytes) == (sha256_digest(content), len(content))
        assert layer.media_type == f"application/vnd.oci.image.layer.v1.tar+{compression}"
        assert layer.diff_id == plain_layer.digest
    diff_ids = json.loads(packed.config_bytes)["rootfs"]["diff_ids"]
    assert diff_ids == [layer.digest for layer in plain.layers]
    assert packed.size_bytes < plain.size_bytes


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_compressed_layer_can_be_read_again_from_anywhere(files: dict[str, Path], compression: Compression) -> None:
    layer = pack(files, compression=compression).layers[2]
    with layer.open() as stream:
        whole = stream.readall()
        for start in (len(whole) - 1, 0, 17, len(whole) // 2, len(whole), len(whole) + 5):
            stream.seek(start)
            assert stream.readall() == whole[start:]


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_compressed_image_comes_back_and_skopeo_reads_it(
    files: dict[str, Path], tmp_path: Path, compression: Compression
) -> None:
    reference = LayoutReference(tmp_path / "layout", "v1")
    push_layout(pack(files, compression=compression), reference, reporter=Silent())
    pull_image(reference, tmp_path / "out", reporter=Silent())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == ADAPTER
    copy = ["--insecure-policy", "copy", "--dest-decompress", f"oci:{tmp_path}/layout:v1", f"dir:{tmp_path}/plain"]
    subprocess.run([require("skopeo"), *copy], check=True, capture_output=True)
    layer = pack(files).layers[2].digest.removeprefix("sha256:")
    assert (tmp_path / "plain" / layer).is_file()


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_a_file_that_changes_under_the_compressor_is_noticed(files: dict[str, Path], compression: Compression) -> None:
    layer = pack(files, compression=compression).layers[2]
    files["adapter_model.safetensors"].write_bytes(b"other")
    with layer.open() as stream, pytest.raises(DataError, match="changed"):
        stream.readall()


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../x", "a//b", ".", "", "a\nb", "a/"])
def test_names_that_lead_elsewhere_are_refused(files: dict[str, Path], name: str) -> None:
    with pytest.raises(DataError, match="not a file name"):
        pack({name: files["README.md"]})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError, match=r"nowhere\.json: not there"):
        pack({"a.json": tmp_path / "nowhere.json"})


@pytest.fixture(scope="module")
def some_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "file"
    path.write_bytes(bytes(range(256)))
    return path


@given(data=st.data())
def test_a_stream_can_be_read_from_anywhere_in_any_pieces(some_file: Path, data: st.DataObject) -> None:
    file = OpenFile.at(some_file)
    parts = data.draw(st.lists(st.one_of(st.binary(max_size=300), st.just(file)), max_size=6))
    whole = b"".join(part if isinstance(part, bytes) else some_file.read_bytes() for part in parts)
    start = data.draw(st.integers(0, len(whole)))
    with BlobStream(parts) as stream:
        stream.seek(start)
        read = b""
        while chunk := stream.read(data.draw(st.integers(1, 400))):
            read += chunk
        assert read == whole[start:]
        assert stream.tell() == len(whole)
        stream.seek(0)
        assert measure(stream) == (sha256_digest(whole), len(whole))
