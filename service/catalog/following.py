"""Takes over into the table what other services have added, changed and removed in the state file.

Runs in the API process; must not know files of adapters or how a change is made here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import NotReady, SettingsError
from ..telemetry import metrics
from ..threads import DISK, run_in
from .adapter_table import AdapterTable, Kept
from .startup import Startup
from .state_file import Record, StateFile
from .turns import FileVersion, read_version
from .versions import RegisteredAdapter

AGAIN_S = 5.0  # until an adapter that could not be read is tried again
TRIES = 12  # a network share may say for a minute that what is new is not there


class Follower:
    """`records` are the registrations as this service has taken them over or written them itself."""

    def __init__(
        self,
        folder: Path,
        state_file: StateFile,
        table: AdapterTable,
        make_startup: Callable[[], Startup],
        take_over_aliases: Callable[[], None],
    ) -> None:
        self._folder, self._state_file, self._table = folder, state_file, table
        self._make_startup, self._take_over_aliases = make_startup, take_over_aliases
        self._seen: FileVersion | None = None
        self._again: dict[str, tuple[float, int]] = {}  # when, and how many tries are left
        self.records: dict[str, Record] = {}

    async def is_behind(self) -> bool:
        """Whether the file is another than was taken over, or part of it could not be. Raises OSError."""
        return bool(self._list_due()) or await run_in(DISK, read_version, self._folder) != self._seen

    async def follow_changes(self) -> None:
        """Takes over what is new, one record after the other; where it is interrupted, the next call goes on.

        Raises OSError, NotReady where a newer service has written the file.
        """
        version = await run_in(DISK, read_version, self._folder)
        if version == self._seen and not self._list_due():
            return
        try:
            await run_in(DISK, self._state_file.read_file)
        except SettingsError:  # it names the folder
            raise NotReady("a newer version of the service has written the registrations") from None
        self._take_over_aliases()
        startup = self._make_startup()
        for id, record in self._find_changes().items():
            await self._take_over(startup, id, record)
        self._seen = version

    async def note_own(self) -> None:
        """Nothing is left to take over of what this service has just written, in its turn."""
        self.records = dict(self._state_file.records)
        with suppress(OSError):  # then it looks again, and finds nothing new
            self._seen = await run_in(DISK, read_version, self._folder)

    def find_unchanged(self, before: Mapping[str, Record]) -> dict[str, Record | None]:
        """The records that nobody has changed since `before` as the table has them now; None for those that
        it has not.
        """
        known = self._state_file.records
        ids = dict.fromkeys((*before, *self._table.current))
        return {id: self._make_record(id) for id in ids if known.get(id) == before.get(id)}

    def _make_record(self, id: str) -> Record | None:
        entry = self._table.current.get(id)
        return self._table.make_record(entry) if entry else None

    def _find_changes(self) -> dict[str, Record | None]:
        """What has been added, changed or, as None, removed."""
        now = self._state_file.records
        ids = dict.fromkeys((*self.records, *now))
        changed = [id for id in ids if now.get(id) != self.records.get(id)]
        return {id: now.get(id) for id in dict.fromkeys((*changed, *self._list_due()))}

    def _list_due(self) -> list[str]:
        return [id for id, (due, _) in self._again.items() if due <= time.monotonic()]

    async def _take_over(self, startup: Startup, id: str, record: Record | None) -> None:
        held = self._table.current.get(id)
        _, tries = self._again.pop(id, (0.0, TRIES))
        if record is None:
            self._replace(held, None, ())
            metrics.adapter_removed(id)
            self.records.pop(id, None)
            return
        if held is None or not self._table.has_versions(id, record):
            entry, kept = await startup.restore_record(id, record), await startup.restore_kept(id)
            self._replace(held, entry, kept)
            if tries and (entry is None or entry.version.validated is None):
                self._again[id] = time.monotonic() + AGAIN_S, tries - 1
        elif held.pinned != record.pinned:
            self._table.pin_adapter(held, record.pinned)
        self.records[id] = record

    def _replace(self, held: RegisteredAdapter | None, entry: RegisteredAdapter | None, kept: Kept) -> None:
        if held is not None:
            self._table.withdraw_adapter(held)
        if entry is not None:
            self._table.insert_adapter(entry, kept)
