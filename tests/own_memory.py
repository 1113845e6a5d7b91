"""What memory a process has of its own, whatever runs beside it. Reads /proc of a process that runs."""

from __future__ import annotations

import re
from pathlib import Path

import psutil


def own_bytes(pid: int) -> int:
    """Bytes that this process alone has written.

    Without files that it only reads: a library's pages are its own or not by whether a neighbour
    uses them too.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    found = re.search(r"^Private_Dirty: +(\d+) kB$", lines, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def mapped_files(pid: int, folder: Path) -> set[str]:
    """The files below the folder, gone or not, whose content this process holds in view."""
    return {one.path for one in psutil.Process(pid).memory_maps() if one.path.startswith(f"{folder}/")}
