"""A preset's architecture made small: for smoke runs and tests, so sizes must be all that differs."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
from tiny import WORDS

from tuner.errors import ConfigError
from tuner.pipeline.adapter import file_digests
from tuner.presets import find_preset, load_presets

pytestmark = pytest.mark.train

PRESETS = list(load_presets())


def test_there_are_presets() -> None:
    assert len(PRESETS) > 10


@pytest.mark.parametrize("name", PRESETS)
class TestEveryPreset:
    def test_keeps_its_linear_layers_and_its_ratio_of_heads(self, name: str, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        from tuner.pipeline.model import linear_layers
        from tuner.pipeline.tiny_model import make_tiny_model

        preset = find_preset(name)
        make_tiny_model(preset, WORDS, tmp_path, vocabulary=400)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(model).__name__ == preset.architecture
        assert linear_layers(model) == dict.fromkeys(preset.linear_modules, 2)
        full, tiny = preset.config, model.config
        groups = full["num_attention_heads"] // full.get("num_key_value_heads", full["num_attention_heads"])
        assert tiny.num_attention_heads // tiny.num_key_value_heads == groups
        assert tiny.tie_word_embeddings == full.get("tie_word_embeddings", type(tiny)().tie_word_embeddings)
        assert tiny.max_position_embeddings == preset.context_length

    def test_does_not_change_the_preset(self, name: str) -> None:
        from tuner.pipeline.tiny_model import tiny_config

        preset = find_preset(name)
        before = deepcopy(preset.config)
        tiny = tiny_config(preset.config, vocabulary=300)
        for value in tiny.values():
            if isinstance(value, dict):
                value.clear()
        assert preset.config == before

    def test_tokenizer_has_the_presets_tokens_and_gives_any_text_back(self, name: str) -> None:
        from tuner.pipeline.tiny_model import make_tiny_tokenizer

        preset = find_preset(name)
        tokenizer = make_tiny_tokenizer(preset, WORDS)
        assert tokenizer.chat_template == preset.chat_template
        assert tokenizer.eos_token == preset.eos_token
        assert all(len(tokenizer.encode(token)) == 1 for token in preset.special_tokens)
        text = "Ünïcode 数 🙂\n\ttabs"
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_equal_inputs_give_equal_bytes_and_another_seed_others(tmp_path: Path) -> None:
    from tuner.pipeline.tiny_model import make_tiny_model

    preset = find_preset("phi-3-mini-4k-instruct")
    for directory, seed in (("one", 0), ("two", 0), ("three", 1)):
        make_tiny_model(preset, WORDS, tmp_path / directory, seed=seed, vocabulary=400)
    one, two, three = (file_digests(tmp_path / directory) for directory in ("one", "two", "three"))
    assert one == two
    assert {name for name in one if one[name] != three[name]} == {"model.safetensors"}


def test_each_kind_of_layer_stays() -> None:
    from tuner.pipeline.tiny_model import tiny_config

    tiny = tiny_config(find_preset("gemma-3-1b-it").config, vocabulary=300)
    assert set(tiny["layer_types"]) == {"sliding_attention", "full_attention"}


def test_factors_of_long_rope_fit_the_small_head(tmp_path: Path) -> None:
    from tuner.pipeline.tiny_model import make_tiny_model

    preset = find_preset("phi-4-mini-instruct")  # partial rotary
    make_tiny_model(preset, WORDS, tmp_path, vocabulary=400)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (
        len(config["rope_parameters"]["long_factor"])
        == config["hidden_size"] // config["num_attention_heads"] * 3 // 4 // 2
    )


def test_an_architecture_that_is_not_known_is_refused(tmp_path: Path) -> None:
    from tuner.pipeline.tiny_model import make_tiny_model

    with pytest.raises(ConfigError, match="not known without a download"):
        make_tiny_model(find_preset("somebody/some-model"), WORDS, tmp_path)
