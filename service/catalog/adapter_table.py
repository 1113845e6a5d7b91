"""Keeps the registered adapters and their versions by id, and those only leased; tells the device
of them.

Runs in the API process; must not know files.

An id is a label on immutable content, and keeps the last contents that it was on: contents end when
no id has them and their last lease is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol
from weakref import WeakValueDictionary

from ..core.adapter import Adapter, Digest, Tier
from ..core.base_info import BaseInfo
from ..core.error_codes import ErrorCode
from ..core.messages import Load
from ..errors import AdapterdError, AdapterInvalid, DigestMismatch, NotFound, NotReady, Overloaded
from ..telemetry import metrics
from . import ids
from .mixes import MixTable
from .state_file import Record
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


Kept = tuple[RegisteredAdapter, ...]


@dataclass(frozen=True, slots=True)
class VersionChange:
    """`before` was under the id; `dropped` are no versions of it any more, and `ending` gives the
    bytes that they have freed once their last lease is over.
    """

    before: RegisteredAdapter | None
    dropped: Kept
    ending: asyncio.Task[int]


class AdapterTable:
    """`current` are the versions under their ids, `kept` those before them, the last one first;
    `most` of each id are kept.
    """

    def __init__(self, device: Device, most: int = 0) -> None:
        self.device, self._most = device, most
        self.current: dict[str, RegisteredAdapter] = {}
        self.kept: dict[str, Kept] = {}
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

    def list_versions(self, id: str) -> Kept:
        """The current version, then those that are kept. Raises AdapterNotFound."""
        return (self.find_adapter(id), *self.kept.get(id, ()))

    def find_version(self, id: str, digest: Digest) -> RegisteredAdapter:
        """The version of this id whose digest begins so.

        Raises AdapterNotFound, DigestMismatch.
        """
        current, *_ = versions = self.list_versions(id)
        for entry in versions:
            if entry.digest.startswith(digest):
                return entry
        has = f"has the digest {current.digest}" if current.digest else "could not be read"
        raise DigestMismatch(
            f"the adapter {id!r} {has}, and no version of it that is kept has {digest}", param="model"
        )

    def find_kept(self, id: str, digest: Digest | None) -> RegisteredAdapter:
        """The version before the current one, or the one whose digest begins so.

        Raises NotFound, AdapterNotFound.
        """
        versions = self.list_versions(id)
        for entry in versions if digest else versions[1:]:
            if entry.digest.startswith(digest or ""):
                return entry
        wanted = f"that has {digest}" if digest else "before the current one"
        raise NotFound(f"the adapter {id!r} keeps no version {wanted}", param="digest")

    def choose_kept(self, entry: RegisteredAdapter, named: Collection[Digest]) -> Kept:
        """The versions that stay once this one is current, and those that are `named` in any case.

        A folder that was written over has lost what was in it.
        """
        id = entry.version.id
        before = (held,) if (held := self.current.get(id)) else ()
        able = [
            old
            for old in (*before, *self.kept.get(id, ()))
            if old.digest not in ("", entry.digest) and old.version.folder != entry.version.folder
        ]
        return self.limit_kept(able, named)

    def limit_kept(self, versions: Sequence[RegisteredAdapter], named: Collection[Digest]) -> Kept:
        """As many of these, the last one first, as are kept, and those that are `named` in any case."""
        return tuple(old for i, old in enumerate(versions) if i < self._most or old.digest in named)

    def make_record(self, entry: RegisteredAdapter, kept: Kept | None = None) -> Record:
        """The registration with the versions that are kept, or will be."""
        chosen = self.kept.get(entry.version.id, ()) if kept is None else kept
        return replace(entry.to_record(), kept=tuple(old.to_record() for old in chosen))

    @property
    def base(self) -> BaseInfo:
        """Raises NotReady while the base loads."""
        if self.device.base is None:
            raise NotReady("not ready: the base is loading", retry_after=2)
        return self.device.base

    def list_entries(self) -> list[RegisteredAdapter]:
        """Every version under an id, the current ones first."""
        return [*self.current.values(), *(old for kept in self.kept.values() for old in kept)]

    def has_versions(self, id: str, record: Record) -> bool:
        """Whether the id has the contents of this registration, the current one and those kept."""
        held = (self.current[id], *self.kept.get(id, ()))
        return [entry.digest for entry in held] == [record.digest, *(kept.digest for kept in record.kept)]

    def tier_of(self, entry: RegisteredAdapter) -> Tier:
        return self.device.tier_of(entry.digest)

    def is_source_used(self, source: str) -> bool:
        """Whether anything, leased or named, lies in this source."""
        return any(entry.version.place.stored == source for entry in self._list_held())

    def lock_for(self, name: str) -> asyncio.Lock:
        """One at a time for an id, and for a content."""
        return self._turns.setdefault(name, asyncio.Lock())

    # ---- changing

    def insert_adapter(self, entry: RegisteredAdapter, kept: Kept = ()) -> None:
        """Registers an adapter and its versions under a free id, without loading it unless it is pinned."""
        id = entry.version.id
        self.current[id] = entry
        if kept:
            self.kept[id] = kept
        metrics.adapter_registered(id)
        for old in (entry, *kept):
            if adapter := old.version.adapter:
                self.device.add_adapter(adapter, old.pinned, old.pinned)

    async def replace_adapter(
        self,
        entry: RegisteredAdapter,
        adapter: Adapter,
        preload: bool,
        remember: Callable[[Callable[[Kept], None]], Awaitable[None]],
    ) -> VersionChange:
        """Puts an adapter under its id once the device has it, if it is to be loaded now.

        `remember` is given the call that does so, and makes it once the registration is written, with the
        versions that are kept then. What is no version any more ends with its last lease.

        Raises AdapterInvalid when the device cannot load the new one, Overloaded and NotReady when that is
        not its fault, and what `remember` raises; then nothing has changed.
        """
        replaced: list[VersionChange] = []

        def put_entry(kept: Kept) -> None:
            replaced.append(self._put_entry(entry, kept))

        async with self.lock_for(adapter.digest):
            self.device.add_adapter(adapter, False, preload)
            if preload and self.device.tier_of(adapter.digest) is Tier.DISK:
                await self._wait_until_loaded(adapter.digest)
            try:
                await remember(put_entry)
            except AdapterdError:
                await self._release_content(adapter.digest)
                raise
        return replaced[0]

    def _put_entry(self, entry: RegisteredAdapter, kept: Kept) -> VersionChange:
        id = entry.version.id
        before = self.current.get(id)
        old = (before, *self.kept.get(id, ())) if before else ()
        self.current[id] = entry
        self._keep_versions(id, kept)
        dropped = tuple(one for one in old if one not in (entry, *kept))
        retiring = self._retire_entries(dropped)
        # After the pins of those before: two at once might hold more of the pool than others leave
        self.pin_adapter(entry, entry.pinned)
        metrics.adapter_registered(id)
        return VersionChange(before, dropped, retiring)

    def _keep_versions(self, id: str, kept: Kept) -> None:
        self.kept[id] = kept
        for old in kept:
            if old.pinned:  # the id's pin is its current version's
                self.pin_adapter(old, False)
        if not kept:
            del self.kept[id]

    async def try_out(self, adapter: Adapter) -> None:
        """Loads a content that no id has yet, and lets it go again.

        Raises AdapterInvalid when the device cannot load it, Overloaded and NotReady when that is
        not its fault.
        """
        async with self.lock_for(adapter.digest):
            if self.device.tier_of(adapter.digest) is Tier.DISK:
                self.device.add_adapter(adapter, False, True)
                await self._wait_until_loaded(adapter.digest)
                await self._release_content(adapter.digest)

    def withdraw_adapter(self, entry: RegisteredAdapter) -> asyncio.Task[int]:
        """Takes an adapter and its versions from their id at once.

        The task waits for their leases, frees their contents and gives the bytes freed.
        """
        del self.current[entry.version.id]
        return self._retire_entries((entry, *self.kept.pop(entry.version.id, ())))

    def _retire_entries(self, entries: Kept) -> asyncio.Task[int]:
        self._retired.update(entries)
        for entry in entries:
            if entry.pinned:  # its pin goes with its name: what drains must not hold the pool
                self.device.pin_adapter(entry.digest, self._is_pinned(entry.digest))
        task = asyncio.create_task(self._end_adapters(entries))
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

    async def _end_adapters(self, entries: Kept) -> int:
        return sum(await asyncio.gather(*map(self._end_adapter, entries)))

    async def _end_adapter(self, entry: RegisteredAdapter) -> int:
        await entry.idle.wait()
        if not entry.digest:
            self._retired.discard(entry)
            return 0
        async with self.lock_for(entry.digest):
            self._retired.discard(entry)
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
        return (*self.list_entries(), *self._retired)

    def _is_pinned(self, digest: Digest) -> bool:
        return any(entry.pinned for entry in self.current.values() if entry.digest == digest)


def error_of_load(load: Load) -> AdapterdError:
    """The error that a caller gets of a load that failed: the adapter's, unless it had no part in it."""
    if load.code is ErrorCode.OVERLOADED:
        return Overloaded(load.error, retry_after=RETRY_S)
    if load.code is ErrorCode.NOT_READY:
        return NotReady(load.error, retry_after=RETRY_S)
    return AdapterInvalid([load.error])
