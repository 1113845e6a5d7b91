"""Makes a control group with a memory limit of its own, of version 1 or 2, where this user may."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from service import limits

LIMITS = ("memory.max", "memory.limit_in_bytes")
JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class MemoryGroup:
    """A group directly below the highest one that can be seen: never the root, and never this process's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.limit = next(folder / name for name in LIMITS if (folder / name).exists())

    def set_limit(self, size: int) -> None:
        """Limits memory; a group that may swap would be slow for long instead of full."""
        self.limit.write_text(str(size))
        for name in ("memory.swap.max", "memory.swappiness"):
            if (self.folder / name).exists():
                (self.folder / name).write_text("0")

    def move_process(self, pid: int) -> None:
        """From now on what this process takes counts here; what it has stays where it is."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def command(self, *words: str) -> Sequence[str]:
        """The command line that runs these words in this group."""
        return ("sh", "-c", JOIN, str(self.folder), *words)


@contextmanager
def made_group(size: int) -> Iterator[MemoryGroup]:
    """A group with this limit in bytes, without processes at the end. Skips where none can be made."""
    folder = _make_folder()
    if folder is None:
        pytest.skip("this user cannot make a control group for memory here")
    try:
        group = MemoryGroup(folder)
        group.set_limit(size)
        yield group
    finally:
        folder.rmdir()


def _make_folder() -> Path | None:
    for chain in limits._own_groups("memory", limits.SYSTEM):
        folder = chain[-1] / f"adapterd-test-{os.getpid()}"
        with suppress(OSError):
            folder.mkdir()
            if any((folder / name).exists() for name in LIMITS):
                return folder
            folder.rmdir()
    return None
