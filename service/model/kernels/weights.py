"""Which base layers the CPU kernels can run, and their weights as the kernels read them:
bfloat16, or the 4-bit and 8-bit values that bitsandbytes holds.

Runs in the worker process; must not know adapters, requests or scheduling.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from bitsandbytes import functional
from bitsandbytes import nn as quantized
from torch import Tensor, nn

from ..compat import plain_4bit

TILE = 32  # outputs that the kernel computes together
BLOCK = 64  # inputs of one output that share a 4-bit scale


class PackedWeights(NamedTuple):
    """See weights.h: bfloat16 without scales, uint8 or int8 with scales in float32."""

    packed: Tensor
    scales: Tensor


def fits_kernel(layer: nn.Module) -> bool:
    """Whether the linear kernel can run this base layer: bfloat16, NF4 in blocks of 64 or int8, its
    weight [out, in] in multiples of [32, 2], or [32, 64] in NF4.
    """
    weight: Any = getattr(layer, "weight", None)
    if type(layer) is nn.Linear:
        return weight.dtype == torch.bfloat16 and _is_whole(weight.shape, 2)
    if type(layer) is quantized.Linear8bitLt:
        return weight.dtype == torch.int8 and _is_whole(weight.shape, 2)
    return type(layer) is quantized.Linear4bit and _is_nf4(weight.quant_state)


def _is_nf4(state: Any) -> bool:
    known = state.quant_type == "nf4" and state.blocksize == BLOCK
    return known and _is_whole(state.shape, BLOCK)


def _is_whole(shape: torch.Size, inputs: int) -> bool:
    n_out, n_in = shape
    return n_out % TILE == 0 and n_in % inputs == 0


def pack_weights(layer: Any) -> PackedWeights:
    """The weights of a layer that fits, in new memory."""
    if type(layer) is quantized.Linear4bit:
        return _pack_nf4(layer.weight)
    weight = layer.weight.detach().data
    packed = torch.ops.adapterd.pack(weight)
    if type(layer) is nn.Linear:
        return PackedWeights(packed, torch.empty(0))
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return PackedWeights(packed, (scales.float() / 127).view(-1, TILE).contiguous())


def _pack_nf4(weight: Any) -> PackedWeights:
    codes, state = plain_4bit(weight)
    n_out, n_in = state.shape
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    packed = torch.ops.adapterd.pack_nf4(codes.reshape(n_out, n_in // 2))
    return PackedWeights(packed, torch.ops.adapterd.pack_scales(scales.float().view(n_out, n_in // BLOCK)))
