"""Tokens that a grammar allows next, as bits: the matcher's bytes on the host, a mask on the device.

Runs in the worker process; must not know rows or requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def find_error(matcher: Any) -> str | None:
    """The reason why the grammar cannot be followed any further, on one short line."""
    return matcher.get_error().partition("\n")[0][:200] if matcher.is_error() else None


def compute_mask(matcher: Any, eos: Iterable[int], vocabulary: int) -> bytes:
    """A bit for each token, from the lowest on; where the grammar is complete only eos is left."""
    size = (vocabulary + 7) // 8
    is_stopped = matcher.is_stopped()
    mask = bytearray(b"" if is_stopped else matcher.compute_bitmask()[:size]).ljust(size, b"\0")
    may_end = is_stopped or matcher.is_accepting()
    for token in eos:  # an eos that is also text would end what is not whole
        byte, bit = token >> 3, 1 << (token & 7)
        mask[byte] = mask[byte] | bit if may_end else mask[byte] & ~bit
    return bytes(mask)


def unpack_masks(packed: Tensor, vocabulary: int) -> Tensor:
    """uint8 [n, bytes] → bool [n, vocabulary]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & 1).bool().flatten(1)[:, :vocabulary]
