"""Counts what adapters and keys used, and writes it in batches; in the API process, on its event loop.

What cannot be written stays in memory and is tried again: no request waits for a disk. Must not know
requests or HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from ..threads import DISK, run_in
from .usage_file import Group, Owner, UsageCounts, UsageFile, UsageNotKept

log = logging.getLogger("adapterd.usage")

FILE = ".adapterd.usage.sqlite"
HOUR_S = 3600
KEPT_HOURS = 400 * 24
WRITE_S = 0.5  # from a count to its writing, so that it is on the disk within a second
MOST_PENDING = (
    100_000  # hours, adapters and keys in memory; the oldest go where nothing can be written for long
)


class UsageBook:
    """The usage since the file was begun; since this process was, where there is no file.

    A count is written once, with others, `WRITE_S` after it came or in the end.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._file: UsageFile | None = None
        self._pending: dict[Group, UsageCounts] = {}
        self._lock = asyncio.Lock()  # held while counts are neither pending nor in the file
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._warned = False

    def keep_in(self, folder: Path) -> None:
        """Everything that is counted from now on goes into the file of this folder."""
        self._file = UsageFile(folder / FILE)

    def count_request(self, adapter: str, key: str, counts: UsageCounts) -> None:
        """Adds to the hour that it is now; an adapter or a key that there is not is empty."""
        self._add({(self._current_hour(), adapter, key): counts})
        self._write_later()

    async def read_counts(self, since: int, until: int) -> dict[Owner, UsageCounts]:
        """The sums from the hour `since` to the one before `until`. Raises UsageNotKept."""
        await self.write_pending()
        async with self._lock:
            found = await run_in(DISK, self._file.read_counts, since, until) if self._file else {}
            for (hour, adapter, key), counts in self._pending.items():
                if since <= hour < until:
                    found[adapter, key] = found.get((adapter, key), UsageCounts()) + counts
        return found

    async def write_pending(self) -> None:
        """Writes what was counted, if it can be; to the end also where the caller leaves."""
        await asyncio.shield(asyncio.create_task(self._write()))

    async def close(self) -> None:
        """Writes what is left."""
        await self.write_pending()
        if self._timer is not None:
            self._timer.cancel()

    def _current_hour(self) -> int:
        return int(self._clock() // HOUR_S)

    def _add(self, batch: Mapping[Group, UsageCounts]) -> None:
        for group, counts in batch.items():
            self._pending[group] = self._pending.get(group, UsageCounts()) + counts
        while len(self._pending) > MOST_PENDING:
            del self._pending[next(iter(self._pending))]

    def _write_later(self) -> None:
        if self._file is not None and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WRITE_S, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._task = asyncio.create_task(self._write())

    async def _write(self) -> None:
        async with self._lock:
            if self._file is None or not self._pending:
                return
            batch, self._pending = self._pending, {}
            try:
                await run_in(DISK, self._file.add_counts, batch, self._current_hour() - KEPT_HOURS)
            except UsageNotKept as error:
                newer, self._pending = self._pending, batch
                self._add(newer)
                self._warn(error)
                self._write_later()
            else:
                self._warned = False

    def _warn(self, error: UsageNotKept) -> None:
        """Once until it can be written again."""
        if not self._warned:
            log.warning("usage stays in memory until it can be written: %s", error)
        self._warned = True
