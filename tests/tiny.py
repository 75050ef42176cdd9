"""Tokenizers and models small enough for tests, of every preset's kind."""

from functools import cache
from typing import Any

from tuner.presets import find_preset

WORDS = (
    "The quick brown fox jumps over the lazy dog. What is 2 + 2? It is 4.",
    "Grüße aus Zürich, 你好世界, привет, 🙂 emoji and\nnew lines\n\nand tabs\t.",
    "system user assistant tool function arguments name get_weather city Paris",
)


@cache
def tiny_tokenizer(preset_name: str, chat_template: str | None = None) -> Any:
    """A byte-level tokenizer with the preset's special tokens, and its chat template unless another is given."""
    from tuner.pipeline.tiny_model import make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer(find_preset(preset_name), WORDS)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
