"""Turns of services that share one directory of registrations, and its version; in the API process.

A turn ends with its process at the latest, so a killed service blocks nobody. Must not know what is
registered or how a change is made.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import FileIO
from pathlib import Path

from .. import file_lock
from ..errors import NotReady
from ..threads import DISK, run_in
from .state_file import STATE_FILE

LOCK = ".adapterd.lock"
LOOK_S = 0.01  # between tries for a turn
LONGEST_S = 30.0  # to wait for one: others hold theirs for milliseconds
FileVersion = tuple[int, int, int]


@asynccontextmanager
async def take_turn(folder: Path) -> AsyncIterator[None]:
    """One at a time over processes and machines.

    Raises NotReady where another has had its turn for too long, OSError where there are no locks.
    """
    lock = await run_in(DISK, _open_lock, folder)
    try:
        try:
            async with asyncio.timeout(LONGEST_S):
                while not await run_in(DISK, file_lock.try_lock, lock):  # noqa: ASYNC110 - a file has no event
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise NotReady("another service keeps the registrations to itself", retry_after=2) from None
        yield
    finally:
        await run_in(DISK, lock.close)


def _open_lock(folder: Path) -> FileIO:
    folder.mkdir(parents=True, exist_ok=True)
    return file_lock.open_lock(folder / LOCK)


def read_version(folder: Path) -> FileVersion:
    """Changes with every registration that is remembered. Raises OSError.

    The file is opened, for a network share may answer for minutes from what it has seen of a name.
    """
    try:
        with (folder / STATE_FILE).open("rb") as file:
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_ino, found.st_size
