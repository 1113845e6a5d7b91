"""What an adapter costs ends with it: a real worker and reader, through hundreds of lives, and with
a thousand that nobody asks for.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
import statistics
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.catalog.registry import Registry
from service.core.request import UNNUMBERED, Finish, Request
from service.errors import AdapterInvalid
from service.settings import Settings
from service.worker.client import WorkerClient
from tests import kinds, making
from tests.own_memory import mapped_files, own_bytes

pytestmark = pytest.mark.anyio

LIVES = 300
GROWTH = 1.02  # since the tenth
PLAIN = {
    "dtype": "float32",
    "quantization": "none",
    "device": "cpu",
    "compile": "off",
    "max_rows": 2,
    "base_id": "tiny",
}
BOUNDS = {"pool_rank": 512, "max_rank": 512, "host_cache_mb": 100}
LAYERS, THOUSAND = 6, 1000
CARD = {"worker": 8_000, "reader": 8_000, "api": 20_000}  # bytes that each of a thousand may cost
# 2 MB on the tiny base: were one life's bytes in ten kept, it would show
WIDE: dict[str, Any] = {"targets": "all-linear", "r": 256}
RECIPES: dict[str, kinds.Maker] = {
    "pooled": kinds.lora(1, **WIDE),
    "beside": kinds.lora(2, lora_bias=True, **WIDE),
    "small": kinds.POOL["dora"],
    "refused": kinds.lora(3, **WIDE),  # for one value of its last tensor
}


class MeasuredService:
    def __init__(self, folder: Path, layers: int) -> None:
        self.root = folder / "adapters"
        self.base = making.tiny(folder / "base", num_hidden_layers=layers)
        self.settings = Settings.model_validate(
            {**PLAIN, **BOUNDS, "base": str(self.base), "adapters_dir": self.root}
        )
        self.client = WorkerClient(self.settings)
        self.registry = Registry(self.settings, self.client)
        self.client.watch_loads(self.registry.note_load)

    async def say(self, id: str) -> None:
        with self.registry.lease_adapter(id) as generation:
            request = Request(UNNUMBERED, (9, 40, 41, 77), 3, generation.digest)
            ticket = self.client.submit_request(request)
            end = [event async for event in ticket][-1]
        assert end.finish is Finish.LENGTH, end.message

    def pids(self) -> dict[str, int]:
        """Of each process; `api` is this one."""
        reader, worker = self.registry._validator.pid, self.client.worker_pid
        assert reader
        assert worker
        return {"worker": worker, "reader": reader, "api": os.getpid()}

    def weight(self) -> dict[str, int]:
        """Bytes that each process has of its own."""
        return {name: own_bytes(pid) for name, pid in self.pids().items()}

    def mapped(self) -> dict[str, set[str]]:
        """The adapters' files that each process has mapped, which are not among its bytes."""
        return {name: mapped_files(pid, self.root) for name, pid in self.pids().items()}


@asynccontextmanager
async def opened(folder: Path, layers: int = 2) -> AsyncIterator[MeasuredService]:
    measured = MeasuredService(folder, layers)
    await asyncio.gather(measured.client.start_worker(), measured.registry.start_validator())
    try:
        await measured.client.wait_ready()
        yield measured
    finally:
        await measured.registry.close()
        await measured.client.stop_worker(0)


async def test_three_hundred_lives_leave_nothing_behind(tmp_path: Path) -> None:
    """B5: registered, asked and deleted; each says what it freed; one in four is refused after its
    values were read.
    """
    async with opened(tmp_path) as measured:
        await measured.registry.open_catalog()
        kinds.make(measured.root, measured.base, RECIPES)
        kinds.spoil(measured.root / "refused", kinds.B, math.nan)
        weights: list[dict[str, int]] = []
        seconds: list[float] = []
        for life, kind in zip(range(LIVES), itertools.cycle(RECIPES), strict=False):
            began = time.perf_counter()
            if kind == "refused":
                with pytest.raises(AdapterInvalid, match="NaN"):
                    await measured.registry.register_adapter("x", kind)
                continue
            await measured.registry.register_adapter("x", kind)
            seconds.append(time.perf_counter() - began)
            await measured.say("x")
            held = measured.client.gauges.host_bytes
            freed = (await measured.registry.remove_adapter("x"))["freed_bytes"]
            assert (freed, measured.registry.list_cards()) == (held, [])
            if life >= 10:
                weights.append(measured.weight())
        first, last = (1000 * statistics.median(part) for part in (seconds[:30], seconds[-30:]))
        print(
            f"a load took {first:.1f} ms in the first lives, {last:.1f} ms in the last; "
            f"bytes {weights[0]} then {weights[-1]}"
        )
        assert not any(measured.mapped().values()), measured.mapped()
        for process, bytes_ in weights[0].items():
            assert max(weight[process] for weight in weights) < bytes_ * GROWTH, process


def copies(mould: Path, root: Path, count: int) -> None:
    """Adapters of one recipe that differ in their last value."""
    weights = (mould / making.WEIGHTS).read_bytes()
    for i in range(count):
        folder = root / f"n{i:04}"
        folder.mkdir(parents=True)
        shutil.copyfile(mould / making.CONFIG, folder / making.CONFIG)
        (folder / making.WEIGHTS).write_bytes(weights[:-4] + struct.pack("<f", i / 1000))


async def test_a_thousand_adapters_cost_only_their_cards_until_one_is_asked_for(tmp_path: Path) -> None:
    """Found at start. Their 100 MB stay on the disk, their equal lists of layers are one."""
    async with opened(tmp_path, layers=LAYERS) as measured:
        mould = kinds.lora(1, targets="all-linear", r=8)(tmp_path / "mould", measured.base)
        copies(mould, measured.root, THOUSAND)
        await measured.registry.start_validator()
        before, began = measured.weight(), time.perf_counter()
        await measured.registry.open_catalog()
        seconds = time.perf_counter() - began
        cards = measured.registry.list_cards()
        assert [(card["state"], card["residency"]) for card in cards] == [("ready", "disk")] * THOUSAND
        # So that it has heard of all before
        await measured.client.wait_until_loaded(measured.registry.list_versions()[-1].digest)
        one = measured.client.gauges.host_bytes
        assert 0 < one < 2 * (mould / making.WEIGHTS).stat().st_size
        await measured.say("n0500")
        assert measured.client.gauges.host_bytes == 2 * one
        each = {name: (bytes_ - before[name]) / THOUSAND for name, bytes_ in measured.weight().items()}
        print(f"{THOUSAND} adapters were read in {seconds:.1f} s; bytes of each: {each}")
        assert not any(measured.mapped().values()), measured.mapped()
        assert all(each[name] < CARD[name] for name in CARD)
