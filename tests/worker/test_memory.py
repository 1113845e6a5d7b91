"""The free memory is the least of the machine's and the control group's, where they have a limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.worker import memory


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:       5 kB\nHugePages_Total: 0\n")
    return tmp_path


def limit(places: Path, most: str, used: int, inactive: int) -> None:
    (places / "memory.max").write_text(most + "\n")
    (places / "memory.current").write_text(f"{used}\n")
    (places / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")


def test_without_a_group_it_is_what_the_machine_has(places: Path) -> None:
    assert memory.free_bytes() == 5 * 1024


def test_a_groups_limit_counts_when_it_is_nearer(places: Path) -> None:
    limit(places, "4000", 3000, 200)
    assert memory.free_bytes() == 1200
    limit(places, "4000", 5000, 0)
    assert memory.free_bytes() == 0
    limit(places, "max", 3000, 200)
    assert memory.free_bytes() == 5 * 1024


def test_a_system_that_does_not_say_sets_no_limit(places: Path) -> None:
    (places / "meminfo").unlink()
    assert memory.free_bytes() is None


def test_this_machine_says() -> None:
    free = memory.free_bytes()
    assert free is None or free > 0
