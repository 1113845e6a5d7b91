"""How long an adapter takes to its first token from wherever it is: unregistered, on disk, in host
memory, on the device.

Beside a plain memory copy of the same bytes and `PeftModel.load_adapter` of the same files. Starts
its own server on the demo base.

    python -m deploy.bench.loading [--rank 32] [--times 20] [--out build/bench/loading]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from . import adapters
from .grid import OUT, processor
from .load import Job, ask, connect, prompt
from .report import percentile
from .servers import Server, end_cleanly_when_told, started

WORDS = 8
PLACES = 2  # adapters that the pool holds
Write = Callable[[Path, int], None]  # an adapter, by folder and seed


@dataclass
class Timings:
    """Milliseconds by what was timed, in the order of the table."""

    found: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, seconds: float) -> None:
        self.found.setdefault(what, []).append(1000 * seconds)

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.add(what, time.perf_counter() - began)

    def rows(self, unit: str) -> list[dict[str, Any]]:
        """Of each the median, the 95th percentile, and the median over that of `unit`."""
        one = percentile(self.found[unit], 50)
        middles = {what: (percentile(times, 50), percentile(times, 95)) for what, times in self.found.items()}
        return [
            {"what": what, "p50_ms": p50, "p95_ms": p95, "copies": p50 / one}
            for what, (p50, p95) in middles.items()
        ]


FIRST = "first token of "
RESIDENT = FIRST + "one on the device"
HOSTED = FIRST + "one in host memory"
ON_DISK = FIRST + "one on disk, registered"
REGISTERED = "registration, read and checked and loaded"
NEW = FIRST + "a new one, registration included"
READ, PLACED = "disk to host memory, by /metrics", "host memory to device, by /metrics"
COPY, PEFT, PEFT_FIRST = (
    "memory copy of its bytes",
    "PeftModel.load_adapter",
    FIRST + "one that PEFT loads, included",
)


class Asking:
    """Asks one server for first tokens; each prompt is a new one."""

    def __init__(self, http: httpx.AsyncClient, root: Path, write: Write) -> None:
        self.http, self.root, self.write, self.sent = http, root, write, 0

    async def first(self, name: str) -> float:
        """Seconds. Raises RuntimeError when there is none."""
        self.sent += 1
        sample = await ask(self.http, Job(name, prompt(WORDS, f"{name}/{self.sent}"), 1), time.perf_counter())
        if sample.error:
            raise RuntimeError(sample.error)
        return sample.first

    async def register(self, name: str, preload: bool = True) -> None:
        (
            await self.http.post("/adapters", json={"id": name, "source": name, "preload": preload})
        ).raise_for_status()

    async def drop(self, name: str) -> None:
        (await self.http.delete(f"/adapters/{name}")).raise_for_status()

    async def residency(self, name: str) -> str:
        return str((await self.http.get(f"/adapters/{name}")).raise_for_status().json()["residency"])

    async def means(self) -> dict[str, float]:
        """The service's own mean seconds of a load and of a placement."""
        families = text_string_to_metric_families((await self.http.get("/metrics")).text)
        told = {
            sample.name: sample.value for family in families for sample in family.samples if not sample.labels
        }
        names = {READ: "adapterd_adapter_load_seconds", PLACED: "adapterd_adapter_place_seconds"}
        return {
            what: told[f"{name}_sum"] / told[f"{name}_count"]
            for what, name in names.items()
            if told[f"{name}_count"]
        }


async def from_each_tier(asking: Asking, times: int, timings: Timings) -> None:
    """Three adapters more than the pool has places, so that the one that was asked longest ago is
    in host memory only.
    """
    names = [f"tier-{i}" for i in range(PLACES + 3)]
    for seed, name in enumerate(names):
        asking.write(asking.root / name, seed)
        await asking.register(name)
        await asking.first(name)
    for turn in range(times):
        name = names[turn % len(names)]
        await expect(asking, name, "host")
        timings.add(HOSTED, await asking.first(name))
        await expect(asking, name, "device")
        timings.add(RESIDENT, await asking.first(name))
    for name in names:
        await asking.drop(name)


async def expect(asking: Asking, name: str, tier: str) -> None:
    """Raises RuntimeError where it is not what is to be timed."""
    if (found := await asking.residency(name)) != tier:
        raise RuntimeError(f"{name} is on {found}, not on {tier}")


