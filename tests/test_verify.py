"""`tuner verify`: passes what each kind of run pushes, fails what was changed since; no machine is named in it."""

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from data_files import write_data
from http_server import HttpServer
from hub import publish_model
from tiny import of_the_first_format, rows_of, tiny_base

from tuner.cli import main
from tuner.records import RunLock, seal_of

pytestmark = pytest.mark.train

SHORT = ("TrainingArguments.max_steps=3", "TrainingArguments.learning_rate=0.02", "TrainingArguments.warmup_steps=0")
PRESET = "phi-3-mini-4k-instruct"


@dataclass(frozen=True)
class Ran:
    """A run that is over: its adapter's directory, and the image that it pushed."""

    adapter: Path
    image: str


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Tuner = Callable[..., Ended]


@pytest.fixture
def tuner(capsys: pytest.CaptureFixture[str]) -> Tuner:
    def run(*argv: str | Path) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        said = capsys.readouterr()
        return Ended(code, said.out.strip(), said.err)

    return run


def run_in(directory: Path, *flags: str | Path, data: str | None = None, settings: tuple[str, ...] = SHORT) -> Ran:
    """`tuner run` in a directory of its own, with an image layout as its output."""
    directory.mkdir(parents=True, exist_ok=True)
    written = write_data(directory / "train.parquet", rows_of("messages", 30))
    argv = ["run", "--data", data or str(written), "--work-dir", str(directory / "work"), *map(str, flags)]
    if "--smoke" not in flags:
        argv += [word for setting in settings for word in ("--set", setting)]
    assert main([*argv, "--output", f"oci:{directory}/image:1"]) == 0
    (adapter,) = (directory / "work").glob("adapter-*")
    return Ran(adapter, f"oci:{directory}/image:1")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer() as running:
        yield running


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """On a base that is only a directory, whose publisher left paths of their own machine in it."""
    directory = tmp_path_factory.mktemp("verify")
    base = directory / "my-base"
    shutil.copytree(tiny_base(), base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    places = {"name_or_path": "/fsx/ours/base", "tokenizer_file": "/home/them/tokenizer.json", "merges_at": "/tmp/them"}
    (base / "tokenizer_config.json").write_text(json.dumps(config | places))
    return run_in(directory, "--model", PRESET, "--base-model", base)


# ── passes what is pushed ────────────────────────────────────────────────────────────────────────────────────────────


def test_image_and_directory_of_a_base_without_a_hub_id_pass(ran: Ran, tuner: Tuner) -> None:
    """The demo's own image was condemned: "adapter_config.json names a directory of another machine"."""
    verified = tuner("verify", ran.image, "--load", tiny_base())
    assert verified.code == 0, verified.err
    assert re.fullmatch(rf"{re.escape(ran.image)}@sha256:[0-9a-f]{{64}}", verified.out)
    assert "9 files are those that the run left, and PEFT loads them" in verified.err
    assert "canary: base and adapter differ at a token by " in verified.err
    directory = tuner("verify", ran.adapter)
    assert (directory.code, directory.out) == (0, str(ran.adapter)), directory.err


LORA_KINDS = ("use_rslora=true", "use_dora=true", "bias=all", 'modules_to_save=["lm_head"]')


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--smoke", "--model", PRESET), id="smoke"),
        pytest.param(("--model", "its directory"), id="a directory as the model"),
        pytest.param(("--method", "lora"), id="method lora"),
        pytest.param(("--no-canary",), id="no canary"),
        *(pytest.param(("--set", f"LoraConfig.{kind}"), id=kind) for kind in LORA_KINDS),
    ],
)
def test_every_kind_of_run_pushes_what_passes(flags: tuple[str, ...], tmp_path: Path, tuner: Tuner) -> None:
    if "--model" not in flags:
        flags = ("--model", PRESET, "--base-model", str(tiny_base()), *flags)
    elif "--smoke" not in flags:
        flags = ("--model", str(tiny_base()))
    other = run_in(tmp_path, *flags)
    for place in (other.image, str(other.adapter)):
        ended = tuner("verify", place)
        assert ended.code == 0, ended.err
        assert "warning" not in ended.err


