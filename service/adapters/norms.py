"""How much an adapter changes, layer by layer; measured by the reader, once for each content. Knows no tensor and no HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any

from ..engine.request import Digest
from .facts import LAYER, leaf
from .reading import Reader, Reading

KEPT = 256  # contents whose norms are remembered; some thousand numbers each


class Norms:
    """Remembers what was measured, by digest; who asks meanwhile waits for the same answer."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._asked: dict[Digest, asyncio.Task[dict[str, float]]] = {}

    async def of(self, reading: Reading) -> dict[str, float]:
        """Module → norm of scaling · B · A. Raises AdapterInvalid when the files are gone or have changed; then the next one asks anew."""
        digest = reading.adapter.digest
        task = self._asked.get(digest)
        if task is None:
            while len(self._asked) >= KEPT:
                del self._asked[next(iter(self._asked))]
            task = self._asked[digest] = asyncio.create_task(self._reader.norms(reading))
            task.add_done_callback(lambda done: self._forget(digest, done))
        return await asyncio.shield(task)

    def _forget(self, digest: Digest, done: asyncio.Task[dict[str, float]]) -> None:
        if (done.cancelled() or done.exception()) and self._asked.get(digest) is done:
            del self._asked[digest]


def by_layer(norms: Mapping[str, float], layers: int) -> dict[str, Any]:
    """`modules`: one list by layer for each name, null where the layer is left alone; `outside`: what lies in no layer, such as the head.

    Modules of one name in one layer, such as experts, count as one: the norm of all their changes together.
    """
    strips: dict[str, dict[int, float]] = {}
    outside: dict[str, float] = {}
    for module, norm in norms.items():
        match, name = LAYER.match(module), leaf(module)
        if match is None:
            outside[name] = math.hypot(outside.get(name, 0.0), norm)
            continue
        strip, layer = strips.setdefault(name, {}), int(match[2])
        strip[layer] = math.hypot(strip.get(layer, 0.0), norm)
        layers = max(layers, layer + 1)
    return {
        "layers": layers,
        "modules": [{"name": name, "norms": [strip.get(layer) for layer in range(layers)]} for name, strip in sorted(strips.items())],
        "outside": [{"name": name, "norm": norm} for name, norm in sorted(outside.items())],
    }
