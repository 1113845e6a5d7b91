"""One change at a time to a shared adapters directory, whoever makes it; and whether anything has
changed there. Knows files only.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TextIO

from service.catalog.state_file import STATE_FILE
from service.threads import DISK, run_in

LOCK = ".adapterd.lock"
LOOK_S = 0.01


@asynccontextmanager
async def changing(root: Path) -> AsyncIterator[None]:
    """One turn at a time over processes and machines; it ends with its process at the latest."""
    file = await run_in(DISK, _lock, root)
    try:
        while not await run_in(DISK, _taken, file.fileno()):  # noqa: ASYNC110 - another process tells no event
            await asyncio.sleep(LOOK_S)
        yield
    finally:
        await run_in(DISK, file.close)


def _lock(root: Path) -> TextIO:
    root.mkdir(parents=True, exist_ok=True)
    return (root / LOCK).open("a", encoding="utf-8")


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def version(root: Path) -> tuple[int, int]:
    """Changes with every registration that is remembered."""
    try:
        found = os.stat(root / STATE_FILE)
    except FileNotFoundError:
        return 0, 0
    return found.st_mtime_ns, found.st_ino
