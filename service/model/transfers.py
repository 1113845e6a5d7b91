"""Numbers on their way to the device and back, and rows of what lies there, without waiting for it.

Runs in the worker process; must not know what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A GPU copies out of pinned memory by itself; for any other the host may have to wait."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


class Fetched:
    """A tensor's numbers on their way to the host, behind the work that makes them."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        self._host.copy_(tensor, non_blocking=True)
        self._landed = torch.get_device_module(tensor.device).Event()
        self._landed.record()

    def read(self) -> Tensor:
        """The numbers, once they are there: here the host waits for the device."""
        self._landed.synchronize()
        return self._host


def send_rows(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers as int64 [m]."""
    return send(torch.tensor(rows, dtype=torch.int64), device)


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """[n, ...] → [m, ...]; `rows` ascend, so that as many as there are means all, which are not copied."""
    return tensor if len(rows) == len(tensor) else tensor[rows]