async def from_files(asking: Asking, times: int, timings: Timings) -> None:
    """Contents that the service has not seen; the files are in the system's cache, as they are
    after an upload.
    """
    for turn in range(times):
        for name, preload in ((f"disk-{turn}", False), (f"new-{turn}", True)):
            asking.write(asking.root / name, 1000 + 2 * turn + preload)
            began = time.perf_counter()
            await asking.register(name, preload)
            if preload:
                timings.add(REGISTERED, time.perf_counter() - began)
                await asking.first(name)
                timings.add(NEW, time.perf_counter() - began)
            else:
                timings.add(ON_DISK, await asking.first(name))
            await asking.drop(name)
            shutil.rmtree(asking.root / name)


async def served(server: Server, root: Path, write: Write, times: int, timings: Timings) -> None:
    async with connect(server.url) as http:
        asking = Asking(http, root, write)
        await from_each_tier(asking, times, timings)
        await from_files(asking, times, timings)
        for what, seconds in (await asking.means()).items():
            timings.add(what, seconds)


def copied(size: int, times: int, timings: Timings) -> None:
    """Between two buffers whose pages are there."""
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    for _ in range(times):
        with timings.clock(COPY):
            np.copyto(target, source)


def by_peft(base: Path, root: Path, write: Write, times: int, timings: Timings) -> None:
    """The same files on the same base in its own dtype, one after another into one model, and a
    token of each.

    With one thread: on two busy cores PEFT's two wait for each other, and a token takes twenty
    times as long.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    asked = {
        "input_ids": torch.arange(5, 5 + WORDS)[None],
        "attention_mask": torch.ones(1, WORDS, dtype=torch.long),
    }
    for seed in range(times + 1):
        folder = root / f"peft-{seed}"
        write(folder, seed)
        if not seed:
            # The first one wraps the layers, and is not timed
            model = PeftModel.from_pretrained(model, folder)
            continue
        began = time.perf_counter()
        with timings.clock(PEFT):
            model.load_adapter(folder, f"a{seed}")
        model.set_adapter(f"a{seed}")
        model.generate(**asked, max_new_tokens=1, do_sample=False)
        timings.add(PEFT_FIRST, time.perf_counter() - began)


def report(timings: Timings, facts: dict[str, object], out: Path) -> str:
    """results.json and results.md in the folder; the table is the answer, too."""
    rows = timings.rows(COPY)
    lines = ["| | median | 95 % | memory copies |", "|---|---|---|---|"]
    lines += [
        f"| {row['what']} | {row['p50_ms']:.2f} ms | {row['p95_ms']:.2f} | {row['copies']:.0f} |"
        for row in rows
    ]
    shown = "\n".join([*lines, "", *(f"- {name}: {fact}" for name, fact in facts.items())]) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    results = json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n"
    (out / "results.json").write_text(results, encoding="utf-8")
    (out / "results.md").write_text(shown, encoding="utf-8")
    return shown


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--rank", type=int, default=32, help="of the adapters, on q, k, v and o: 32 is 7.4 MB in bfloat16"
    )
    found.add_argument("--times", type=int, default=20)
    found.add_argument("--out", type=Path, default=OUT / "loading")
    return found


def main() -> None:
    from service.model.loading import resolve_folder

    asked = parser().parse_args()
    end_cleanly_when_told()
    root, timings = asked.out / "adapters", Timings()
    shutil.rmtree(root, ignore_errors=True)

    def write(folder: Path, seed: int) -> None:
        adapters.write(folder, asked.rank, seed)

    write(root / "first", 999)
    size = (root / "first" / "adapter_model.safetensors").stat().st_size
    copied(size, asked.times, timings)
    settings = {
        "base": "demo",
        "adapters_dir": str(root),
        "pool_rank": str(PLACES * asked.rank),
        "max_rank": str(asked.rank),
    }
    with started(settings, asked.out / "log") as server:
        asyncio.run(served(server, root, write, asked.times, timings))
    by_peft(resolve_folder("demo"), root, write, asked.times, timings)
    facts: dict[str, object] = {
        "adapter": f"rank {asked.rank}, {size / 1e6:.2f} MB",
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }
    print(report(timings, facts, asked.out))


if __name__ == "__main__":
    main()
