"""Memory that is limited or runs out, in real control groups: it is named, nobody is blamed for it, and what
cannot fit is not begun.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.bench.servers import ROOT, started
from tests import kinds, making
from tests.operations.memory_group import MemoryGroup, made_group

LIMIT_S = 600  # against hangs only
PLAIN = {"dtype": "float32", "quantization": "none", "device": "cpu", "compile": "off"}


def run_in_group(group: MemoryGroup, *words: str) -> subprocess.CompletedProcess[str]:
    command = group.command(sys.executable, *words)
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)


@pytest.fixture
def group() -> Iterator[MemoryGroup]:
    with made_group(200_000_000) as group:
        yield group


def test_the_limit_of_a_group_below_the_root_is_seen(group: MemoryGroup) -> None:
    asked = "from service.limits import free_memory; left = free_memory(); print(left.memory, left.limit)"
    ran = run_in_group(group, "-c", asked)
    free, _, limit = ran.stdout.strip().partition(" ")
    assert 0 < int(free) < 200_000_000
    assert limit == f"the control group's {group.limit.name} is 200 MB"


def test_a_worker_for_which_memory_runs_out_while_it_loads_is_told_as_such(group: MemoryGroup) -> None:
    ran = run_in_group(group, "-m", "tests.operations.hungry", "loading")
    limit = f"the control group's {group.limit.name} is 200 MB"
    why = f"memory ran out and the system killed it; {limit}"
    assert ran.stdout == f"the worker died ({why}) 3 times in a row while loading\n", ran.stderr


def test_memory_that_runs_out_while_an_adapter_is_read_is_not_its_fault(group: MemoryGroup) -> None:
    ran = run_in_group(group, "-m", "tests.operations.hungry", "reading")
    code, words, state = ran.stdout.splitlines()
    assert (code, state) == ("not_ready", "ready")
    assert words.startswith("the worker died (memory ran out and the system killed it")


def test_an_adapter_that_cannot_fit_is_refused_unread_and_taken_once_it_can(
    tmp_path: Path,
) -> None:
    base = making.tiny(tmp_path / "base", hidden_size=512, intermediate_size=1024)
    wide = kinds.lora(1, targets="all-linear", r=256)(tmp_path / "adapters" / "wide", base)
    size = (wide / making.WEIGHTS).stat().st_size
    folders = {"base": str(base), "adapters_dir": str(tmp_path / "adapters")}
    request = {"id": "again", "source": "wide"}
    with (
        made_group(size + size // 2) as group,
        started(PLAIN | folders, tmp_path / "log") as server,
        httpx.Client(base_url=server.url, timeout=LIMIT_S, trust_env=False) as http,
    ):
        (worker,) = find_workers(server.pid)
        group.move_process(worker)
        refused = http.post("/adapters", json=request)
        assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
        assert "not enough memory for the adapter" in refused.json()["error"]
        assert int(refused.headers["retry-after"]) > 0
        assert http.get("/adapters/again").status_code == 404
        group.set_limit(10 * size)
        assert http.post("/adapters", json=request).status_code == 201
        assert find_workers(server.pid) == [worker]


def find_workers(pid: int) -> list[int]:
    below = psutil.Process(pid).children()
    return [one.pid for one in below if "service.worker.loop" in one.cmdline()]
