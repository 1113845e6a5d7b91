"""How much an adapter changes, layer by layer; measured by the validator, once for each content.

Knows no tensor and no HTTP.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.adapter import Digest, LoraLayerSpec
from .facts import LAYER, last_name
from .validator.messages import ValidatedAdapter
from .validator.process import Validator

LARGEST = sys.float_info.max  # what stands for a norm that no number says
KEPT = 256  # contents whose norms are remembered; some thousand numbers each


class NormCache:
    """Remembers what was measured, by digest; who asks meanwhile waits for the same answer."""

    def __init__(self, validator: Validator) -> None:
        self._validator = validator
        self._asked: dict[Digest, asyncio.Task[dict[str, float]]] = {}

    async def measure_norms(self, validated: ValidatedAdapter) -> dict[str, float]:
        """Module → norm of scaling · B · A.

        Raises AdapterInvalid when the files are gone or have changed; then the next one asks anew.
        """
        digest = validated.adapter.digest
        task = self._asked.get(digest)
        if task is None:
            while len(self._asked) >= KEPT:
                del self._asked[next(iter(self._asked))]
            task = self._asked[digest] = asyncio.create_task(self._validator.measure_norms(validated))
            task.add_done_callback(lambda done: self._forget_failed(digest, done))
        return await asyncio.shield(task)

    def _forget_failed(self, digest: Digest, done: asyncio.Task[dict[str, float]]) -> None:
        if (done.cancelled() or done.exception()) and self._asked.get(digest) is done:
            del self._asked[digest]


def group_by_layer(
    patches: Sequence[LoraLayerSpec], norms: Mapping[str, float], layers: int
) -> dict[str, Any]:
    """`modules`: ranks and norms by layer for each name, null where the layer is left alone;

    `outside`: what lies in no layer, as the head.

    Modules of one name in one layer, such as experts, count as one: the largest rank, and the norm
    of all their changes together.
    """
    strips: dict[str, dict[int, list[LoraLayerSpec]]] = {}
    outside: dict[str, list[LoraLayerSpec]] = {}
    for one in patches:
        name = last_name(one.module)
        if match := LAYER.match(one.module):
            strips.setdefault(name, {}).setdefault(int(match[2]), []).append(one)
        else:
            outside.setdefault(name, []).append(one)
    layers = max([layers, *(1 + layer for strip in strips.values() for layer in strip)])

    def both(found: Sequence[LoraLayerSpec]) -> tuple[int, float]:
        norm = math.hypot(*(norms[one.module] for one in found))
        return max(one.rank for one in found), norm if math.isfinite(norm) else LARGEST

    def strip(name: str) -> dict[str, Any]:
        told = [
            both(found) if (found := strips[name].get(layer)) else (None, None) for layer in range(layers)
        ]
        return {"name": name, "ranks": [rank for rank, _ in told], "norms": [norm for _, norm in told]}

    rest = [(name, *both(found)) for name, found in sorted(outside.items())]
    return {
        "layers": layers,
        "modules": [strip(name) for name in sorted(strips)],
        "outside": [{"name": name, "rank": rank, "norm": norm} for name, rank, norm in rest],
    }
