"""What stands under which id, what is still leased without one, and what the device is told of it.

Knows no files.

An id is a label on immutable content: contents end when no id has them and their last lease is
over.
"""

from __future__ import annotations

import asyncio
from typing import Protocol
from weakref import WeakValueDictionary

from ..core.adapter import Adapter, Digest, Tier
from ..core.base_info import BaseInfo
from ..core.messages import Load
from ..errors import AdapterInvalid, NotReady
from ..telemetry import metrics
from . import ids
from .versions import RegisteredAdapter


class Device(Protocol):
    """The engine, as names need it.

    `base` is there once it is loaded; `drop` gives the bytes freed.
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

    # ---- looking

    def find_adapter(self, id: str) -> RegisteredAdapter:
        """Raises AdapterNotFound."""
        if id not in self.current:
            raise ids.unknown_adapter(id)
        return self.current[id]

    def find_usable(self, id: str) -> RegisteredAdapter:
        """Raises AdapterNotFound, AdapterInvalid for one that could not be read at start."""
        one = self.find_adapter(id)
        if one.version.validated is None:
            raise AdapterInvalid([one.failure])
        return one

    @property
    def base(self) -> BaseInfo:
        """Raises NotReady while the base loads."""
        if self.device.base is None:
            raise NotReady("not ready: the base is loading", retry_after=2)
        return self.device.base

    def tier_of(self, one: RegisteredAdapter) -> Tier:
        return self.device.tier_of(one.digest)

    def is_source_used(self, source: str) -> bool:
        """Whether anything, leased or named, lies in this source."""
        return any(one.version.place.source == source for one in (*self.current.values(), *self._retired))

    def lock_for(self, name: str) -> asyncio.Lock:
        """One at a time for an id, and for a content."""
        return self._turns.setdefault(name, asyncio.Lock())

    # ---- changing

    def insert_adapter(self, one: RegisteredAdapter) -> None:
        """Puts an adapter where nothing stands, without loading it unless it is pinned."""
        self.current[one.version.id] = one
        metrics.adapter_registered(one.version.id)
        if adapter := one.version.adapter:
            self.device.add_adapter(adapter, one.pinned, one.pinned)

    async def replace_adapter(
        self, one: RegisteredAdapter, adapter: Adapter, preload: bool
    ) -> RegisteredAdapter | None:
        """Puts an adapter under its id once the device has it, if it is to be loaded now; what
        stood there ends with its last lease.

        Raises AdapterInvalid when the device cannot load it; then nothing has changed.
        """
        async with self.lock_for(adapter.digest):
            self.device.add_adapter(adapter, one.pinned, preload)
            if preload and self.device.tier_of(adapter.digest) is Tier.DISK:
                await self._wait_until_loaded(adapter.digest)
            held = self.current.get(one.version.id)
            if held:
                self.withdraw_adapter(held)
            self.current[one.version.id] = one
            if one.pinned:
                # Another id of this content may have been unpinned meanwhile
                self.device.pin_adapter(adapter.digest, True)
            metrics.adapter_registered(one.version.id)
        return held

    async def try_out(self, adapter: Adapter) -> None:
        """Loads what nothing has under any id yet, and lets it go again.

        Raises AdapterInvalid when the device cannot load it.
        """
        async with self.lock_for(adapter.digest):
            if self.device.tier_of(adapter.digest) is Tier.DISK:
                self.device.add_adapter(adapter, False, True)
                await self._wait_until_loaded(adapter.digest)
                await self._release_content(adapter.digest)

    def withdraw_adapter(self, one: RegisteredAdapter) -> asyncio.Task[int]:
        """Takes an adapter from its id at once; the task waits for its leases, frees its content
        and gives the bytes freed.
        """
        del self.current[one.version.id]
        self._retired.add(one)
        if one.pinned:  # its pin goes with its name: what drains must not hold the pool
            self.device.pin_adapter(one.digest, self._is_pinned(one.digest))
        task = asyncio.create_task(self._end_adapter(one))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task

    def pin_adapter(self, one: RegisteredAdapter, pinned: bool) -> None:
        one.pinned = pinned
        self.device.pin_adapter(one.digest, self._is_pinned(one.digest))

    def cancel_endings(self) -> None:
        for task in self._ending:
            task.cancel()

    # ---- inside

    async def _wait_until_loaded(self, digest: Digest) -> None:
        try:
            load = await self.device.wait_until_loaded(digest)
            if load.error:
                raise AdapterInvalid([load.error])
        except BaseException:
            await self._release_content(digest)
            raise

    async def _end_adapter(self, one: RegisteredAdapter) -> int:
        await one.idle.wait()
        self._retired.discard(one)
        if not one.digest:
            return 0
        async with self.lock_for(one.digest):
            return await self._release_content(one.digest)

    async def _release_content(self, digest: Digest) -> int:
        """Drops a content that nothing has any more.

        What still has it may lie elsewhere, and may not be pinned; the bytes freed.
        """
        having = (
            one.version.adapter for one in (*self.current.values(), *self._retired) if one.digest == digest
        )
        adapter = next(having, None)
        if adapter is None:
            return await self.device.remove_adapter(digest)
        self.device.add_adapter(adapter, False, False)
        self.device.pin_adapter(digest, self._is_pinned(digest))
        return 0

    def _is_pinned(self, digest: Digest) -> bool:
        return any(one.pinned for one in self.current.values() if one.digest == digest)
