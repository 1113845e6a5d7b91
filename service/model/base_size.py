"""Says whether a base fits into the memory that is left, before its weights are read.

Runs in the worker process. A base's size is that of its class on the meta device, in the dtype and
the quantization that it will be loaded in. Must not know adapters or requests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .. import limits
from ..base_config import auto_class, read_base_config
from ..core import capacity
from ..errors import DoesNotFit
from ..limits import megabytes
from .gguf_header import count_values
from .stored_quantization import PLAIN_ON_CPU, stored_config, stored_method

# Beside the weights: the self-check, the first KV blocks, and the validator's process, which starts meanwhile
WORKING_BYTES = 400_000_000


def check_base(folder: Path, name: str, device: torch.device, dtype: torch.dtype, quantization: str) -> None:
    """Raises DoesNotFit where the base in this folder is larger than what the device has left."""
    weights = _measure_folder(folder, dtype, quantization, device.type)
    if not weights:
        return  # loading it says what is wrong
    kind = f"{megabytes(weights)} of weights"
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself is free, too
        free, most = torch.cuda.mem_get_info(device)
        _require_bytes(name, kind, weights, free, f"{device} has {megabytes(most)}")
        return
    left = limits.free_memory()
    if left is not None:
        need = f"{kind} and {megabytes(WORKING_BYTES)} to work in"
        _require_bytes(name, need, weights + WORKING_BYTES, left.total, left.limit)


def check_conversion(file: Path, dtype: torch.dtype, target: Path) -> None:
    """Raises DoesNotFit where converting this GGUF file takes more memory than is left, or more
    room than the disk under `target` has.

    All values are there in float32 first, and then once more in `dtype`.
    """
    try:
        values = count_values(file)
    except (OSError, ValueError):
        return  # reading it says what is wrong
    left, on_disk = limits.free_memory(), limits.free_disk(target)
    needed = values * (torch.float32.itemsize + dtype.itemsize) + WORKING_BYTES
    if left is not None:
        _require_bytes(file.name, "to be converted, once", needed, left.total, left.limit)
    written = values * dtype.itemsize
    if on_disk is not None and written > on_disk:
        raise DoesNotFit(
            f"ADAPTERD_BASE: {file.name!r} takes {megabytes(written)} on the disk of the cache folder to be "
            f"converted; {megabytes(on_disk)} are free there"
        )


def _require_bytes(name: str, what: str, needed: int, free: int, limit: str) -> None:
    if needed > free:
        raise DoesNotFit(
            f"ADAPTERD_BASE: {name!r} needs {megabytes(needed)} of memory ({what}); {megabytes(free)} are "
            f"free, for {limit}"
        )


def _measure_folder(folder: Path, dtype: torch.dtype, quantization: str, device: str = "cpu") -> int:
    """Bytes of the weights in this folder, once loaded; 0 where the library does not understand it."""
    try:
        config = read_base_config(folder)
        if stored := stored_config(config):
            if device != "cpu" or stored_method(stored) not in PLAIN_ON_CPU:  # it is loaded as it is stored
                return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
            quantization = "none"
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False)
    except Exception:  # whatever it makes of such a folder
        return 0
    return measure_weights(model, dtype, quantization)


def measure_weights(model: Any, dtype: torch.dtype, quantization: str) -> int:
    """Bytes of a model's weights in this dtype, its linear layers but the head quantized."""
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    quantized = {id(layer.weight) for layer in layers}
    in_linears = sum(weight.numel() for weight in model.parameters() if id(weight) in quantized)
    others = sum(weight.numel() for weight in model.parameters()) - in_linears
    return capacity.weights_bytes(in_linears, others, quantization, dtype.itemsize)
