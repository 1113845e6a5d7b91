"""A system made of files, for tests of what the real one would say: a folder with `proc` and `sys` in it."""

from __future__ import annotations

from pathlib import Path

UNIFIED_MOUNT = "41 31 0:38 {root} {point} rw,relatime - cgroup2 cgroup2 rw"
FIRST_MOUNT = "35 31 0:32 {root} {point} rw,relatime shared:9 - cgroup cgroup rw,{controllers}"


class FakeSystem:
    """`root` is the folder. Each process of it is this one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/self/mountinfo", "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n")
        self.write("proc/self/cgroup", "")
        self.write(
            "proc/meminfo",
            "MemTotal: 9000 kB\nMemAvailable:    5000 kB\nSwapFree: 0 kB\nHugePages_Total: 0\n",
        )

    def write(self, name: str, text: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def add_line(self, name: str, line: str) -> None:
        with (self.root / name).open("a") as file:
            print(line, file=file)

    def mount_unified(self, path: str, root: str = "/", point: str = "/sys/fs/cgroup") -> None:
        """Version 2, whose group `root` is seen at `point`; the own group is at `path`."""
        self.add_line("proc/self/mountinfo", UNIFIED_MOUNT.format(root=root, point=point))
        self.add_line("proc/self/cgroup", f"0::{path}")

    def mount_first(self, controllers: str, path: str, root: str = "/") -> None:
        """Version 1's hierarchy of these controllers."""
        point = f"/sys/fs/cgroup/{controllers}"
        line = FIRST_MOUNT.format(root=root, point=point, controllers=controllers)
        self.add_line("proc/self/mountinfo", line)
        self.add_line("proc/self/cgroup", f"4:{controllers}:{path}")

    def set_group(self, folder: str, **files: object) -> None:
        """Writes the group's files below `sys/fs/cgroup`; a name's first `_` stands for its dot."""
        for name, value in files.items():
            self.write(f"sys/fs/cgroup/{folder}/{name.replace('_', '.', 1)}", f"{value}\n")
