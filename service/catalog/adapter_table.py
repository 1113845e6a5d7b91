"""Keeps the registered adapters by id, and those still leased without one, and tells the device of them.

Runs in the API process; must not know files.

An id is a label on immutable content: contents end when no id has them and their last lease is
over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol
from weakref import WeakValueDictionary

from ..core.adapter import Adapter, Digest, Tier
from ..core.base_info import BaseInfo
from ..core.error_codes import ErrorCode
from ..core.messages import Load
from ..errors import AdapterdError, AdapterInvalid, NotReady, Overloaded
from ..telemetry import metrics
from . import ids
from .mixes import MixTable
from .versions import RegisteredAdapter

RETRY_S = 2  # after memory or the worker was missing


class Device(Protocol):
    """The engine, as the registry needs it.

    `base` is there once it is loaded; `remove_adapter` gives the bytes freed.
    """

    @property
    def base(self) -> BaseInfo | None: ...
    def add_adapter(self, adapter: Adapter, pinned: bool = False, preload: bool = True) -> None: ...
    async def wait_until_loaded(self, digest: Digest) -> Load: ...
    def pin_adapter(self, digest: Digest, pinned: bool) -> None: ...
    async def remove_adapter(self, digest: Digest) -> int: ...
    def tier_of(self, digest: Digest) -> Tier: ...


class AdapterTable:
    def __init__(self, device: Device) -> None:
        self.device = device
        self.current: dict[str, RegisteredAdapter] = {}
        self._retired: set[RegisteredAdapter] = set()  # replaced or deleted, and still leased
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._ending: set[asyncio.Task[int]] = set()
        self.mixes = MixTable(device)

    # ---- looking

    def find_adapter(self, id: str) -> RegisteredAdapter:
        """Raises AdapterNotFound."""
        if id not in self.current:
            raise ids.unknown_adapter(id)
        return self.current[id]

    def find_usable(self, id: str) -> RegisteredAdapter:
        """Raises AdapterNotFound, AdapterInvalid for one that could not be read at start."""
        entry = self.find_adapter(id)
        if entry.version.validated is None:
            raise AdapterInvalid([entry.failure])
        return entry

    @property
    def base(self) -> BaseInfo:
        """Raises NotReady while the base loads."""
        if self.device.base is None:
            raise NotReady("not ready: the base is loading", retry_after=2)
        return self.device.base

    def tier_of(self, entry: RegisteredAdapter) -> Tier:
        return self.device.tier_of(entry.digest)

    def is_source_used(self, source: str) -> bool:
        """Whether anything, leased or named, lies in this source."""
        return any(entry.version.place.stored == source for entry in self._list_held())

    def lock_for(self, name: str) -> asyncio.Lock:
        """One at a time for an id, and for a content."""
        return self._turns.setdefault(name, asyncio.Lock())

    # ---- changing

    def insert_adapter(self, entry: RegisteredAdapter) -> None:
        """Registers an adapter under a free id, without loading it unless it is pinned."""
        self.current[entry.version.id] = entry
        metrics.adapter_registered(entry.version.id)
        if adapter := entry.version.adapter:
            self.device.add_adapter(adapter, entry.pinned, entry.pinned)

    async def replace_adapter(
        self,
        entry: RegisteredAdapter,
        adapter: Adapter,
        preload: bool,
        remember: Callable[[Callable[[], None]], Awaitable[None]],
    ) -> RegisteredAdapter | None:
        """Puts an adapter under its id once the device has it, if it is to be loaded now.

        `remember` is given the call that does so, and makes it once the registration is kept. The entry
        that it replaces ends with its last lease, and is returned. Raises AdapterInvalid when the device
        cannot load the new one, Overloaded and NotReady when that is not its fault, and what `remember`
        raises; then nothing has changed.
        """
        replaced: list[RegisteredAdapter] = []

        def put_entry() -> None:
            if held := self.current.get(entry.version.id):
                self.withdraw_adapter(held)
                replaced.append(held)
            self.current[entry.version.id] = entry
            if entry.pinned:  # another id of this content may have been unpinned meanwhile
                self.device.pin_adapter(adapter.digest, True)
            metrics.adapter_registered(entry.version.id)

        async with self.lock_for(adapter.digest):
            self.device.add_adapter(adapter, entry.pinned, preload)
            if preload and self.device.tier_of(adapter.digest) is Tier.DISK:
                await self._wait_until_loaded(adapter.digest)
            try:
                await remember(put_entry)
            except AdapterdError:
                await self._release_content(adapter.digest)
                raise
        return replaced[0] if replaced else None

    async def try_out(self, adapter: Adapter) -> None:
        """Loads a content that no id has yet, and lets it go again.

        Raises AdapterInvalid when the device cannot load it, Overloaded and NotReady when that is not its
        fault.
        """
        async with self.lock_for(adapter.digest):
            if self.device.tier_of(adapter.digest) is Tier.DISK:
                self.device.add_adapter(adapter, False, True)
                await self._wait_until_loaded(adapter.digest)
                await self._release_content(adapter.digest)

    def withdraw_adapter(self, entry: RegisteredAdapter) -> asyncio.Task[int]:
        """Takes an adapter from its id at once.

        The task waits for its leases, frees its content and gives the bytes freed.
        """
        del self.current[entry.version.id]
        self._retired.add(entry)
        if entry.pinned:  # its pin goes with its name: what drains must not hold the pool
            self.device.pin_adapter(entry.digest, self._is_pinned(entry.digest))
        task = asyncio.create_task(self._end_adapter(entry))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    def pin_adapter(self, entry: RegisteredAdapter, pinned: bool) -> None:
        entry.pinned = pinned
        self.device.pin_adapter(entry.digest, self._is_pinned(entry.digest))

    def preload_adapter(self, entry: RegisteredAdapter) -> None:
        """Has the device read the content, and place it while there is room; waits for neither."""
        adapter = entry.version.adapter
        if adapter and self.tier_of(entry) is not Tier.DEVICE:
            self.device.add_adapter(adapter, False, True)

    def cancel_endings(self) -> None:
        for task in self._ending:
            task.cancel()

    # ---- inside

    async def _wait_until_loaded(self, digest: Digest) -> None:
        try:
            load = await self.device.wait_until_loaded(digest)
            if load.error:
                raise error_of_load(load)
        except BaseException:
            await self._release_content(digest)
            raise

    async def _end_adapter(self, entry: RegisteredAdapter) -> int:
        await entry.idle.wait()
        self._retired.discard(entry)
        if not entry.digest:
            return 0
        async with self.lock_for(entry.digest):
            return await self._release_content(entry.digest)

    async def _release_content(self, digest: Digest) -> int:
        """Removes a content that nothing has any more.

        Another entry that has it may lie elsewhere, and may not be pinned. Returns the bytes freed.
        """
        holders = (entry.version.adapter for entry in self._list_held() if entry.digest == digest)
        adapter = next(holders, None)
        if adapter is None:
            self.mixes.forget_content(digest)
            return await self.device.remove_adapter(digest)
        self.device.add_adapter(adapter, False, False)
        self.device.pin_adapter(digest, self._is_pinned(digest))
        return 0

    def _list_held(self) -> tuple[RegisteredAdapter, ...]:
        """Every entry, under an id or only leased."""
        return (*self.current.values(), *self._retired)

    def _is_pinned(self, digest: Digest) -> bool:
        return any(entry.pinned for entry in self.current.values() if entry.digest == digest)


def error_of_load(load: Load) -> AdapterdError:
    """The error that a caller gets of a load that failed: the adapter's, unless it had no part in it."""
    if load.code is ErrorCode.OVERLOADED:
        return Overloaded(load.error, retry_after=RETRY_S)
    if load.code is ErrorCode.NOT_READY:
        return NotReady(load.error, retry_after=RETRY_S)
    return AdapterInvalid([load.error])
