"""Adds adapters to the outputs of up to three linears that share their input: y += (x Aᵀ * weight)
B, each token with the rank rows of its own adapters, and before that DoRA's gate of y.

A tile is (first token, tokens, first rank row, rank): at most 16 consecutive tokens of one adapter.
Tokens with several adapters have a tile for each, one behind the other; a tile of no tokens is
unused. Tokens without a tile keep their y to the bit. Shrink sums the inputs in parts, which expand
adds in their order. All that differs from step to step is read from memory: a launch that is
recorded serves all steps of as many tiles. Runs in the worker process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .shapes import (
    LORA_PROGRAMS,
    LORA_RANK,
    LORA_TOKENS,
    MEMBERS,
    LoraMember,
    LoraShape,
    LoraTiles,
    lora_shape,
)

STEP_TENSORS = ["tiles", "weights", "gates"]  # slices of which start anywhere


@triton.jit(do_not_specialize=["programs"], do_not_specialize_on_alignment=STEP_TENSORS)
def shrink(
    x, a0, a1, a2, tiles, ranks0, ranks1, ranks2, inner,
    n_in, programs, x_row, a_row, inner_member, inner_split, inner_row,
    TOKENS: tl.constexpr, RANK: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """inner[member, split, tile * TOKENS + token, rank row of the tile] = the split's part of x Aᵀ; a
    program takes every so many-th RANK rows.
    """
    tile, split, third = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, tokens = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    member, program = third // programs, third % programs
    a, ranks = a0, ranks0
    if member == 1:
        a, ranks = a1, ranks1
    elif member == 2:
        a, ranks = a2, ranks2
    low = tl.load(tiles + tile * 4 + 2)
    rank = tl.minimum(tl.load(tiles + tile * 4 + 3), tl.load(ranks + low))
    if tokens == 0 or program * RANK >= rank:
        return
    t, k = tl.arange(0, TOKENS), tl.arange(0, K)
    rows = x + (start + t)[:, None] * x_row + k[None, :]
    is_token = (t < tokens)[:, None]
    share = tl.cdiv(tl.cdiv(n_in, K), tl.num_programs(1))
    first, last = split * share, tl.minimum((split + 1) * share, tl.cdiv(n_in, K))
    where = inner + member * inner_member + split * inner_split + (tile * TOKENS + t)[:, None] * inner_row
    for block in range(program, tl.cdiv(rank, RANK), programs):
        r = block * RANK + tl.arange(0, RANK)
        is_rank = (r < rank)[:, None]
        own = a + (low + r)[:, None].to(tl.int64) * a_row + k[None, :]
        acc = tl.zeros([TOKENS, RANK], tl.float32)
        for i in tl.range(first, last, num_stages=STAGES):
            is_input = (i * K + k < n_in)[None, :]
            left = tl.load(rows + i * K, mask=is_token & is_input, other=0.0)
            right = tl.load(own + i * K, mask=is_rank & is_input, other=0.0)
            acc = tl.dot(left, tl.trans(right.to(left.dtype)), acc, input_precision="ieee")
        tl.store(where + r[None, :], acc, mask=is_token & is_rank.T)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=STEP_TENSORS)
def expand(
    inner, b0, b1, b2, tiles, weights, gates, ranks0, ranks1, ranks2, bias0, bias1, bias2, y0, y1, y2,
    count, n_out0, n_out1, n_out2, inner_member, inner_split, inner_row,
    b_row0, b_row1, b_row2, y_row0, y_row1, y_row2,
    TOKENS: tl.constexpr, RANK: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y[token] += the sum over the token's tiles of gate * (y - bias) + (inner * weight) B, of one
    member's columns.
    """
    tile, block = tl.program_id(0), tl.program_id(1)
    start, tokens = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    # The tiles of one token are one program's: the first of them
    earlier = tl.load(tiles + tile * 4 - 4, mask=tile > 0, other=-1)
    is_later = (tl.load(tiles + tile * 4 - 3, mask=tile > 0, other=0) > 0) & (earlier == start)
    if tokens == 0 or is_later:
        return
    first1 = tl.cdiv(n_out0, N)
    first2 = first1 + tl.cdiv(n_out1, N)
    if block < first1:
        b, y, n_out, b_row, y_row, parts = b0, y0, n_out0, b_row0, y_row0, inner
        ranks, bias = ranks0, bias0
    elif block < first2:
        b, y, n_out, b_row, y_row, parts = b1, y1, n_out1, b_row1, y_row1, inner + inner_member
        ranks, bias = ranks1, bias1
        block -= first1
    else:
        b, y, n_out, b_row, y_row, parts = b2, y2, n_out2, b_row2, y_row2, inner + 2 * inner_member
        ranks, bias = ranks2, bias2
        block -= first2
    t, r, n = tl.arange(0, TOKENS), tl.arange(0, RANK), block * N + tl.arange(0, N)
    is_token, is_column = (t < tokens)[:, None], (n < n_out)[None, :]
    where = y + (start + t)[:, None] * y_row + n[None, :]
    acc = tl.zeros([TOKENS, N], tl.float32)
    met, goes_on = 0, tokens > 0
    while goes_on:
        low, gate = tl.load(tiles + tile * 4 + 2), tl.load(gates + tile)
        rank = tl.minimum(tl.load(tiles + tile * 4 + 3), tl.load(ranks + low))
        if gate >= 0 and rank > 0:
            own = tl.load(where, mask=is_token & is_column, other=0.0).to(tl.float32)
            if BIAS:
                own -= tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[None, :]
            grown = tl.load(b + gate.to(tl.int64) * b_row + n, mask=n < n_out, other=0.0)
            acc += own * grown.to(tl.float32)[None, :]
        weight = tl.load(weights + tile * TOKENS + t)
        for first in range(0, rank, RANK):
            is_rank = first + r < rank
            rows = b + (low + first + r)[:, None].to(tl.int64) * b_row + n[None, :]
            right = tl.load(rows, mask=is_rank[:, None] & is_column, other=0.0)
            left = tl.zeros([TOKENS, RANK], tl.float32)
            part = parts + (tile * TOKENS + t)[:, None] * inner_row + (first + r)[None, :]
            for split in tl.static_range(SPLITS):
                left += tl.load(part + split * inner_split, mask=is_token & is_rank[None, :], other=0.0)
            left = (left * weight[:, None]).to(right.dtype)
            acc = tl.dot(left, right, acc, input_precision="ieee")
        met += rank
        tile += 1
        following = tl.load(tiles + tile * 4, mask=tile < count, other=-1)
        goes_on = (following == start) & (tl.load(tiles + tile * 4 + 1, mask=tile < count, other=0) > 0)
    keep = is_token & is_column & (met > 0)
    tl.store(where, (tl.load(where, mask=keep, other=0.0) + acc).to(y.dtype.element_ty), mask=keep)


