"""How long /health takes while the service does the hardest things it does: says so for each phase. Starts its own server on the demo base.

python -m deploy.bench.health [--clients 16] [--seconds 20] [--rank 1024]
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from . import adapters
from .load import ask, connect, jobs
from .report import percentile
from .servers import Server, end_cleanly_when_told, models, started

EVERY_S = 0.02
LIMIT_MS = 200.0


@dataclass
class Poll:
    """Asks in a thread of its own, so that the load's client cannot delay it. `times` are in milliseconds."""

    url: str
    times: list[float] = field(default_factory=list)
    wrong: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=30, trust_env=False) as http:
            while not self.over.wait(EVERY_S):
                began = time.perf_counter()
                self.wrong += http.get("/health").status_code != 200
                self.times.append((time.perf_counter() - began) * 1000)

    def told(self, phase: str) -> str:
        p50, p99 = (percentile(self.times, share) for share in (50, 99))
        verdict = "" if p99 < LIMIT_MS and not self.wrong else f"  over {LIMIT_MS:.0f} ms or not 200"
        return f"| {phase} | {len(self.times)} | {p50:.1f} | {p99:.1f} | {max(self.times):.1f} | {self.wrong} |{verdict}"


@asynccontextmanager
async def polled(server: Server, phase: str) -> AsyncIterator[None]:
    poll = Poll(server.url)
    thread = threading.Thread(target=poll.run)
    thread.start()
    try:
        yield
    finally:
        poll.over.set()
        await asyncio.to_thread(thread.join)
    print(poll.told(phase), flush=True)


async def generate(http: httpx.AsyncClient, names: list[str], clients: int, seconds: float) -> None:
    """Streams, `clients` at once, until the time is over."""
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while time.perf_counter() < end:
            for job in jobs([names[number % len(names)]], "uniform", 1, words=64, tokens=64, seed=number):
                await ask(http, job, time.perf_counter())

    await asyncio.gather(*(one(number) for number in range(clients)))


async def reload(http: httpx.AsyncClient, seconds: float) -> None:
    """Registers the large one, which reads, checks, loads and places it, and deletes it, again and again."""
    end, loads = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        (await http.post("/adapters", json={"id": "large-again", "source": "large", "pinned": True})).raise_for_status()
        (await http.delete("/adapters/large-again")).raise_for_status()
        loads += 1
    print(f"  {loads} loads", flush=True)


async def measure(server: Server, clients: int, seconds: float) -> None:
    base, _ = models(server)
    async with connect(server.url) as http:
        (await http.delete("/adapters/large")).raise_for_status()
        names = [base, *(f"rank16-{i:03}" for i in range(clients))]
        await generate(http, names, clients, 5)
        print("| phase | polls | p50 ms | p99 ms | max ms | not 200 |\n|---|---|---|---|---|---|")
        async with polled(server, "idle"):
            await asyncio.sleep(seconds / 4)
        async with polled(server, f"{clients} streams"):
            await generate(http, names, clients, seconds)
        async with polled(server, "a large adapter loads"):
            await reload(http, seconds)
        async with polled(server, f"{clients} streams, and a large adapter loads"):
            await asyncio.gather(generate(http, names, clients, seconds), reload(http, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rank", type=int, default=1024, help="of the large adapter")
    asked = parser.parse_args()
    end_cleanly_when_told()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        adapters.make(root, asked.clients)
        adapters.write(root / "large", asked.rank, seed=1)
        size = (root / "large" / "adapter_model.safetensors").stat().st_size
        print(f"the large adapter: rank {asked.rank}, {size / 1e6:.0f} MB")
        pool = {"pool_rank": str(2 * asked.rank), "max_rank": str(asked.rank)}
        with started({"base": "demo", "adapters_dir": str(root), **pool}, Path(folder) / "log") as server:
            asyncio.run(measure(server, asked.clients, asked.seconds))


if __name__ == "__main__":
    main()
