"""What makes packed training exact and quick with stock torch.

Attention within documents, the output head where something is learnt, and LoRA computed along with its 4-bit layer.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from tuner.memory import head_chunk_tokens

DOCUMENT_ATTENTION = "tuner_documents"
LOOPED_ATTENTION = "tuner_documents_looped"  # the same without the kernel: one document after the other
_LARGEST_FLASH_HEAD = 256


def document_attention(
    module: nn.Module,
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
    _refuse_what_is_not_computed(attention_mask, dropout, boundaries)
    cu_seq_lens: torch.Tensor | None = boundaries.get("cu_seq_lens_q")
    if cu_seq_lens is not None and query.is_cuda and has_varlen_kernel(query.device.index):
        dtype = _flash_dtype(value)
        if dtype is not None and query.shape[-1] % 8 == 0 and query.shape[-1] <= _LARGEST_FLASH_HEAD:
            states = (query.to(dtype), key.to(dtype), value.to(dtype))
            return _varlen(*states, cu_seq_lens, boundaries["max_length_q"], scaling, sliding_window), None
    return looped_attention(
        module, query, key, value, None, scaling=scaling, sliding_window=sliding_window, **boundaries
    )


def looped_attention(
    module: nn.Module,  # noqa: ARG001
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **boundaries: Any,
) -> tuple[torch.Tensor, None]:
    """document_attention by torch's own attention, one document after the other: for CPUs, fp32, and who asks."""
    _refuse_what_is_not_computed(attention_mask, dropout, boundaries)
    edges: Sequence[int] | None = boundaries.get("document_edges")
    if edges is None:
        cu_seq_lens: torch.Tensor | None = boundaries.get("cu_seq_lens_q")
        edges = [0, query.shape[2]] if cu_seq_lens is None else cu_seq_lens.tolist()
    grouped = query.shape[1] != key.shape[1]
    lengths = [end - begin for begin, end in pairwise(edges)]
    parts = []
    # split, as the backward of a slice fills the whole row with zeros, for each document
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        mask = _window_mask(q.shape[2], sliding_window, query.device)
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _refuse_what_is_not_computed(
    attention_mask: torch.Tensor | None, dropout: float, boundaries: dict[str, Any]
) -> None:
    if attention_mask is not None or dropout:
        raise ValueError("packed documents take neither an attention mask nor attention dropout")
    if boundaries.get("s_aux") is not None or boundaries.get("softcap"):
        raise ValueError("attention sinks and capped scores are not computed here")  # gpt-oss, Gemma 2


@cache
def has_varlen_kernel(gpu: int) -> bool:
    """Whether torch's flash attention over sequences of different length runs there: torch ≥ 2.11, capability ≥ 8.0."""
    if find_spec("torch.nn.attention.varlen") is None or torch.cuda.get_device_capability(gpu) < (8, 0):
        return False
    return {"scale", "window_size"} <= _varlen_parameters()


@cache
def _varlen_parameters() -> frozenset[str]:
    """What this torch's varlen_attn takes: `window_size` since 2.11, `enable_gqa` since 2.12."""
    from torch.nn.attention.varlen import varlen_attn

    return frozenset(inspect.signature(varlen_attn).parameters)


def _flash_dtype(value: torch.Tensor) -> torch.dtype | None:
    """The 16-bit type to compute in; None in fp32. Rotary embeddings may leave query and key in another one."""
    if value.dtype in (torch.float16, torch.bfloat16):
        return value.dtype
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


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
    """The same on a GPU, in one kernel: torch's own flash attention over sequences of different length."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    if window is not None and window >= longest:
        window = None  # (-1, 0) is plain causal attention, for which there are more and faster kernels
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1 if window is None else window - 1, 0)}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _varlen_parameters():
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
    return varlen_attn(q, k, v, cu_seq_lens, cu_seq_lens, longest, longest, **options)[None]


AttentionInterface.register(DOCUMENT_ATTENTION, document_attention)
AttentionInterface.register(LOOPED_ATTENTION, looped_attention)


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
        # All in place: the logits of a chunk are the largest thing there is.
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        size = head_chunk_tokens(weight.shape[0])
        for begin in range(0, hidden.shape[0], size):
            chunk = slice(begin, begin + size)
            logits = torch.nn.functional.linear(hidden[chunk].to(weight.dtype), weight, bias).float()
            if scale != 1.0:
                logits *= scale
            if softcap:
                capped = logits.div_(softcap).tanh_()
                logits = capped * softcap
            wanted = targets[chunk, None]
            of_target = logits.gather(1, wanted)
            peak = logits.amax(dim=1, keepdim=True)
            odds = logits.sub_(peak).exp_()
            odds_sum = odds.sum(dim=1, keepdim=True)
            total += (odds_sum.log() + peak - of_target).sum()
            if gradient is not None:
                by_logits = odds.div_(odds_sum)
                by_logits.scatter_add_(1, wanted, by_logits.new_full(wanted.shape, -1.0))
                if softcap:
                    by_logits *= capped.square_().neg_().add_(1.0)
                if scale != 1.0:
                    by_logits *= scale
                gradient[chunk] = (by_logits.to(weight.dtype) @ weight).to(hidden.dtype)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # in fp32: the factor, one over the tokens of a step, has no exact half
        return (gradient.float() * upstream[0]).to(gradient.dtype), None, None, None, None, None


@dataclass(frozen=True)
class Exact:
    """Which short cuts give a model's own numbers. `packs`: documents in one row do not see each other; `learnt_head`:
    the head at learnt positions, without what else the model may do to its logits, has the model's loss."""

    packs: bool
    learnt_head: bool


