"""What is registered when the service starts: what was registered before, and the folders that lie
in the adapters directory.

Must not know leases or the device.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import replace

from ..core.manifest import compute_digest
from ..errors import AdapterdError, AdapterInvalid, Conflict
from ..threads import DISK, run_in
from . import ids, versions
from .sources.store import SourceLocation, Store
from .state_file import Record, StateFile
from .validator import header
from .validator.messages import ValidatedAdapter
from .validator.process import Validator
from .versions import AdapterVersion, RegisteredAdapter

log = logging.getLogger("adapterd.adapters")


class Startup:
    """Yields every adapter once, read and validated; one that cannot be is yielded with the reason,
    and harms no other.
    """

    def __init__(self, store: Store, state_file: StateFile, validator: Validator, base_id: str) -> None:
        self.store, self.state_file, self.validator, self.base_id = store, state_file, validator, base_id

    async def __aiter__(self) -> AsyncIterator[RegisteredAdapter]:
        await run_in(DISK, self.store.sweep_interrupted)
        records = self.state_file.records
        used = {
            record.source if not record.subfolder else f"{record.source}/{record.subfolder}"
            for record in records.values()
        }
        for id, record in records.items():
            if one := await self.restore_record(id, record):
                yield one
        for folder in await run_in(DISK, lambda: list(self.store.list_folders())):
            if folder in used | self.state_file.deleted or folder in records:
                continue
            if self._can_be_id(folder):
                yield await self._register_folder(folder)

    def _can_be_id(self, folder: str) -> bool:
        try:
            ids.check_id(folder, self.base_id)
        except AdapterdError as error:
            log.warning(
                "the folder %s is not registered: %s",
                folder,
                "reserved" if isinstance(error, Conflict) else "no id",
            )
            return False
        return True

    async def restore_record(self, id: str, record: Record) -> RegisteredAdapter | None:
        """A registration from before; a found folder that is gone is no registration any more."""
        unplaced = SourceLocation(self.store.root, record.source, record.subfolder, record.revision)
        try:
            held = [file.name for file in record.files]
            location = await self.store.find_source(
                record.source, record.subfolder, record.revision, uploads=True, held=held
            )
            fingerprint, validated = await read_location(self.validator, location, record)
        except (AdapterdError, OSError) as error:
            if record.source == id and not await run_in(DISK, (self.store.root / id).exists):
                log.info("the folder of %s is gone", id)
                return None
            return self._failed_adapter(id, unplaced, record, error)
        if record.digest and validated.adapter.digest != record.digest:
            note = f"the files have changed since {record.registered_at}, when the digest was {record.digest}"
            log.warning("%s: %s", id, note)
            validated = replace(validated, warnings=(*validated.warnings, note))
        return RegisteredAdapter(
            AdapterVersion(id, location, fingerprint, record.registered_at, validated), record.pinned
        )

    async def _register_folder(self, folder: str) -> RegisteredAdapter:
        try:
            location = await self.store.find_source(folder)
            fingerprint, validated = await read_location(self.validator, location)
        except (AdapterdError, OSError) as error:
            return self._failed_adapter(folder, SourceLocation(self.store.root, folder), None, error)
        return RegisteredAdapter(
            AdapterVersion(folder, location, fingerprint, versions.current_time(), validated)
        )

    def _failed_adapter(
        self, id: str, location: SourceLocation, record: Record | None, error: Exception
    ) -> RegisteredAdapter:
        reason = (
            error.message
            if isinstance(error, AdapterdError)
            else f"the files cannot be read: {getattr(error, 'strerror', error)}"
        )
        log.warning("the adapter %s cannot be used: %s", id, reason)
        version = AdapterVersion(
            id, location, "", record.registered_at if record else versions.current_time(), None, reason
        )
        return RegisteredAdapter(version, record.pinned if record else False)


async def read_location(
    validator: Validator, location: SourceLocation, record: Record | None = None
) -> tuple[str, ValidatedAdapter]:
    """The fingerprint of the files and what they hold; files that are as they were when they were
    recorded are not looked at again.

    What a glance refuses never reaches the validator, which may be busy with something large. Raises
    AdapterInvalid, AdapterUnsupported, OSError.
    """
    await run_in(DISK, header.quick_check, location.folder, validator.max_rank)
    fingerprint = await run_in(DISK, location.compute_fingerprint)
    same = (
        record is not None
        and record.fingerprint == fingerprint
        and compute_digest(record.files) == record.digest
    )
    validated = await validator.validate_adapter(location.folder, record.files if record and same else ())
    if await run_in(DISK, location.compute_fingerprint) != fingerprint:
        raise AdapterInvalid(
            ["its files have changed while they were read: register it again once they are written"]
        )
    return fingerprint, validated
