"""The numbers of a base that a device's memory depends on, from its config alone.

Its class runs a few tokens on the meta device, without weights, by the code that measures a base at start
and proves that it can be served.
For the command line's `plan`, in its own process. Must not know a device, settings or how memory is shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from ..base_config import auto_class, read_base_config
from ..core.base_info import LinearKind
from . import kv, states
from .base_size import measure_weights
from .loading import describe_error, list_linear_kinds, own_context
from .probe import probe_layers
from .selfcheck import prove_architecture

DTYPE = torch.bfloat16  # in which a GPU computes


@dataclass(frozen=True, slots=True)
class BaseShape:
    """`linears` are the layers that adapters may adapt; `weights_bytes` has the bytes of all weights, and
    `state_bytes` is what layers with states keep of a sequence.
    """

    linears: tuple[LinearKind, ...]
    context: int
    weights_bytes: int
    kv_bytes_per_token: int
    state_bytes: int


def read_config(path: Path) -> Any:
    """Of a `config.json` or its folder. Raises ValueError, fit for a person."""
    try:
        return read_base_config(path)
    except Exception as error:  # whatever the library makes of it
        raise ValueError(f"{path} cannot be read as a config.json: {describe_error(error)}") from error


def make_config(fields: dict[str, Any]) -> Any:
    """Of the fields of a config.json."""
    return AutoConfig.for_model(**fields)


def measure_shape(config: Any, quantization: str) -> BaseShape:
    """Raises ValueError, fit for a person, where the base cannot be served, SettingsError with the
    start's own reason.
    """
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=DTYPE, trust_remote_code=False).eval()
    except Exception as error:  # whatever the class makes of a stranger's config
        raise ValueError(f"a {config.model_type!r} cannot be made: {describe_error(error)}") from error
    weights = measure_weights(model, DTYPE, quantization)
    with torch.inference_mode():
        layers = probe_layers(model)
        prove_architecture(model, layers.attention, own_context(model))
    return BaseShape(
        list_linear_kinds(model, layers.calls.limits),
        own_context(model),
        weights,
        kv.bytes_per_position(layers.attention, DTYPE),
        states.bytes_per_sequence(layers.stateful),
    )
