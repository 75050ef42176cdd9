"""A base model's config.json + how it is trained → bytes on each GPU. Arithmetic alone: no torch, no GPU, no download.

Parameter counts and weights are exact. Activations follow from what autograd keeps of the eager transformers blocks
with LoRA on every linear layer, bf16 throughout; tests/test_memory.py holds both against real models. The rest
(CUDA's own memory, what the allocator wastes) are allowances, named as such. docs/memory.md has the formulas.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from tuner.errors import ConfigError

GIB = 2**30

# CUDA's context, cuBLAS' workspaces and what the driver keeps back. An allowance, not a measurement.
CONTEXT_BYTES = GIB
NCCL_BYTES = GIB // 2  # for gradients to travel between GPUs; an allowance too
# Of what weights and adapters leave free, activations may fill this much: the rest is the allocator's to waste.
FILL = 0.85
HEAD_CHUNK_LOGITS = 2**26  # that exist at one time, at 6 bytes each while their gradient is made
QUANTIZATION_BLOCK = 64  # weights that share one scale
SCALES_BLOCK = 256  # scales that share one scale, with double quantization

# Bytes of optimizer state for each trained parameter.
ADAMW_STATE_BYTES = 8
OPTIMIZER_STATE_BYTES: Mapping[str, float] = MappingProxyType(
    {
        "adafactor": 0.1,  # a row and a column of each matrix
        "adagrad": 4,
        "adamw_8bit": 2,
        "adamw_bnb_8bit": 2,
        "adamw_torch_4bit": 1,
        "adamw_torch_8bit": 2,
        "ademamix": 12,
        "ademamix_8bit": 3,
        "lion_32bit": 4,
        "lion_8bit": 1,
        "paged_adamw": 8,
        "paged_adamw_8bit": 2,
        "paged_ademamix_32bit": 12,
        "paged_ademamix_8bit": 3,
        "paged_lion_32bit": 4,
        "paged_lion_8bit": 1,
        "rmsprop": 4,
        "rmsprop_bnb": 4,
        "rmsprop_bnb_32bit": 4,
        "rmsprop_bnb_8bit": 1,
        "sgd": 0,
    }
)


# ── the model ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Family:
    """What config.json does not say because the architecture's code does."""

    linear_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    hidden_norms: int = 2  # of a block, as wide as the residual stream
    head_norms: bool = False  # one over each query and key head
    biased_modules: tuple[str, ...] = ()
    ties_head: bool = False  # where config.json leaves tie_word_embeddings out


FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "gemma3_text": _Family(hidden_norms=4, head_norms=True, ties_head=True),
        "llama": _Family(),
        "mistral": _Family(),
        "phi3": _Family(linear_modules=("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        "qwen2": _Family(biased_modules=("q_proj", "k_proj", "v_proj")),
        "qwen3": _Family(head_norms=True),
    }
)
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block."""

    name: str
    inputs: int
    outputs: int
    has_bias: bool

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """A model's dimensions. `query_size` is all query heads together, `key_value_size` all key heads."""

    layers: int
    hidden_size: int
    intermediate_size: int
    vocabulary: int
    heads: int
    query_size: int
    key_value_size: int
    linears: tuple[Linear, ...]
    hidden_norms: int
    head_norm_size: int  # 0 where there is none
    has_own_head: bool
    caps_logits: bool

    @property
    def head_size(self) -> int:
        return self.query_size // self.heads


@dataclass(frozen=True)
class Parameters:
    """How many of each kind; `head` is 0 where it is the embedding itself."""

    linear: int
    embedding: int
    head: int
    other: int  # norms and biases

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.head + self.other


