"""What takes processors away for the benchmark takes them, and gives them back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from deploy.bench import processors

ASK = "import os; print(sorted(os.sched_getaffinity(0)), open('/proc/self/cgroup').read())"


def started() -> str:
    return subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout


def test_what_starts_pinned_has_one_processor_and_this_process_keeps_its_own() -> None:
    before = os.sched_getaffinity(0)
    with processors.starting_pinned():
        assert started().startswith(f"[{min(before)}]")
    assert os.sched_getaffinity(0) == before


def test_the_neighbour_runs_on_the_last_processor_until_the_block_ends() -> None:
    with processors.busy_neighbour():
        (child,) = (one for one in psutil.Process().children() if processors.SPIN in one.cmdline())
        assert child.cpu_affinity() == [max(os.sched_getaffinity(0))]
    assert not child.is_running()


@pytest.mark.parametrize("version", [1, 2])
def test_a_groups_quota_is_one_processor(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, folder = {
        1: ("3:cpuset:/\n1:cpu:/mine\n0::/\n", "cpu/mine"),
        2: ("0::/mine\n", "mine"),
    }[version]
    (tmp_path / "cgroup").write_text(lines)
    home = tmp_path / folder
    home.mkdir(parents=True)
    monkeypatch.setattr(processors, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(processors, "GROUPS", tmp_path)
    monkeypatch.setattr(Path, "rmdir", lambda group: None)  # a control group's files go with it
    if version == 2:
        (home / processors.NAME).mkdir()
        (home / processors.NAME / "cpu.max").write_text("max 100000")
    with processors.quota_group() as group:
        names = {1: ["cpu.cfs_quota_us", "cpu.cfs_period_us"], 2: ["cpu.max"]}[version]
        assert " ".join((group / name).read_text() for name in names) == "100000 100000"
        with processors.starting_in(group):
            assert (group / "cgroup.procs").read_text() == str(os.getpid())
    assert (home / "cgroup.procs").read_text() == str(os.getpid())
