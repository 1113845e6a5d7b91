"""The benchmark of loading asks for adapters where it says they are, times each way once a turn,
and makes the right table of it.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch

from deploy.bench import loading
from deploy.bench.load import connect
from deploy.bench.servers import started
from tests import making

SETTINGS = {
    "dtype": "float32",
    "quantization": "none",
    "device": "cpu",
    "compile": "off",
    "pool_rank": "8",
    "max_rank": "4",
}


def test_rows_are_medians_and_count_in_copies() -> None:
    timings = loading.Timings({"a copy": [2.0, 1.0, 3.0], "other": [10.0, 30.0]})
    assert timings.rows("a copy") == [
        {"what": "a copy", "p50_ms": 2.0, "p95_ms": pytest.approx(2.9), "copies": 1.0},
        {"what": "other", "p50_ms": 20.0, "p95_ms": pytest.approx(29.0), "copies": 10.0},
    ]


@pytest.mark.filterwarnings("ignore")
def test_every_way_is_timed_and_the_adapters_are_where_they_are_said_to_be(tmp_path: Path) -> None:
    base, root, timings = making.tiny(tmp_path / "base"), tmp_path / "adapters", loading.Timings()

    def write(folder: Path, seed: int) -> None:
        making.noise(folder, base, seed)

    folders = {"base": str(base), "adapters_dir": str(root)}
    loading.copied(1000, 3, timings)
    with started(SETTINGS | folders, tmp_path / "log") as server:
        asyncio.run(loading.served(server, root, write, 3, timings))
    threads = torch.get_num_threads()
    loading.by_peft(base, root, write, 3, timings)
    torch.set_num_threads(threads)
    ways = [loading.COPY, loading.HOSTED, loading.RESIDENT, loading.ON_DISK, loading.REGISTERED, loading.NEW]
    ways += [loading.PEFT, loading.PEFT_FIRST]
    counts = {what: len(times) for what, times in timings.found.items()}
    assert counts == dict.fromkeys(ways, 3) | {loading.READ: 1, loading.PLACED: 1}
    assert all(time > 0 for times in timings.found.values() for time in times)
    shown = loading.report(timings, {"machine": "a small one"}, tmp_path / "out")
    assert shown.count("\n| ") == 10
    assert "- machine: a small one" in shown
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) == 10


def test_what_is_elsewhere_is_not_timed(tmp_path: Path) -> None:
    class Elsewhere(loading.Asking):
        async def residency(self, name: str) -> str:
            return "disk"

    async def look() -> None:
        async with connect("http://127.0.0.1:1") as http:
            await loading.expect(Elsewhere(http, tmp_path, lambda folder, seed: None), "one", "host")

    with pytest.raises(RuntimeError, match="one is on disk, not on host"):
        asyncio.run(look())
