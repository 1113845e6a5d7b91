"""Puts the Triton kernels in place of bitsandbytes' product, torch's attention and the masked
product of adapters, on a GPU.

The base's own tree keeps theirs, and is what these are compared with at start. Runs in the worker
process; must not know adapters' files, requests or scheduling.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from . import kv
from .kernels import triton as kernels
from .kernels.triton import oracles
from .kernels.triton.shapes import LORA_TOKENS, LoraMember, LoraTiles
from .loading import describe_error
from .lora_linear import LoraLinear
from .lora_pool import LoraPool
from .step_layout import StepLayout

NAME = "adapterd_paged"
TILES_ERROR = 0.02  # relative; 0.003 is bfloat16's rounding

log = logging.getLogger(__name__)


class NF4Linear(nn.Module):
    """bitsandbytes' 4-bit layer, with a product of our own for up to 64 tokens.

    One path for all of these, so that a token's result does not depend on how many share its step.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self._nf4: Any = importlib.import_module(f"{kernels.__name__}.nf4")
        self._packed = self._nf4.NF4Weight.from_state(layer.weight.data, layer.weight.quant_state)

    @property
    def weight(self) -> Any:
        return self.layer.weight

    @property
    def bias(self) -> Any:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        flat = x.reshape(-1, x.shape[-1])
        if len(flat) > self._nf4.MOST_TOKENS:
            dense: Tensor = self.layer(x)
            return dense
        (y,) = self._nf4.multiply(flat, [self._packed])
        out: Tensor = y if self.bias is None else y + self.bias
        return out.view(*x.shape[:-1], -1)


def explain_absence(device: torch.device) -> str | None:
    """Why the kernels cannot be used there; None where they can."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "torch has no CUDA here"
    return kernels.explain_absence()


def install_kernels(pool: LoraPool) -> None:
    """Gives the pool's tree the paged attention and the grouped product of adapters, and its 4-bit
    layers the NF4 product.

    Raises ValueError for weights in another layout than bitsandbytes' NF4.
    """
    layers = [layer for layer in pool.layers.values() if isinstance(layer, LoraLinear)]
    quantized = [layer for layer in layers if type(layer.base_layer).__name__ == "Linear4bit"]
    for layer in quantized:
        layer.base_layer = NF4Linear(layer.base_layer)
    AttentionInterface.register(NAME, partial(kv.attend_blocks, attend_singles=attend_singles))
    pool.tree.set_attn_implementation(NAME)
    log.info("kernels: paged attention, and the NF4 product in %d of %d layers", len(quantized), len(layers))
    if reason := _explain_difference(layers):
        log.warning("kernels: adapters by torch's masked product; the grouped one %s", reason)
    else:
        pool.step.add_tiles = add_tiles


def add_tiles(x: Tensor, member: LoraMember, tiles: LoraTiles) -> None:
    """Adds to a layer's outputs, in place, what its pool rows of the tiles make of x [tokens, n_in]."""
    lora: Any = importlib.import_module(f"{kernels.__name__}.lora")
    lora.add_adapters(x, [member], tiles)


def _explain_difference(layers: Sequence[LoraLinear]) -> str:
    """Why adapters are not to be added by tiles, tried on random numbers of every shape; empty
    where they are what torch makes of them.
    """
    for shape in {(layer.pool_a.shape[1], layer.pool_b.shape[1], layer.pool_a.dtype) for layer in layers}:
        try:
            error = _try_tiles(*shape, layers[0].pool_a.device)
        except Exception as cause:  # whatever a compiler says of a device that nobody tried
            return f"raises {describe_error(cause)}"
        if not error < TILES_ERROR:
            return f"differs by {error:.2g} for layers of {shape}"
    return ""


def _try_tiles(n_in: int, n_out: int, dtype: torch.dtype, device: torch.device) -> float:
    """How far three tokens are from torch's, one of them the base's, one with a gate: relative."""
    draw = partial(torch.randn, dtype=dtype, device=device)
    count = partial(torch.tensor, dtype=torch.int32, device=device)
    x, y, a, b = draw(3, n_in), draw(3, n_out), draw(32, n_in) / n_in**0.5, draw(32, n_out)
    member = LoraMember(y, a, b, count([16] * 32))
    tiles = count([(0, 1, 0, 16), (1, 0, 0, 0), (2, 1, 16, 11)])
    layout = LoraTiles(tiles, torch.ones(3, LORA_TOKENS, device=device), count([-1, -1, 27]), 16)
    expected = oracles.add_adapters(x, member, layout)
    add_tiles(x, member, layout)
    return float((y.float() - expected).norm() / expected.norm())


def attend_singles(attention: kv.BlockAttention, query: Tensor, layout: StepLayout) -> Tensor:
    """One token a sequence: query [heads, n, dim] → [n, heads, value dim]."""
    paged: Any = importlib.import_module(f"{kernels.__name__}.attention")
    if "kv_length" not in layout.masks:
        layout.masks["kv_length"] = layout.positions[: layout.singles] + 1
        starts = torch.arange(layout.singles + 1, dtype=torch.int32, device=query.device)
        layout.masks["starts"] = starts
    lengths, starts = layout.masks["kv_length"], layout.masks["starts"]
    keys, values = attention.keys.transpose(1, 2), attention.values.transpose(1, 2)
    pages = paged.PagedKV(keys, values, starts, lengths, layout.block_table)
    out: Tensor = paged.attend_decode(query.transpose(0, 1).contiguous(), pages, attention.rules)
    return out