def test_a_base_from_the_hub_is_named_by_id_and_commit_and_passes(
    server: HttpServer, tmp_path: Path, tuner: Tuner, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    publish_model(server, {path.name: path.read_bytes() for path in tiny_base().iterdir()}, "org/tiny", commit)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    ran = run_in(tmp_path / "run", "--model", "org/tiny")
    for place in (ran.image, str(ran.adapter)):
        ended = tuner("verify", place)
        assert ended.code == 0, ended.err
    lock = RunLock.model_validate_json((ran.adapter / "run.lock.json").read_bytes())
    assert lock.base_model
    assert (lock.base_model.title, lock.base_model.id, lock.base_model.revision) == ("org/tiny", "org/tiny", commit)
    assert not [path for path, content in bytes_of(ran).items() if str(tmp_path).encode() in content]


def test_an_output_directory_passes_with_what_a_volume_s_root_has_of_its_own(
    ran: Ran, tmp_path: Path, tuner: Tuner
) -> None:
    target = shutil.copytree(ran.adapter, tmp_path / "out")
    (target / "lost+found").mkdir()
    (target / ".tuner").mkdir()
    (target / "fine_tuning_completed.txt").touch()
    assert tuner("verify", target).code == 0


def test_weights_that_were_only_saved_anew_pass_and_that_is_said(ran: Ran, tmp_path: Path, tuner: Tuner) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(ran.adapter, tmp_path / "adapter")
    path = copy / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "by": "another program"})
    ended = tuner("verify", copy)
    assert ended.code == 0, ended.err
    assert "adapter_model.safetensors was saved anew: its bytes are others, its tensors the same" in ended.err


# ── fails what was changed ───────────────────────────────────────────────────────────────────────────────────────────


