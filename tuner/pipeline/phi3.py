"""Phi-3's blocks without copies of parts: its query, key and value are one product, gate and up another.

transformers slices these products. A slice's backward fills a tensor of the whole size with zeros, and kernels that
want contiguous parts copy them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tuner.pipeline.kernels import (
    DOCUMENT_ATTENTION,
    LOOPED_ATTENTION,
    Adapted,
    FusedForward,
    computed_in,
    document_attention,
    looped_attention,
)

# ── between the products: by torch, and on a GPU by one kernel each ──────────────────────────────────────────────────


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up (T, 2n) → silu(gate) · up (T, n)."""
    if gate_up.is_cuda:
        from tuner.pipeline.triton_kernels import swiglu as kernel

        return kernel(gate_up)
    gate, up = gate_up.chunk(2, dim=1)
    return nn.functional.silu(gate).mul_(up)


def swiglu_backward(gate_up: torch.Tensor, by_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up (T, 2n) and the gradient by swiglu's result (T, n) → the gradient by gate_up, and the result again."""
    if gate_up.is_cuda:
        from tuner.pipeline.triton_kernels import swiglu_backward as kernel

        return kernel(gate_up, by_hidden)
    gate, up = gate_up.chunk(2, dim=1)
    silu = nn.functional.silu(gate)
    by_gate_up = torch.empty_like(gate_up)
    by_gate, by_up = by_gate_up.chunk(2, dim=1)
    torch.ops.aten.silu_backward.grad_input(by_hidden * up, gate, grad_input=by_gate)
    torch.mul(by_hidden, silu, out=by_up)
    return by_gate_up, silu.mul_(up)


def rotate(
    source: torch.Tensor, target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backward: bool = False
) -> None:
    """Write rotary-embedded heads into `target`, which may be `source`; `backward`: turned the other way.

    source and target (T, heads, d); cos and sin (T, r), r ≤ d, both halves alike, as transformers makes them. What
    lies beyond r is not rotated.
    """
    if source.is_cuda:
        from tuner.pipeline.triton_kernels import rotate as kernel

        return kernel(source, target, cos, sin, backward=backward)
    half = cos.shape[1] // 2
    c, s = cos[:, None, :half], sin[:, None, :half]
    if backward:
        s = -s
    first, second = source[..., :half], source[..., half : 2 * half]
    turned = first * c - second * s, second * c + first * s
    target[..., :half], target[..., half : 2 * half] = turned
    if source.data_ptr() != target.data_ptr():
        target[..., 2 * half :] = source[..., 2 * half :]
    return None


# ── the blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────

_ATTENTION = {DOCUMENT_ATTENTION: document_attention, LOOPED_ATTENTION: looped_attention}


class _RotatedProjections(torch.autograd.Function):  # type: ignore[misc]
    """Hidden states → query, key and value with LoRA and rotary embedding, as three views of one product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: Any,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scale: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        heads: tuple[int, int],
    ) -> tuple[torch.Tensor, ...]:
        """x (T, in), cos and sin (T, r), `heads` of query and of key → (T, heads, d), (T, kv, d), (T, kv, d)."""
        adapted = Adapted(layer, lora_a.to(x.dtype), lora_b.to(x.dtype), scale)
        result, inner = adapted.product(x)
        parts = result.view(x.shape[0], heads[0] + 2 * heads[1], -1)
        rotated = parts[:, : sum(heads)]
        rotate(rotated, rotated, cos, sin)
        ctx.save_for_backward(x, inner, adapted.a, adapted.b, cos, sin)
        ctx.layer, ctx.scale, ctx.adapter_dtype, ctx.shape = layer, scale, lora_a.dtype, parts.shape
        query, key, value = parts.split([heads[0], heads[1], heads[1]], dim=1)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, a, b, cos, sin = ctx.saved_tensors
        by_query, by_key, by_value = upstream
        parts = by_value.new_empty(ctx.shape)
        query, key, value = parts.split([by_query.shape[1], by_key.shape[1], by_value.shape[1]], dim=1)
        rotate(by_query, query, cos, sin, backward=True)
        rotate(by_key, key, cos, sin, backward=True)
        value.copy_(by_value)
        adapted = Adapted(ctx.layer, a, b, ctx.scale)
        grad = parts.flatten(1)
        by_inner = grad @ b
        by_x = adapted.by_rows(grad, by_inner) if ctx.needs_input_grad[0] else None
        by_a, by_b = adapted.by_adapter(x, inner, grad, by_inner)
        return by_x, None, by_a.to(ctx.adapter_dtype), by_b.to(ctx.adapter_dtype), None, None, None, None


class _SwigluDown(torch.autograd.Function):  # type: ignore[misc]
    """silu(gate) · up, and the down projection with LoRA; what lies between them is made again backward."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: torch.Tensor, layer: Any, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """gate_up (T, 2n), A (r, n), B (out, r) → (T, out)."""
        adapted = Adapted(layer, lora_a.to(gate_up.dtype), lora_b.to(gate_up.dtype), scale)
        result, inner = adapted.product(swiglu(gate_up))
        ctx.save_for_backward(gate_up, inner, adapted.a, adapted.b)
        ctx.layer, ctx.scale, ctx.adapter_dtype = layer, scale, lora_a.dtype
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, inner, a, b = ctx.saved_tensors
        adapted = Adapted(ctx.layer, a, b, ctx.scale)
        grad = upstream[0].contiguous()
        by_inner = grad @ b
        by_gate_up, hidden = swiglu_backward(gate_up, adapted.by_rows(grad, by_inner))
        by_a, by_b = adapted.by_adapter(hidden, inner, grad, by_inner)
        return by_gate_up, None, by_a.to(ctx.adapter_dtype), by_b.to(ctx.adapter_dtype), None


@dataclass(frozen=True)
class _Forward:
    module: Any
    original: Callable[..., Any]
    replaced: Callable[..., Any] | None  # on this module itself before: Liger's

    def give_back(self) -> None:
        if self.replaced is None:
            del self.module.forward
        else:
            self.module.forward = self.replaced


class _AttentionForward(_Forward):
    """Phi3Attention's forward for packed rows."""

    def __call__(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        module, config = self.module, self.module.config
        fused = module.qkv_proj.forward
        attention = _ATTENTION.get(config._attn_implementation)
        one_row = hidden_states.shape[0] == 1 and past_key_values is None
        if not one_row or attention is None or not isinstance(fused, FusedForward) or not fused.applies:
            return self.original(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        cos, sin = (one.reshape(-1, one.shape[-1]) for one in position_embeddings)
        heads = config.num_attention_heads, config.num_key_value_heads
        parts = _RotatedProjections.apply(computed_in(hidden_states).squeeze(0), *fused.parts, cos, sin, heads)
        query, key, value = (part.transpose(0, 1)[None] for part in parts)
        attended, _ = attention(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=module.scaling,
            dropout=module.attention_dropout if module.training else 0.0,
            sliding_window=getattr(config, "sliding_window", None),
            **kwargs,
        )
        return module.o_proj(attended.flatten(2)), None


class _MlpForward(_Forward):
    """Phi3MLP's forward."""

    def __call__(self, hidden_states: torch.Tensor) -> Any:
        module = self.module
        fused = module.down_proj.forward
        if not isinstance(fused, FusedForward) or not fused.applies:
            return self.original(hidden_states)
        gate_up = computed_in(module.gate_up_proj(hidden_states))
        result = _SwigluDown.apply(gate_up.flatten(0, -2), *fused.parts)
        return result.view(*hidden_states.shape[:-1], -1)


def _blocks(model: nn.Module) -> list[tuple[Any, Any]]:
    """Attention and MLP of each layer."""
    return [(layer.self_attn, layer.mlp) for layer in model.get_decoder().layers]


def why_not(model: Any) -> str | None:
    """What keeps a model from `take_parts`; None: nothing."""
    if model.config.model_type != "phi3":
        return "for Phi-3's architecture"
    if model.config.hidden_act != "silu":
        return f"not for {model.config.hidden_act}"
    projections = [one for attention, mlp in _blocks(model) for one in (attention.qkv_proj, mlp.down_proj)]
    return None if all(isinstance(one.forward, FusedForward) for one in projections) else "needs fused-lora"


def take_parts(model: Any) -> None:
    """Let every block compute as this module says. Rows of other shapes go the original way."""
    for attention, mlp in _blocks(model):
        for module, forward in ((attention, _AttentionForward), (mlp, _MlpForward)):
            module.forward = forward(module, module.forward, module.__dict__.get("forward"))


def give_back(model: Any) -> None:
    """Undo take_parts."""
    for block in _blocks(model):
        for module in block:
            if isinstance(module.forward, _Forward):
                module.forward.give_back()
