"""Numbers on their way to the device, and rows of what lies there, without waiting for it.

Runs in the worker process; must not know what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)


def send_rows(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers as int64 [m]."""
    return send(torch.tensor(rows, dtype=torch.int64), device)


def take_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """[n, ...] → [m, ...]; `rows` ascend, so that as many as there are means all, which are not copied."""
    return tensor if len(rows) == len(tensor) else tensor[rows]
