"""What the worker was told of adapters and what it said of them, so that a new worker can be told
again and nobody waits for ever.

Lives on the event loop; must not know requests, processes or adapter names.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..core.adapter import Adapter, Digest, ExecutionPath, Tier
from ..core.messages import AddAdapter, Command, Load, Pin, RemoveAdapter, Report
from ..telemetry import metrics

STOPPED = "the engine has stopped"


class AdapterMirror:
    """`send` gives an order to the worker; False where there is none to take it."""

    def __init__(self, send: Callable[[Command], bool]) -> None:
        self._send = send
        self._offers: dict[Digest, AddAdapter] = {}
        self._tiers: dict[Digest, Tier] = {}
        self._sizes: dict[Digest, int] = {}  # bytes in host memory, once read
        self._loads: dict[Digest, asyncio.Future[Load]] = {}
        self._drops: dict[Digest, list[asyncio.Future[int]]] = {}
        self._closed = False
        self.watcher: Callable[[Load], None] = lambda load: None

    def add_adapter(self, adapter: Adapter, pinned: bool, preload: bool) -> None:
        known = self._offers.get(adapter.digest)
        pinned = pinned or (known is not None and known.pinned)
        if preload:
            self._expect_load(adapter.digest)
        # A new worker must read it, too
        awaited = adapter.digest in self._loads and not self._loads[adapter.digest].done()
        self._offers[adapter.digest] = AddAdapter(adapter, pinned, preload or awaited)
        self._send(self._offers[adapter.digest])
        self._count_tiers()

    @property
    def waits(self) -> bool:
        """Whether a load or a drop has not ended yet."""
        return bool(self._drops) or not all(load.done() for load in self._loads.values())

    async def wait_until_loaded(self, digest: Digest) -> Load:
        if digest not in self._loads:
            if digest not in self._offers:
                return Load(digest, 0.0, 0, "the adapter is not registered any more")
            self.add_adapter(self._offers[digest].adapter, pinned=False, preload=True)
        return await asyncio.shield(self._loads[digest])

    def pin_adapter(self, digest: Digest, pinned: bool) -> None:
        if digest in self._offers:
            self._offers[digest] = replace(self._offers[digest], pinned=pinned)
            self._send(Pin(digest, pinned))

    async def remove_adapter(self, digest: Digest) -> int:
        self._offers.pop(digest, None)
        self._load_ended(Load(digest, 0.0, 0, "the adapter was removed"))
        self._loads.pop(digest, None)
        self._count_tiers()
        if not self._send(RemoveAdapter(digest)):
            self._forget_adapter(digest)
            return 0
        freed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._drops.setdefault(digest, []).append(freed)
        return await freed

    def tier_of(self, digest: Digest) -> Tier:
        return self._tiers.get(digest, Tier.DISK)

    def count_request(self, digest: Digest) -> None:
        """A request for this content was admitted: whether it is where it is needed is counted,
        tier by tier.
        """
        offer = self._offers.get(digest)
        if offer is not None:
            resident, hosted = self.tier_of(digest) is Tier.DEVICE, self.tier_of(digest) is not Tier.DISK
            if offer.adapter.lane is ExecutionPath.POOL:
                metrics.looked_up(Tier.DEVICE.value, resident)
            if not resident:
                metrics.looked_up(Tier.HOST.value, hosted)

    def is_resident(self, digest: Digest) -> bool:
        """Whether it could run in the next step."""
        offer = self._offers.get(digest)
        at_home = Tier.DEVICE if offer is None or offer.adapter.lane is ExecutionPath.POOL else Tier.HOST
        return self.tier_of(digest) is at_home

    def bytes_of(self, digests: Iterable[Digest]) -> int:
        """The bytes of these contents, which are the same on the device as in host memory."""
        return sum(map(self._size_of, digests))

    def on_report(self, report: Report) -> None:
        for load in report.loads:
            if load.seconds and not load.error:
                self._sizes[load.digest] = load.size
                metrics.adapter_loaded(load.seconds, load.size)
            self._load_ended(load)
            self.watcher(load)
        # Before the tiers: an adapter offered again since then tells its own
        for digest, freed in report.dropped:
            self._tiers.pop(digest, None)
            self._forget_adapter(digest)
            self._on_removed(digest, freed)
        for digest, seconds in report.placed:
            metrics.adapter_placed(seconds, self._size_of(digest))
        for digest, tier, seconds in report.evicted:
            if digest in self._offers:  # what was dropped has not left for another
                metrics.adapter_evicted(tier.value, seconds, self._size_of(digest))
        if report.tiers:
            self._tiers.update(report.tiers)
        if report.tiers or report.dropped:
            self._count_tiers()

    def repeat_all(self) -> None:
        """Tells a new worker everything."""
        for offer in self._offers.values():
            self._send(offer)

    def on_worker_lost(self) -> None:
        """The worker is gone, and with it what it held."""
        self._tiers.clear()
        for digest in list(self._drops):
            self._on_removed(digest, 0)
        self._count_tiers()

    def end_waiting(self) -> None:
        """No worker will come any more."""
        self._closed = True
        self.on_worker_lost()
        for digest in self._loads:
            self._load_ended(Load(digest, 0.0, 0, STOPPED))

    def _forget_adapter(self, digest: Digest) -> None:
        if digest not in self._offers:
            self._sizes.pop(digest, None)

    def _size_of(self, digest: Digest) -> int:
        return self._sizes.get(digest, 0)

    def _expect_load(self, digest: Digest) -> None:
        if digest not in self._loads or self._loads[digest].done():
            self._loads[digest] = asyncio.get_running_loop().create_future()
        if self._closed:
            self._load_ended(Load(digest, 0.0, 0, STOPPED))

    def _load_ended(self, load: Load) -> None:
        expected = self._loads.get(load.digest)
        if expected is not None and not expected.done():
            expected.set_result(load)

    def _on_removed(self, digest: Digest, freed: int) -> None:
        for waiter in self._drops.pop(digest, ()):
            if not waiter.done():
                waiter.set_result(freed)

    def _count_tiers(self) -> None:
        counted = Counter(self.tier_of(digest) for digest in self._offers)
        for tier in Tier:
            metrics.ADAPTERS.labels(tier.value).set(counted[tier])
