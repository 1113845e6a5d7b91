"""Makes of an adapter's files what the pool needs:
scaling and DoRA's gate folded in, once, off the step's thread of the worker process.

Knows PEFT's formulas. Must not know the pool's layout or requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.adapter import Adapter, LoraLayerSpec
from ..errors import AdapterInvalid, AdapterUnsupported
from .adapter_file import read_files
from .compat import plain_4bit
from .lora_linear import FusedLoraLinear, LoraLinear, LoraWeights
from .lora_pool import LoraPool
from .stored_quantization import is_quantized


def read_weights(adapter: Adapter, pool: LoraPool) -> dict[str, LoraWeights]:
    """Reads and folds a pool adapter, or all parts of a mix, layer by layer. Raises AdapterInvalid."""
    if adapter.pool_rows > pool.rank:
        raise AdapterInvalid(
            [f"rank {adapter.rank} and DoRA's gate take {adapter.pool_rows} rows of the pool's {pool.rank}"]
        )
    weights = join_parts(adapter, pool) if adapter.parts else _fold_adapter(adapter, pool)
    return pin_weights(weights) if pool.device.type == "cuda" else weights


def _fold_adapter(adapter: Adapter, pool: LoraPool, weight: float = 1.0) -> dict[str, LoraWeights]:
    _, tensors = read_files(adapter)
    folded = {}
    for spec in adapter.patches:
        weighted = replace(spec, scaling=spec.scaling * weight)
        folded[spec.module] = fold_layer(weighted, tensors, pool.layers.get(spec.module), pool)
    return folded


def join_parts(mix: Adapter, pool: LoraPool) -> dict[str, LoraWeights]:
    """The parts' factors one below the other, each with its weight, as PEFT's
    `add_weighted_adapter(combination_type="cat")` joins them. Raises AdapterInvalid.
    """
    layers: dict[str, list[LoraWeights]] = {}
    for part in mix.parts:
        for module, factors in _fold_adapter(part.adapter, pool, part.weight).items():
            if not factors.b.isfinite().all():
                reason = f"the weight {part.weight:g} makes {module} overflow {pool.dtype}"
                raise AdapterInvalid([reason])
            layers.setdefault(module, []).append(factors)
    return {module: _stack_factors(factors) for module, factors in layers.items()}


def _stack_factors(factors: Sequence[LoraWeights]) -> LoraWeights:
    a = torch.cat([factor.a for factor in factors], -2)
    b = torch.cat([factor.b for factor in factors], -2)
    return LoraWeights(a, b)


@torch.inference_mode()
def fold_layer(
    spec: LoraLayerSpec,
    tensors: Mapping[str, Tensor],
    layer: LoraLinear | FusedLoraLinear | None,
    pool: LoraPool,
) -> LoraWeights:
    """a = A; b = scaling · Bᵀ, or scaling · (B · (1 + gate))ᵀ with DoRA, in the pool's dtype.

    On a parameter of experts, which no layer stands for, the same of each: a [experts, r, in], b
    [experts, r, out].
    """
    a, b = tensors[spec.a], tensors[spec.b]
    if layer is None:
        return _fold_experts(a, b, spec, pool)
    gate = None
    if spec.magnitude is not None:
        gate = dora_gate(layer.base_layer, a, b, tensors[spec.magnitude], spec.scaling)
        b = b.float() * (1 + gate[:, None])
    scaled = (b.float() * spec.scaling).T
    return LoraWeights(to_pool_dtype(a, pool), to_pool_dtype(scaled, pool), gate)


def _fold_experts(a: Tensor, b: Tensor, spec: LoraLayerSpec, pool: LoraPool) -> LoraWeights:
    """Of A [experts · rank, in], expert by expert, and B [out, rank · experts], rank by rank."""
    shape = spec.experts, spec.rank
    scaled = (b.float() * spec.scaling).view(-1, *reversed(shape)).permute(2, 1, 0)
    return LoraWeights(to_pool_dtype(a.view(*shape, -1), pool), to_pool_dtype(scaled, pool))


def to_pool_dtype(tensor: Tensor, pool: LoraPool) -> Tensor:
    """Contiguous in the pool's dtype."""
    return tensor.to(pool.dtype).contiguous()


@torch.inference_mode()
def pin_weights(weights: Mapping[str, LoraWeights]) -> dict[str, LoraWeights]:
    """The same in one block that a GPU can copy from while steps run: many small ones would each be
    rounded up to a power of two.
    """
    tensors = [tensor for part in weights.values() for tensor in part if tensor is not None]
    sizes = [tensor.numel() for tensor in tensors]
    block = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=True)
    pieces = iter(torch.split(block, sizes))

    def move(tensor: Tensor) -> Tensor:
        return next(pieces).view(tensor.shape).copy_(tensor)

    return {
        name: LoraWeights(move(a), move(b), None if gate is None else move(gate))
        for name, (a, b, gate) in weights.items()
    }


def dora_gate(layer: nn.Module, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float) -> Tensor:
    """magnitude / ‖W + scaling·B·A‖ - 1, norm over the inputs: float32 [out] (arXiv:2402.09353,
    section 4.3, as PEFT computes it).
    """
    weight = dense_weight(layer)
    delta = (b.to(weight.device, weight.dtype) @ a.to(weight.device, weight.dtype)) * scaling
    norm = torch.linalg.norm(weight + delta, dim=1)
    gate: Tensor = magnitude.to(norm.device, norm.dtype) / norm
    return (gate.float() - 1).cpu()


def dense_weight(layer: Any) -> Tensor:
    """The base layer's weight [out, in], dequantized where it is quantized.

    Raises AdapterUnsupported where only the layer's own code can read it.
    """
    weight: Any = getattr(layer, "weight", None)
    if isinstance(layer, Conv1D):
        return cast(Tensor, weight.T)
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return cast(Tensor, functional.dequantize_4bit(*plain_4bit(weight)).float())
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return cast(Tensor, functional.int8_vectorwise_dequant(weight.data, scales).float())
    if is_quantized(layer):
        raise AdapterUnsupported(
            [f"`use_dora` is not served on {type(layer).__name__}, whose weight is packed"]
        )
    return cast(Tensor, weight)
