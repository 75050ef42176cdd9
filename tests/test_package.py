"""An adapter directory as an image: what goes in, what never does, what its annotations say."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_adapter import weights

from tuner.errors import ConfigError, GateError, InputMissingError
from tuner.open_files import OpenDirectory
from tuner.pipeline.package import PACKAGED_FILES, adapter_image, annotations

LOCK = {
    "name": "tuning-demo",
    "preset": "phi-3-mini-4k-instruct",
    "method": "qlora",
    "smoke": False,
    "run_digest": "sha256:aa",
    "base_model": {"id": "microsoft/Phi-3-mini-4k-instruct", "revision": "0a67", "digest": "sha256:bb"},
    "datasets": [{"source": "https://example.org/a", "sha256": "cc"}, {"source": "b", "sha256": "dd"}],
    "figures": {"eval_loss_after": 0.5},
}


def adapter(directory: Path, **lock: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    weights(directory / "adapter_model.safetensors")
    config = {"base_model_name_or_path": "microsoft/Phi-3-mini-4k-instruct", "revision": "0a67", "r": 16}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 32}))
    (directory / "run.lock.json").write_text(json.dumps(LOCK | lock))
    for name in ("README.md", "metrics.jsonl", "tokenizer.json", "chat_template.jinja"):
        (directory / name).write_text(name)
    return directory


def test_secrets_data_and_optimizer_states_are_never_packaged(tmp_path: Path) -> None:
    """An allow-list: what nobody thought of stays out too."""
    clean = adapter_image(OpenDirectory.at(adapter(tmp_path / "clean")))
    directory = adapter(tmp_path / "full")
    for name in (".env", "config.json", ".dockerconfigjson", "optimizer.pt", "train.arrow", "added_tokens.json"):
        (directory / name).write_text("secret")
    (directory / "checkpoint-5").mkdir()
    assert adapter_image(OpenDirectory.at(directory)).digest == clean.digest


def test_all_that_the_trainer_leaves_is_packaged(tmp_path: Path) -> None:
    """KAITO fault 15: two files are pushed; metrics, card and tokenizer are lost."""
    directory = adapter(tmp_path)
    before = adapter_image(OpenDirectory.at(directory)).digest
    for name in sorted(path.name for path in directory.iterdir()):
        assert name in PACKAGED_FILES
    (directory / "metrics.jsonl").write_text("other")
    assert adapter_image(OpenDirectory.at(directory)).digest != before


def test_annotations_say_what_it_was_made_from(tmp_path: Path) -> None:
    said = annotations(OpenDirectory.at(adapter(tmp_path)))
    assert said["sh.kaito.model.name"] == "phi-3-mini-4k-instruct"
    assert said["org.opencontainers.image.title"] == "tuning-demo"
    assert said["tuner.base-model.id"] == "microsoft/Phi-3-mini-4k-instruct"
    assert said["tuner.base-model.revision"] == "0a67"
    assert said["tuner.dataset-digests"] == "sha256:cc,sha256:dd"
    assert said["tuner.eval-loss"] == "0.5"
    assert said["tuner.lora.r"] == "16"
    assert "tuner.smoke" not in said


def test_a_smoke_run_is_annotated_as_one_and_names_no_base(tmp_path: Path) -> None:
    directory = adapter(tmp_path, smoke=True, base_model=None)
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": None, "r": 16}))
    said = annotations(OpenDirectory.at(directory))
    assert said["tuner.smoke"] == "true"
    assert "smoke run" in said["org.opencontainers.image.description"]
    assert not any(key.startswith("tuner.base-model") for key in said)


def test_an_adapter_of_somebody_else_is_packaged_with_what_it_says_itself(tmp_path: Path) -> None:
    directory = adapter(tmp_path)
    (directory / "run.lock.json").unlink()
    said = annotations(OpenDirectory.at(directory))
    assert said["tuner.base-model.id"] == "microsoft/Phi-3-mini-4k-instruct"
    assert "sh.kaito.model.name" not in said
    assert adapter_image(OpenDirectory.at(directory)).digest


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_directory_without_an_adapter_is_refused(name: str, tmp_path: Path) -> None:
    directory = adapter(tmp_path)
    (directory / name).unlink()
    with pytest.raises(InputMissingError, match=name):
        adapter_image(OpenDirectory.at(directory))


def test_a_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    directory = adapter(tmp_path)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"adapter_config\.json: not JSON"):
        adapter_image(OpenDirectory.at(directory))


@pytest.mark.parametrize("lock", ["[]", "{}", '{"name": 1}'])
def test_a_lock_that_is_not_ours_is_refused(lock: str, tmp_path: Path) -> None:
    directory = adapter(tmp_path)
    (directory / "run.lock.json").write_text(lock)
    with pytest.raises(ConfigError, match=r"run\.lock\.json"):
        adapter_image(OpenDirectory.at(directory))


def test_bad_weights_are_not_packaged(tmp_path: Path) -> None:
    directory = adapter(tmp_path)
    weights(directory / "adapter_model.safetensors", b=0.0)
    with pytest.raises(GateError, match="every lora_B is zero"):
        adapter_image(OpenDirectory.at(directory))
