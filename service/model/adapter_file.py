"""Reads an adapter's two files in the worker process, once, if they are still those registered.

Knows nothing else.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from ..core.adapter import Adapter
from ..core.manifest import CHANGED, CONFIG, WEIGHTS, hash_bytes
from ..errors import AdapterInvalid


def read_files(adapter: Adapter) -> tuple[bytes, dict[str, Tensor]]:
    """The config, and name → tensor as the weights file has them. Raises AdapterInvalid."""
    try:
        config, weights = Path(adapter.config).read_bytes(), Path(adapter.weights).read_bytes()
    except OSError as error:
        raise AdapterInvalid([f"its files cannot be read any more: {error.strerror}"]) from None
    if not {hash_bytes(CONFIG, config), hash_bytes(WEIGHTS, weights)} <= set(adapter.files):
        raise AdapterInvalid([CHANGED])
    tensors: dict[str, Tensor] = load(weights)
    return config, tensors