def read_shape(name: str, config: Mapping[str, Any]) -> Shape:
    """The dimensions that config.json states. Raises ConfigError for an architecture that is not in FAMILIES."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        kind = f"of architecture {config['model_type']!r}" if "model_type" in config else "that is no preset"
        raise ConfigError(
            f"{name}: the dimensions of a model {kind} are not known before a download",
            hint=f"with --base-model DIR its config.json tells them, if it is one of {', '.join(FAMILIES)}",
        )
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not isinstance(config.get(key), int)]
    if missing:
        raise ConfigError(f"{name}: config.json has no {', '.join(missing)}")
    hidden, heads, intermediate = (config[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    head_size = config.get("head_dim") or hidden // heads
    query = heads * head_size
    key_value = (config.get("num_key_value_heads") or heads) * head_size
    sizes = {
        "q_proj": (hidden, query),
        "k_proj": (hidden, key_value),
        "v_proj": (hidden, key_value),
        "qkv_proj": (hidden, query + 2 * key_value),
        "o_proj": (query, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "gate_up_proj": (hidden, 2 * intermediate),
        "down_proj": (intermediate, hidden),
    }
    biased = {
        *family.biased_modules,
        *(_ATTENTION if config.get("attention_bias") else ()),
        *(_MLP if config.get("mlp_bias") else ()),
    }
    return Shape(
        layers=config["num_hidden_layers"],
        hidden_size=hidden,
        intermediate_size=intermediate,
        vocabulary=config["vocab_size"],
        heads=heads,
        query_size=query,
        key_value_size=key_value,
        linears=tuple(Linear(module, *sizes[module], module in biased) for module in family.linear_modules),
        hidden_norms=family.hidden_norms,
        head_norm_size=head_size if family.head_norms else 0,
        has_own_head=not config.get("tie_word_embeddings", family.ties_head),
        caps_logits=bool(config.get("final_logit_softcapping")),
    )


def count_parameters(shape: Shape) -> Parameters:
    """Exact: what `sum(p.numel() for p in model.parameters())` gives for the loaded model."""
    embedding = shape.vocabulary * shape.hidden_size
    norms = shape.hidden_norms * shape.hidden_size + 2 * shape.head_norm_size
    biases = sum(linear.outputs for linear in shape.linears if linear.has_bias)
    return Parameters(
        linear=shape.layers * sum(linear.weights for linear in shape.linears),
        embedding=embedding,
        head=embedding if shape.has_own_head else 0,
        other=shape.layers * (norms + biases) + shape.hidden_size,
    )


# ── how it is trained ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Setup:
    """What of a configuration its memory depends on."""

    weight_bits: int  # of the blocks' linear layers: 4, 8, 16 or 32
    double_quant: bool
    compute_bytes: int  # of one number of the residual stream: 2, or 4 for an fp32 model
    rank: int
    modules: tuple[str, ...]  # that LoRA adapts
    adapted_layers: int
    whole_modules: tuple[str, ...]  # LoraConfig.modules_to_save: trained whole
    optimizer: str
    has_dropout: bool
    gpus: int


def adapter_parameters(shape: Shape, setup: Setup) -> int:
    """What is trained: A and B of each adapted layer, and whole copies of modules_to_save."""
    low_rank = setup.adapted_layers * sum(
        setup.rank * (linear.inputs + linear.outputs) for linear in shape.linears if linear.name in setup.modules
    )
    whole = sum(name in setup.whole_modules for name in ("embed_tokens", "lm_head"))
    return low_rank + whole * shape.vocabulary * shape.hidden_size


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU at the worst moment of a micro-batch of `tokens` tokens.

    Forward ends with one chunk of logits, backward decodes one weight and holds one block's gradients: the two never
    meet, so only the larger counts.
    """

    tokens: int
    checkpointing: bool
    linear_weights: int
    other_weights: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    decoded_weight: int
    block_gradients: int
    context: int

    @property
    def resident(self) -> int:
        """What is there between two micro-batches."""
        trained = self.adapters + self.gradients + self.optimizer
        return self.linear_weights + self.other_weights + trained + self.context

    @property
    def moving(self) -> int:
        """What a micro-batch adds at its worst moment."""
        return self.activations + max(self.logits, self.decoded_weight + self.block_gradients)

    @property
    def waste(self) -> int:
        """What the allocator may lose to fragments: activations fill at most `FILL` of what is free."""
        return math.ceil(self.moving * (1 / FILL - 1))

    @property
    def total(self) -> int:
        return self.resident + self.moving + self.waste


def estimate_memory(shape: Shape, setup: Setup, *, tokens: int, checkpointing: bool) -> Estimate:
    """What one GPU holds when a micro-batch has `tokens` tokens, all of them learnt."""
    parameters = count_parameters(shape)
    trained = adapter_parameters(shape, setup)
    block = _saved_by_block(shape, setup) * tokens
    kept = shape.layers * setup.compute_bytes * shape.hidden_size * tokens + block
    head_tokens = min(tokens, head_chunk_tokens(shape.vocabulary))
    return Estimate(
        tokens=tokens,
        checkpointing=checkpointing,
        linear_weights=shape.layers * sum(linear_bytes(linear, setup) for linear in shape.linears),
        other_weights=(parameters.total - parameters.linear) * setup.compute_bytes,
        adapters=(4 + (setup.compute_bytes if setup.compute_bytes < 4 else 0)) * trained,  # fp32, and cast for matmuls
        gradients=4 * trained * (2 if setup.gpus > 1 else 1),  # and once more in what travels between GPUs
        optimizer=math.ceil(trained * OPTIMIZER_STATE_BYTES.get(setup.optimizer, ADAMW_STATE_BYTES)),
        activations=(kept if checkpointing else shape.layers * block) + _saved_around_blocks(shape, setup) * tokens,
        logits=_LOGIT_BYTES[shape.caps_logits] * head_tokens * shape.vocabulary,
        decoded_weight=_decoded_bytes(shape, setup),
        block_gradients=_block_gradients(shape, setup) * tokens,
        context=CONTEXT_BYTES + (NCCL_BYTES if setup.gpus > 1 else 0),
    )


