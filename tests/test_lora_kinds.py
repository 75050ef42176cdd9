"""Every kind of LoRA that a config may ask for: trained, saved and loaded again, or refused with the reason."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import Heard, make_job, prepared_job, rows_of, tiny_base

from tuner.errors import ConfigError
from tuner.pipeline.adapter import vllm_problems
from tuner.pipeline.run import train

pytestmark = pytest.mark.train

QWEN_2, QWEN_3 = "qwen2.5-coder-7b-instruct", "qwen3-0.6b"  # with biases; with tied embeddings
SHORT = {"max_steps": 3, "learning_rate": 0.02, "gradient_accumulation_steps": 2, "warmup_steps": 0}


def train_kind(directory: Path, lora: Mapping[str, Any], preset: str, heard: Heard) -> tuple[Path, Any]:
    config = {"LoraConfig": lora, "TrainingArguments": SHORT, "ModelConfig": {"dtype": "float32"}}
    job = make_job(directory, rows_of("messages", 24), config, preset=preset)
    prepared = prepared_job(job)
    trained = train(job.spec, *prepared, job.work_dir, heard)
    return job.work_dir / trained.adapter_dir, (job, prepared[1], trained)


WORK: dict[str, tuple[Mapping[str, Any], str, str | None]] = {
    # what is asked for, of which model, and what of vLLM is said
    "rsLoRA": ({"use_rslora": True}, QWEN_2, None),
    "DoRA": ({"use_dora": True}, QWEN_2, "no adapter with LoraConfig.use_dora"),
    "a trained head": ({"modules_to_save": ["lm_head"]}, QWEN_2, "no adapter with LoraConfig.modules_to_save"),
    "trained embeddings": ({"modules_to_save": ["embed_tokens"]}, QWEN_2, "LoraConfig.modules_to_save"),
    "biases": ({"bias": "all"}, QWEN_2, "no adapter with LoraConfig.bias"),
    "ranks by layer": ({"rank_pattern": {"o_proj": 4}}, QWEN_2, "ignores LoraConfig.rank_pattern"),
    "alphas by layer": ({"alpha_pattern": {"o_proj": 4}}, QWEN_2, "ignores LoraConfig.alpha_pattern"),
    "a large rank": ({"r": 64}, QWEN_2, "must be started with --max-lora-rank 64"),
    "another start": ({"init_lora_weights": "gaussian"}, QWEN_2, None),
    "single rows of the embeddings": ({"trainable_token_indices": [1, 2]}, QWEN_2, "trainable_token_indices"),
    "some layers": ({"layers_to_transform": [1]}, QWEN_3, None),
}


@pytest.mark.parametrize("kind", WORK)
def test_what_is_trained_is_what_peft_loads_and_what_vllm_cannot_serve_is_said(kind: str, tmp_path: Path) -> None:
    """The held-out loss of the adapter on the disk, on its 4-bit base, is the one that was measured in training."""
    import torch
    from peft import PeftModel

    from tuner.pipeline.model import load_base_model, pick_device
    from tuner.pipeline.train import _load_split

    lora, preset, said = WORK[kind]
    heard = Heard()
    adapter, (job, prepared, trained) = train_kind(tmp_path, lora, preset, heard)
    about_vllm = [line for line in heard.warnings if "vLLM" in line]
    assert bool(about_vllm) == (said is not None)
    assert said is None or said in about_vllm[0]
    base = load_base_model(tiny_base(preset), job.spec.training, pick_device())
    model = PeftModel.from_pretrained(base, adapter)
    model.eval()
    total, count = 0.0, 0
    for row in _load_split(prepared.evaluation, job.work_dir):
        ids, labels = (torch.from_numpy(row[name])[None].long() for name in ("input_ids", "labels"))
        learnt = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * learnt
        count += learnt
    assert total / count == pytest.approx(trained.eval_loss_after, rel=1e-4)
    assert abs(trained.eval_loss_after - trained.eval_loss_before) > 1e-3
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert all(config[key] == value for key, value in lora.items())


REFUSED: dict[str, tuple[Mapping[str, Any], str, str]] = {
    "a name that is nowhere": ({"modules_to_save": ["lm_hed"]}, QWEN_2, "no 'lm_hed' in Qwen2ForCausalLM"),
    "a tied head": ({"modules_to_save": ["lm_head"]}, QWEN_3, "lm_head shares its matrix in this model"),
    "quantized weights": ({"modules_to_save": ["mlp"]}, QWEN_2, "the weights of mlp are quantized"),
    "tied embeddings": ({"modules_to_save": ["embed_tokens"]}, QWEN_3, "embed_tokens shares its matrix"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_would_pass_over_is_refused_before_the_first_step(kind: str, tmp_path: Path) -> None:
    lora, preset, message = REFUSED[kind]
    heard = Heard()
    with pytest.raises(ConfigError, match=message):
        train_kind(tmp_path, lora, preset, heard)
    assert not heard.steps


def test_what_peft_says_of_a_config_is_a_line_of_ours(tmp_path: Path) -> None:
    heard = Heard()
    train_kind(tmp_path, {"target_parameters": ["nothing"]}, QWEN_2, heard)
    assert any(line.startswith("PEFT: ") and "no parameter was matched" in line for line in heard.warnings)


def test_our_defaults_are_served_by_vllm_as_it_is_started_by_default() -> None:
    assert vllm_problems({"r": 16, "lora_alpha": 32, "bias": "none", "use_rslora": True}) == []
