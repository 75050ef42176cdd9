"""The adapter directory: what readers find in it, what never is in it, and what is refused."""

import hashlib
import json
import shutil
import socket
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kaito_runtime import logits_in_kaitos_runtime
from tiny import Job, make_job, prepared_job, rows_of, tiny_base

from tuner.errors import DataError, GateError
from tuner.open_files import OpenFile
from tuner.pipeline.adapter import adapter_config, check_weights, model_card, run_lock, source_label
from tuner.records import Figures, LockedFile, Quantization, WeightCount
from tuner.runspec import Fetched, FetchedFile, FetchedModel, Prepared, Silent, Trained

HUB = FetchedModel(
    path="/somewhere/here", id="microsoft/Phi-3-mini-4k-instruct", revision="0a67737c", digest="sha256:1"
)
DEFAULTS = {"r": 8, "alora_invocation_tokens": None, "use_rslora": False, "use_qalora": False, "target_modules": None}


# ── adapter_config.json ──────────────────────────────────────────────────────────────────────────────────────────────


def test_config_names_the_hub_id_and_revision_and_the_task() -> None:
    """KAITO fault 15: a local path and no task."""
    config, _ = adapter_config({"r": 16, "task_type": None, "base_model_name_or_path": "/mnt/weights"}, DEFAULTS, HUB)
    assert config["base_model_name_or_path"] == "microsoft/Phi-3-mini-4k-instruct"
    assert config["revision"] == "0a67737c"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True


def test_config_has_the_keys_of_peft_0_11_and_newer_ones_only_when_they_say_something() -> None:
    lora = {"r": 16, "alora_invocation_tokens": None, "use_qalora": True, "target_modules": {"b", "a"}}
    config, newer = adapter_config(lora, DEFAULTS, HUB)
    assert config["r"] == 16
    assert config["target_modules"] == ["a", "b"]
    assert "alora_invocation_tokens" not in config
    assert config["use_qalora"] is True
    assert newer == ["use_qalora"]


def test_config_of_a_base_that_is_only_a_directory_has_its_name_and_a_smoke_run_nothing() -> None:
    path = FetchedModel(path="/models/mine", digest="sha256:1")
    assert adapter_config({}, {}, path)[0]["base_model_name_or_path"] == "mine"
    smoke, _ = adapter_config({}, {}, None)
    assert smoke["base_model_name_or_path"] is None
    assert smoke["revision"] is None


@pytest.mark.train
def test_every_default_of_todays_peft_that_0_11_does_not_know_is_left_out() -> None:
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    config, newer = adapter_config(LoraConfig(r=4, target_modules=["o_proj"]).to_dict(), defaults, HUB)
    assert not newer
    assert len(defaults) > len(config) >= 20


# ── the weights ──────────────────────────────────────────────────────────────────────────────────────────────────────


