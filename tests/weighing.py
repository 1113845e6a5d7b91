"""The real runner, whose base is hashed when it is loaded and when the worker ends: lines of
`hashes`, beside the adapters directory.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import torch

from service.core.base_info import BaseInfo
from service.model import build as building
from service.model.runner import ModelRunner
from service.settings import Settings


def hashed(model: Any) -> str:
    """Over every parameter and buffer but the KV blocks, by name, shape, type and bytes."""
    found = sha256()
    kept = {name: tensor for name, tensor in model.named_buffers() if ".kv_" not in name}
    for name, tensor in (*model.named_parameters(), *kept.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def build(settings: Settings, progress: Callable[[str, float], None]) -> tuple[ModelRunner, BaseInfo]:
    made, card = building.build_runner(settings, progress)

    def note() -> None:
        with (settings.adapters.parent / "hashes").open("a") as file:
            print(hashed(made.model), file=file)

    note()
    atexit.register(note)
    return made, card
