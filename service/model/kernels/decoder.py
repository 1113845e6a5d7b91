"""A whole decoder layer in one kernel call, for the models whose layers are Llama's in kind.

The small operations between the products cost more time apart than they compute. Other models keep
transformers' own layers around the kernels' linear layers and attention.

Runs in the worker process; must not know adapters, requests or scheduling.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kv import AttentionSpec

# transformers' module: prefix of its classes
ALIKE = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class FusedDecoderLayer:
    """Stands in for the forward of one layer; `layer` keeps its tensors."""

    def __init__(self, layer: Any, spec: AttentionSpec) -> None:
        attention = layer.self_attn
        self.linears: list[Tensor] = []
        for name in LINEARS:
            self.linears += layer.get_submodule(name).kernel_tensors()
        none = self.linears[0].new_empty(0)
        head_norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.next: list[Tensor] = []  # the following layer's
        self.norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        self.norms += [getattr(norm, "weight", none) for norm in head_norms]
        self.kv = attention.kv_keys, attention.kv_values, attention.kv_table, attention.kv_block_table
        self.options = layer.input_layernorm.variance_epsilon, spec.scale, spec.window

    def __call__(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **other: Any
    ) -> Tensor:
        """hidden_states bf16 [1, T, hidden] → the same, one layer on; position_embeddings are
        cosines and sines [1, T, dim].
        """
        x, (cos, sin) = hidden_states, position_embeddings
        y: Tensor = torch.ops.adapterd.decoder(
            x, self.linears, self.norms, self.next, cos, sin, *self.kv, *self.options
        )
        return y


def install_layers(layers: nn.ModuleList, attention: Sequence[AttentionSpec]) -> int:
    """Gives every layer of Llama's kind the kernel for its forward. How many there were."""
    fused: list[FusedDecoderLayer] = []
    for layer, spec in zip(layers, attention, strict=True):
        if _is_llama_like(layer, spec):
            fused.append(FusedDecoderLayer(layer, spec))
            layer.forward = fused[-1]
    for own, following in itertools.pairwise(fused):
        own.next = following.linears
    return len(fused)


def _is_llama_like(layer: Any, spec: AttentionSpec) -> bool:
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    known = {
        f"transformers.models.{family}.modeling_{family}.{prefix}DecoderLayer"
        for family, prefix in ALIKE.items()
    }
    if name not in known or layer.self_attn.config.hidden_act != "silu":
        return False
    is_plain = spec.value_dim == spec.dim and not spec.softcap and not spec.has_sinks
    return is_plain and spec.dim % 32 == 0
