"""Registers, replaces, leases and removes adapters by id, and remembers them.

Runs in the API process, on one event loop; must not know tensors or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import replace as changed
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from .. import durable
from ..core.adapter import Digest, ExecutionPath
from ..core.messages import Load
from ..errors import AdapterdError, AdapterInvalid, Conflict, Forbidden, NotReady, StorageFull
from ..settings import Settings
from ..telemetry import metrics
from ..telemetry.audit import record_change
from ..threads import DISK, run_in
from . import architecture, facts, fetches, ids, summary, versions
from . import summary_text as tables
from .adapter_table import AdapterTable, Device, Kept, VersionChange
from .alias_registry import AliasRegistry
from .aliases import Alias, AliasTarget
from .first_use import FirstUse
from .following import Follower
from .mixes import Mix, make_mix
from .norms import NormCache, group_by_layer
from .ownership import claim_directory
from .sources.base import SourceLocation, is_fetched
from .sources.hub import Hub
from .sources.store import Store, UploadedFile, stored_source
from .sources.stored import delete_folder
from .sources.urls import Urls
from .startup import Startup, read_location, record_start
from .state_file import STATE_FILE, Record, StateFile
from .takeover import take_over_state
from .turns import take_turn
from .validation_cache import ValidationCache
from .validator.messages import ValidatedAdapter
from .validator.process import Validator
from .versions import AdapterVersion, RegisteredAdapter

__all__ = ["AdapterVersion", "Device", "Registry"]

log = logging.getLogger("adapterd.adapters")

WATCH_S = 0.5  # between looks at what other services have changed
Json = dict[str, Any]
T = TypeVar("T")


class Registry:
    """The registered adapters; `base_id` is the clients' name for the base.

    Nothing can be registered before `open_catalog`.

    Raises SettingsError where a newer service has remembered registrations in the adapters
    directory.
    """

    def __init__(
        self,
        settings: Settings,
        device: Device,
        hub: Hub | None = None,
        validator: type[Validator] = Validator,
    ) -> None:
        named = ids.base_name(settings.base)  # now, for later the event loop would ask the disk
        self.base_id = settings.base_id or named
        self._settings = settings
        limit = int(settings.max_upload_mb * 1e6)
        urls = Urls(settings.sources, settings.state)
        self._store = Store(settings.adapters, hub or Hub(settings.hub), limit, settings.state, (urls,))
        self._state_file = StateFile(settings.state / STATE_FILE)
        self._state_file.check_version()
        self._cache = ValidationCache(settings.state)
        self._lock: FileIO | None = None
        self._table = AdapterTable(device, settings.keep_versions)
        self.aliases = AliasRegistry(self, self._in_turn, self._write_aliases)
        self._purges: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._validator = validator(settings.max_rank)
        self._norms = NormCache(self._validator)
        self._opened = False
        self._fetches = fetches.Fetches()
        self._first_use = FirstUse(self._register_found, lambda id: id in self._table.current)
        self._shared = settings.shared == "on"
        self._follower = Follower(
            settings.state, self._state_file, self._table, self._make_startup, self._take_over_aliases
        )
        self._watching: asyncio.Task[None] | None = None

    # ---- life

    def claim_state(self) -> None:
        """Takes the directory of registrations until `close`, before anything is read: for this
        service alone, or beside others that share it. Raises DirectoryHeld where another has it
        otherwise.
        """
        self._lock = claim_directory(self._settings.state, self._settings.port, self._shared)
        if self._settings.state != self._settings.adapters:
            take_over_state(self._settings.adapters, self._settings.state)

    async def open_catalog(self) -> None:
        """Starts the validator on the device's base, restores the registrations of before, and
        registers the folders that lie in the adapters directory.
        """
        base = self._table.base
        await self._validator.start_on(Path(base.folder), base.limits, base.adapted_parameters)
        await run_in(DISK, self._state_file.read_file)
        before = dict(self._state_file.records)
        self._follower.records = dict(before)
        await run_in(DISK, self._cache.read_file, base, self._settings.max_rank)
        self._take_over_aliases()
        dropped = await self._restore_adapters()
        record_start(self._state_file.records, self._table.current)
        await run_in(DISK, self._cache.end_start)
        self._opened = True
        try:
            await self._in_turn(partial(self._write_opened, before))
            await self._purge_sources(dropped)
        except (StorageFull, Forbidden, NotReady) as error:  # what is there was found or read
            log.info("what was found at start is not remembered: %s", error)
        if self._shared:
            self._watching = asyncio.create_task(self._watch_others())

    async def _restore_adapters(self) -> list[RegisteredAdapter]:
        """Inserts every adapter with its versions; those over what the setting keeps now are returned."""
        startup, dropped = self._make_startup(), []
        async for entry in startup:
            id = entry.version.id
            restored = await startup.restore_kept(id)
            kept = self._table.limit_kept(restored, self.aliases.digests_of(id))
            self._table.insert_adapter(entry, kept)
            dropped += [version for version in restored if version not in kept]
        return dropped

    def _take_over_aliases(self) -> None:
        self.aliases.by_name = dict(self._state_file.aliases)

    def _make_startup(self) -> Startup:
        parts = (self._store, self._state_file, self._validator, self._cache, self.base_id)
        return Startup(*parts, alone=not self._shared)

    async def _write_opened(self, before: Mapping[str, Record]) -> None:
        """Writes what was found at start; what others have changed since `before` stays theirs."""
        await self._write_state(self._follower.find_unchanged(before))

    async def follow_state_file(self) -> None:
        """Takes over what other services have added, changed and removed in the same directory."""
        await self._to_its_end(self._follower.follow_changes)

    async def _watch_others(self) -> None:
        """Follows within half a second, in no turn: the file is always whole."""
        told = ""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                if await self._follower.is_behind():
                    await self.follow_state_file()
                told = ""
            except (OSError, AdapterdError) as error:
                if told != str(error):  # once until it goes well again
                    log.warning("the registrations of other services cannot be followed: %s", error)
                told = str(error)

    async def start_validator(self) -> None:
        """Starts the validator's process, before the base is there."""
        await self._validator.warm_up()

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        async with self._changing:  # the last change is kept and made before
            self._table.cancel_endings()
        for purge in self._purges:
            purge.cancel()
        await self._validator.close()
        if self._lock is not None:
            self._lock.close()

    # ---- changing

    async def register_adapter(
        self,
        id: str,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        pinned: bool | None = False,
        preload: bool = True,
        replace: bool = False,
        expect: Digest | None = None,
    ) -> tuple[Json, bool]:
        """The card, and whether the id is new.

        The same content again changes nothing unless it had failed.

        Other content needs `replace`, and is refused where it is not what `expect` names. A pin of
        None is the one that the id has.

        Raises BadRequest, Conflict, UnexpectedDigest, Forbidden, AdapterInvalid,
        AdapterUnsupported, Overloaded where memory is short, StorageFull where a disk is, NotReady
        where the worker was lost meanwhile.
        """
        self._check_id(id)
        async with (
            self._find_source(id, source, subfolder, revision) as location,
            self._table.lock_for(f"id {id}"),
        ):
            if location.staged:
                return await self._register_staged(id, location, pinned, preload, replace, expect)
            version = await self._read_version(id, location)
            _check_expected(version.digest, expect)
            return await self._register_version(version, pinned, preload, replace)

    async def upload_adapter(
        self,
        id: str,
        files: Mapping[str, UploadedFile],
        replace: bool = False,
        expect: Digest | None = None,
    ) -> tuple[Json, bool]:
        """Stores the parts of an upload under the adapters directory and registers them.

        A replacement has the pin of what it replaces. Raises as `register_adapter`, and
        PayloadTooLarge.
        """
        self._check_id(id)
        staged = await self._store.stage_upload(files)
        try:
            async with self._table.lock_for(f"id {id}"):
                upload = SourceLocation(staged, "upload", staged=True)
                return await self._register_staged(id, upload, None, True, replace, expect)
        finally:
            await run_in(DISK, delete_folder, staged)

    async def _register_staged(
        self,
        id: str,
        staged: SourceLocation,
        pinned: bool | None,
        preload: bool,
        replace: bool,
        expect: Digest | None,
    ) -> tuple[Json, bool]:
        """Keeps an upload or a download under the digest of its content, and registers it."""
        _, validated = await self._validate_files(staged)
        digest = validated.adapter.digest
        _check_expected(digest, expect)
        async with self._purge_after(stored_source(staged, digest)):
            kept = await run_in(DISK, self._store.keep_staged, staged, digest)
            fingerprint = await run_in(DISK, kept.compute_fingerprint)
            moved = validated.move_to(kept.folder)
            version = AdapterVersion(id, kept, fingerprint, versions.current_time(), moved)
            return await self._register_version(version, pinned, preload, replace)

    async def check_adapter(
        self,
        id: str,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        preload: bool = True,
        expect: Digest | None = None,
    ) -> Json:
        """The whole validation and the summary; registers nothing.

        It is ok where `register_adapter` would take it: what only PEFT itself can run is tried out
        on the device, too. An id that other content has is a problem beside the summary, and so is
        content that is not what `expect` names. Raises BadRequest, Conflict for a reserved id or an
        alias, Forbidden.
        """
        self._check_id(id)
        try:
            async with self._find_source(id, source, subfolder, revision) as location:
                version = await self._read_version(id, location)
                problems = self._find_conflicts(version)
                if expect not in (None, version.digest):
                    problems.append(ids.unexpected_digest(str(expect), version.digest).message)
                if preload and not problems:
                    await self._try_out(version)
        except AdapterInvalid as error:
            return {"ok": False, "summary": None, "problems": error.problems}
        summary = self._summary_of(RegisteredAdapter(version))
        summary |= {"state": "unregistered", "registered_at": None}
        return {"ok": not problems, "summary": summary, "problems": problems}

    async def _try_out(self, version: AdapterVersion) -> None:
        adapter = version.adapter
        assert adapter is not None, "it was just read"
        held = self._table.current.get(version.id)
        if adapter.lane is ExecutionPath.SHADOW and not (held and held.digest == adapter.digest):
            await self._table.try_out(adapter)

    async def remove_adapter(self, id: str, purge: bool = False) -> Json:
        """Takes the id away at once with its versions, waits for their leases, then frees their
        contents.

        A content stays where another id has it too. Raises AdapterNotFound, Conflict where an alias
        sends requests to it, StorageFull.
        """
        entries, drained, ending = await self._in_turn(partial(self._remove_entry, id))
        freed = await asyncio.shield(ending)
        if purge:
            await self._purge_sources(entries)
        digest = entries[0].digest or None
        return {"id": id, "digest": digest, "drained_requests": drained, "freed_bytes": freed}

    async def _remove_entry(self, id: str) -> tuple[Kept, int, asyncio.Task[int]]:
        """The versions, how many requests ran on them, and the task that ends them."""
        entries = self._table.list_versions(id)
        self.aliases.require_no_target(id)
        paths = [entry.version.place.path for entry in entries]
        await self._write_state({id: None}, deleted=(id, *paths))
        drained = sum(entry.in_flight for entry in entries)
        ending = self._table.withdraw_adapter(entries[0])
        metrics.adapter_removed(id)
        record_change("deleted", id, entries[0].digest, None)
        return entries, drained, ending

    async def roll_back(self, id: str, digest: Digest | None = None) -> Json:
        """Makes the version before current again, or the one whose digest begins so; the card.

        Raises AdapterNotFound, NotFound for a version that is not kept, and as `register_adapter`
        where it cannot be loaded any more.
        """
        async with self._table.lock_for(f"id {id}"):
            entry = self._table.find_kept(id, digest)
            if entry is not self._table.current[id]:
                still_kept = partial(self._table.find_kept, id, entry.digest)
                await self._replace_entry(entry, True, None, still_kept)
            return self._card_of(entry)

    async def pin_adapter(self, id: str, pinned: bool) -> Json:
        """Pins to, or unpins from, the device; the card.

        Raises AdapterNotFound, AdapterInvalid for a failed adapter, StorageFull.
        """
        return self._card_of(await self._in_turn(partial(self._pin_entry, id, pinned)))

    async def _pin_entry(self, id: str, pinned: bool) -> RegisteredAdapter:
        entry = self._table.find_usable(id)
        await self._write_state({id: changed(self._table.make_record(entry), pinned=pinned)})
        self._table.pin_adapter(entry, pinned)
        record_change("pinned" if pinned else "unpinned", id, entry.digest, entry.digest)
        return entry

    def prefetch_adapters(self, wanted: Sequence[str]) -> list[Json]:
        """Has the device read these ids' contents, and place them while there is room; where each
        is now.

        Raises AdapterNotFound, AdapterInvalid for one that could not be read; then nothing was
        begun.
        """
        entries = [self._table.find_usable(id) for id in dict.fromkeys(wanted)]
        for entry in entries:
            self._table.preload_adapter(entry)
        return [{"id": entry.version.id, "residency": self._table.tier_of(entry).value} for entry in entries]

    def note_load(self, load: Load) -> None:
        """Shows the result of a load on the device as the state of the adapters with this content."""
        for entry in self._table.list_entries():
            if entry.digest == load.digest and entry.version.validated:
                entry.failure = load.error

    # ---- using

    @contextmanager
    def lease_adapter(self, name: str) -> Iterator[AdapterVersion]:
        """The content of an id, or of one of its versions where the name is `id@sha256:…`, which
        stays until the lease ends.

        Raises AdapterNotFound; BadRequest and DigestMismatch; AdapterInvalid for one that could not
        be read.
        """
        id, digest = ids.split_digest(name)
        entry = self._table.find_version(id, digest) if digest else self._table.find_usable(id)
        entry.take_lease()
        try:
            yield entry.version
        finally:
            entry.give_back_lease()

    @contextmanager
    def lease_mix(self, weights: Sequence[tuple[str, float]]) -> Iterator[Mix]:
        """The ids' contents with these weights as one content, which stays until the lease ends.

        Raises as `lease_adapter` and `make_mix`.
        """
        with ExitStack() as leases:
            versions = [leases.enter_context(self.lease_adapter(id)) for id, _ in weights]
            mix = make_mix(versions, [weight for _, weight in weights], self._table.base.pool_rank)
            yield leases.enter_context(self._table.mixes.lease_mix(mix))

    async def resolve_adapter(self, id: str) -> None:
        """Registers the folder of this name, if ADAPTERD_RESOLVE is on and nothing is registered
        under it.

        An unknown name stays unknown. Raises AdapterInvalid for a folder that cannot be served;
        Overloaded, NotReady.
        """
        if self._settings.resolve == "on" and id not in self._table.current and ids.is_valid(id):
            await self._first_use.register_folder(id)

    # ---- what aliases need

    def is_registered(self, id: str) -> bool:
        return id in self._table.current

    def find_digest(self, target: AliasTarget) -> Digest | None:
        """The whole digest of a target that names the beginning of one.

        Raises AdapterNotFound, DigestMismatch.
        """
        if target.digest is None:
            self._table.find_adapter(target.id)
            return None
        return self._table.find_version(target.id, target.digest).digest

    async def _write_aliases(self, aliases: Mapping[str, Alias]) -> None:
        await self._write_state(aliases=aliases)

    # ---- looking

    def card_of(self, id: str) -> Json:
        """The card; of what is still fetched for the first time how far that has come."""
        fetching = self._fetches.describe(id)
        if fetching and id not in self._table.current:
            return fetches.make_card(id, fetching)
        return self._card_of(self._table.find_adapter(id)) | fetching

    def list_cards(self) -> list[Json]:
        return [self._card_of(entry) for _, entry in sorted(self._table.current.items())]

    def list_versions(self) -> list[AdapterVersion]:
        """The version under each id, by id."""
        return [entry.version for _, entry in sorted(self._table.current.items())]

    def versions_of(self, id: str) -> list[Json]:
        """The versions of an id that answer: the current one, then those that are kept."""
        entries = self._table.list_versions(id)
        return [summary.describe_version(entry, self._table.tier_of(entry)) for entry in entries]

    def summary_of(self, id: str) -> Json:
        return self._summary_of(self._table.find_adapter(id))

    def summary_text(self, id: str) -> str:
        return tables.format_summary(self.summary_of(id))

    def draw_architecture(self, id: str) -> str:
        """The base's module tree with the adapter in place.

        Raises AdapterNotFound, AdapterInvalid for one that could not be read.
        """
        validated = self._table.find_usable(id).version.validated
        assert validated is not None, "a usable adapter was read"
        assert self._validator.tree is not None, "it was read against a tree"
        known = validated.facts
        return architecture.draw_architecture(
            self._validator.tree, validated.layers, known["dropout"], known["features"]
        )

    async def measure_norms(self, id: str) -> Json:
        """How much it changes by layer and module; see norms.group_by_layer.

        Raises AdapterNotFound, AdapterInvalid, NotReady.
        """
        entry = self._table.find_usable(id)
        validated = entry.version.validated
        assert validated is not None, "a usable adapter was read"
        norms = await self._norms.measure_norms(validated)
        by_layer = group_by_layer(validated.layers, norms, self._table.base.layers)
        return {"id": id, "digest": entry.digest} | by_layer

    def forecast_size(self, r: int, modules: Sequence[str], dtype: str = "float32") -> Json:
        """The size of an adapter of this shape on the base. Raises BadRequest."""
        base = self._table.base
        return facts.forecast_size(base.linears, base.parameters, r, modules, dtype)

    # ---- inside

    async def _register_version(
        self, version: AdapterVersion, pinned: bool | None, preload: bool, replace: bool
    ) -> tuple[Json, bool]:
        held = self._table.current.get(version.id)
        if held and held.digest == version.digest:
            if not held.failure:
                return await self._keep_registered(held, pinned, replace), False
            if not replace:
                pinned = pinned or held.pinned
        if not replace:
            self._require_free(version)

        def check() -> None:  # another service may have taken the id meanwhile, or an alias
            self.aliases.require_no_alias(version.id)
            if not replace:
                self._require_free(version)

        entry = RegisteredAdapter(version)
        before = await self._replace_entry(entry, preload, pinned, check)
        assert version.validated is not None, "only what was read can be taken"
        await run_in(DISK, self._cache.add_adapter, version.fingerprint, version.validated)
        # Not by id: somebody may have deleted it by now
        return self._card_of(entry), not (before and before.digest)

    async def _replace_entry(
        self,
        entry: RegisteredAdapter,
        preload: bool,
        pinned: bool | None,
        check: Callable[[], object],
    ) -> RegisteredAdapter | None:
        """Makes an entry the current one of its id, and returns what was; `check` raises where
        meanwhile something has happened that forbids it.
        """
        id, adapter = entry.version.id, entry.version.adapter
        assert adapter is not None, "only what was read can be current"
        entry.pinned = self._choose_pin(id, pinned)

        async def remember(put_entry: Callable[[Kept], None]) -> None:
            check()
            entry.pinned = self._choose_pin(id, pinned)
            kept = self._table.choose_kept(entry, self.aliases.digests_of(id))
            await self._write_state({id: self._table.make_record(entry, kept)})
            replaced = self._table.current.get(id)
            put_entry(kept)
            what = "replaced" if replaced else "registered"
            record_change(what, id, replaced.digest if replaced else None, entry.digest)

        change = await self._table.replace_adapter(
            entry, adapter, preload, lambda put_entry: self._in_turn(partial(remember, put_entry))
        )
        self._purge_later(change)
        return change.before

    def _choose_pin(self, id: str, pinned: bool | None) -> bool:
        held = self._table.current.get(id)
        return bool(held and held.pinned) if pinned is None else pinned

    def _purge_later(self, change: VersionChange) -> None:
        """Deletes the uploads that are no version any more, once nothing runs on them."""
        if not change.dropped:
            return

        async def purge() -> None:
            await asyncio.shield(change.ending)
            await self._purge_sources(change.dropped)

        task = asyncio.create_task(purge())
        self._purges.add(task)
        task.add_done_callback(self._purges.discard)

    async def _keep_registered(self, held: RegisteredAdapter, pinned: bool | None, replace: bool) -> Json:
        """The card of content that is registered already; a replacement may still change its pin."""
        if replace and pinned is not None and pinned != held.pinned:
            return await self.pin_adapter(held.version.id, pinned)
        return self._card_of(held)

    def _require_free(self, version: AdapterVersion) -> None:
        """Raises Conflict."""
        if conflicts := self._find_conflicts(version):
            raise Conflict(conflicts[0], param="id")

    def _find_conflicts(self, version: AdapterVersion) -> list[str]:
        """Why its id cannot be registered: it has other content, which was not only a folder that
        could not be read.
        """
        held = self._table.current.get(version.id)
        if held is None or held.digest in ("", version.digest):
            return []
        return [f"the id {version.id!r} is taken by other content ({held.digest}); PUT replaces it"]

    def _check_id(self, id: str) -> None:
        """Raises BadRequest, Conflict for a reserved id or an alias."""
        ids.check_id(id, self.base_id)
        self.aliases.require_no_alias(id)

    async def _purge_sources(self, entries: Iterable[RegisteredAdapter]) -> None:
        for source in {entry.version.place.stored for entry in entries}:
            async with self._purge_after(source):
                pass

    @asynccontextmanager
    async def _purge_after(self, source: str) -> AsyncIterator[None]:
        """Deletes the upload of this source in the end if no adapter has it.

        Another upload of the same content waits, lest the files go while it takes them.
        """
        async with self._table.lock_for(f"source {source}"):
            try:
                yield
            finally:
                if not self._table.is_source_used(source):
                    await run_in(DISK, self._store.purge_upload, source)

    def _card_of(self, entry: RegisteredAdapter) -> Json:
        return summary.make_card(entry, self._table.tier_of(entry))

    @asynccontextmanager
    async def _find_source(
        self, id: str, source: str, subfolder: str | None, revision: str | None
    ) -> AsyncIterator[SourceLocation]:
        """The files; what was fetched for this once and is not kept goes in the end."""
        with self._fetches.track(id, is_fetched(source)) as fetch:
            location = await self._store.find_source(
                source, subfolder, revision, on_progress=fetch.note_progress
            )
        try:
            yield location
        finally:
            await self._store.discard_staged(location)

    async def _register_found(self, id: str) -> bool:
        """Registers the folder of this name; whether there is one that is not to stay away."""
        is_reserved = ids.is_reserved(id, self.base_id) or id in self._state_file.deleted
        if is_reserved or not await run_in(DISK, self._store.has_folder, id):
            return False
        await self.register_adapter(id, id)
        return True

    async def _read_version(self, id: str, location: SourceLocation) -> AdapterVersion:
        fingerprint, validated = await self._validate_files(location)
        return AdapterVersion(id, location, fingerprint, versions.current_time(), validated)

    async def _validate_files(self, location: SourceLocation) -> tuple[str, ValidatedAdapter]:
        """Raises NotReady, AdapterInvalid, AdapterUnsupported."""
        if not self._opened:
            raise NotReady("not ready: the base is loading", retry_after=2)
        try:
            return await read_location(self._validator, location)
        except OSError as error:
            raise AdapterInvalid([f"the files cannot be read: {error.strerror}"]) from None

    def _summary_of(self, entry: RegisteredAdapter) -> Json:
        served = ids.ServedBase(self.base_id, self._settings.base)
        return summary.make_summary(entry, self._table.tier_of(entry), self._table.base, served)

    async def _in_turn(self, change: Callable[[], Awaitable[T]]) -> T:
        """Makes one change at a time of what is registered, to its end also where its caller
        leaves: what is written and what is served must not differ.
        """

        if not self._shared:
            return await self._to_its_end(change)

        async def change_shared() -> T:
            if durable.why_unwritable(self._settings.state):
                raise Forbidden("this service may only read the registrations: ask one that may change them")
            try:
                await self._follower.follow_changes()  # what takes long, in nobody's turn
                async with take_turn(self._settings.state):
                    await self._follower.follow_changes()
                    return await change()
            except OSError as error:
                raise _refuse_change(error) from error

        return await self._to_its_end(change_shared)

    async def _to_its_end(self, change: Callable[[], Awaitable[T]]) -> T:
        async def turn() -> T:
            async with self._changing:
                return await change()

        return await asyncio.shield(asyncio.create_task(turn()))

    async def _write_state(
        self,
        changes: Mapping[str, Record | None] | None = None,
        deleted: Iterable[str] = (),
        aliases: Mapping[str, Alias] | None = None,
    ) -> None:
        """Writes the registrations and aliases as they will be after these changes; None is a
        deletion.

        Raises StorageFull; then they are as they were.
        """
        names = self._state_file.deleted.union(deleted)
        kept = await run_in(DISK, _list_present, self._settings.adapters, names)
        written = self.aliases.by_name if aliases is None else aliases
        records = self._list_records() | dict(changes or {})
        registered = {id: record for id, record in records.items() if record is not None}
        try:
            await run_in(DISK, self._state_file.write_file, registered, kept, written)
        except durable.NotWritten as error:
            raise _refuse_change(error) from error
        if self._shared:
            await self._follower.note_own()

    def _list_records(self) -> dict[str, Record | None]:
        """Of a directory that others change, too, as the file has them: this service may have read less."""
        if self._shared:
            return dict(self._state_file.records)
        return {id: self._table.make_record(entry) for id, entry in self._table.current.items()}


def _refuse_change(error: OSError) -> StorageFull:
    reason = f"the change cannot be kept: {error.strerror}"
    return StorageFull(f"{reason}; nothing has changed, ask again once there is room")


def _check_expected(digest: Digest, expect: Digest | None) -> None:
    if expect not in (None, digest):
        raise ids.unexpected_digest(str(expect), digest)


def _list_present(root: Path, names: set[str]) -> set[str]:
    return {name for name in names if (root / name).exists()}
