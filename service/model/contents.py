"""The tensors of an adapter's file, read once and only if the bytes are still those that were registered. Knows nothing else."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from ..digest import digest
from ..engine.request import Adapter
from ..errors import AdapterInvalid


def contents(adapter: Adapter) -> dict[str, Tensor]:
    """Name → tensor, as the file has them. Raises AdapterInvalid."""
    try:
        config, weights = Path(adapter.config).read_bytes(), Path(adapter.weights).read_bytes()
    except OSError as error:
        raise AdapterInvalid([f"its files cannot be read any more: {error.strerror}"]) from None
    if digest(config, weights) != adapter.digest:
        raise AdapterInvalid(["its files have changed on disk since it was registered: register it again (PUT) to serve the new content"])
    tensors: dict[str, Tensor] = load(weights)
    return tensors
