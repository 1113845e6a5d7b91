"""Zeros that cost a CPU nothing until they are written: KV rows and pools are sized for the worst case, most of which never comes."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor


def zeros(*shape: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As torch.zeros; on a CPU the pages are anonymous memory, which the system hands out, zeroed, at the first write to each."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not size:
        return torch.zeros(*shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(*shape)
