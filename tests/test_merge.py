"""Adapter + base → one model: what it answers, what is in its directory, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import Heard, make_job, of_the_first_format, prepared_job, rows_of, tiny_base

from tuner.cli import main
from tuner.errors import ConfigError, InputMissingError, TunerError

pytestmark = pytest.mark.train

QWEN = "qwen3-0.6b"  # q, k and v apart, tied embeddings


def adapter_of(directory: Path, base: Path, *, preset: str = "phi-3-mini-4k-instruct", **config: Any) -> Path:
    """An adapter that changes what the model says, as a run leaves it."""
    from tuner.pipeline.run import train

    arguments = {"max_steps": 6, "learning_rate": 0.02, "gradient_accumulation_steps": 4, "warmup_steps": 0}
    method = config.pop("method", "qlora")
    sections = {"TrainingArguments": arguments, **config}
    job = make_job(directory, rows_of("messages", 30), sections, preset=preset, base_model=base, method=method)
    fetched, prepared = prepared_job(job)
    fetched.save(job.work_dir / "fetched.json")
    return job.work_dir / train(job.spec, fetched, prepared, job.work_dir, Heard()).adapter_dir


def in_bf16(directory: Path) -> Path:
    """The tiny base as checkpoints are published."""
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny_base(), directory)
    AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(tmp_path_factory.mktemp("adapter"), tiny_base())


def merged(adapter: Path, target: Path, base: Path | None = None) -> Any:
    from tuner.pipeline.merge import merge

    return merge(adapter, target, base or tiny_base(), Heard())


def test_a_merged_model_answers_as_the_adapter_on_its_4_bit_base(adapter: Path, tmp_path: Path) -> None:
    """And the straight way, adding it to the checkpoint's own weights, does not."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tuner.pipeline.merge import _drift, _load, _logits
    from tuner.pipeline.model import load_base_model, pick_device

    drift = merged(adapter, tmp_path / "merged")
    assert drift.largest < 1e-4
    assert drift.same_answer == 1.0

    from tuner.pipeline.merge import _read, _training

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    probe = [torch.tensor([tokenizer("What if there are 7?")["input_ids"]])]
    device = pick_device()
    training = _training(_read(adapter / "run.lock.json"))
    on_4_bit = _logits(PeftModel.from_pretrained(load_base_model(tiny_base(), training, device), adapter), probe)
    ours = _logits(_load(tmp_path / "merged", device, torch.float32), probe)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base()), adapter).merge_and_unload()
    straight = _logits(plain, probe)
    assert _drift(on_4_bit, ours).largest < 1e-4
    assert _drift(on_4_bit, straight).mean > 100 * _drift(on_4_bit, ours).mean


def test_a_bf16_checkpoint_stays_one_and_its_rounding_is_measured(tmp_path: Path) -> None:
    from safetensors import safe_open

    base = in_bf16(tmp_path / "base")
    drift = merged(adapter_of(tmp_path / "run", base), tmp_path / "merged", base)
    assert 0 < drift.mean < 0.05
    assert drift.same_answer > 0.9
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize(
    "config",
    [
        {"LoraConfig": {"use_dora": True}},
        {"LoraConfig": {"use_rslora": True, "modules_to_save": ["lm_head"]}},
        {"LoraConfig": {"bias": "none", "layers_to_transform": [1]}},
        {"method": "lora"},
    ],
    ids=["DoRA", "rsLoRA and a trained head", "one layer", "method lora"],
)
def test_every_kind_that_can_be_merged_is(config: dict[str, Any], tmp_path: Path) -> None:
    drift = merged(adapter_of(tmp_path / "run", tiny_base(), **config), tmp_path / "merged")
    assert drift.largest < 1e-3
    assert drift.same_answer == 1.0


def test_a_model_with_q_k_v_apart_and_tied_embeddings_is_merged(tmp_path: Path) -> None:
    base = tiny_base(QWEN)
    adapter = adapter_of(tmp_path / "run", base, preset=QWEN)
    assert merged(adapter, tmp_path / "merged", base).largest < 1e-4


# ── the directory ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_directory_is_a_whole_model_in_shards_without_a_word_of_quantization(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tuner.pipeline import merge as module

    monkeypatch.setattr(module, "SHARD", "500KB")
    drift = merged(adapter, tmp_path / "merged")
    target = tmp_path / "merged"
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 1
    assert (target / "model.safetensors.index.json").is_file()
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["use_cache"] is True
    assert AutoModelForCausalLM.from_pretrained(target).config.architectures == ["Phi3ForCausalLM"]
    assert AutoTokenizer.from_pretrained(target).chat_template == AutoTokenizer.from_pretrained(adapter).chat_template
    card = (target / "README.md").read_text()
    assert str(drift) in card
    assert "as its 4-bit form is decoded" in card
    assert json.loads((target / "merge.json").read_text())["drift"]["largest"] == drift.largest
    assert not (tmp_path / "merged.partial").exists()