def add_adapters(
    x: Tensor, members: Sequence[LoraMember], layout: LoraTiles, shape: LoraShape | None = None
) -> None:
    """Adds to each member's y, in place, what the adapters make of x [tokens, n_in].

    Raises ValueError for what does not fit together.
    """
    _check_adapters(x, members, layout)
    count, n_in = layout.tiles.shape[0], x.shape[1]
    shape = shape or lora_shape(n_in)
    blocks = triton.cdiv(layout.most_rank, LORA_RANK)
    if not count or not blocks:
        return
    ranks = blocks * LORA_RANK
    inner = x.new_empty(len(members), shape.splits, count * LORA_TOKENS, ranks, dtype=torch.float32)
    _launch_shrink(x, members, layout.tiles, inner, shape, min(blocks, LORA_PROGRAMS))
    _launch_expand(inner, members, layout, shape)


SHRINK_STAGES = 4


def _launch_shrink(
    x: Tensor,
    members: Sequence[LoraMember],
    tiles: Tensor,
    inner: Tensor,
    shape: LoraShape,
    programs: int,
) -> None:
    pools = _padded([member.a for member in members])
    shrink[tiles.shape[0], shape.splits, len(members) * programs](
        x,
        *pools,
        tiles,
        *_padded([member.ranks for member in members]),
        inner,
        x.shape[1],
        programs,
        x.stride(0),
        pools[0].stride(0),
        *inner.stride()[:3],
        TOKENS=LORA_TOKENS,
        RANK=LORA_RANK,
        K=shape.inputs,
        STAGES=SHRINK_STAGES,
        num_warps=4,
    )


