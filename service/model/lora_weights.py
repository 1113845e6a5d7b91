"""What the pool needs of an adapter: scaling and DoRA's gate folded in, once, off the step's
thread.

Knows PEFT's formulas. Must not know the pool's layout or requests.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.adapter import Adapter, LoraLayerSpec
from .adapter_file import read_files
from .lora_linear import FusedLoraLinear, LoraLinear, LoraWeights
from .lora_pool import LoraPool


def read_weights(adapter: Adapter, bank: LoraPool) -> dict[str, LoraWeights]:
    """Reads and folds a pool adapter, layer by layer. Raises AdapterInvalid."""
    _, tensors = read_files(adapter)
    made = {
        patch.module: fold_layer(patch, tensors, bank.layers[patch.module], bank) for patch in adapter.patches
    }
    return pin_weights(made) if bank.device.type == "cuda" else made


@torch.inference_mode()
def fold_layer(
    patch: LoraLayerSpec, tensors: Mapping[str, Tensor], layer: LoraLinear | FusedLoraLinear, bank: LoraPool
) -> LoraWeights:
    """a = A; b = scaling · Bᵀ, or scaling · (B · gate)ᵀ with DoRA, in the bank's dtype."""
    a, b = tensors[patch.a], tensors[patch.b]
    gate = None
    if patch.magnitude is not None:
        gate = dora_gate(layer.base_layer, a, b, tensors[patch.magnitude], patch.scaling)
        b = b.float() * gate[:, None]
    return LoraWeights(to_pool_dtype(a, bank), to_pool_dtype((b.float() * patch.scaling).T, bank), gate)


def to_pool_dtype(tensor: Tensor, bank: LoraPool) -> Tensor:
    """Contiguous in the pool's dtype."""
    return tensor.to(bank.dtype).contiguous()


@torch.inference_mode()
def pin_weights(made: Mapping[str, LoraWeights]) -> dict[str, LoraWeights]:
    """The same in one block that a GPU can copy from while steps run: many small ones would each be
    rounded up to a power of two.
    """
    parts = [tensor for a, b, _ in made.values() for tensor in (a, b)]
    block = torch.empty(sum(part.numel() for part in parts), dtype=parts[0].dtype, pin_memory=True)
    places = iter(torch.split(block, [part.numel() for part in parts]))

    def moved(tensor: Tensor) -> Tensor:
        return next(places).view(tensor.shape).copy_(tensor)

    return {name: LoraWeights(moved(a), moved(b), gate) for name, (a, b, gate) in made.items()}


def dora_gate(layer: nn.Module, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """magnitude / ‖W + scaling·B·A‖, norm over the inputs: float32 [out] (arXiv:2402.09353, section
    4.3, as PEFT computes it).
    """
    weight = dense_weight(layer)
    delta = (b.to(weight.device, weight.dtype) @ a.to(weight.device, weight.dtype)) * scaling
    norm = torch.linalg.norm(weight + delta, dim=1)
    gate: Tensor = magnitude.to(norm.device, norm.dtype) / norm
    return gate.float().cpu()


def dense_weight(layer: Any) -> Tensor:
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
    """bitsandbytes repacks 4-bit weights for a CPU at the first forward; its dequantizing function,
    and PEFT's DoRA, then misread them.
    """
    data, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        state.original_nested = False  # its scales are not nested any more, and stay so
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.T.reshape(-1).float()
    return cast(Tensor, functional.dequantize_4bit(data, state).float())