def head_chunk_tokens(vocabulary: int) -> int:
    """At how many positions at a time the output head is applied: pipeline/kernels.py does, and the estimate counts."""
    return max(64, HEAD_CHUNK_LOGITS // vocabulary)


def linear_bytes(linear: Linear, setup: Setup) -> int:
    """One layer's frozen weight with its scales, as bitsandbytes allocates them."""
    weights = linear.weights
    match setup.weight_bits:
        case 4:
            scales = math.ceil(weights / QUANTIZATION_BLOCK)
            tables = 4 * 16
            if not setup.double_quant:
                return math.ceil(weights / 2) + 4 * scales + tables
            tables += 4 * 256 + 4
            return math.ceil(weights / 2) + scales + 4 * math.ceil(scales / SCALES_BLOCK) + tables
        case 8:
            return weights + 4 * linear.outputs
        case bits:
            return weights * bits // 8


# logits in fp32, which become their gradient in place, and its copy in bf16; with a soft cap its derivative too
_LOGIT_BYTES = {False: 6, True: 10}


def _saved_by_block(shape: Shape, setup: Setup) -> int:
    """Bytes for each token that autograd keeps of one block."""
    number = setup.compute_bytes
    norms = 4 * shape.hidden_norms * shape.hidden_size + number * 2 * shape.hidden_size
    attention = number * 2 * (shape.query_size + shape.key_value_size) + 4 * shape.heads
    if shape.head_norm_size:
        norms += 4 * (shape.query_size + shape.key_value_size)
    mlp = number * 4 * shape.intermediate_size
    adapted = [linear for linear in shape.linears if linear.name in setup.modules]
    low_rank = number * setup.rank * len(adapted)
    dropped = (number + 1) * sum(linear.inputs for linear in adapted) if setup.has_dropout else 0
    return norms + attention + mlp + low_rank + dropped


def _saved_around_blocks(shape: Shape, setup: Setup) -> int:
    """The last norm, the positions' sines, and the hidden states that the head sees, with their gradient."""
    return 4 * shape.hidden_size + setup.compute_bytes * (3 * shape.hidden_size + 4 * shape.head_size)


def _block_gradients(shape: Shape, setup: Setup) -> int:
    """Bytes for each token of what backward holds beside the saved, in the MLP or in a norm."""
    mlp = setup.compute_bytes * (4 * shape.intermediate_size + 2 * shape.hidden_size)
    norm = 12 * shape.hidden_size
    return max(mlp, norm)


def _decoded_bytes(shape: Shape, setup: Setup) -> int:
    """The largest weight as backward multiplies by it; one that is not quantized is used as it lies."""
    if setup.weight_bits > 8:
        return 0
    return setup.compute_bytes * max(linear.weights for linear in shape.linears)


def largest_micro_batch(
    shape: Shape, setup: Setup, *, checkpointing: bool, memory_bytes: int, most: int, step: int = 64
) -> Estimate | None:
    """The estimate at the most tokens, a multiple of `step` up to `most`, that `memory_bytes` hold; None if none do."""
    fits: Estimate | None = None
    low, high = 1, most // step
    while low <= high:
        middle = (low + high) // 2
        estimate = estimate_memory(shape, setup, tokens=middle * step, checkpointing=checkpointing)
        if estimate.total <= memory_bytes:
            fits, low = estimate, middle + 1
        else:
            high = middle - 1
    return fits


# ── work ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def flops_per_token(
    shape: Shape, *, checkpointing: bool, learnt_share: float = 1.0, document_tokens: float = 0, trained: int = 0
) -> float:
    """Floating-point operations for one token, forward and backward.

    A frozen weight costs 2 forward and 2 backward, there is no gradient of its own; recomputing the blocks costs 2
    more. The head is computed where something is learnt. `document_tokens` is a document's mean length, which its
    attention grows with.
    """
    passes = 3 if checkpointing else 2
    linear = 2 * passes * count_parameters(shape).linear
    head = 4 * shape.vocabulary * shape.hidden_size * learnt_share
    attention = 2 * (passes + 1) * shape.layers * shape.query_size * document_tokens
    return linear + head + attention + 2 * (passes + 1) * trained
