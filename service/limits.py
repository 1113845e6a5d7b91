"""What the system leaves this process: processors and memory; in every process, on Linux.

It asks affinity, `/proc/meminfo` and the control groups of versions 1 and 2: this process's own and all
above it that can be seen, for the least limit counts. Where the system does not say, nothing is limited.
`root` is the folder that `proc` and `sys` lie in. Must not know who asks, and what for.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

SYSTEM = Path("/")
UNIFIED = ""  # version 2's line in /proc/self/cgroup names no controller
UNLIMITED = 1 << 60  # bytes; version 1 has no word for it and says some number beyond
OCTAL = re.compile(r"\\([0-7]{3})")  # how a mount point's spaces are written


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Bytes that can be had before the system ends a process: `memory`, and further `swap`.

    Files' pages that nobody maps count as free. `limit` says what sets the bound, fit for a person.
    """

    memory: int
    swap: int
    limit: str

    @property
    def total(self) -> int:
        return self.memory + self.swap


class _MemoryFiles(NamedTuple):
    """The names that a version gives to a group's limits and to what it uses."""

    limits: tuple[str, ...]
    used: str
    swap_limit: str
    swap_used: str
    prefix: str  # of the statistics that have the groups below in them


VERSION_1 = _MemoryFiles(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    "memory.memsw.limit_in_bytes",
    "memory.memsw.usage_in_bytes",
    "total_",
)
# Over memory.high nobody is killed, and nothing goes on either
VERSION_2 = _MemoryFiles(
    ("memory.max", "memory.high"), "memory.current", "memory.swap.max", "memory.swap.current", ""
)


def usable_processors(root: Path = SYSTEM) -> int:
    """Processors that can be kept busy: those there are, by affinity and by the groups' quota, rounded up."""
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    groups = (group for chain in _own_groups("cpu", root) for group in chain)
    quotas = [math.ceil(quota) for group in groups if (quota := _processor_quota(group)) is not None]
    return max(1, min([cores, usable, *quotas]))


def free_memory(root: Path = SYSTEM) -> FreeMemory | None:
    """The memory that is left, by the nearest bound; None where the system does not say."""
    machine = _machine_memory(root)
    groups = [group for chain in _own_groups("memory", root) for group in chain]
    rooms = [room for room in (machine, *map(_group_memory, groups)) if room is not None]
    if not rooms:
        return None
    nearest = min(rooms, key=lambda room: room.memory)
    return replace(nearest, swap=min(room.swap for room in rooms) if machine else 0)


def count_oom_kills(root: Path = SYSTEM) -> int:
    """Processes that the system has ended for want of memory: those of this process's group, or the
    machine's where groups are not counted. Never falls.
    """
    for chain in _own_groups("memory", root):
        for name in ("memory.events", "memory.oom_control"):
            count = _read_values(chain[0] / name).get("oom_kill")
            if count is not None:
                return count
    return _read_values(root / "proc/vmstat").get("oom_kill", 0)


def megabytes(size: int) -> str:
    """The size in megabytes of 10^6 bytes, as all figures are shown."""
    return f"{round(size / 1e6)} MB"


def _machine_memory(root: Path) -> FreeMemory | None:
    values = _read_values(root / "proc/meminfo")
    available = values.get("MemAvailable:")
    if available is None:
        return None
    limit = f"this machine has {megabytes(values.get('MemTotal:', 0) * 1024)}"
    return FreeMemory(available * 1024, values.get("SwapFree:", 0) * 1024, limit)


def _group_memory(group: Path) -> FreeMemory | None:
    """What a group leaves; None where it has no limit."""
    for files in (VERSION_2, VERSION_1):
        used = _read_number(group / files.used)
        if used is not None:
            return _limited_memory(group, files, used)
    return None


def _limited_memory(group: Path, files: _MemoryFiles, used: int) -> FreeMemory | None:
    statistics = _read_values(group / "memory.stat")
    limits = {name: _read_number(group / name) for name in files.limits}
    # Of groups that cannot be seen from here, too
    limits["hierarchical_memory_limit"] = statistics.get("hierarchical_memory_limit")
    known = {name: limit for name, limit in limits.items() if limit is not None and limit < UNLIMITED}
    if not known:
        return None
    name = min(known, key=known.__getitem__)
    unmapped = _unmapped_pages(statistics, files.prefix)
    memory = max(0, known[name] - used + unmapped)
    swap = _swap_left(group, files)
    if files is VERSION_1:  # its limit is of memory and swap together
        swap = max(0, swap + unmapped - memory)
    return FreeMemory(memory, swap, f"the control group's {name} is {megabytes(known[name])}")


def _swap_left(group: Path, files: _MemoryFiles) -> int:
    limit, used = _read_number(group / files.swap_limit), _read_number(group / files.swap_used)
    return UNLIMITED if limit is None or used is None else max(0, limit - used)


def _unmapped_pages(statistics: dict[str, int], prefix: str) -> int:
    """Bytes of files' pages that no process has mapped: weights and libraries are, and are needed."""
    active, inactive, mapped = (
        statistics.get(prefix + name, 0)
        for name in ("active_file", "inactive_file", "mapped_file" if prefix else "file_mapped")
    )
    return max(0, active + inactive - mapped)


def _processor_quota(group: Path) -> float | None:
    """Processors' worth of time that a group may use; None where there is no limit."""
    quota, _, period = _read_text(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = (_read_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    if not quota.isdecimal() or not period.isdecimal() or not int(period):
        return None
    return int(quota) / int(period)


def _own_groups(controller: str, root: Path) -> Iterator[list[Path]]:
    """For each version that has this controller the folders of this process's group and of those above
    it, the own first.
    """
    paths = _own_paths(root)
    for line in _read_text(root / "proc/self/mountinfo").splitlines():
        fields, _, rest = (part.split() for part in line.partition(" - "))
        kind = rest[0] if rest else ""
        is_first = kind == "cgroup" and controller in rest[2].split(",")
        path = paths.get(controller if is_first else UNIFIED)
        if path is not None and (is_first or kind == "cgroup2"):
            yield _list_upwards(root, fields[3], fields[4], path)


def _own_paths(root: Path) -> dict[str, str]:
    """Controller → path of this process's group in its hierarchy."""
    lines = (line.split(":", 2) for line in _read_text(root / "proc/self/cgroup").splitlines())
    return {name: path for _, names, path in lines for name in names.split(",")}


def _list_upwards(root: Path, mounted: str, point: str, path: str) -> list[Path]:
    """The folders from the group at `path` up to the mount's `point`, which shows the group `mounted`.

    In a container the own group may be the highest that can be seen, or lie outside what is mounted.
    """
    top = root / OCTAL.sub(lambda match: chr(int(match[1], 8)), point).lstrip("/")
    own, shown = PurePosixPath(path), PurePosixPath(mounted)
    if ".." in own.parts or not own.is_relative_to(shown):
        return [top]
    inner = own.relative_to(shown)
    return [top / part for part in (inner, *inner.parents)] if inner.parts else [top]


def _read_text(file: Path) -> str:
    """The file's text; empty where there is none."""
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _read_number(file: Path) -> int | None:
    """The file's number; None where it has none, as `max` is."""
    text = _read_text(file)
    return int(text) if text.isdecimal() else None


def _read_values(file: Path) -> dict[str, int]:
    """The file's lines as name and number."""
    lines = (line.split() for line in _read_text(file).splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
