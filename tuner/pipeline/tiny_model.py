"""A preset's architecture made small, with random weights and a tokenizer trained on the data: for --smoke and tests.

Everything that can differ between architectures stays: module names, fused projections, grouped heads, rope kind,
chat template, special tokens. Only the sizes shrink.
"""

from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed

from tuner.errors import ConfigError
from tuner.presets import Preset

HIDDEN_SIZE = 64  # bitsandbytes quantizes in blocks of 64
LAYERS = 2
HEADS = 4
VOCABULARY = 1024


def make_tiny_tokenizer(
    preset: Preset, texts: Iterable[str], *, vocabulary: int = VOCABULARY
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the preset's special tokens and chat template; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([*_named_tokens(preset).values(), *preset.special_tokens]))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=preset.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=preset.context_length or 4096,
        **_named_tokens(preset),
    )


def _named_tokens(preset: Preset) -> dict[str, str]:
    eos = preset.eos_token or "</s>"
    named = {"bos_token": preset.bos_token, "eos_token": eos, "pad_token": preset.pad_token or eos}
    return {role: token for role, token in named.items() if token}


def tiny_config(
    config: dict[str, Any], *, vocabulary: int, hidden_size: int = HIDDEN_SIZE, layers: int = LAYERS
) -> dict[str, Any]:
    """A model's config.json with small sizes: the ratio of query to key-value heads stays.

    Where 4 heads cannot have that ratio (Qwen2.5's 7 to 1) there are as many as it takes, and the hidden size follows.
    """
    config = deepcopy(config)  # transformers writes into nested dicts that it is given
    groups = config["num_attention_heads"] // config.get("num_key_value_heads", config["num_attention_heads"])
    key_value_heads = max(1, HEADS // groups)
    heads = groups * key_value_heads
    head_dim = hidden_size // HEADS
    tiny = config | {
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
    }
    if "head_dim" in config:
        tiny["head_dim"] = head_dim
    if "query_pre_attn_scalar" in config:
        tiny["query_pre_attn_scalar"] = head_dim
    # One layer of each kind first: Gemma 3's first five are alike, and its rope parameters name both kinds.
    rope_kinds = [name for name in config.get("rope_parameters", {}) if name.endswith("_attention")]
    kinds = config.get("layer_types") or rope_kinds
    if kinds:
        tiny["layer_types"] = [*dict.fromkeys(kinds), *kinds * layers][:layers]
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if isinstance(rope, dict) and "long_factor" in rope:
            # one factor for each pair of rotated dimensions of a head
            partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
            pairs = int(head_dim * partial) // 2
            tiny[name] = rope | {key: rope[key][:pairs] for key in ("long_factor", "short_factor")}
    return tiny


def make_tiny_model(
    preset: Preset,
    texts: Iterable[str],
    directory: Path,
    *,
    seed: int = 0,
    vocabulary: int = VOCABULARY,
    hidden_size: int = HIDDEN_SIZE,
    layers: int = LAYERS,
) -> None:
    """Write config, weights (safetensors, fp32) and tokenizer to `directory`; equal inputs give equal bytes.

    Raises ConfigError for a preset whose architecture is not known without a download.
    """
    if not preset.config:
        raise ConfigError(
            f"{preset.name} is no preset, so its architecture is not known without a download",
            hint="use one of `tuner presets`, or give --base-model DIR",
        )
    tokenizer = make_tiny_tokenizer(preset, texts, vocabulary=vocabulary)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shape = tiny_config(preset.config, vocabulary=len(tokenizer), hidden_size=hidden_size, layers=layers) | ids
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
