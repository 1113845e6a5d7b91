"""Restores registrations when the service starts, and registers the folders that lie there.

Runs in the API process; must not know leases or the device.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace

from ..core.manifest import Manifest, compute_digest
from ..errors import AdapterdError, AdapterInvalid, Conflict
from ..telemetry.audit import record_change
from ..threads import DISK, run_in
from . import ids, versions
from .sources.base import SourceLocation
from .sources.store import Store
from .state_file import Record, StateFile
from .validation_cache import ValidationCache
from .validator import header
from .validator.messages import ValidatedAdapter
from .validator.process import Validator
from .versions import AdapterVersion, RegisteredAdapter

log = logging.getLogger("adapterd.adapters")

# After which nobody still writes what lies half made in a directory that several services share
ABANDONED_S = 6 * 3600


class Startup:
    """Yields every adapter once, read and validated; one that cannot be is yielded with the reason,
    and harms no other.

    `alone`: no other service writes to the same directory.
    """

    def __init__(
        self,
        store: Store,
        state_file: StateFile,
        validator: Validator,
        cache: ValidationCache,
        base_id: str,
        alone: bool = True,
    ) -> None:
        self.store, self.state_file, self.base_id = store, state_file, base_id
        self.validator, self.cache = validator, cache
        self.age_s = 0 if alone else ABANDONED_S

    async def __aiter__(self) -> AsyncIterator[RegisteredAdapter]:
        await run_in(DISK, self.store.sweep_interrupted, self.age_s)
        await run_in(DISK, self.store.sweep_replaced, self.state_file.path, self.age_s)
        await self._warn_of_uploads()
        records = self.state_file.records
        for id, record in records.items():
            if entry := await self.restore_record(id, record):
                yield entry
        known = {*_list_paths(records.values()), *records, *self.state_file.deleted}
        for folder in await run_in(DISK, lambda: list(self.store.list_folders())):
            if folder in known:
                continue
            if self._can_be_id(folder):
                yield await self._register_folder(folder)

    async def _warn_of_uploads(self) -> None:
        try:
            await run_in(DISK, self.store.try_writing)
        except OSError as error:
            reason = error.strerror
            log.warning("uploads will be refused: the adapters directory cannot be written: %s", reason)

    def _can_be_id(self, folder: str) -> bool:
        try:
            ids.check_id(folder, self.base_id)
            if folder in self.state_file.aliases:
                raise Conflict("an alias has this name")
        except AdapterdError as error:
            reason = "its name is taken or reserved" if isinstance(error, Conflict) else "no id"
            log.warning("the folder %s is not registered: %s", folder, reason)
            return False
        return True

    async def restore_record(self, id: str, record: Record) -> RegisteredAdapter | None:
        """A registration from before; a found folder that is gone is no registration any more."""
        try:
            location, fingerprint, validated = await self._read_record(record)
        except (AdapterdError, OSError) as error:
            if record.source == id and not await run_in(DISK, (self.store.root / id).exists):
                log.info("the folder of %s is gone", id)
                return None
            location = SourceLocation(self.store.root, record.source, record.subfolder, record.revision)
            return self._failed_adapter(id, location, record, error)
        if record.digest and validated.adapter.digest != record.digest:
            note = f"the files have changed since {record.registered_at}, when the digest was {record.digest}"
            log.warning("%s: %s", id, note)
            validated = replace(validated, warnings=(*validated.warnings, note))
        version = AdapterVersion(id, location, fingerprint, record.registered_at, validated)
        return RegisteredAdapter(version, record.pinned)

    async def restore_kept(self, id: str) -> tuple[RegisteredAdapter, ...]:
        """The versions of before that were kept; one whose files are gone or are others is kept no more."""
        record = self.state_file.records.get(id)
        restored = [await self._restore_version(id, kept) for kept in (record.kept if record else ())]
        return tuple(entry for entry in restored if entry is not None)

    async def _restore_version(self, id: str, record: Record) -> RegisteredAdapter | None:
        try:
            location, fingerprint, validated = await self._read_record(record)
            if validated.adapter.digest != record.digest:
                raise AdapterInvalid(["its files have changed"])
        except (AdapterdError, OSError) as error:
            log.warning("the version %s of %s is kept no more: %s", record.digest, id, _describe_error(error))
            return None
        return RegisteredAdapter(AdapterVersion(id, location, fingerprint, record.registered_at, validated))

    async def _read_record(self, record: Record) -> tuple[SourceLocation, str, ValidatedAdapter]:
        held = [file.name for file in record.files]
        location = await self.store.find_source(
            record.source, record.subfolder, record.revision, uploads=True, held=held, digest=record.digest
        )
        return location, *await self._read_location(location, record)

    async def _read_location(
        self, location: SourceLocation, record: Record | None = None
    ) -> tuple[str, ValidatedAdapter]:
        """As read_location; what was found of these very files before is not looked at again."""
        fingerprint = await run_in(DISK, location.compute_fingerprint)
        if found := self.cache.find_adapter(fingerprint):
            return fingerprint, found.move_to(location.folder)
        fingerprint, validated = await read_location(self.validator, location, record)
        await run_in(DISK, self.cache.add_adapter, fingerprint, validated)
        return fingerprint, validated

    async def _register_folder(self, folder: str) -> RegisteredAdapter:
        try:
            location = await self.store.find_source(folder)
            fingerprint, validated = await self._read_location(location)
        except (AdapterdError, OSError) as error:
            return self._failed_adapter(folder, SourceLocation(self.store.root, folder), None, error)
        version = AdapterVersion(folder, location, fingerprint, versions.current_time(), validated)
        return RegisteredAdapter(version)

    def _failed_adapter(
        self, id: str, location: SourceLocation, record: Record | None, error: Exception
    ) -> RegisteredAdapter:
        reason = _describe_error(error)
        log.warning("the adapter %s cannot be used: %s", id, reason)
        registered_at = record.registered_at if record else versions.current_time()
        version = AdapterVersion(id, location, "", registered_at, None, reason)
        return RegisteredAdapter(version, record.pinned if record else False)


def record_start(records: Mapping[str, Record], found: Mapping[str, RegisteredAdapter]) -> None:
    """Audits what is not as it was registered: folders that came, have other content, or are gone."""
    before = {id: record.digest for id, record in records.items()}
    after = {id: entry.digest for id, entry in found.items() if entry.version.validated}
    for id in sorted(before.keys() | after.keys()):
        is_broken = id in found and id not in after
        if not is_broken and before.get(id) != after.get(id):
            record_change("found" if id in after else "gone", id, before.get(id), after.get(id))


async def read_location(
    validator: Validator, location: SourceLocation, record: Record | None = None
) -> tuple[str, ValidatedAdapter]:
    """The fingerprint of the files and their validated content; files that are as they were when they
    were recorded are not looked at again.

    Files that the quick check refuses never reach the validator, which may be busy with something
    large. Raises AdapterInvalid, AdapterUnsupported, OSError.
    """
    await run_in(DISK, header.quick_check, location.folder, validator.max_rank)
    fingerprint = await run_in(DISK, location.compute_fingerprint)
    known = _known_files(record, fingerprint) if record else ()
    validated = await validator.validate_adapter(location.folder, known)
    if await run_in(DISK, location.compute_fingerprint) != fingerprint:
        raise AdapterInvalid(
            ["its files have changed while they were read: register it again once they are written"]
        )
    return fingerprint, validated


def _known_files(record: Record, fingerprint: str) -> Manifest:
    """The recorded manifest, where the files are still those that it was made of."""
    same = record.fingerprint == fingerprint and compute_digest(record.files) == record.digest
    return record.files if same else ()


def _describe_error(error: Exception) -> str:
    if isinstance(error, AdapterdError):
        return error.message
    return f"the files cannot be read: {getattr(error, 'strerror', error)}"


def _list_paths(records: Iterable[Record]) -> Iterator[str]:
    """Where the registrations lie below the adapters directory, with the versions that are kept."""
    for record in records:
        yield f"{record.source}/{record.subfolder}" if record.subfolder else record.source
        yield from _list_paths(record.kept)
