"""What the Triton kernels must compute, in plain torch and float32: for tests and self-checks, and
for machines without Triton. Runs in the worker process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .shapes import OUTER_BLOCK, SCALE_BLOCK, LoraMember, LoraTiles

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


def add_adapters(x: Tensor, member: LoraMember, layout: LoraTiles) -> Tensor:
    """y [tokens, n_out] in float32 with what the adapters add: of each tile (x Aᵀ * weight) B, and
    before that its gate's share of y without the bias.
    """
    a, b = member.a.float(), member.b.float()
    plain = member.y.float() - (0 if member.bias is None else member.bias.float())
    out = member.y.float().clone()
    for (start, tokens, low, rank), gate, own in zip(*_list_tiles(layout), layout.weights, strict=True):
        known = min(rank, int(member.ranks[low]))
        rows, ranks = slice(start, start + tokens), slice(low, low + known)
        if known and gate >= 0:
            out[rows] += plain[rows] * b[gate]
        out[rows] += (x[rows].float() @ a[ranks].T * own[:tokens, None]) @ b[ranks]
    return out


def _list_tiles(layout: LoraTiles) -> tuple[list[list[int]], list[int]]:
    return layout.tiles.tolist(), layout.gates.tolist()


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
