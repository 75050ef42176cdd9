"""Triton kernels for what lies between matrix products on a GPU; each is one pass over its data.

They compute in fp32 and round once, and take no atomics: the same input gives the same bits.
"""

import torch
import triton
import triton.language as tl

_COLUMNS = 2048
_HEADS = 16
_TILE = 64, 256  # rows and columns that one program adds to: the fastest of seven on an H200


@triton.jit
def _swiglu_kernel(gate_up, hidden, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0).to(tl.float32)
    tl.store(hidden + row * width + column, gate * tl.sigmoid(gate) * up, mask=inside)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up (T, 2n), contiguous → silu(gate) · up (T, n)."""
    count, width = gate_up.shape[0], gate_up.shape[1] // 2
    hidden = gate_up.new_empty(count, width)
    _swiglu_kernel[(count, triton.cdiv(width, _COLUMNS))](gate_up, hidden, width, BLOCK=_COLUMNS)
    return hidden


@triton.jit
def _swiglu_backward_kernel(
    gate_up,
    by_hidden,
    by_gate_up,
    hidden,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0).to(tl.float32)
    upstream = tl.load(by_hidden + row * width + column, mask=inside, other=0).to(tl.float32)
    odds = tl.sigmoid(gate)
    silu = gate * odds
    by_gate = upstream * up * (odds + silu * (1 - odds))
    tl.store(by_gate_up + row * 2 * width + column, by_gate, mask=inside)
    tl.store(by_gate_up + row * 2 * width + width + column, upstream * silu, mask=inside)
    tl.store(hidden + row * width + column, silu * up, mask=inside)


def swiglu_backward(gate_up: torch.Tensor, by_hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up (T, 2n) and the gradient by swiglu's result (T, n) → the gradient by gate_up, and the result again.

    The result comes along for one write, so that it need not be kept from forward to backward.
    """
    count, width = by_hidden.shape
    by_gate_up, hidden = torch.empty_like(gate_up), torch.empty_like(by_hidden)
    grid = (count, triton.cdiv(width, _COLUMNS))
    _swiglu_backward_kernel[grid](gate_up, by_hidden, by_gate_up, hidden, width, BLOCK=_COLUMNS)
    return by_gate_up, hidden


@triton.jit
def _rotate_kernel(
    source,
    source_token,
    source_head,
    target,
    target_token,
    target_head,
    cos,
    sin,
    direction,
    heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF)
    angles = token * 2 * half + at
    c = tl.load(cos + angles, mask=at < half, other=0).to(tl.float32)[None, :]
    s = tl.load(sin + angles, mask=at < half, other=0).to(tl.float32)[None, :] * direction
    inside = (head[:, None] < heads) & (at[None, :] < half)
    head = head[:, None].to(tl.int64)
    taken = source + token * source_token + head * source_head + at[None, :]
    first = tl.load(taken, mask=inside, other=0).to(tl.float32)
    second = tl.load(taken + half, mask=inside, other=0).to(tl.float32)
    put = target + token * target_token + head * target_head + at[None, :]
    tl.store(put, first * c - second * s, mask=inside)
    tl.store(put + half, second * c + first * s, mask=inside)


def rotate(
    source: torch.Tensor, target: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backward: bool = False
) -> None:
    """Write rotary-embedded heads into `target`, which may be `source`; `backward`: turned the other way.

    source and target (T, heads, d) with any strides between tokens and heads: gradients come as attention left them.
    cos and sin (T, r), r ≤ d, both halves alike, as transformers makes them. What lies beyond r is not rotated.
    """
    count, heads, size = source.shape
    if source.stride(2) != 1:
        source = source.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    half = cos.shape[-1] // 2
    _rotate_kernel[(count, triton.cdiv(heads, _HEADS))](
        source,
        source.stride(0),
        source.stride(1),
        target,
        target.stride(0),
        target.stride(1),
        cos,
        sin,
        -1.0 if backward else 1.0,
        heads,
        half,
        HEADS=_HEADS,
        HALF=triton.next_power_of_2(half),
    )
    if 2 * half < size and source.data_ptr() != target.data_ptr():
        target[..., 2 * half :].copy_(source[..., 2 * half :])


@triton.jit
def _add_low_rank_kernel(
    total,
    left,
    right,
    right_column,
    right_rank,
    scale,
    rows,
    columns,
    rank,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RANK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, RANK)
    there = (row[:, None] < rows) & (at[None, :] < rank)
    x = tl.load(left + row[:, None] * rank + at[None, :], mask=there, other=0)
    there = (column[None, :] < columns) & (at[:, None] < rank)
    y = tl.load(right + column[None, :] * right_column + at[:, None] * right_rank, mask=there, other=0)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    place = total + row[:, None].to(tl.int64) * columns + column[None, :]
    before = tl.load(place, mask=inside, other=0).to(tl.float32)
    tl.store(place, before + scale * tl.dot(x, y), mask=inside)


def add_low_rank(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """total (T, n) += scale · left (T, r) @ right (r, n), in place; total and left contiguous, right of any strides."""
    rows, columns = total.shape
    rank = left.shape[1]
    grid = (triton.cdiv(rows, _TILE[0]), triton.cdiv(columns, _TILE[1]))
    _add_low_rank_kernel[grid](
        total,
        left,
        right,
        right.stride(1),
        right.stride(0),
        scale,
        rows,
        columns,
        rank,
        ROWS=_TILE[0],
        COLUMNS=_TILE[1],
        RANK=max(16, triton.next_power_of_2(rank)),
        num_warps=4,
    )
