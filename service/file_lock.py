"""Locks a file among processes, in every process.

A lock ends with its process at the latest, however that ends. Must not know what a lock is for.
"""

from __future__ import annotations

import fcntl
import os
from io import FileIO
from pathlib import Path


def open_lock(path: Path) -> FileIO:
    """The file, made where there is none; one that another user made is opened to be read. Raises OSError."""
    try:
        return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except PermissionError:
        return FileIO(path)


def try_lock(file: FileIO, shared: bool = False) -> bool:
    """Takes the lock until the file is closed; whether it was free. `shared`: beside other shared ones.

    Raises OSError where the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_shared_lock(file: FileIO) -> None:
    """Raises OSError where the file system has no locks."""
    fcntl.flock(file, fcntl.LOCK_SH)
