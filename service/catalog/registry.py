"""Names and what they stand for: registers, replaces, leases and removes adapters, and remembers them. Knows no tensor and no HTTP.

Lives on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from ..core.adapter import Lane
from ..core.messages import Load
from ..errors import AdapterInvalid, Conflict, NotReady
from ..settings import Settings
from ..telemetry import metrics
from ..threads import DISK, run_in
from . import architecture, facts, ids, summary, versions
from . import summary_text as tables
from .adapter_table import Device, Shelves
from .norms import Norms, by_layer
from .sources.hub import Hub
from .sources.store import Place, Store, Upload, discard, home
from .startup import Opening, read_place
from .state_file import Ledger
from .validator.messages import Reading
from .validator.process import Reader
from .versions import Generation, Shelved

__all__ = ["Device", "Generation", "Registry"]

Told = dict[str, Any]


class Registry:
    """`base_id` is what clients call the base. Nothing can be registered before `open`.

    Raises SettingsError where a newer service has remembered registrations in the adapters directory.
    """

    def __init__(self, settings: Settings, device: Device, hub: Hub | None = None, reader: type[Reader] = Reader) -> None:
        named = ids.base_name(settings.base)  # now, for later the event loop would ask the disk
        self.base_id = settings.base_id or named
        self._settings = settings
        self._store = Store(settings.adapters, hub or Hub(settings.hub), int(settings.max_upload_mb * 1e6))
        self._ledger = Ledger(settings.adapters / ".adapterd.json")
        self._ledger.check_version()
        self._shelves = Shelves(device)
        self._saving = asyncio.Lock()
        self._deleted: set[str] = set()
        self._reader = reader(settings.max_rank)
        self._norms = Norms(self._reader)
        self._opened = False

    # ---- life

    async def open(self) -> None:
        """Starts the reader on the device's base and registers what was registered before and what lies in the adapters directory."""
        base = self._shelves.base
        await self._reader.start(Path(base.folder), base.limits)
        await run_in(DISK, self._ledger.load)
        self._deleted = set(self._ledger.deleted)
        async for one in Opening(self._store, self._ledger, self._reader, self.base_id):
            self._shelves.place(one)
        self._opened = True
        await self._save()

    async def follow(self) -> None:
        """Takes over what another process has remembered in the same directory meanwhile: the ids that came, changed and went.

        Nobody may change anything here or there while it runs; see deploy/ray.
        """
        await run_in(DISK, self._ledger.load)
        self._deleted = set(self._ledger.deleted)
        for id in self._shelves.current.keys() - self._ledger.records:
            self._shelves.withdraw(self._shelves.current[id])
            metrics.adapter_removed(id)
        opening = Opening(self._store, self._ledger, self._reader, self.base_id)
        for id, record in self._ledger.records.items():
            held = self._shelves.current.get(id)
            if held is None or held.digest != record.digest:
                await self._replace(held, await opening.again(id, record))
            elif held.pinned != record.pinned:
                self._shelves.pin(held, record.pinned)

    async def _replace(self, held: Shelved | None, one: Shelved | None) -> None:
        if held is not None:
            self._shelves.withdraw(held)
        if one is not None:
            self._shelves.place(one)

    async def warm(self) -> None:
        """Starts what can be started before the base is there."""
        await self._reader.warm()

    async def close(self) -> None:
        self._shelves.close()
        await self._reader.close()

    # ---- changing

    async def register(
        self,
        id: str,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        pinned: bool = False,
        preload: bool = True,
        replace: bool = False,
    ) -> tuple[Told, bool]:
        """The card, and whether the id is new. The same content again changes nothing unless it had failed.

        Other content needs `replace`.

        Raises BadRequest, Conflict, Forbidden, AdapterInvalid, AdapterUnsupported.
        """
        ids.check(id, self.base_id)
        place = await self._store.find(source, subfolder, revision)
        async with self._shelves.turn(f"id {id}"):
            return await self._take(await self._generation(id, place), pinned, preload, replace)

    async def upload(self, id: str, files: Mapping[str, Upload]) -> tuple[Told, bool]:
        """Stores the parts of an upload under the adapters directory and registers them. Raises as `register`, and PayloadTooLarge."""
        ids.check(id, self.base_id)
        staged = await self._store.stage(files)
        try:
            async with self._shelves.turn(f"id {id}"):
                _, reading = await self._read(Place(staged, "upload"))
                content = reading.adapter.digest
                async with self._purging(home(content)):
                    kept = await run_in(DISK, self._store.keep, staged, content)
                    fingerprint = await run_in(DISK, kept.fingerprint)
                    generation = Generation(id, kept, fingerprint, versions.now(), reading.moved(kept.folder))
                    return await self._take(generation, pinned=False, preload=True, replace=False)
        finally:
            await run_in(DISK, discard, staged)

    async def check(self, id: str, source: str, subfolder: str | None = None, revision: str | None = None, preload: bool = True) -> Told:
        """The whole validation and the summary; registers nothing. It is ok where `register` would take it.

        What only PEFT itself can run is tried out on the device, as `register` would. An id that other content has is a problem, too,
        told beside the summary. Raises BadRequest, Conflict for a reserved id, Forbidden.
        """
        ids.check(id, self.base_id)
        try:
            one = Shelved(await self._generation(id, await self._store.find(source, subfolder, revision)))
            problems = self._taken(one.generation)
            if preload and not problems:
                await self._try_out(one.generation)
        except AdapterInvalid as error:
            return {"ok": False, "summary": None, "problems": error.problems}
        summary = self._summary(one) | {"state": "unregistered", "registered_at": None}
        return {"ok": not problems, "summary": summary, "problems": problems}

    async def _try_out(self, generation: Generation) -> None:
        adapter = generation.adapter
        assert adapter is not None, "it was just read"
        held = self._shelves.current.get(generation.id)
        if adapter.lane is Lane.SHADOW and not (held and held.digest == adapter.digest):
            await self._shelves.try_out(adapter)

    async def remove(self, id: str, purge: bool = False) -> Told:
        """Takes the id away at once, waits for its leases, then frees its content unless another id has it too. Raises AdapterNotFound."""
        one = self._shelves.found(id)
        place, drained = one.generation.place, one.in_flight
        self._deleted = self._deleted | {id, place.path}
        ending = self._shelves.withdraw(one)
        metrics.adapter_removed(id)
        await self._save()
        freed = await asyncio.shield(ending)
        if purge:
            async with self._purging(place.source):
                pass
        return {"id": id, "digest": one.digest or None, "drained_requests": drained, "freed_bytes": freed}

    async def pin(self, id: str, pinned: bool) -> Told:
        """Pins to, or unpins from, the device; the card. Raises AdapterNotFound, AdapterInvalid for a failed adapter."""
        one = self._shelves.usable(id)
        self._shelves.pin(one, pinned)
        await self._save()
        return self._card(one)

    def note(self, load: Load) -> None:
        """What became of a load on the device: shown as the state of the adapters with this content."""
        for one in self._shelves.current.values():
            if one.digest == load.digest and one.generation.reading:
                one.failure = load.error

    # ---- using and looking

    @contextmanager
    def lease(self, id: str) -> Iterator[Generation]:
        """The id's content, which stays until the lease ends. Raises AdapterNotFound; AdapterInvalid for one that could not be read."""
        one = self._shelves.usable(id)
        one.take()
        try:
            yield one.generation
        finally:
            one.give_back()

    def card(self, id: str) -> Told:
        return self._card(self._shelves.found(id))

    def cards(self) -> list[Told]:
        return [self._card(one) for _, one in sorted(self._shelves.current.items())]

    def registered(self) -> list[Generation]:
        """What stands under each id, by id."""
        return [one.generation for _, one in sorted(self._shelves.current.items())]

    def summary(self, id: str) -> Told:
        return self._summary(self._shelves.found(id))

    def summary_text(self, id: str) -> str:
        return tables.summary(self.summary(id))

    def architecture(self, id: str) -> str:
        """The base's module tree with the adapter in place. Raises AdapterNotFound, AdapterInvalid for one that could not be read."""
        reading = self._shelves.usable(id).generation.reading
        assert reading is not None, "a usable adapter was read"
        assert self._reader.tree is not None, "it was read against a tree"
        return architecture.draw(self._reader.tree, reading.layers, reading.facts["dropout"], reading.facts["features"])

    async def norms(self, id: str) -> Told:
        """How much it changes by layer and module; see norms.by_layer. Raises AdapterNotFound, AdapterInvalid, NotReady."""
        one = self._shelves.usable(id)
        reading = one.generation.reading
        assert reading is not None, "a usable adapter was read"
        return {"id": id, "digest": one.digest} | by_layer(reading.layers, await self._norms.of(reading), self._shelves.base.layers)

    def forecast(self, r: int, modules: Sequence[str], dtype: str = "float32") -> Told:
        """What an adapter of this shape would weigh on the base. Raises BadRequest."""
        base = self._shelves.base
        return facts.forecast(base.linears, base.parameters, r, modules, dtype)

    # ---- inside

    async def _take(self, generation: Generation, pinned: bool, preload: bool, replace: bool) -> tuple[Told, bool]:
        id, adapter = generation.id, generation.adapter
        assert adapter is not None, "only what was read can be taken"
        held = self._shelves.current.get(id)
        same = held is not None and held.digest == adapter.digest
        if held and same and not held.failure:
            return await self.pin(id, pinned) if replace and pinned != held.pinned else self.card(id), False
        if not replace and (taken := self._taken(generation)):
            raise Conflict(taken[0], param="id")
        one = Shelved(generation, pinned or bool(held and same and held.pinned and not replace))
        before = await self._shelves.put(one, adapter, preload)
        await self._save()
        return self._card(one), not (before and before.digest)  # somebody may have deleted it by now

    def _taken(self, generation: Generation) -> list[str]:
        """Why its id cannot be registered: it has other content, which was not only a folder that could not be read."""
        held = self._shelves.current.get(generation.id)
        if held is None or held.digest in ("", generation.digest):
            return []
        return [f"the id {generation.id!r} is taken by other content ({held.digest}); PUT replaces it"]

    @asynccontextmanager
    async def _purging(self, source: str) -> AsyncIterator[None]:
        """What was uploaded there goes in the end if nothing has it. Who uploads the same waits, lest it go while he takes it."""
        async with self._shelves.turn(f"source {source}"):
            try:
                yield
            finally:
                if not self._shelves.sourced(source):
                    await run_in(DISK, self._store.purge, source)

    def _card(self, one: Shelved) -> Told:
        return summary.card(one, self._shelves.tier(one))

    async def _generation(self, id: str, place: Place) -> Generation:
        fingerprint, reading = await self._read(place)
        return Generation(id, place, fingerprint, versions.now(), reading)

    async def _read(self, place: Place) -> tuple[str, Reading]:
        """Raises NotReady, AdapterInvalid, AdapterUnsupported."""
        if not self._opened:
            raise NotReady("not ready: the base is loading", retry_after=2)
        try:
            return await read_place(self._reader, place)
        except OSError as error:
            raise AdapterInvalid([f"the files cannot be read: {error.strerror}"]) from None

    def _summary(self, one: Shelved) -> Told:
        served = ids.Served(self.base_id, self._settings.base)
        return summary.summary(one, self._shelves.tier(one), self._shelves.base, served)

    async def _save(self) -> None:
        async with self._saving:
            deleted = self._deleted
            there = await run_in(DISK, _present, self._settings.adapters, deleted)
            if self._deleted is deleted:  # what was deleted meanwhile may have been made anew before
                self._deleted = there
            records = {id: one.record() for id, one in self._shelves.current.items()}
            await run_in(DISK, self._ledger.save, records, set(self._deleted))


def _present(root: Path, names: set[str]) -> set[str]:
    return {name for name in names if (root / name).exists()}