def _launch_expand(inner: Tensor, members: Sequence[LoraMember], layout: LoraTiles, shape: LoraShape) -> None:
    sizes = [member.y.shape[1] for member in members] + [0] * (MEMBERS - len(members))
    pools, outputs = _padded([member.b for member in members]), _padded([member.y for member in members])
    biases = [member.b if member.bias is None else member.bias for member in members]
    count = layout.tiles.shape[0]
    expand[count, sum(triton.cdiv(size, shape.columns) for size in sizes)](
        inner,
        *pools,
        layout.tiles,
        layout.weights,
        layout.gates,
        *_padded([member.ranks for member in members]),
        *_padded(biases),
        *outputs,
        count,
        *sizes,
        *inner.stride()[:3],
        *(pool.stride(0) for pool in pools),
        *(y.stride(0) for y in outputs),
        TOKENS=LORA_TOKENS,
        RANK=shape.ranks,
        N=shape.columns,
        SPLITS=shape.splits,
        BIAS=members[0].bias is not None,
        num_warps=4,
    )


def _padded(tensors: list[Tensor]) -> list[Tensor]:
    """Of as many as the kernels take: the first stands in for what is not there, and is not read."""
    return tensors + tensors[:1] * (MEMBERS - len(tensors))


def _check_adapters(x: Tensor, members: Sequence[LoraMember], layout: LoraTiles) -> None:
    if not 1 <= len(members) <= MEMBERS:
        raise ValueError(f"{len(members)} outputs in one launch, not 1 to {MEMBERS}")
    tiles, weights = layout.tiles, layout.weights
    if tiles.dtype != torch.int32 or tiles.dim() != 2 or tiles.shape[1] != 4 or not tiles.is_contiguous():
        raise ValueError(f"tiles {tuple(tiles.shape)} of {tiles.dtype} are not int32 [n, 4]")
    if weights.dtype != torch.float32 or weights.shape != (tiles.shape[0], LORA_TOKENS):
        raise ValueError(f"weights {tuple(weights.shape)} of {weights.dtype} for {tiles.shape[0]} tiles")
    if layout.gates.dtype != torch.int32 or layout.gates.shape != tiles.shape[:1]:
        raise ValueError(f"gates {tuple(layout.gates.shape)} for {tiles.shape[0]} tiles")
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"inputs {tuple(x.shape)} are no rows")
    for member in members:
        _check_member(x, member, members[0])


def _check_member(x: Tensor, member: LoraMember, first: LoraMember) -> None:
    y, a, b, ranks, bias = member
    if ranks.dtype != torch.int32 or len(ranks) != len(a):
        raise ValueError(f"ranks {tuple(ranks.shape)} of {ranks.dtype} for {len(a)} rank rows")
    if (bias is None) != (first.bias is None) or (bias is not None and len(bias) != y.shape[1]):
        raise ValueError("the outputs of one launch have biases of their widths, or none has one")
    if a.shape[1] != x.shape[1] or a.shape[0] != b.shape[0] or y.shape != (x.shape[0], b.shape[1]):
        shapes = [tuple(part.shape) for part in (x, y, a, b)]
        raise ValueError(f"inputs, outputs, A and B of {shapes} do not fit together")
    if a.stride(0) != first.a.stride(0) or any(part.stride(1) != 1 for part in (y, a, b)):
        raise ValueError("the pools of one launch differ in their strides")