def prove(model: Any) -> Exact:
    """Try the short cuts on a few tokens of the model itself, beside its own attention and loss: architectures are
    many, and what is right of one may be wrong of another. Leaves the model with the attention that its answer means.
    """
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    words = model.config.get_text_config().vocab_size
    device = model.get_input_embeddings().weight.device
    first, second = (torch.randint(0, words, (length,), generator=generator).to(device) for length in (19, 23))
    with torch.no_grad():
        packed = _tried(lambda: _packed_hidden(model, [first, second])) if is_packable(model) else None
        _take_plain_attention(model)
        alone = _tried(lambda: model.base_model(input_ids=second[None], use_cache=False).last_hidden_state[0].float())
        packs = packed is not None and alone is not None and _agree(packed[-len(second) :], alone)
        whole = model(input_ids=second[None], labels=second[None])
        loss = float(whole.loss) * (len(second) - 1)
        learnt = torch.arange(len(second) - 1, device=device)
        batch = {"input_ids": second[None], "learnt": learnt, "targets": second[1:]}
        ours = _tried(lambda: summed_nll(model, batch)) if has_plain_head(model) else None
        # Random tokens have much the same loss whatever is done to small logits; the logits themselves have not.
        logits = None if ours is None or alone is None else _logits(model, alone)
        scored = logits is not None and _agree(logits, whole.logits[0].float(), within=0.02)
    if packs:
        model.set_attn_implementation(DOCUMENT_ATTENTION)
    model.train(training)
    learnt_head = ours is not None and scored and abs(float(ours) - loss) <= 0.02 * abs(loss)
    return Exact(packs=packs, learnt_head=learnt_head)


