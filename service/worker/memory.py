"""How much memory this process may still take, as Linux tells: of the machine and of its control
group. Knows nothing of what it is for.
"""

from __future__ import annotations

from pathlib import Path

MACHINE = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Bytes, those of files that the system would give up included; None where it does not say."""
    return min((room for room in (_machine_free(), _group_free()) if room is not None), default=None)


def _machine_free() -> int | None:
    available = _read_values(MACHINE).get("MemAvailable:")
    return None if available is None else available * 1024


def _group_free() -> int | None:
    """A group without a limit says `max`."""
    try:
        limit, used = ((GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    if not limit.isdecimal():
        return None
    return max(0, int(limit) - int(used) + _read_values(GROUP / "memory.stat").get("inactive_file", 0))


def _read_values(file: Path) -> dict[str, int]:
    """The file's lines as name and number."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
