"""An adapter's way from its file to host memory: the bytes are checked against the digest, then everything is folded, once.

Knows the file format and PEFT's formulas. Must not know the pool's layout or requests.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import bitsandbytes
import torch
from bitsandbytes import functional
from safetensors.torch import load as parse
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..digest import digest
from ..engine.request import Adapter, Patch
from ..errors import AdapterInvalid
from .bank import Adapted, Bank, Factors


class Hosted(NamedTuple):
    """An adapter in host memory: its factors by layer; `size` in bytes."""

    factors: Mapping[str, Factors]
    size: int


def read(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the file, if its content is still what was registered. Raises AdapterInvalid."""
    try:
        config, weights = Path(adapter.config).read_bytes(), Path(adapter.weights).read_bytes()
    except OSError as error:
        raise AdapterInvalid([f"its files cannot be read any more: {error.strerror}"]) from None
    if digest(config, weights) != adapter.digest:
        raise AdapterInvalid(["its files have changed on disk since it was registered: register it again (PUT) to serve the new content"])
    tensors: dict[str, Tensor] = parse(weights)
    return tensors


def host(adapter: Adapter, bank: Bank) -> Hosted:
    """Reads and folds a pool adapter. Raises AdapterInvalid."""
    tensors = read(adapter)
    factors = {patch.module: folded(patch, tensors, bank.layers[patch.module], bank) for patch in adapter.patches}
    return Hosted(factors, sum(t.nbytes for f in factors.values() for t in f if t is not None))


@torch.inference_mode()
def folded(patch: Patch, tensors: Mapping[str, Tensor], layer: Adapted, bank: Bank) -> Factors:
    """a = A; b = scaling · Bᵀ, or scaling · (B · gate)ᵀ with DoRA, in the bank's dtype."""
    a, b = tensors[patch.a], tensors[patch.b]
    gate = None
    if patch.magnitude is not None:
        gate = dora_gate(layer.base_layer, a, b, tensors[patch.magnitude], patch.scaling)
        b = b.float() * gate[:, None]
        gate = ready(gate, bank)
    return Factors(ready(a, bank), ready((b.float() * patch.scaling).T, bank), gate)


def ready(tensor: Tensor, bank: Bank) -> Tensor:
    """Contiguous in the pool's dtype; pinned where a GPU will copy it."""
    made = tensor.to(bank.dtype).contiguous()
    return made.pin_memory() if bank.device.type == "cuda" else made


def dora_gate(layer: nn.Module, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """magnitude / ‖W + scaling·B·A‖, norm over the inputs: float32 [out] (arXiv:2402.09353, section 4.3, as PEFT computes it)."""
    weight = dense(layer)
    delta = (b.to(weight.device, weight.dtype) @ a.to(weight.device, weight.dtype)) * scaling
    norm = torch.linalg.norm(weight + delta, dim=1)
    gate: Tensor = magnitude.to(norm.device, norm.dtype) / norm
    return gate.float().cpu()


def dense(layer: Any) -> Tensor:
    """The base layer's weight [out, in], dequantized where it is quantized."""
    weight: Any = layer.weight
    if isinstance(layer, Conv1D):
        return cast(Tensor, weight.T)
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return _dense_4bit(weight)
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scales).float())
    return cast(Tensor, weight)


def _dense_4bit(weight: Any) -> Tensor:
    """bitsandbytes repacks 4-bit weights for a CPU at the first forward; its dequantizing function, and PEFT's DoRA, then misread them."""
    data, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        state.original_nested = False  # its scales are not nested any more, and stay so
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    return cast(Tensor, functional.dequantize_4bit(data, state).float())