def _tried(compute: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """What it gives, or None where the architecture is not made for it."""
    try:
        return compute()
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None


def is_packable(model: Any) -> bool:
    """Whether its attention is ours: some models take no other, and attention dropout is left to sdpa."""
    config = model.config.get_text_config()
    return config._attn_implementation == DOCUMENT_ATTENTION and not getattr(config, "attention_dropout", 0.0)


def has_plain_head(model: Any) -> bool:
    """Whether the head is a frozen matrix: not quantized, adapted or trained."""
    head = model.get_output_embeddings()
    return type(head) is nn.Linear and not any(parameter.requires_grad for parameter in head.parameters())


def _take_plain_attention(model: Any) -> None:
    try:
        model.set_attn_implementation("sdpa")
    except (ValueError, ImportError):
        model.set_attn_implementation("eager")


def _packed_hidden(model: Any, documents: list[torch.Tensor]) -> torch.Tensor:
    """(T, d) in fp32: what the last layer says of each token of the packed documents."""
    lengths = [len(document) for document in documents]
    device = documents[0].device
    edges = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    hidden: torch.Tensor = model.base_model(
        input_ids=torch.cat(documents)[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        cu_seq_lens_q=edges,
        cu_seq_lens_k=edges,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        document_edges=tuple(edges.tolist()),
        use_cache=False,
    ).last_hidden_state[0]
    return hidden.float()


def _logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """(T, V) in fp32: what summed_nll takes for the logits of hidden states (T, d)."""
    head = model.get_output_embeddings()
    scale, softcap = _logit_transform(model.config.get_text_config())
    logits = head(hidden.to(head.weight.dtype)).float() * scale
    return (logits / softcap).tanh() * softcap if softcap else logits


def _agree(one: torch.Tensor, other: torch.Tensor, within: float = 0.05) -> bool:
    """Equal but for rounding: in bf16 another shape of product is a percent off, a leak is as large as the values."""
    return bool((one - other).square().mean().sqrt() <= within * other.square().mean().sqrt())


def summed_nll(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The sum of -log p over a micro-batch's learnt tokens, as a scalar in fp32 with a gradient.

    `model` is a transformers causal LM; `batch` has input_ids and position_ids (1, T), `learnt` (n,): the positions
    before each learnt token, `targets` (n,): the tokens, and the documents' boundaries. The head is applied at these n
    positions only: at half the tokens learnt, half the work of the largest matrix.
    """
    inputs = {key: value for key, value in batch.items() if key not in ("learnt", "targets")}
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.squeeze(0)
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    return _SummedNll.apply(
        hidden.index_select(0, batch["learnt"]), head.weight, head.bias, batch["targets"], *_logit_transform(config)
    )


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """What a model does to its logits after the head: (factor, soft cap)."""
    scale = getattr(config, "logit_scale", None) or 1.0
    if getattr(config, "logits_scaling", None):
        scale /= config.logits_scaling
    return scale, getattr(config, "final_logit_softcapping", None)


class _FusedLora(torch.autograd.Function):  # type: ignore[misc]
    """y = x Wᵀ + b + s (x Aᵀ) Bᵀ with W frozen: LoRA's products are added into the large ones, none is kept twice."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: Any, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """x (…, in), A (r, in), B (out, r) → (…, out) in x's type. `layer` is bitsandbytes' Linear4bit."""
        rows = x.reshape(-1, x.shape[-1])
        adapted = Adapted(layer, lora_a.to(x.dtype), lora_b.to(x.dtype), scale)
        result, inner = adapted.product(rows)
        ctx.save_for_backward(rows, inner, adapted.a, adapted.b)
        ctx.layer, ctx.scale, ctx.adapter_dtype = layer, scale, lora_a.dtype
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, inner, a, b = ctx.saved_tensors
        adapted = Adapted(ctx.layer, a, b, ctx.scale)
        grad = upstream[0].reshape(-1, upstream[0].shape[-1])
        by_inner = grad @ b
        by_x = None
        if ctx.needs_input_grad[0]:
            by_x = adapted.by_rows(grad, by_inner).view(*upstream[0].shape[:-1], -1)
        by_a, by_b = adapted.by_adapter(rows, inner, grad, by_inner)
        return by_x, None, by_a.to(ctx.adapter_dtype), by_b.to(ctx.adapter_dtype), None


@dataclass(frozen=True)
class Adapted:
    """One 4-bit layer with its adapter as numbers, A (r, in) and B (out, r): the products of forward and backward."""

    layer: Any  # bitsandbytes' Linear4bit
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def product(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """rows (T, in) → the layer's result (T, out), and rows Aᵀ (T, r), which backward needs."""
        result = torch.nn.functional.linear(rows, _decoded(self.layer, rows.dtype), self.layer.bias)
        inner = rows @ self.a.t()
        return _add_low_rank(result, inner, self.b.t(), self.scale), inner

    def by_rows(self, grad: torch.Tensor, by_inner: torch.Tensor) -> torch.Tensor:
        """The gradient by the result (T, out), and that times B (T, r) → the gradient by the rows (T, in)."""
        return _add_low_rank(grad @ _decoded(self.layer, grad.dtype), by_inner, self.a, self.scale)

    def by_adapter(
        self, rows: torch.Tensor, inner: torch.Tensor, grad: torch.Tensor, by_inner: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients by A and by B."""
        return (by_inner.t() @ rows).mul_(self.scale), (grad.t() @ inner).mul_(self.scale)


def _add_low_rank(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """total (T, n) += scale · left (T, r) @ right (r, n), in place.

    All of it is reading and writing `total`, in which cuBLAS takes one and a half times as long as our kernel (H200).
    """
    halves = total.is_cuda and total.dtype.itemsize == 2  # fp32 is for who wants it exact: Triton would take TF32
    if halves and total.shape[0] >= _LEAST_ROWS and left.shape[1] <= _LARGEST_RANK:
        kernel = _low_rank_kernel(total.device, total.dtype)
        if kernel:
            kernel(total, left, right, scale)
            return total
    return total.addmm_(left, right, alpha=scale)


_LARGEST_RANK = 64  # of what was measured
_LEAST_ROWS = 4096  # with fewer the CPU, which takes longer to launch it, is what a step waits for


@cache
def _low_rank_kernel(device: torch.device, dtype: torch.dtype) -> Callable[..., None] | None:
    """Our kernel, where it compiles and gives what cuBLAS gives: the few tokens on which levers are proved never reach
    it. Tried on the largest rank, and on either way in which `right` lies: B is transposed, A is not."""
    try:
        from tuner.pipeline.triton_kernels import add_low_rank

        generator = torch.Generator(device).manual_seed(0)
        sizes = ((70, 300), (70, _LARGEST_RANK), (_LARGEST_RANK, 300))
        total, left, right = (torch.randn(size, generator=generator, device=device, dtype=dtype) for size in sizes)
        expected = torch.addmm(total.float(), left.float(), right.float(), alpha=0.5)
        for lying in (right, right.t().contiguous().t()):
            got = total.clone()
            add_low_rank(got, left, lying, 0.5)
            if not bool((got.float() - expected).norm() < 0.01 * expected.norm()):
                return None
    except torch.OutOfMemoryError:
        raise  # the step is tried again smaller; this says nothing of the kernel
    except Exception:  # Triton raises what it likes
        return None
    return add_low_rank


def _decoded(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """(out, in): the 4-bit weights as numbers."""
    kept: torch.Tensor | None = layer.__dict__.get(_DECODED)
    if kept is not None:
        return kept.to(dtype)
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)


_DECODED = "tuner_decoded"  # on a Linear4bit: its weights as numbers, in no state_dict


def decoded_bytes(model: nn.Module) -> int:
    """What `keep_decoded` takes: two bytes for each weight of a 4-bit layer, four in fp32."""
    return sum(
        module.weight.quant_state.shape.numel() * module.weight.quant_state.dtype.itemsize
        for module in model.modules()
        if isinstance(module, Linear4bit)
    )


def keep_decoded(model: nn.Module) -> int:
    """Decode every 4-bit layer's weights once and multiply by those from now on; how many layers there were.

    The products are of the very numbers that bitsandbytes decodes anew each time.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.__dict__[_DECODED] = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        layer.forward = _ResidentForward(layer)
    return len(layers)


def drop_decoded(model: nn.Module) -> None:
    """Undo keep_decoded."""
    for module in model.modules():
        if module.__dict__.pop(_DECODED, None) is not None:
            del module.forward


class _ResidentForward:
    """Linear4bit's forward by its decoded weights."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer = self._layer
        dtype = layer.compute_dtype or x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), layer.__dict__[_DECODED].to(dtype), bias).to(x.dtype)


def fuse_lora(model: nn.Module) -> int:
    """Let every 4-bit linear layer with one plain LoRA adapter compute both in one step; how many there were.

    Left as they are: dropout, DoRA, adapters with a bias, 8-bit and 16-bit layers. The numbers differ from PEFT's by
    rounding only.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LoraLinear4bit)
        and isinstance(module.lora_dropout["default"], nn.Identity)
        and not module.use_dora["default"]
        and module.lora_A["default"].bias is None
        and module.lora_B["default"].bias is None
    ]
    for layer in layers:
        layer.forward = FusedForward(layer)
    return len(layers)


def unfuse_lora(model: nn.Module) -> None:
    """Give every layer PEFT's own path back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), FusedForward):
            del module.forward


class FusedForward:
    """The forward of one LoRA layer while it trains; with the adapter off, PEFT's own."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._original = layer.forward

    @property
    def applies(self) -> bool:
        """Whether the one adapter is on, and not merged into the weights."""
        layer = self._layer
        return not layer.disable_adapters and not layer.merged and layer.active_adapters == ["default"]

    @property
    def parts(self) -> tuple[Any, torch.Tensor, torch.Tensor, float]:
        """The 4-bit layer, A (r, in), B (out, r), and their factor."""
        layer = self._layer
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        return layer.get_base_layer(), a, b, layer.scaling["default"]

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.applies:
            return self._original(x, *args, **kwargs)
        return _FusedLora.apply(computed_in(x), *self.parts)


def computed_in(x: torch.Tensor) -> torch.Tensor:
    """x in the type that products are computed in: autocast's, as it does not look into a function of ours."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
