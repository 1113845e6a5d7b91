"""Reads how much memory this process may still take; runs in the worker process, on Linux.

It counts the machine's and the control group's. Must not know adapters.
"""

from __future__ import annotations

from pathlib import Path

MACHINE = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Free bytes, with those of files that the system would give up; None where it does not say."""
    rooms = [room for room in (_machine_free(), _group_free()) if room is not None]
    return min(rooms, default=None)


def _machine_free() -> int | None:
    available = _read_values(MACHINE).get("MemAvailable:")
    return None if available is None else available * 1024


def _group_free() -> int | None:
    """A group without a limit says `max`."""
    try:
        limit, used = (
            (GROUP / name).read_text(encoding="utf-8").strip() for name in ("memory.max", "memory.current")
        )
    except OSError:
        return None
    if not limit.isdecimal():
        return None
    reclaimable = _read_values(GROUP / "memory.stat").get("inactive_file", 0)
    return max(0, int(limit) - int(used) + reclaimable)


def _read_values(file: Path) -> dict[str, int]:
    """The file's lines as name and number."""
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