def weights(path: Path, dtype: str = "BF16", *, b: float = 1.0, cut: int = 0, odd: float | None = None) -> Path:
    """A safetensors file of one lora_A and one lora_B, written by hand; `odd` is one value in lora_A."""
    a = np.full(8, 0.5, np.float32)
    if odd is not None:
        a[3] = odd
    parts = []
    for values in (a, np.full(8, b, np.float32)):
        match dtype:
            case "F32":
                parts.append(values.tobytes())
            case "F16":
                parts.append(values.astype(np.float16).tobytes())
            case _:
                parts.append((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    names = ("model.lora_A.weight", "model.lora_B.weight")
    begin, header = 0, {}
    for name, part in zip(names, parts, strict=True):
        header[name] = {"dtype": dtype, "shape": [8], "data_offsets": [begin, begin + len(part)]}
        begin += len(part)
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    content = struct.pack("<Q", len(text)) + text + b"".join(parts)
    path.write_bytes(content[: len(content) - cut])
    return path


def written(path: Path, dtype: str = "BF16", **how: Any) -> OpenFile:
    return OpenFile.at(weights(path, dtype, **how))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
class TestWeights:
    def test_good_ones_pass(self, dtype: str, tmp_path: Path) -> None:
        check_weights(written(tmp_path / "a.safetensors", dtype))

    @pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
    def test_no_number_is_refused(self, dtype: str, odd: float, tmp_path: Path) -> None:
        with pytest.raises(GateError, match=r"model\.lora_A\.weight has NaN or infinite"):
            check_weights(written(tmp_path / "a.safetensors", dtype, odd=odd))

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_an_adapter_that_changes_nothing_is_refused(self, dtype: str, zero: float, tmp_path: Path) -> None:
        with pytest.raises(GateError, match="every lora_B is zero"):
            check_weights(written(tmp_path / "a.safetensors", dtype, b=zero))


@pytest.mark.parametrize("cut", [1, 40, 150, 10_000])
def test_a_file_that_is_cut_short_is_refused(cut: int, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.safetensors"):
        check_weights(written(tmp_path / "a.safetensors", cut=cut))


@pytest.mark.parametrize(
    "content",
    [
        b"not safetensors at all, whatever its name",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"{x",
        struct.pack("<Q", 14) + b'{"a": {"b": 1}}'[:14],
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 2**60) + b"{}",
    ],
)
def test_what_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.safetensors"):
        check_weights(OpenFile.at(path))


def test_the_digest_of_the_tensors_is_as_it_is_written_down(tmp_path: Path) -> None:
    """docs/artifact.md: others must get the same."""
    path = weights(tmp_path / "a.safetensors")
    a, b = np.full(8, 0x3F00, "<u2").tobytes(), np.full(8, 0x3F80, "<u2").tobytes()
    lines = (b'["model.lora_A.weight","BF16",[8]]\n' + a, b'["model.lora_B.weight","BF16",[8]]\n' + b)
    assert check_weights(OpenFile.at(path)) == hashlib.sha256(b"".join(lines)).hexdigest()


@pytest.mark.train
def test_an_adapter_that_is_saved_anew_has_the_same_tensors_and_a_changed_one_others(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = weights(tmp_path / "a.safetensors", "F32")
    tensors = load_file(path)
    digest = check_weights(OpenFile.at(path))
    save_file(dict(reversed(tensors.items())), path, metadata={"by": "somebody", "else": "1"})
    assert check_weights(OpenFile.at(path)) == digest
    name = "model.lora_B.weight"
    for other in (
        tensors | {name: -tensors[name]},
        tensors | {name: tensors[name].reshape(2, 4)},
        tensors | {name: tensors[name].half()},
        {"other": tensors["model.lora_A.weight"], name: tensors[name]},
        {name: tensors[name]},
    ):
        save_file(other, path)
        assert check_weights(OpenFile.at(path)) != digest


def test_weights_are_looked_at_in_pieces_however_large_a_tensor_is(tmp_path: Path) -> None:
    """A trained head of 1 GB ended a pusher that has 1 GiB."""
    path, count = tmp_path / "a.safetensors", 16 << 20
    header = {"lora_B": {"dtype": "BF16", "shape": [count], "data_offsets": [0, 2 * count]}}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(2 * count - 2, 1)
        file.write(b"\x80\x3f")  # the last value is the only one that is not zero
    tracemalloc.start()
    try:
        check_weights(OpenFile.at(path))
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


def test_a_tensor_that_is_shorter_than_its_shape_is_refused(tmp_path: Path) -> None:
    path = weights(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes().replace(b'"shape": [8]', b'"shape": [9]'))
    with pytest.raises(DataError, match="not as long as its shape"):
        check_weights(OpenFile.at(path))


def test_tensors_that_overlap_or_cannot_be_checked_are_refused(tmp_path: Path) -> None:
    path = weights(tmp_path / "a.safetensors")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"data_offsets": [16, 32]', b'"data_offsets": [00, 32]'.replace(b"00", b" 0")))
    with pytest.raises(DataError, match="overlap"):
        check_weights(OpenFile.at(path))
    path.write_bytes(content.replace(b"BF16", b"F8_8"))
    with pytest.raises(DataError, match="F8_8 cannot be checked"):
        check_weights(OpenFile.at(path))


# ── card and lock ────────────────────────────────────────────────────────────────────────────────────────────────────

FIGURES = Figures(
    steps=6,
    epochs=0.6,
    kept_step=2,
    first_train_loss=6.25,
    last_train_loss=5.5,
    eval_loss_before=6.0,
    eval_loss_after=None,
)
QUANTIZATION = Quantization(
    quant_type="nf4",
    double_quant=True,
    compute_dtype="float32",
    weights={
        "linear": {"nf4": WeightCount(tensors=8, parameters=750)},
        "head": {"float32": WeightCount(tensors=1, parameters=250)},
    },
)


@pytest.mark.train
def test_card_and_lock_have_no_time_host_or_path_of_the_machine(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows_of("messages", 24))
    fetched, prepared = prepared_job(job)
    fetched = fetched.model_copy(update={"base_model": HUB})
    card = model_card(job.spec, fetched, prepared, figures=FIGURES, quantization=QUANTIZATION, coverage="LoRA on all")
    lock = run_lock(
        job.spec,
        fetched,
        prepared,
        figures=FIGURES,
        quantization=QUANTIZATION,
        versions={"torch": "2"},
        tensors_sha256="",
        files={"chat_template.jinja": LockedFile(sha256="5", size_bytes=1)},
    )
    assert (
        "| base in training | 750 of 1,000 parameters in nf4, its scales quantized too; computed in float32 |" in card
    )
    for text in (card, json.dumps(lock.sealed())):
        assert str(tmp_path) not in text
        assert "/somewhere" not in text
        assert socket.gethostname() not in text
        assert "train.parquet" in text
        assert "0a67737c" in text
        assert prepared.train.order_sha256 in text


@pytest.mark.train
@pytest.mark.parametrize("base", [HUB, FetchedModel(path="/models/mine", digest="sha256:1"), None])
def test_front_matter_is_yaml_that_names_the_base(base: FetchedModel | None, tmp_path: Path) -> None:
    job = make_job(tmp_path, rows_of("messages", 24))
    fetched, prepared = prepared_job(job)
    fetched = fetched.model_copy(update={"base_model": base})
    card = model_card(job.spec, fetched, prepared, figures=FIGURES, quantization=QUANTIZATION, coverage="")
    _, front, text = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["library_name"] == "peft"
    assert facts["license"] == "mit"
    assert facts.get("base_model") == (base.id if base else None)
    assert "| held-out loss | 6 → – |" in text
    assert f"for {'a made-up base model' if base is None else f'`{base.title}`'}" in text


@pytest.mark.parametrize(
    ("source", "path", "label"),
    [
        ("https://example.org/a/train.parquet", "data/0000-train.parquet", "https://example.org/a/train.parquet"),
        ("/home/somebody/train.parquet", "/home/somebody/train.parquet", "train.parquet"),
        ("/home/somebody/folder", "/home/somebody/folder/part-1.parquet", "part-1.parquet"),
        ("registry.example.org/team/data:1", "data/0000-image/data/a.jsonl", "registry.example.org/team/data:1"),
    ],
)
def test_a_data_file_is_named_by_where_others_find_it(source: str, path: str, label: str) -> None:
    assert source_label(FetchedFile(source=source, path=path, sha256="", size_bytes=0)) == label


# ── who reads it ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Fetched, Prepared, Trained]:
    from tuner.pipeline.run import train

    config = {"TrainingArguments": {"max_steps": 5, "learning_rate": 0.02, "gradient_accumulation_steps": 2}}
    job = make_job(tmp_path_factory.mktemp("adapter"), rows_of("messages", 40), config)
    fetched, prepared = prepared_job(job)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the last checkpoint stays, to compare with
        return job, fetched, prepared, train(job.spec, fetched, prepared, job.work_dir, Silent())


IDS = list(range(5, 45))


def logits(model: Any) -> Any:
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([IDS])).logits[0]


@pytest.mark.train
class TestReaders:
    @pytest.fixture(autouse=True)
    def _quiet(self) -> None:
        from tuner.pipeline.libraries import quiet

        quiet()

    def test_peft_reproduces_the_logits_of_the_trainers_model(self, trained: Any) -> None:
        """The trainer's own model is the quantized base with the adapters of its last checkpoint, in fp32."""
        from peft import PeftModel

        from tuner.pipeline.model import load_base_model, pick_device

        job, _, _, result = trained
        (checkpoint,) = (job.work_dir / "checkpoints").glob("*/checkpoint-5")

        def quantized() -> Any:
            return load_base_model(tiny_base(), job.spec.training, pick_device())

        ours = logits(PeftModel.from_pretrained(quantized(), job.work_dir / result.adapter_dir))
        trainers = logits(PeftModel.from_pretrained(quantized(), checkpoint))
        base = logits(quantized())
        assert float((ours - trainers).abs().max()) < 0.01  # bf16 keeps eight bits
        assert float((ours - base).abs().max()) > 0.1

    def test_kaitos_transformers_runtime_loads_it_and_agrees_with_todays_peft(self, trained: Any) -> None:
        """A peft 0.21 config fails there: "unexpected keyword argument 'alora_invocation_tokens'"."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        job, _, _, result = trained
        adapter = job.work_dir / result.adapter_dir
        theirs = logits_in_kaitos_runtime(tiny_base(), adapter, IDS)
        assert (theirs["peft"], theirs["transformers"]) == ("0.11.1", "5.14.1")
        base = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32)
        ours = logits(PeftModel.from_pretrained(base, adapter))
        assert torch.allclose(ours, torch.tensor(theirs["logits"]), atol=1e-4)

    def test_tokenizer_and_chat_template_are_beside_the_weights(self, trained: Any) -> None:
        """KAITO fault 15: they are not saved."""
        from transformers import AutoTokenizer

        job, _, _, result = trained
        tokenizer = AutoTokenizer.from_pretrained(job.work_dir / result.adapter_dir)
        assert tokenizer.chat_template == job.spec.preset.chat_template

    def test_weights_are_bf16_and_half_as_large_as_fp32(self, trained: Any) -> None:
        from safetensors import safe_open

        job, _, _, result = trained
        path = job.work_dir / result.adapter_dir / "adapter_model.safetensors"
        with safe_open(path, "pt") as file:
            assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
        assert path.stat().st_size < 2 * result.trainable_parameters + 10_000