def negate(adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def append(name: str) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        with (adapter / name).open("a") as file:
            file.write("\n")

    return change


def edit(name: str, **values: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        content = json.loads((adapter / name).read_text())
        (adapter / name).write_text(json.dumps(content | values))

    return change


def reseal(**values: Any) -> Callable[[Path], None]:
    """An edited lock whose own digest was made to fit."""

    def change(adapter: Path) -> None:
        lock = json.loads((adapter / "run.lock.json").read_text()) | values
        (adapter / "run.lock.json").write_text(json.dumps(lock | {"lock_sha256": seal_of(lock)}))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).unlink()


def add(name: str) -> Callable[[Path], None]:
    return lambda adapter: (adapter / name).write_text("{}")  # type: ignore[func-returns-value]


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "negated weights": (negate, "the tensors in adapter_model.safetensors are not those that the lock names"),
    "another card": (append("README.md"), "README.md is not the file that the lock names"),
    "another template": (append("chat_template.jinja"), "chat_template.jinja is not the file that the lock names"),
    "another config": (edit("adapter_config.json", lora_alpha=64), "adapter_config.json is not the file"),
    "another log": (append("metrics.jsonl"), "metrics.jsonl is not the file that the lock names"),
    "another canary": (edit("canary.json", trained_in="fp4"), "canary.json is not the file that the lock names"),
    "no canary": (remove("canary.json"), "there is no canary.json in it, which the lock names"),
    "no template": (remove("chat_template.jinja"), "there is no chat_template.jinja in it, which the lock names"),
    "one more file": (add("vocab.json"), "there is vocab.json in it, which the lock does not name"),
    "an edited lock": (edit("run.lock.json", seed=7), "run.lock.json was changed"),
    "a lock with another adapter's tensors": (reseal(tensors_sha256="0" * 64), "canary.json is of another adapter"),
    "a lock of another run": (reseal(run_digest="sha256:" + "0" * 64), "canary.json is of another adapter"),
    "a lock without rows": (reseal(rows=None), "run.lock.json: rows: "),
    "a lock of another base": (reseal(base_model={"title": "b", "id": None, "revision": None, "digest": ""}), "'b'"),
    "a lock of the future": (edit("run.lock.json", format=3), "run.lock.json is of format 3, and this version"),
    "no lock": (remove("run.lock.json"), "cannot be verified: there is no run.lock.json in it"),
    "the first format": (of_the_first_format, "cannot be verified: its run.lock.json is of the first format"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_is_found_in_the_directory_and_in_an_image_made_of_it(
    what: str, ran: Ran, tmp_path: Path, tuner: Tuner
) -> None:
    change, message = CHANGES[what]
    copy = shutil.copytree(ran.adapter, tmp_path / "adapter")
    change(copy)
    found = tuner("verify", copy)
    assert found.code == 65, found.err
    assert message in found.err
    pushed = tuner("push", copy, f"oci:{tmp_path}/image:1")
    assert pushed.code == 0, pushed.err
    found = tuner("verify", f"oci:{tmp_path}/image:1")
    assert found.code == 65, found.err
    assert message in found.err
    assert "/tmp/tmp" not in found.err  # a directory that is gone when this is read


@pytest.mark.parametrize("what", ["negated weights", "another card", "no canary", "one more file"])
def test_who_pushes_changed_files_is_told_that_they_will_be_found(
    what: str, ran: Ran, tmp_path: Path, tuner: Tuner
) -> None:
    copy = shutil.copytree(ran.adapter, tmp_path / "adapter")
    assert "warning" not in tuner("push", copy, f"oci:{tmp_path}/image:0").err
    CHANGES[what][0](copy)
    ended = tuner("push", copy, f"oci:{tmp_path}/image:1")
    assert ended.code == 0
    assert re.search(r"warning: \S+: not as run\.lock\.json says, so `tuner verify` refuses the image", ended.err)


@pytest.mark.parametrize("change", [remove("run.lock.json"), of_the_first_format], ids=["no lock", "the first format"])
def test_what_cannot_be_verified_passes_for_who_allows_it_and_the_rest_is_checked(
    change: Callable[[Path], None], ran: Ran, tmp_path: Path, tuner: Tuner
) -> None:
    copy = shutil.copytree(ran.adapter, tmp_path / "adapter")
    change(copy)
    ended = tuner("verify", "--allow-unlocked", copy)
    assert ended.code == 0, ended.err
    assert "run.lock.json" in ended.err
    assert "files agree with each other" in ended.err
    append("adapter_model.safetensors")(copy)
    assert tuner("verify", "--allow-unlocked", copy).code == 65


def test_an_old_image_with_the_path_of_its_base_is_still_read(ran: Ran, tmp_path: Path, tuner: Tuner) -> None:
    copy = of_the_first_format(shutil.copytree(ran.adapter, tmp_path / "adapter"), base="/models/base")
    assert tuner("push", copy, f"oci:{tmp_path}/image:1").code == 0
    ended = tuner("verify", "--allow-unlocked", f"oci:{tmp_path}/image:1")
    assert ended.code == 0, ended.err
    assert "names a directory of another machine as its base model, as tuner's first format did" in ended.err
    assert tuner("pull", f"oci:{tmp_path}/image:1", tmp_path / "pulled").code == 0


def test_a_directory_without_an_adapter_and_a_file_are_no_adapter(tmp_path: Path, tuner: Tuner) -> None:
    ended = tuner("verify", tmp_path)
    assert ended.code == 66
    assert "no adapter, there is no adapter_config.json in it" in ended.err
    (tmp_path / "file").touch()
    assert tuner("verify", tmp_path / "file").code == 64


def test_of_many_problems_the_first_are_said(ran: Ran, tmp_path: Path, tuner: Tuner) -> None:
    copy = shutil.copytree(ran.adapter, tmp_path / "adapter")
    for number in range(100):
        (copy / f"extra-{number:03}.json").touch()
    ended = tuner("verify", copy)
    assert ended.code == 65
    assert "there is extra-009.json in it, which the lock does not name; and 90 more" in ended.err


# ── the format ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_lock_names_every_other_file_and_says_what_was_really_quantized(ran: Ran) -> None:
    lock = RunLock.model_validate_json((ran.adapter / "run.lock.json").read_bytes())
    assert set(lock.files) == {path.name for path in ran.adapter.iterdir()} - {"run.lock.json"}
    for name, file in lock.files.items():
        content = (ran.adapter / name).read_bytes()
        assert (file.sha256, file.size_bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert lock.row_formats == {"messages": lock.rows.train}
    assert lock.chat_template_sha256 == lock.files["chat_template.jinja"].sha256
    weights = lock.quantization.weights
    assert (lock.quantization.quant_type, lock.quantization.double_quant) == ("nf4", True)
    assert lock.quantization.compute_dtype == "float32"  # asked for was bfloat16: this is a CPU
    assert weights["linear"]["nf4"].tensors == 8
    assert set(weights["head"]) == set(weights["embeddings"]) == {"float32"}


def test_annotations_call_a_base_without_a_hub_id_by_its_title(ran: Ran) -> None:
    index = json.loads(Path(ran.image.removeprefix("oci:").removesuffix(":1"), "index.json").read_text())
    layout = Path(ran.image.removeprefix("oci:").removesuffix(":1"))
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    annotations = json.loads((layout / "blobs/sha256" / digest).read_text())["annotations"]
    assert annotations["tuner.base-model.title"] == "my-base"
    assert "tuner.base-model.id" not in annotations


def bytes_of(ran: Ran) -> dict[str, bytes]:
    layout = Path(ran.image.removeprefix("oci:").removesuffix(":1"))
    files = [*ran.adapter.iterdir(), *layout.rglob("*")]
    return {str(path): path.read_bytes() for path in files if path.is_file()}


def test_no_byte_of_directory_and_image_names_the_machine(ran: Ran) -> None:
    home, here = os.environ["HOME"], str(Path.cwd())
    places = [str(ran.adapter.parent.parent), home, here, "/tmp", "/mnt", "/fsx/", "/home/", socket.gethostname()]
    for path, content in bytes_of(ran).items():
        assert not [place for place in places if place.encode() in content], path


@pytest.mark.parametrize("how", ["a path as the model", "a file URL", "a directory of data"])
def test_however_base_and_data_are_named_no_path_gets_in(how: str, tmp_path: Path) -> None:
    place = tmp_path / "somewhere"
    (place / "rows").mkdir(parents=True)
    file = write_data(place / "rows" / "part.parquet", rows_of("messages", 30))
    data = {"a file URL": f"file://{file}", "a directory of data": str(place / "rows")}.get(how)
    flags = ("--model", PRESET, "--base-model", tiny_base())
    settings = SHORT
    if how == "a path as the model":
        flags = ("--model", shutil.copytree(tiny_base(), place / "my-model"))
        settings = (*SHORT, f"DatasetConfig.dataset_path={tmp_path}/run/train.parquet")
    ran = run_in(tmp_path / "run", *flags, data=data, settings=settings)
    for path, content in bytes_of(ran).items():
        assert str(tmp_path).encode() not in content, path
        assert str(tiny_base()).encode() not in content, path
    lock = json.loads((ran.adapter / "run.lock.json").read_text())
    if how == "a path as the model":
        assert lock["preset"] == lock["base_model"]["title"] == "my-model"
        assert lock["config"]["DatasetConfig"]["dataset_path"] == "train.parquet"


def test_the_same_base_under_another_name_is_another_run_and_elsewhere_the_same(tmp_path: Path) -> None:
    """The name stands in the adapter, so equal runs would push other bytes."""
    from tiny import make_job

    places = [tmp_path / "a" / "base", tmp_path / "b" / "base", tmp_path / "b" / "other"]
    digests = []
    for number, place in enumerate(places):
        shutil.copytree(tiny_base(), place)
        job = make_job(tmp_path / f"job-{number}", rows_of("messages", 4), base_model=place)
        digests.append(job.spec.digest)
    assert digests[0] == digests[1] != digests[2]
