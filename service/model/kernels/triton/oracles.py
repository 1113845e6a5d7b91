"""What the Triton kernels must compute, in plain torch and float32: for tests and self-checks, and
for machines without Triton. Runs in the worker process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .shapes import OUTER_BLOCK, SCALE_BLOCK

if TYPE_CHECKING:
    from .nf4 import NF4Weight

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def dequantize(weight: NF4Weight) -> Tensor:
    """float32 [n_out, n_in]."""
    table = torch.tensor(NF4_VALUES, device=weight.packed.device)
    codes = torch.stack((weight.packed >> 4, weight.packed & 15), 1).flatten().long()
    scales = weight.scales
    if weight.code is not None and weight.outer is not None and weight.offset is not None:
        outer = weight.outer.repeat_interleave(OUTER_BLOCK)[: scales.numel()]
        scales = weight.code[scales.flatten().long()] * outer + weight.offset
    values = table[codes].view(-1, SCALE_BLOCK) * scales.reshape(-1, 1)
    return values.view(weight.n_out, weight.n_in)


def multiply(x: Tensor, weight: NF4Weight) -> Tensor:
    """x [tokens, n_in] → float32 [tokens, n_out]."""
    return x.float() @ dequantize(weight).T


def add_adapters(
    x: Tensor, y: Tensor, pool_a: Tensor, pool_b: Tensor, tiles: Sequence[Sequence[int]], weights: Tensor
) -> Tensor:
    """y [tokens, n_out] in float32 with what the adapters add: of each tile (first token, tokens,
    first rank row, rank) (x Aᵀ * weight) B; `weights` [tiles, tokens of a tile at most].
    """
    out = y.float().clone()
    for (start, tokens, low, rank), own in zip(tiles, weights, strict=True):
        rows, ranks = slice(start, start + tokens), slice(low, low + rank)
        inner = x[rows].float() @ pool_a[ranks].float().T * own[:tokens, None]
        out[rows] += inner @ pool_b[ranks].float()
    return out


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    sequence_start: Tensor,
    kv_length: Tensor,
    block_table: Tensor,
    *,
    scale: float,
    window: int = 0,
    chunk: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `attention.attend`, in float32."""
    out = query.new_zeros(*query.shape[:2], values.shape[3], dtype=torch.float32)
    starts, lengths = sequence_start.tolist(), kv_length.tolist()
    groups = query.shape[1] // keys.shape[2]
    for i, length in enumerate(lengths):
        own = slice(starts[i], starts[i + 1])
        key, value = (
            part[block_table[i].long()].flatten(0, 1)[:length].repeat_interleave(groups, 1).float()
            for part in (keys, values)
        )
        scores = torch.einsum("thd,lhd->htl", query[own].float(), key) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        tokens = scores.shape[1]
        visible = _visible(torch.arange(length - tokens, length, device=query.device), length, window, chunk)
        scores = scores.masked_fill(~visible, float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, tokens, 1)), 2)
        out[own] = torch.einsum("htl,lhd->thd", scores.softmax(-1)[..., :length], value)
    return out


def _visible(positions: Tensor, length: int, window: int, chunk: int) -> Tensor:
    """Bool [tokens, length]: which keys the tokens at these positions see."""
    key, own = torch.arange(length, device=positions.device), positions[:, None]
    visible = key <= own
    if window:
        visible &= key > own - window
    if chunk:
        visible &= key >= own - own % chunk
    return visible
