"""A CPU's memory:
zeros that cost nothing until they are written, weights in huge pages, and what is given back to the
system.

KV blocks and pools are sized for the worst case, most of which never comes. Runs in the worker
process; must not know what a tensor is for.
"""

from __future__ import annotations

import ctypes
import math
import mmap

import torch
from torch import Tensor

PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
PAGE_OUT = 21  # madvise's MADV_PAGEOUT, which Python does not name


def lazy_zeros(
    *shape: int, dtype: torch.dtype, device: torch.device | str = "cpu", huge: bool = False
) -> Tensor:
    """As torch.zeros; on a CPU the pages are anonymous memory, which the system hands out, zeroed,
    at the first write to each.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or not size:
        return torch.zeros(*shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=PRIVATE)
    if huge:
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(*shape)


class HugePageArena:
    """`size` bytes of CPU memory in huge pages where the system has them: a step reads all weights
    once, and each page costs a look-up.
    """

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, max(size, 1), flags=PRIVATE)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._used = 0

    def copy_in(self, tensor: Tensor) -> Tensor:
        """A copy of the tensor in the arena, behind what is there, at a multiple of 64 bytes.

        Raises ValueError when it is full.
        """
        count, offset = tensor.numel(), self._used
        flat = torch.frombuffer(self._memory, dtype=tensor.dtype, count=count, offset=offset)
        self._used += -(-tensor.nbytes // 64) * 64
        return flat.view(tensor.shape).copy_(tensor)


def release_pages(tensor: Tensor) -> None:
    """Lets the system take back the pages of a CPU tensor that will hardly be read again.

    A tensor that maps a file is read anew when it is.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), PAGE_OUT)


def trim_heap() -> None:
    """Gives back what loading left free in the heap, where the C library can."""
    if give_back := getattr(ctypes.CDLL(None), "malloc_trim", None):
        give_back(0)
