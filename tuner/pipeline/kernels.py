"""What makes packed training exact and quick with stock torch: attention within documents, loss where it is learnt."""

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

DOCUMENT_ATTENTION = "tuner_documents"
_HEAD_CHUNK_TOKENS = 2048  # of logits at a time: at a vocabulary of 200k in fp32 that is 1.6 GB


def document_attention(
    module: nn.Module,  # noqa: ARG001  # the interface's signature
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **boundaries: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document of a packed row, for transformers' AttentionInterface.

    query (1, heads, T, d), key and value (1, kv heads, T, d) → (1, T, heads, d). Documents are what
    `cu_seq_lens_q` (documents + 1,) int32 says; without it the rows are whole documents. No T×T mask is made: time is
    the sum over documents of their lengths squared.
    """
    if attention_mask is not None or dropout:
        raise ValueError("packed documents take neither an attention mask nor attention dropout")
    cu_seq_lens: torch.Tensor | None = boundaries.get("cu_seq_lens_q")
    if query.is_cuda and cu_seq_lens is not None:
        return _varlen(query, key, value, cu_seq_lens, boundaries["max_length_q"], scaling, sliding_window), None
    edges = [0, query.shape[2]] if cu_seq_lens is None else cu_seq_lens.tolist()
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for begin, end in pairwise(edges):
        cut = slice(begin, end)
        mask = _window_mask(end - begin, sliding_window, query.device)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, cut],
                key[:, :, cut],
                value[:, :, cut],
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _window_mask(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """(length, length) bool, True where a token sees another; None when the window is no shorter than the document."""
    if window is None or window >= length:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_lens: torch.Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The same on a GPU, in one kernel: torch's own flash attention over sequences of different length (≥ 2.10)."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    parameters = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scaling}
    if "window_size" in parameters:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        options["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in parameters:
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, **options)[None]


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)


class _SummedNll(torch.autograd.Function):  # type: ignore[misc]
    """Sum of -log p(target) over positions, through a frozen output head, without keeping any logits.

    The gradient by the hidden states is computed along with the loss, one chunk of positions at a time: the sum's
    derivative by each position is known before backward begins.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        scale: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """hidden (n, d), weight (V, d), bias (V,), targets (n,) → scalar in fp32."""
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        for begin in range(0, hidden.shape[0], _HEAD_CHUNK_TOKENS):
            chunk = slice(begin, begin + _HEAD_CHUNK_TOKENS)
            logits = torch.nn.functional.linear(hidden[chunk].to(weight.dtype), weight, bias).float() * scale
            if softcap:
                capped = torch.tanh(logits / softcap)
                logits = capped * softcap
            log_z = torch.logsumexp(logits, dim=-1)
            total += (log_z - logits.gather(1, targets[chunk, None])[:, 0]).sum()
            if gradient is not None:
                by_logits = logits.sub_(log_z[:, None]).exp_()
                by_logits.scatter_add_(1, targets[chunk, None], by_logits.new_full((by_logits.shape[0], 1), -1.0))
                if softcap:
                    by_logits *= 1 - capped * capped
                gradient[chunk] = ((by_logits * scale).to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None, None, None


def summed_nll(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The sum of -log p over a micro-batch's learnt tokens, as a scalar in fp32 with a gradient.

    `model` is a transformers causal LM; `batch` has input_ids and position_ids (1, T), `learnt` (n,): the positions
    before each learnt token, `targets` (n,): the tokens, and the documents' boundaries. The head is applied at these n
    positions only: at half the tokens learnt, half the work of the largest matrix.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("learnt", "targets")}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    return _SummedNll.apply(
        hidden[batch["learnt"]], head.weight, head.bias, batch["targets"], *_logit_transform(config)
    )


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """What a model does to its logits after the head: (factor, soft cap)."""
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    return scale, getattr(config, "final_logit_softcapping", None)
