"""A whole decoder layer in one kernel call, for the models whose layers are Llama's in kind.

The small operations between the products cost more time apart than they compute. Other models keep
transformers' own layers around the kernels' linear layers and attention.

Must not know adapters, requests or scheduling.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kv import AttentionSpec

# Transformers' module: prefix of its classes
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

    def __init__(self, layer: Any, seen: AttentionSpec) -> None:
        attention = layer.self_attn
        self.linears = [tensor for name in LINEARS for tensor in layer.get_submodule(name).kernel_tensors()]
        none = self.linears[0].new_empty(0)
        own = [
            getattr(norm, "weight", none)
            for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None))
        ]
        self.next: list[Tensor] = []  # the following layer's
        self.norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight, *own]
        self.rows = attention.kv_keys, attention.kv_values, attention.kv_table
        self.options = layer.input_layernorm.variance_epsilon, seen.scale, seen.window

    def __call__(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **other: Any
    ) -> Tensor:
        """hidden_states bf16 [1, T, hidden] → the same, one layer on; position_embeddings are
        cosines and sines [1, T, dim].
        """
        x, (cos, sin) = hidden_states, position_embeddings
        y: Tensor = torch.ops.adapterd.decoder(
            x, self.linears, self.norms, self.next, cos, sin, *self.rows, *self.options
        )
        return y


def install_layers(layers: nn.ModuleList, attention: Sequence[AttentionSpec]) -> int:
    """Gives every layer of Llama's kind the kernel for its forward. How many there were."""
    found = [
        (layer, seen) for layer, seen in zip(layers, attention, strict=True) if _is_llama_like(layer, seen)
    ]
    made = [FusedDecoderLayer(layer, seen) for layer, seen in found]
    for (layer, _), own in zip(found, made, strict=True):
        layer.forward = own
    for own, following in itertools.pairwise(made):
        own.next = following.linears
    return len(found)


def _is_llama_like(layer: Any, seen: AttentionSpec) -> bool:
    name = f"{type(layer).__module__}.{type(layer).__name__}"
    known = name in {
        f"transformers.models.{family}.modeling_{family}.{prefix}DecoderLayer"
        for family, prefix in ALIKE.items()
    }
    return known and layer.self_attn.config.hidden_act == "silu" and not seen.softcap and seen.dim % 32 == 0
