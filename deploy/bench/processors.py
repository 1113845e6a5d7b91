"""Takes processors away from servers that the benchmark starts: a neighbour that is busy, a pin to one
processor, a control group's quota. On Linux; must not know servers or load.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
NAME = "adapterd-bench"
PERIOD_US = 100_000
SPIN = "while True: pass"


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process takes the last processor for itself."""
    process = subprocess.Popen([sys.executable, "-c", SPIN])
    try:
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def starting_pinned() -> Iterator[None]:
    """What starts in the block has the first processor alone, for all its life."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def quota_group() -> Iterator[Path]:
    """A control group that may use one processor's time, on whichever it likes; the block ends what is in it.

    Raises OSError where none can be made.
    """
    home = own_group()
    group = home / NAME
    group.mkdir(exist_ok=True)
    try:
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{PERIOD_US} {PERIOD_US}")
        else:
            (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (group / "cpu.cfs_quota_us").write_text(str(PERIOD_US))
        yield group
    finally:
        group.rmdir()


def own_group() -> Path:
    """The folder of this process's group in the hierarchy that limits processors, of version 1 or 2."""
    lines = [line.split(":", 2) for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines()]
    paths = {name: path for _, names, path in lines for name in names.split(",")}
    root = GROUPS / "cpu" if "cpu" in paths else GROUPS
    return root / paths.get("cpu", paths.get("", "/")).lstrip("/")


@contextmanager
def starting_in(group: Path) -> Iterator[None]:
    """What starts in the block is in the group, for all its life."""
    home = own_group()
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        (home / "cgroup.procs").write_text(str(os.getpid()))
