"""What is registered when the service starts: what was registered before, and the folders that lie in the adapters directory.

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
from .sources.store import Place, Store
from .state_file import Ledger, Record
from .validator import header
from .validator.messages import Reading
from .validator.process import Reader
from .versions import Generation, Shelved

log = logging.getLogger("adapterd.adapters")


class Opening:
    """Yields every adapter once, read and validated; one that cannot be is yielded with the reason, and harms no other."""

    def __init__(self, store: Store, ledger: Ledger, reader: Reader, base_id: str) -> None:
        self.store, self.ledger, self.reader, self.base_id = store, ledger, reader, base_id

    async def __aiter__(self) -> AsyncIterator[Shelved]:
        await run_in(DISK, self.store.sweep)
        records = self.ledger.records
        used = {record.source if not record.subfolder else f"{record.source}/{record.subfolder}" for record in records.values()}
        for id, record in records.items():
            if one := await self.again(id, record):
                yield one
        for folder in await run_in(DISK, lambda: list(self.store.folders())):
            if folder in used | self.ledger.deleted or folder in records:
                continue
            if self._nameable(folder):
                yield await self._found(folder)

    def _nameable(self, folder: str) -> bool:
        try:
            ids.check(folder, self.base_id)
        except AdapterdError as error:
            log.warning("the folder %s is not registered: %s", folder, "reserved" if isinstance(error, Conflict) else "no id")
            return False
        return True

    async def again(self, id: str, record: Record) -> Shelved | None:
        """A registration from before; a found folder that is gone is no registration any more."""
        unplaced = Place(self.store.root, record.source, record.subfolder, record.revision)
        try:
            held = [file.name for file in record.files]
            place = await self.store.find(record.source, record.subfolder, record.revision, uploads=True, held=held)
            fingerprint, reading = await read_place(self.reader, place, record)
        except (AdapterdError, OSError) as error:
            if record.source == id and not await run_in(DISK, (self.store.root / id).exists):
                log.info("the folder of %s is gone", id)
                return None
            return self._failed(id, unplaced, record, error)
        if record.digest and reading.adapter.digest != record.digest:
            note = f"the files have changed since {record.registered_at}, when the digest was {record.digest}"
            log.warning("%s: %s", id, note)
            reading = replace(reading, warnings=(*reading.warnings, note))
        return Shelved(Generation(id, place, fingerprint, record.registered_at, reading), record.pinned)

    async def _found(self, folder: str) -> Shelved:
        try:
            place = await self.store.find(folder)
            fingerprint, reading = await read_place(self.reader, place)
        except (AdapterdError, OSError) as error:
            return self._failed(folder, Place(self.store.root, folder), None, error)
        return Shelved(Generation(folder, place, fingerprint, versions.now(), reading))

    def _failed(self, id: str, place: Place, record: Record | None, error: Exception) -> Shelved:
        reason = error.message if isinstance(error, AdapterdError) else f"the files cannot be read: {getattr(error, 'strerror', error)}"
        log.warning("the adapter %s cannot be used: %s", id, reason)
        generation = Generation(id, place, "", record.registered_at if record else versions.now(), None, reason)
        return Shelved(generation, record.pinned if record else False)


async def read_place(reader: Reader, place: Place, record: Record | None = None) -> tuple[str, Reading]:
    """The fingerprint of the files and what they hold; files that are as they were when they were recorded are not looked at again.

    What a glance refuses never reaches the reader, which may be busy with something large. Raises AdapterInvalid, AdapterUnsupported,
    OSError.
    """
    await run_in(DISK, header.glance, place.folder, reader.max_rank)
    fingerprint = await run_in(DISK, place.fingerprint)
    same = record is not None and record.fingerprint == fingerprint and compute_digest(record.files) == record.digest
    reading = await reader.read(place.folder, record.files if record and same else ())
    if await run_in(DISK, place.fingerprint) != fingerprint:
        raise AdapterInvalid(["its files have changed while they were read: register it again once they are written"])
    return fingerprint, reading
