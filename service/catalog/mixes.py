"""Makes one content of several adapters with weights, for requests that name them; in the API process.

Must not know ids' leases, files or requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from ..core.adapter import Adapter, Digest, ExecutionPath, WeightedPart
from ..errors import AdapterUnsupported, BadRequest
from .versions import AdapterVersion

IDLE = 32  # mixes that no request runs on and that the device keeps


@dataclass(frozen=True, slots=True)
class MixPart:
    """An adapter of a mix, by the id that the request named it by."""

    id: str
    digest: Digest
    weight: float


@dataclass(frozen=True, slots=True)
class Mix:
    """y = base(x) + Σ weight · change(x) over its parts; `adapter` is what the worker runs."""

    adapter: Adapter
    parts: tuple[MixPart, ...]

    @property
    def digest(self) -> Digest:
        return self.adapter.digest


class MixDevice(Protocol):
    """The engine, as mixes need it."""

    def add_adapter(self, adapter: Adapter, pinned: bool = False, preload: bool = True) -> None: ...
    async def remove_adapter(self, digest: Digest) -> int: ...


class MixTable:
    """The mixes that the device knows: those that requests run on, and the last `IDLE` others."""

    def __init__(self, device: MixDevice) -> None:
        self._device = device
        self._in_flight: Counter[Digest] = Counter()
        self._idle: dict[Digest, Adapter] = {}
        self._removals: set[asyncio.Task[int]] = set()

    @contextmanager
    def lease_mix(self, mix: Mix) -> Iterator[Mix]:
        """The device knows the mix until the lease ends; its parts must be leased as long."""
        digest = mix.digest
        if not self._in_flight[digest] and self._idle.pop(digest, None) is None:
            self._device.add_adapter(mix.adapter, preload=False)
        self._in_flight[digest] += 1
        try:
            yield mix
        finally:
            self._end_lease(mix.adapter)

    def _end_lease(self, adapter: Adapter) -> None:
        self._in_flight[adapter.digest] -= 1
        if self._in_flight[adapter.digest]:
            return
        del self._in_flight[adapter.digest]
        self._idle[adapter.digest] = adapter
        if len(self._idle) > IDLE:
            self._remove_mix(next(iter(self._idle)))

    def forget_content(self, digest: Digest) -> None:
        """Removes the mixes that have this content as a part; none of them is leased any more."""
        for mix in [mix for mix in self._idle.values() if digest in _list_digests(mix)]:
            self._remove_mix(mix.digest)

    def _remove_mix(self, digest: Digest) -> None:
        del self._idle[digest]
        task = asyncio.create_task(self._device.remove_adapter(digest))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)


def _list_digests(mix: Adapter) -> list[Digest]:
    return [part.adapter.digest for part in mix.parts]


def make_mix(versions: Sequence[AdapterVersion], weights: Sequence[float], pool_rank: int) -> Mix:
    """The mix of these adapters in this order.

    Raises AdapterUnsupported for a part that is more than plain LoRA, BadRequest for parts that do not fit
    the pool together.
    """
    parts = []
    for version, weight in zip(versions, weights, strict=True):
        parts.append(WeightedPart(_require_plain(version), weight))
    rank = _count_rows(parts)
    if rank > pool_rank:
        raise BadRequest(
            f"adapters: these have rank {rank} together, and the pool has {pool_rank}", param="adapters"
        )
    size = sum(part.adapter.size for part in parts)
    adapter = Adapter(_hash_parts(parts), "", "", ExecutionPath.POOL, rank, size, parts=tuple(parts))
    named = zip(versions, parts, strict=True)
    return Mix(adapter, tuple(MixPart(v.id, part.adapter.digest, part.weight) for v, part in named))


def _require_plain(version: AdapterVersion) -> Adapter:
    adapter = version.adapter
    assert adapter is not None, "a leased adapter was validated"
    kind = _name_kind(adapter)
    if kind:
        raise AdapterUnsupported([f"adapters: {version.id} is {kind}; only plain LoRA can be mixed"])
    return adapter


def _name_kind(adapter: Adapter) -> str:
    """What the adapter is beside plain LoRA; empty where it is just that."""
    if adapter.lane is not ExecutionPath.POOL:
        return "an adapter that PEFT runs"
    if adapter.invocation:
        return "an activated LoRA (aLoRA)"
    return "a DoRA adapter" if any(spec.magnitude for spec in adapter.patches) else ""


def _count_rows(parts: Sequence[WeightedPart]) -> int:
    """The pool rows of the layer that most rows meet in."""
    rows: Counter[str] = Counter()
    for part in parts:
        for spec in part.adapter.patches:
            rows[spec.module] += spec.rank
    return max(rows.values())


def _hash_parts(parts: Sequence[WeightedPart]) -> Digest:
    """A digest of the parts' digests and weights, in their order."""
    text = json.dumps([[part.adapter.digest, part.weight] for part in parts])
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
