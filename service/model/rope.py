"""Rotary frequencies that transformers chooses anew in every forward, chosen once instead.

Its rules for "longrope" and "dynamic" look at the largest position of the whole batch, so that one
long sequence would change the words of all others. Runs in the worker process; must not know
requests, rows or settings.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

log = logging.getLogger(__name__)

CHOSEN = "%(factors)s factors for every sequence; the original context is %(original_context)d"
FIXED = "fixed"  # any type that transformers does not recompute


def fix_frequencies(model: nn.Module, context: int) -> dict[str, Any] | None:
    """Makes the frequencies of every rotary module those of sequences of `context` positions,
    whatever a batch holds.

    LongRoPE's factors are the short ones where the context is at most the original one, else the
    long ones. Dynamic NTK scaling changes nothing up to `max_position_embeddings`, which no served
    context exceeds. Returns the choice for `/base`: type, factors, original context; None where the
    base leaves none.
    """
    choice: dict[str, Any] | None = None
    for module in model.modules():
        for kind, layer_type, parameters in list(_recomputed(module)):
            if kind == "longrope":
                choice = _fix_longrope(module, layer_type, parameters, context)
            _name_fixed(module, layer_type)
    if choice:
        log.info("rope: %s", CHOSEN % choice)
    return choice


def _name_fixed(module: Any, layer_type: str | None) -> None:
    if layer_type is None:
        module.rope_type = FIXED
    else:
        module.rope_type[layer_type] = FIXED


def _recomputed(module: Any) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """Type, layer type (None: the module has one for all layers) and parameters of what
    transformers would recompute.
    """
    kinds = getattr(module, "rope_type", None)
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else ((None, kinds),):
        if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
            parameters = module.config.rope_parameters
            yield kind, layer_type, parameters if layer_type is None else parameters[layer_type]


def _fix_longrope(
    module: Any, layer_type: str | None, parameters: dict[str, Any], context: int
) -> dict[str, Any]:
    original = parameters["original_max_position_embeddings"]
    factors = "long" if context > original else "short"
    name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
    own = getattr(module, name)
    compute_frequencies = ROPE_INIT_FUNCTIONS["longrope"]
    frequencies, _ = compute_frequencies(module.config, own.device, seq_len=context, layer_type=layer_type)
    own.copy_(frequencies)
    if f"{factors}_mscale" in parameters:  # Phi-3.5-MoE chooses a scale as well, by its own code
        module.config = copy.deepcopy(module.config)
        scale = parameters[f"{factors}_mscale"]
        module.config.rope_parameters |= {"long_mscale": scale, "short_mscale": scale}
    return {"type": "longrope", "factors": factors, "original_context": original}
