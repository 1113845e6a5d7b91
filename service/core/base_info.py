"""Describes the resident base in exact numbers, in every process. Frozen values only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BLOCK_TOKENS = 16  # positions of a KV block


@dataclass(frozen=True, slots=True)
class LinearKind:
    """Adapted layers that share a last name and a shape."""

    name: str
    in_features: int
    out_features: int
    count: int


@dataclass(frozen=True, slots=True)
class LayerLimit:
    """Linear layers that no mixed batch can adapt: their name pattern, class, and why.

    `by_peft`: PEFT can.
    """

    pattern: str
    kind: str
    reason: str
    by_peft: bool


def name_pattern(module: str) -> str:
    """A layer's dotted name with * for each number: what layers of one kind share."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The resident base: exact numbers, made by the worker once it is loaded.

    Bytes are resident bytes, by dtype. `linears` are the layers that can be adapted, `limits` what
    stands in the way of others. `kv_blocks` blocks of BLOCK_TOKENS positions serve `rows` sequences at once,
    each of at most `context` tokens. `rope` says which rotary factors serve every sequence, where the base
    has several; else it is None. `state_bytes` is what layers with states keep of one sequence: where there
    are such layers, no sequence goes on from another's KV. `quantization` is how the linear layers are held:
    `quantized_bytes` of them, beside `plain_expert_bytes` of experts, which layer by layer no method
    quantizes. `adapted_parameters` are the name patterns of what the mixed batch adapts beside linear layers:
    the parameters of experts and of their routers.
    """

    folder: str
    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    context: int
    quantization: str
    dtype: str
    device: str
    resident_bytes: dict[str, int]
    linears: tuple[LinearKind, ...]
    pool_rank: int
    rows: int
    kv_blocks: int = 0
    state_bytes: int = 0
    rope: dict[str, Any] | None = None
    limits: tuple[LayerLimit, ...] = ()
    quantized_bytes: int = 0
    plain_expert_bytes: int = 0
    adapted_parameters: tuple[str, ...] = ()
