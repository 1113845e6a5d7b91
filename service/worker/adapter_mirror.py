"""Keeps the worker's adapter commands and its reports of adapters; runs in the API process.

So a new worker gets the commands again, and no caller waits for ever. Lives on the event loop; must not
know requests, processes or adapter names.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..core.adapter import Adapter, Digest, ExecutionPath, Tier
from ..core.error_codes import ErrorCode
from ..core.messages import AddAdapter, Command, Load, Pin, RemoveAdapter, Report
from ..telemetry import metrics

STOPPED = "the engine has stopped"


class AdapterMirror:
    """`send` gives a command to the worker; False where there is none to take it."""

    def __init__(self, send: Callable[[Command], bool]) -> None:
        self._send = send
        self._added: dict[Digest, AddAdapter] = {}
        self._tiers: dict[Digest, Tier] = {}
        self._sizes: dict[Digest, int] = {}  # bytes in host memory, once read
        self._loads: dict[Digest, asyncio.Future[Load]] = {}
        self._interrupted: set[Digest] = set()  # loads that have lost one worker
        self._removals: dict[Digest, list[asyncio.Future[int]]] = {}
        self._closed = False
        self.watcher: Callable[[Load], None] = lambda load: None

    def add_adapter(self, adapter: Adapter, pinned: bool, preload: bool) -> None:
        before = self._added.get(adapter.digest)
        pinned = pinned or (before is not None and before.pinned)
        if preload:
            self._expect_load(adapter.digest)
        # A new worker must read it, too
        awaited = adapter.digest in self._loads and not self._loads[adapter.digest].done()
        command = AddAdapter(adapter, pinned, preload or awaited)
        self._added[adapter.digest] = command
        self._send(command)
        self._count_tiers()

    @property
    def waits(self) -> bool:
        """Whether a load or a removal has not ended yet."""
        return bool(self._removals or self._list_awaited())

    async def wait_until_loaded(self, digest: Digest) -> Load:
        if digest not in self._loads:
            if digest not in self._added:
                return Load(digest, 0.0, 0, "the adapter is not registered any more")
            self.add_adapter(self._added[digest].adapter, pinned=False, preload=True)
        return await asyncio.shield(self._loads[digest])

    def pin_adapter(self, digest: Digest, pinned: bool) -> None:
        if digest in self._added:
            self._added[digest] = replace(self._added[digest], pinned=pinned)
            self._send(Pin(digest, pinned))

    async def remove_adapter(self, digest: Digest) -> int:
        self._added.pop(digest, None)
        self._end_load(Load(digest, 0.0, 0, "the adapter was removed"))
        self._loads.pop(digest, None)
        self._count_tiers()
        if not self._send(RemoveAdapter(digest)):
            self._forget_adapter(digest)
            return 0
        freed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._removals.setdefault(digest, []).append(freed)
        return await freed

    def tier_of(self, digest: Digest) -> Tier:
        return self._tiers.get(digest, Tier.DISK)

    def count_request(self, digest: Digest) -> None:
        """Counts, for an admitted request for this content, a hit or a miss of each tier."""
        if digest not in self._added:
            return
        tier = self.tier_of(digest)
        if self._is_batched(digest):
            metrics.looked_up(Tier.DEVICE.value, tier is Tier.DEVICE)
        if tier is not Tier.DEVICE:
            metrics.looked_up(Tier.HOST.value, tier is not Tier.DISK)

    def is_resident(self, digest: Digest) -> bool:
        """Whether it could run in the next step."""
        needed = Tier.DEVICE if self._is_batched(digest) else Tier.HOST
        return self.tier_of(digest) is needed

    def bytes_of(self, digests: Iterable[Digest]) -> int:
        """The bytes of these contents, which are the same on the device as in host memory."""
        return sum(map(self._size_of, digests))

    def on_report(self, report: Report) -> None:
        for load in report.loads:
            self._record_load(load)
        # Before the tiers: an adapter added again since then has a new one
        for digest, freed in report.dropped:
            self._tiers.pop(digest, None)
            self._forget_adapter(digest)
            self._end_removal(digest, freed)
        for digest, seconds in report.placed:
            metrics.adapter_placed(seconds, self._size_of(digest))
        for digest, tier, seconds in report.evicted:
            if digest in self._added:  # a removed adapter has not left for another
                metrics.adapter_evicted(tier.value, seconds, self._size_of(digest))
        if report.tiers:
            self._tiers.update(report.tiers)
        if report.tiers or report.dropped:
            self._count_tiers()

    def repeat_all(self) -> None:
        """Sends a new worker all commands that still count."""
        for command in self._added.values():
            self._send(command)

    def on_worker_lost(self, why: str, out_of_memory: bool) -> None:
        """The worker is gone, and with it all adapters that it held.

        A load that was under way is left to the next worker, once, but where memory ran out it has ended:
        the next one would die of it, too.
        """
        for digest in self._list_awaited():
            if out_of_memory or digest in self._interrupted:
                self._give_up_load(digest, why)
            else:
                self._interrupted.add(digest)
        self._forget_tiers()

    def end_waiting(self) -> None:
        """No worker will come any more."""
        self._closed = True
        for digest in self._loads:
            self._lose_load(digest, STOPPED)
        self._forget_tiers()

    def _forget_tiers(self) -> None:
        self._tiers.clear()
        for digest in list(self._removals):
            self._end_removal(digest, 0)
        self._count_tiers()

    def _list_awaited(self) -> list[Digest]:
        return [digest for digest, load in self._loads.items() if not load.done()]

    def _give_up_load(self, digest: Digest, why: str) -> None:
        """Lets no other worker begin with this load; a request for the adapter may."""
        if digest in self._added:
            self._added[digest] = replace(self._added[digest], preload=False)
        self._lose_load(digest, f"{why} before the adapter was read")

    def _lose_load(self, digest: Digest, why: str) -> None:
        self._end_load(Load(digest, 0.0, 0, why, ErrorCode.NOT_READY))

    def _forget_adapter(self, digest: Digest) -> None:
        if digest not in self._added:
            self._sizes.pop(digest, None)

    def _is_batched(self, digest: Digest) -> bool:
        """Whether it runs in the batch of all adapters, so from the pool; an unknown one counts so."""
        added = self._added.get(digest)
        return added is None or added.adapter.lane is ExecutionPath.POOL

    def _size_of(self, digest: Digest) -> int:
        return self._sizes.get(digest, 0)

    def _expect_load(self, digest: Digest) -> None:
        if digest not in self._loads or self._loads[digest].done():
            self._loads[digest] = asyncio.get_running_loop().create_future()
        if self._closed:
            self._lose_load(digest, STOPPED)

    def _record_load(self, load: Load) -> None:
        if load.seconds and not load.error:
            self._sizes[load.digest] = load.size
            metrics.adapter_loaded(load.seconds, load.size)
        self._end_load(load)
        self.watcher(load)

    def _end_load(self, load: Load) -> None:
        self._interrupted.discard(load.digest)
        expected = self._loads.get(load.digest)
        if expected is not None and not expected.done():
            expected.set_result(load)

    def _end_removal(self, digest: Digest, freed: int) -> None:
        for waiter in self._removals.pop(digest, ()):
            if not waiter.done():
                waiter.set_result(freed)

    def _count_tiers(self) -> None:
        counted = Counter(self.tier_of(digest) for digest in self._added)
        for tier in Tier:
            metrics.ADAPTERS.labels(tier.value).set(counted[tier])
