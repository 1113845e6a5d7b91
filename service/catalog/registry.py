"""Names and what they stand for: registers, replaces, leases and removes adapters, and remembers
them. Knows no tensor and no HTTP.

Lives on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from ..core.adapter import ExecutionPath
from ..core.messages import Load
from ..errors import AdapterInvalid, Conflict, NotReady
from ..settings import Settings
from ..telemetry import metrics
from ..threads import DISK, run_in
from . import architecture, facts, ids, summary, versions
from . import summary_text as tables
from .adapter_table import AdapterTable, Device
from .norms import NormCache, group_by_layer
from .sources.hub import Hub
from .sources.store import SourceLocation, Store, UploadedFile, delete_folder, upload_source
from .startup import Startup, read_place
from .state_file import StateFile
from .validator.messages import ValidatedAdapter
from .validator.process import Validator
from .versions import AdapterVersion, RegisteredAdapter

__all__ = ["AdapterVersion", "Device", "Registry"]

Told = dict[str, Any]


class Registry:
    """`base_id` is what clients call the base. Nothing can be registered before `open`.

    Raises SettingsError where a newer service has remembered registrations in the adapters
    directory.
    """

    def __init__(
        self, settings: Settings, device: Device, hub: Hub | None = None, reader: type[Validator] = Validator
    ) -> None:
        named = ids.base_name(settings.base)  # now, for later the event loop would ask the disk
        self.base_id = settings.base_id or named
        self._settings = settings
        self._store = Store(settings.adapters, hub or Hub(settings.hub), int(settings.max_upload_mb * 1e6))
        self._ledger = StateFile(settings.adapters / ".adapterd.json")
        self._ledger.check_version()
        self._shelves = AdapterTable(device)
        self._saving = asyncio.Lock()
        self._deleted: set[str] = set()
        self._reader = reader(settings.max_rank)
        self._norms = NormCache(self._reader)
        self._opened = False

    # ---- life

    async def open_catalog(self) -> None:
        """Starts the reader on the device's base and registers what was registered before and what
        lies in the adapters directory.
        """
        base = self._shelves.base
        await self._reader.start_on(Path(base.folder), base.limits)
        await run_in(DISK, self._ledger.read_file)
        self._deleted = set(self._ledger.deleted)
        async for one in Startup(self._store, self._ledger, self._reader, self.base_id):
            self._shelves.insert_adapter(one)
        self._opened = True
        await self._save_state()

    async def follow_state_file(self) -> None:
        """Takes over what another process has remembered in the same directory meanwhile: the ids
        that came, changed and went.

        Nobody may change anything here or there while it runs; see deploy/ray.
        """
        await run_in(DISK, self._ledger.read_file)
        self._deleted = set(self._ledger.deleted)
        for id in self._shelves.current.keys() - self._ledger.records:
            self._shelves.withdraw_adapter(self._shelves.current[id])
            metrics.adapter_removed(id)
        opening = Startup(self._store, self._ledger, self._reader, self.base_id)
        for id, record in self._ledger.records.items():
            held = self._shelves.current.get(id)
            if held is None or held.digest != record.digest:
                await self._replace_followed(held, await opening.restore_record(id, record))
            elif held.pinned != record.pinned:
                self._shelves.pin_adapter(held, record.pinned)

    async def _replace_followed(self, held: RegisteredAdapter | None, one: RegisteredAdapter | None) -> None:
        if held is not None:
            self._shelves.withdraw_adapter(held)
        if one is not None:
            self._shelves.insert_adapter(one)

    async def start_validator(self) -> None:
        """Starts what can be started before the base is there."""
        await self._reader.warm_up()

    async def close(self) -> None:
        self._shelves.cancel_endings()
        await self._reader.close()

    # ---- changing

    async def register_adapter(
        self,
        id: str,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        pinned: bool = False,
        preload: bool = True,
        replace: bool = False,
    ) -> tuple[Told, bool]:
        """The card, and whether the id is new.

        The same content again changes nothing unless it had failed.

        Other content needs `replace`.

        Raises BadRequest, Conflict, Forbidden, AdapterInvalid, AdapterUnsupported.
        """
        ids.check_id(id, self.base_id)
        place = await self._store.find_source(source, subfolder, revision)
        async with self._shelves.lock_for(f"id {id}"):
            return await self._register_version(await self._read_version(id, place), pinned, preload, replace)

    async def upload_adapter(self, id: str, files: Mapping[str, UploadedFile]) -> tuple[Told, bool]:
        """Stores the parts of an upload under the adapters directory and registers them.

        Raises as `register`, and PayloadTooLarge.
        """
        ids.check_id(id, self.base_id)
        staged = await self._store.stage_upload(files)
        try:
            async with self._shelves.lock_for(f"id {id}"):
                _, reading = await self._validate_files(SourceLocation(staged, "upload"))
                content = reading.adapter.digest
                async with self._purge_after(upload_source(content)):
                    kept = await run_in(DISK, self._store.keep_upload, staged, content)
                    fingerprint = await run_in(DISK, kept.compute_fingerprint)
                    generation = AdapterVersion(
                        id, kept, fingerprint, versions.current_time(), reading.move_to(kept.folder)
                    )
                    return await self._register_version(generation, pinned=False, preload=True, replace=False)
        finally:
            await run_in(DISK, delete_folder, staged)

    async def check_adapter(
        self,
        id: str,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        preload: bool = True,
    ) -> Told:
        """The whole validation and the summary; registers nothing.

        It is ok where `register` would take it.

        What only PEFT itself can run is tried out on the device, as `register` would. An id that
        other content has is a problem, too, told beside the summary. Raises BadRequest, Conflict
        for a reserved id, Forbidden.
        """
        ids.check_id(id, self.base_id)
        try:
            one = RegisteredAdapter(
                await self._read_version(id, await self._store.find_source(source, subfolder, revision))
            )
            problems = self._taken(one.generation)
            if preload and not problems:
                await self._try_out(one.generation)
        except AdapterInvalid as error:
            return {"ok": False, "summary": None, "problems": error.problems}
        summary = self._summary_of(one) | {"state": "unregistered", "registered_at": None}
        return {"ok": not problems, "summary": summary, "problems": problems}

    async def _try_out(self, generation: AdapterVersion) -> None:
        adapter = generation.adapter
        assert adapter is not None, "it was just read"
        held = self._shelves.current.get(generation.id)
        if adapter.lane is ExecutionPath.SHADOW and not (held and held.digest == adapter.digest):
            await self._shelves.try_out(adapter)

    async def remove_adapter(self, id: str, purge: bool = False) -> Told:
        """Takes the id away at once, waits for its leases, then frees its content unless another id
        has it too. Raises AdapterNotFound.
        """
        one = self._shelves.find_adapter(id)
        place, drained = one.generation.place, one.in_flight
        self._deleted = self._deleted | {id, place.path}
        ending = self._shelves.withdraw_adapter(one)
        metrics.adapter_removed(id)
        await self._save_state()
        freed = await asyncio.shield(ending)
        if purge:
            async with self._purge_after(place.source):
                pass
        return {"id": id, "digest": one.digest or None, "drained_requests": drained, "freed_bytes": freed}

    async def pin_adapter(self, id: str, pinned: bool) -> Told:
        """Pins to, or unpins from, the device; the card.

        Raises AdapterNotFound, AdapterInvalid for a failed adapter.
        """
        one = self._shelves.find_usable(id)
        self._shelves.pin_adapter(one, pinned)
        await self._save_state()
        return self._card_of(one)

    def note_load(self, load: Load) -> None:
        """What became of a load on the device: shown as the state of the adapters with this
        content.
        """
        for one in self._shelves.current.values():
            if one.digest == load.digest and one.generation.reading:
                one.failure = load.error

    # ---- using and looking

    @contextmanager
    def lease_adapter(self, id: str) -> Iterator[AdapterVersion]:
        """The id's content, which stays until the lease ends.

        Raises AdapterNotFound; AdapterInvalid for one that could not be read.
        """
        one = self._shelves.find_usable(id)
        one.take_lease()
        try:
            yield one.generation
        finally:
            one.give_back_lease()

    def card_of(self, id: str) -> Told:
        return self._card_of(self._shelves.find_adapter(id))

    def list_cards(self) -> list[Told]:
        return [self._card_of(one) for _, one in sorted(self._shelves.current.items())]

    def list_versions(self) -> list[AdapterVersion]:
        """What stands under each id, by id."""
        return [one.generation for _, one in sorted(self._shelves.current.items())]

    def summary_of(self, id: str) -> Told:
        return self._summary_of(self._shelves.find_adapter(id))

    def summary_text(self, id: str) -> str:
        return tables.format_summary(self.summary_of(id))

    def draw_architecture(self, id: str) -> str:
        """The base's module tree with the adapter in place.

        Raises AdapterNotFound, AdapterInvalid for one that could not be read.
        """
        reading = self._shelves.find_usable(id).generation.reading
        assert reading is not None, "a usable adapter was read"
        assert self._reader.tree is not None, "it was read against a tree"
        return architecture.draw_architecture(
            self._reader.tree, reading.layers, reading.facts["dropout"], reading.facts["features"]
        )

    async def measure_norms(self, id: str) -> Told:
        """How much it changes by layer and module; see norms.group_by_layer.

        Raises AdapterNotFound, AdapterInvalid, NotReady.
        """
        one = self._shelves.find_usable(id)
        reading = one.generation.reading
        assert reading is not None, "a usable adapter was read"
        return {"id": id, "digest": one.digest} | group_by_layer(
            reading.layers, await self._norms.measure_norms(reading), self._shelves.base.layers
        )

    def forecast_size(self, r: int, modules: Sequence[str], dtype: str = "float32") -> Told:
        """What an adapter of this shape would weigh on the base. Raises BadRequest."""
        base = self._shelves.base
        return facts.forecast_size(base.linears, base.parameters, r, modules, dtype)

    # ---- inside

    async def _register_version(
        self, generation: AdapterVersion, pinned: bool, preload: bool, replace: bool
    ) -> tuple[Told, bool]:
        id, adapter = generation.id, generation.adapter
        assert adapter is not None, "only what was read can be taken"
        held = self._shelves.current.get(id)
        same = held is not None and held.digest == adapter.digest
        if held and same and not held.failure:
            return await self.pin_adapter(id, pinned) if replace and pinned != held.pinned else self.card_of(
                id
            ), False
        if not replace and (taken := self._taken(generation)):
            raise Conflict(taken[0], param="id")
        one = RegisteredAdapter(generation, pinned or bool(held and same and held.pinned and not replace))
        before = await self._shelves.replace_adapter(one, adapter, preload)
        await self._save_state()
        # Somebody may have deleted it by now
        return self._card_of(one), not (before and before.digest)

    def _taken(self, generation: AdapterVersion) -> list[str]:
        """Why its id cannot be registered: it has other content, which was not only a folder that
        could not be read.
        """
        held = self._shelves.current.get(generation.id)
        if held is None or held.digest in ("", generation.digest):
            return []
        return [f"the id {generation.id!r} is taken by other content ({held.digest}); PUT replaces it"]

    @asynccontextmanager
    async def _purge_after(self, source: str) -> AsyncIterator[None]:
        """What was uploaded there goes in the end if nothing has it.

        Who uploads the same waits, lest it go while he takes it.
        """
        async with self._shelves.lock_for(f"source {source}"):
            try:
                yield
            finally:
                if not self._shelves.is_source_used(source):
                    await run_in(DISK, self._store.purge_upload, source)

    def _card_of(self, one: RegisteredAdapter) -> Told:
        return summary.make_card(one, self._shelves.tier_of(one))

    async def _read_version(self, id: str, place: SourceLocation) -> AdapterVersion:
        fingerprint, reading = await self._validate_files(place)
        return AdapterVersion(id, place, fingerprint, versions.current_time(), reading)

    async def _validate_files(self, place: SourceLocation) -> tuple[str, ValidatedAdapter]:
        """Raises NotReady, AdapterInvalid, AdapterUnsupported."""
        if not self._opened:
            raise NotReady("not ready: the base is loading", retry_after=2)
        try:
            return await read_place(self._reader, place)
        except OSError as error:
            raise AdapterInvalid([f"the files cannot be read: {error.strerror}"]) from None

    def _summary_of(self, one: RegisteredAdapter) -> Told:
        served = ids.ServedBase(self.base_id, self._settings.base)
        return summary.make_summary(one, self._shelves.tier_of(one), self._shelves.base, served)

    async def _save_state(self) -> None:
        async with self._saving:
            deleted = self._deleted
            there = await run_in(DISK, _present, self._settings.adapters, deleted)
            # What was deleted meanwhile may have been made anew before
            if self._deleted is deleted:
                self._deleted = there
            records = {id: one.to_record() for id, one in self._shelves.current.items()}
            await run_in(DISK, self._ledger.write_file, records, set(self._deleted))


def _present(root: Path, names: set[str]) -> set[str]:
    return {name for name in names if (root / name).exists()}
