"""Sees that one service alone changes a directory of registrations; in the API process.

Must not know what is registered.
"""

from __future__ import annotations

import logging
import os
import socket
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path

from .. import durable, file_lock
from ..errors import DirectoryHeld
from .versions import current_time

log = logging.getLogger("adapterd.adapters")

LOCK = ".adapterd.service.lock"
LONGEST = 200  # bytes of a holder's description that are read


def claim_directory(folder: Path, port: int, shared: bool = False) -> FileIO | None:
    """The lock, held until it is closed or this process ends; None where there can be none: of a directory
    that can only be read nothing can be lost.

    `shared`: beside other services that claim it so, and see to it themselves that they change it in turn.
    Raises DirectoryHeld, naming the holder.
    """
    if durable.why_unwritable(folder):
        return None
    with ExitStack() as opened:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = opened.enter_context(file_lock.open_lock(folder / LOCK))
            is_free = file_lock.try_lock(lock, shared)
        except OSError as error:
            log.warning("no other service may use %s, which cannot be locked: %s", folder, error.strerror)
            return None
        if not is_free:
            raise DirectoryHeld(
                f"ADAPTERD_ADAPTERS_DIR: {folder} is held by another service, {_read_holder(lock)}: "
                "stop that one, name another directory, or share this one (ADAPTERD_SHARED)"
            )
        _write_holder(lock, port)
        opened.pop_all()
    return lock


def _write_holder(lock: FileIO, port: int) -> None:
    """Over what is there, so that it takes no room on a full disk."""
    words = f"process {os.getpid()} on the host {socket.gethostname()}, port {port}, since {current_time()}\n"
    with suppress(OSError):  # another user's file
        os.pwrite(lock.fileno(), words.encode(), 0)
        os.ftruncate(lock.fileno(), len(words.encode()))


def _read_holder(lock: FileIO) -> str:
    words = os.pread(lock.fileno(), LONGEST, 0).decode("utf-8", "replace").split()
    return " ".join(words) or "which has not said who it is"
