"""What the system leaves this process: the least of the machine's and of its groups', in both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service import limits
from tests.system import FakeSystem

MACHINE = 5000 * 1024
NO_LIMIT = 9223372036854771712  # as version 1 says it


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def free(system: FakeSystem) -> int:
    left = limits.free_memory(system.root)
    assert left is not None
    return left.memory


# ---- memory


def test_without_a_group_it_is_what_the_machine_has(system: FakeSystem) -> None:
    assert limits.free_memory(system.root) == limits.FreeMemory(MACHINE, 0, "this machine has 9 MB")


def test_a_system_that_does_not_say_sets_no_limit(tmp_path: Path) -> None:
    assert limits.free_memory(tmp_path) is None
    assert limits.count_oom_kills(tmp_path) == 0
    assert limits.usable_processors(tmp_path) == len(os.sched_getaffinity(0))


def test_of_version_2_the_own_group_counts_and_not_the_root(system: FakeSystem) -> None:
    system.mount_unified("/system.slice/adapterd.service")
    system.set_group("", memory_max="max", memory_current=10**9)
    own = {"memory_max": 4000, "memory_high": "max", "memory_current": 3000}
    system.set_group("system.slice/adapterd.service", **own)
    left = limits.free_memory(system.root)
    assert left == limits.FreeMemory(1000, 0, "the control group's memory.max is 0 MB")


def test_the_group_above_counts_where_it_leaves_less(system: FakeSystem) -> None:
    system.mount_unified("/pod/own")
    system.set_group("pod", memory_max=4000, memory_current=3900)
    system.set_group("pod/own", memory_max=4000, memory_current=1000)
    assert free(system) == 100


def test_the_group_below_which_everything_is_throttled_counts_as_its_limit(system: FakeSystem) -> None:
    system.mount_unified("/own")
    system.set_group("own", memory_max=4000, memory_high=3_000_000, memory_current=1000)
    assert free(system) == 3000
    system.set_group("own", memory_max=4_000_000)
    left = limits.free_memory(system.root)
    assert left
    assert (left.memory, left.limit) == (2_999_000, "the control group's memory.high is 3 MB")


def test_a_private_namespace_shows_the_own_group_as_the_root(system: FakeSystem) -> None:
    system.mount_unified("/")
    system.set_group("", memory_max=4000, memory_current=3000)
    assert free(system) == 1000


def test_a_mount_that_shows_a_group_below_the_root_is_walked_up_to_that_group(system: FakeSystem) -> None:
    system.mount_first("memory", "/docker/abc/inner", root="/docker/abc")
    system.set_group("memory", memory_limit_in_bytes=4000, memory_usage_in_bytes=3900)
    own = {"memory_limit_in_bytes": NO_LIMIT, "memory_usage_in_bytes": 1000}
    system.set_group("memory/inner", **own)
    assert free(system) == 100


@pytest.mark.parametrize("path", ["/../other", "/elsewhere"])
def test_of_a_group_outside_of_what_is_mounted_the_mount_counts(system: FakeSystem, path: str) -> None:
    system.mount_unified(path, root="/docker/abc")
    system.set_group("", memory_max=4000, memory_current=3000)
    assert free(system) == 1000


def test_a_mount_point_with_a_space_is_found(system: FakeSystem) -> None:
    system.mount_unified("/own", point=r"/sys/fs/cgroup/a\040b")
    system.set_group("a b/own", memory_max=4000, memory_current=3000)
    assert free(system) == 1000


def test_of_version_1_the_limit_counts_also_of_groups_that_cannot_be_seen(system: FakeSystem) -> None:
    system.mount_first("memory", "/own")
    own = {"memory_limit_in_bytes": NO_LIMIT, "memory_usage_in_bytes": 1000}
    system.set_group("memory/own", **own)
    assert free(system) == MACHINE
    system.set_group("memory/own", memory_stat="hierarchical_memory_limit 1500")
    assert free(system) == 500


def test_where_both_versions_are_mounted_the_one_with_the_controller_counts(system: FakeSystem) -> None:
    system.mount_first("memory", "/own")
    system.mount_unified("/", point="/sys/fs/cgroup/unified")
    system.set_group("memory/own", memory_limit_in_bytes=4000, memory_usage_in_bytes=3000)
    system.set_group("unified", cgroup_controllers="")
    assert free(system) == 1000


def test_pages_of_files_count_as_free_but_for_those_that_are_mapped(system: FakeSystem) -> None:
    system.mount_unified("/own")
    pages = "anon 1\ninactive_file 1000\nactive_file 500\nfile_mapped 300"
    system.set_group("own", memory_max=4000, memory_current=3900, memory_stat=pages)
    assert free(system) == 100 + 1200
    system.set_group("own", memory_current=9000)
    assert free(system) == 0


def test_version_1_counts_the_pages_of_the_groups_below_too(system: FakeSystem) -> None:
    system.mount_first("memory", "/own")
    pages = "inactive_file 7\ntotal_inactive_file 1000\ntotal_active_file 500\ntotal_mapped_file 300"
    limit = {"memory_limit_in_bytes": 4000, "memory_usage_in_bytes": 3900}
    system.set_group("memory/own", memory_stat=pages, **limit)
    assert free(system) == 100 + 1200


@pytest.mark.parametrize(("limit", "swap"), [("max", 2048), ("1000", 900), ("50", 0)])
def test_swap_is_told_apart_as_far_as_the_group_may_use_it(system: FakeSystem, limit: str, swap: int) -> None:
    system.write("proc/meminfo", "MemAvailable: 5000 kB\nSwapFree: 2 kB\n")
    system.mount_unified("/own")
    system.set_group("own", memory_max=4000, memory_current=3000)
    swapped = {"memory_swap.max": limit, "memory_swap.current": 100}
    system.set_group("own", **swapped)
    left = limits.free_memory(system.root)
    assert left
    assert (left.memory, left.swap, left.total) == (1000, swap, 1000 + swap)


@pytest.mark.parametrize(("limit", "swap"), [(NO_LIMIT, 2048), (4000, 0), (4500, 400)])
def test_version_1_limits_memory_and_swap_together(system: FakeSystem, limit: int, swap: int) -> None:
    system.write("proc/meminfo", "MemAvailable: 5000 kB\nSwapFree: 2 kB\n")
    system.mount_first("memory", "/own")
    own = {"memory_limit_in_bytes": 4000, "memory_usage_in_bytes": 3000}
    both = {"memory_memsw.limit_in_bytes": limit, "memory_memsw.usage_in_bytes": 3100}
    system.set_group("memory/own", **own, **both)
    left = limits.free_memory(system.root)
    assert left
    assert (left.memory, left.swap) == (1000, swap)


# ---- the system's killings


def test_killings_of_the_own_group_are_counted_in_both_versions(system: FakeSystem) -> None:
    system.write("proc/vmstat", "pgfault 5\noom_kill 70\n")
    assert limits.count_oom_kills(system.root) == 70
    system.mount_unified("/own")
    system.set_group("", memory_events="oom_kill 9")
    system.set_group("own", memory_events="low 0\noom 3\noom_kill 2\noom_group_kill 1")
    assert limits.count_oom_kills(system.root) == 2


def test_version_1_counts_them_elsewhere(system: FakeSystem) -> None:
    system.mount_first("memory", "/own")
    system.set_group("memory/own", memory_oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 4")
    assert limits.count_oom_kills(system.root) == 4


# ---- processors


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


@pytest.mark.usefixtures("many")
def test_processors_are_those_of_the_affinity(system: FakeSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    assert limits.usable_processors(system.root) == 16
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert limits.usable_processors(system.root) == 4


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(
    ("own", "above", "usable"),
    [
        ("max 100000", "max 100000", 16),
        ("150000 100000", "max 100000", 2),
        ("10000 100000", "max 100000", 1),
        ("400000 100000", "250000 100000", 3),
        ("9900000 100000", "max 100000", 16),
    ],
)
def test_the_quota_counts_rounded_up_and_that_of_the_groups_above(
    system: FakeSystem, own: str, above: str, usable: int
) -> None:
    system.mount_unified("/pod/own")
    system.set_group("pod", cpu_max=above)
    system.set_group("pod/own", cpu_max=own)
    assert limits.usable_processors(system.root) == usable


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize(("quota", "usable"), [("-1", 16), ("300000", 3)])
def test_version_1_has_quota_and_period_in_two_files(system: FakeSystem, quota: str, usable: int) -> None:
    system.mount_first("cpu,cpuacct", "/own")
    files = {"cpu_cfs_quota_us": quota, "cpu_cfs_period_us": 100_000}
    system.set_group("cpu,cpuacct/own", **files)
    assert limits.usable_processors(system.root) == usable


# ---- the real system


def test_this_machine_says() -> None:
    left = limits.free_memory()
    assert left is None or left.memory > 0
    assert 1 <= limits.usable_processors() <= (os.cpu_count() or 1)
    assert limits.count_oom_kills() >= 0
