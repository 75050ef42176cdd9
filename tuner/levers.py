"""The short cuts a run may take, by name: each one faster, none with other numbers than rounding makes.

All are on where they are proved on the loaded model and, on a GPU, measured to gain; `--disable NAME` or the
annotation `tuner/disable` turns one off. pipeline/levers.py decides; this says what there is to decide about.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from tuner.errors import ConfigError, cut, did_you_mean

PACKING = "packing"
LEARNT_HEAD = "learnt-head"
VARLEN_ATTENTION = "varlen-attention"
FUSED_LORA = "fused-lora"
LIGER = "liger"
FUSED_PROJECTIONS = "fused-projections"
RESIDENT_WEIGHTS = "resident-weights"
MEMORY_PROBE = "memory-probe"

LEVERS: Mapping[str, str] = MappingProxyType(
    {
        PACKING: "several documents in one row, which do not see each other",
        LEARNT_HEAD: "the output head where a token is learnt, without keeping logits",
        VARLEN_ATTENTION: "attention over all documents of a row in one kernel (GPU, torch 2.11 or newer)",
        FUSED_LORA: "LoRA's products added into those of its 4-bit layer",
        LIGER: "Liger's kernels for norms, rotary embedding and the MLP (GPU, extra `fast`)",
        FUSED_PROJECTIONS: "Phi-3's joined projections without copies of their parts",
        RESIDENT_WEIGHTS: "4-bit weights decoded once, where the GPU's memory has room",
        MEMORY_PROBE: "tokens at once and kept activations chosen by measurement, not by the estimate (GPU)",
    }
)


def parse_disabled(words: Iterable[str]) -> tuple[str, ...]:
    """Levers from `liger,fused-lora` and the like, in their own order. Raises ConfigError for what is none."""
    asked = {name.strip() for word in words for name in word.split(",")} - {""}
    unknown = sorted(asked - set(LEVERS))
    if unknown:
        raise ConfigError(
            f"nothing called {cut(', '.join(unknown))} can be turned off",
            hint=did_you_mean(unknown[0], LEVERS) or f"there are {', '.join(LEVERS)}",
        )
    return tuple(name for name in LEVERS if name in asked)