def test_the_command_prints_the_directory_and_says_the_drift(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--base-model", str(tiny_base())]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "merged")
    assert "merged: over " in said.err
    assert "most likely token at 100.0%" in said.err


def test_a_base_without_a_hub_id_is_found_by_the_work_directory_s_records(adapter: Path, tmp_path: Path) -> None:
    """The adapter itself has no path of a machine in it."""
    from tuner.pipeline.merge import merge

    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == tiny_base().name
    merge(adapter, tmp_path / "merged", None, Heard())
    elsewhere = shutil.copytree(adapter, tmp_path / "elsewhere")
    with pytest.raises(InputMissingError, match=f"{named}, is none of the hub's") as caught:
        merge(elsewhere, tmp_path / "again", None, Heard())
    assert caught.value.hint == "give --base-model DIR"


def test_a_directory_that_has_the_base_s_name_by_chance_is_not_taken_for_it(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.pipeline.merge import merge

    shutil.copytree(tiny_base(), tmp_path / tiny_base().name)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputMissingError, match="none of the hub's"):
        merge(shutil.copytree(adapter, tmp_path / "elsewhere"), tmp_path / "merged", None, Heard())


def test_an_adapter_of_the_first_format_is_merged_with_the_base_whose_path_it_has(
    adapter: Path, tmp_path: Path
) -> None:
    from tuner.pipeline.merge import merge

    copy = of_the_first_format(shutil.copytree(adapter, tmp_path / "elsewhere"), base=str(tiny_base()))
    merge(copy, tmp_path / "merged", None, Heard())
    assert json.loads((tmp_path / "merged" / "run.lock.json").read_text())["version"] == 1


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────

Spoil = Callable[[dict[str, Any], dict[str, Any]], Any]
REFUSED: dict[str, tuple[Spoil, type[TunerError], str]] = {
    "another kind": (lambda config, lock: config.update(peft_type="IA3"), ConfigError, "a IA3 adapter cannot"),
    "activated": (
        lambda config, lock: config.update(alora_invocation_tokens=[1]),
        ConfigError,
        "alora_invocation_tokens cannot be merged: it acts from",
    ),
    "more layers": (lambda config, lock: config.update(layer_replication=[[0, 2]]), ConfigError, "layer_replication"),
    "8 bits": (
        lambda config, lock: lock["config"]["QuantizationConfig"].update(load_in_8bit=True),
        ConfigError,
        "8-bit base",
    ),
    "another base": (
        lambda config, lock: lock.update(base_model={"digest": "sha256:0"}),
        ConfigError,
        "not those that the adapter was trained on",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_merged_is_refused_before_a_model_is_loaded(
    what: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.pipeline import merge as module

    spoil, kind, message = REFUSED[what]
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    files = [copy / "adapter_config.json", copy / "run.lock.json"]
    values = [json.loads(file.read_text()) for file in files]
    spoil(*values)
    for file, value in zip(files, values, strict=True):
        file.write_text(json.dumps(value))
    monkeypatch.setattr(module, "load_base_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(kind, match=message):
        merged(copy, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("where", ["modules_to_save", "target_modules"])
def test_an_adapter_on_a_head_that_is_the_embeddings_is_refused(where: str, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {where: ["lm_head"]}))
    with pytest.raises(ConfigError, match="shares it with the embeddings"):
        merged(copy, tmp_path / "merged", tiny_base(QWEN))


def test_too_little_disk_and_a_directory_in_use_are_said_first(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="used: is not empty"):
        merged(adapter, tmp_path / "used")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"1\.0 kB free, and the merged model needs about"):
        merged(adapter, tmp_path / "merged")


def test_a_base_that_is_not_here_and_an_adapter_of_others_are_told_what_to_do(adapter: Path, tmp_path: Path) -> None:
    from tuner.pipeline.merge import merge

    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "nobody/nothing"}))
    lock = json.loads((copy / "run.lock.json").read_text())
    lock["base_model"]["id"] = "nobody/nothing"
    (copy / "run.lock.json").write_text(json.dumps(lock))
    with pytest.raises(InputMissingError, match=r"nobody/nothing .* not in the hub's cache") as caught:
        merge(copy, tmp_path / "merged", None, Heard())
    assert caught.value.hint == "give --base-model DIR"
    (copy / "run.lock.json").unlink()
    with pytest.raises(InputMissingError, match=r"run\.lock\.json: there is no such file"):
        merge(copy, tmp_path / "merged", None, Heard())


def test_who_merges_a_smoke_run_is_told_where_its_base_is() -> None:
    from tuner.pipeline.merge import find_base

    with pytest.raises(InputMissingError) as caught:
        find_base(Path("adapter"), {"base_model_name_or_path": None}, {"base_model": None})
    assert "smoke-model in its work directory" in (caught.value.hint or "")
