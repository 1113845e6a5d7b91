"""Says how much an adapter changes, layer by layer; measured by the validator, once for each content.

Runs in the API process; must not know tensors or HTTP.
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

LARGEST = sys.float_info.max  # stands for a norm that no number says
SpecsByLayer = dict[str, dict[int, list[LoraLayerSpec]]]
KEPT = 256  # contents whose norms are remembered; some thousand numbers each


class NormCache:
    """Remembers measured norms by digest; callers that come meanwhile wait for the same answer."""

    def __init__(self, validator: Validator) -> None:
        self._validator = validator
        self._asked: dict[Digest, asyncio.Task[dict[str, float]]] = {}

    async def measure_norms(self, validated: ValidatedAdapter) -> dict[str, float]:
        """Module → norm of scaling · B · A.

        Raises AdapterInvalid when the files are gone or have changed; then the next call measures anew.
        """
        digest = validated.adapter.digest
        task = self._asked.get(digest)
        if task is None:
            self._make_room()
            measuring = self._validator.measure_norms(validated)
            task = self._asked[digest] = asyncio.create_task(measuring)
            task.add_done_callback(lambda done: self._forget_failed(digest, done))
        return await asyncio.shield(task)

    def _make_room(self) -> None:
        """Forgets the contents that were asked for first, so that one more may be remembered."""
        while len(self._asked) >= KEPT:
            oldest = next(iter(self._asked))
            del self._asked[oldest]

    def _forget_failed(self, digest: Digest, done: asyncio.Task[dict[str, float]]) -> None:
        has_failed = done.cancelled() or done.exception() is not None
        if has_failed and self._asked.get(digest) is done:
            del self._asked[digest]


def group_by_layer(
    patches: Sequence[LoraLayerSpec], norms: Mapping[str, float], layers: int
) -> dict[str, Any]:
    """Ranks and norms of an adapter's modules, by name and layer.

    `modules`: ranks and norms by layer for each name, null where the layer is left alone; `outside`:
    modules that lie in no layer, as the head. Modules of one name in one layer, such as experts, count
    as one: the largest rank, and the norm of all their changes together.
    """
    by_layer, outside = _split_by_layer(patches)
    numbers = {number for specs in by_layer.values() for number in specs}
    layers = max(layers, *(1 + number for number in numbers), 0)
    modules = [_describe_layers(name, specs, norms, layers) for name, specs in sorted(by_layer.items())]
    others = [_describe_outside(name, specs, norms) for name, specs in sorted(outside.items())]
    return {"layers": layers, "modules": modules, "outside": others}


def _split_by_layer(specs: Sequence[LoraLayerSpec]) -> tuple[SpecsByLayer, dict[str, list[LoraLayerSpec]]]:
    """By last name: the specs of each numbered layer, and those that lie in no layer."""
    by_layer: SpecsByLayer = {}
    outside: dict[str, list[LoraLayerSpec]] = {}
    for spec in specs:
        name = last_name(spec.module)
        match = LAYER.match(spec.module)
        if match:
            layer = int(match[2])
            by_layer.setdefault(name, {}).setdefault(layer, []).append(spec)
        else:
            outside.setdefault(name, []).append(spec)
    return by_layer, outside


def _describe_layers(
    name: str, by_layer: Mapping[int, Sequence[LoraLayerSpec]], norms: Mapping[str, float], layers: int
) -> dict[str, Any]:
    """One rank and one norm a layer, null where the layer is left alone."""
    ranks: list[int | None] = [None] * layers
    layer_norms: list[float | None] = [None] * layers
    for layer, specs in by_layer.items():
        ranks[layer], layer_norms[layer] = _combine_modules(specs, norms)
    return {"name": name, "ranks": ranks, "norms": layer_norms}


def _describe_outside(
    name: str, specs: Sequence[LoraLayerSpec], norms: Mapping[str, float]
) -> dict[str, Any]:
    rank, norm = _combine_modules(specs, norms)
    return {"name": name, "rank": rank, "norm": norm}


def _combine_modules(specs: Sequence[LoraLayerSpec], norms: Mapping[str, float]) -> tuple[int, float]:
    """The largest rank, and the norm of all changes together."""
    rank = max(spec.rank for spec in specs)
    norm = math.hypot(*(norms[spec.module] for spec in specs))
    return rank, norm if math.isfinite(norm) else LARGEST
