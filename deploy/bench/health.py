"""How long /health, /metrics and a summary take while the service does the hardest things it does:
says so for each phase.

Starts its own server on the demo base, and a hub of its own whose weights come late.

python -m deploy.bench.health [--clients 16] [--seconds 20] [--rank 1024] [--late 10]
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import httpx

from . import adapters
from .load import Shape, ask, connect, jobs, prompt
from .report import percentile
from .servers import Server, end_cleanly_when_told, models, started
from .slow_hub import OWNER, slow_hub

PATHS = ("/health", "/metrics", "/adapters/rank16-000/summary")
SLOW = 8  # adapters that come from the slow hub at once
TOPS = 20  # runner-ups
EVERY_S = 0.02
LIMIT_MS = 200.0


class Poll:
    """Asks for one path in a process of its own, so that the load's client cannot delay it."""

    def __init__(self, url: str, path: str) -> None:
        self.path = path
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=ask_repeatedly, args=(url, path, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def started(self) -> None:
        """Returns once it asks."""
        self._pipe.recv()

    def stop(self, phase: str) -> str:
        """Its row of the table."""
        self._pipe.send(None)
        times, wrong = self._pipe.recv()
        self._process.join()
        p50, p99 = (percentile(times, share) for share in (50, 99))
        verdict = "" if p99 < LIMIT_MS and not wrong else f"  over {LIMIT_MS:.0f} ms or not 200"
        row = (phase, self.path, len(times), *(f"{ms:.1f}" for ms in (p50, p99, max(times))), wrong)
        return f"| {' | '.join(map(str, row))} |{verdict}"


def ask_repeatedly(url: str, path: str, pipe: Connection) -> None:
    """Says when it begins, and when it is told to stop how long each answer took in milliseconds
    and how many were not 200.
    """
    times: list[float] = []
    wrong = 0
    with httpx.Client(base_url=url, timeout=30, trust_env=False) as http:
        pipe.send(None)
        while not times or not pipe.poll(EVERY_S):
            began = time.perf_counter()
            wrong += http.get(path).status_code != 200
            times.append((time.perf_counter() - began) * 1000)
    pipe.send((times, wrong))


@asynccontextmanager
async def polled(server: Server, phase: str) -> AsyncIterator[None]:
    polls = [Poll(server.url, path) for path in PATHS]
    for poll in polls:
        await asyncio.to_thread(poll.started)
    yield
    for poll in polls:
        print(await asyncio.to_thread(poll.stop, phase), flush=True)


async def generate(http: httpx.AsyncClient, names: list[str], clients: int, seconds: float) -> None:
    """Streams, `clients` at once, until the time is over."""
    end = time.perf_counter() + seconds

    async def one(number: int) -> None:
        while time.perf_counter() < end:
            for job in jobs([names[number % len(names)]], "uniform", 1, Shape(), seed=number):
                await ask(http, job, time.perf_counter())

    await asyncio.gather(*(one(number) for number in range(clients)))


async def reload(http: httpx.AsyncClient, seconds: float) -> None:
    """Registers the large one, which reads, checks, loads and places it, and deletes it, again and
    again.
    """
    end, loads = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        (
            await http.post("/adapters", json={"id": "large-again", "source": "large", "pinned": True})
        ).raise_for_status()
        (await http.delete("/adapters/large-again")).raise_for_status()
        loads += 1
    print(f"  {loads} loads", flush=True)


async def chat(http: httpx.AsyncClient, names: list[str], clients: int, over: asyncio.Event) -> None:
    """Streams of chats with runner-ups, `clients` at once, until it is over."""

    async def one(number: int) -> None:
        messages = [{"role": "user", "content": prompt(64, f"chat/{number}")}]
        body = {
            "model": names[number % len(names)],
            "messages": messages,
            "max_tokens": 64,
            "stream": True,
            "logprobs": True,
        }
        while not over.is_set():
            async with http.stream(
                "POST", "/v1/chat/completions", json={**body, "ignore_eos": True, "top_logprobs": TOPS}
            ) as answer:
                answer.raise_for_status()
                async for _ in answer.aiter_bytes():
                    pass

    await asyncio.gather(*(one(number) for number in range(clients)))


async def register_slow(http: httpx.AsyncClient, over: asyncio.Event) -> None:
    """Registers all of the slow hub's at once, and says when the last one is there."""
    began = time.perf_counter()

    async def one(number: int) -> None:
        (
            await http.post("/adapters", json={"id": f"slow-{number}", "source": f"hub:{OWNER}/{number}"})
        ).raise_for_status()

    try:
        await asyncio.gather(*(one(number) for number in range(SLOW)))
    finally:
        over.set()
    print(f"  {SLOW} adapters of the slow hub after {time.perf_counter() - began:.1f} s", flush=True)


async def answer_many(http: httpx.AsyncClient, model: str) -> None:
    """One request for as many answers as may be, with runner-ups beside each token."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt(16, "many")}],
        "max_tokens": 64,
        "ignore_eos": True,
    }
    many = body | {"n": 128, "temperature": 1, "logprobs": True, "top_logprobs": TOPS}
    answer = (await http.post("/v1/chat/completions", json=many)).raise_for_status()
    print(f"  {len(answer.content) / 1e6:.0f} MB", flush=True)


async def measure(server: Server, clients: int, seconds: float) -> None:
    base, _ = models(server)
    async with connect(server.url) as http:
        (await http.delete("/adapters/large")).raise_for_status()
        names = [base, *(f"rank16-{i:03}" for i in range(clients))]
        await generate(http, names, clients, 5)
        print("| phase | path | polls | p50 ms | p99 ms | max ms | not 200 |\n|---|---|---|---|---|---|---|")
        async with polled(server, "idle"):
            await asyncio.sleep(seconds / 4)
        async with polled(server, f"{clients} streams"):
            await generate(http, names, clients, seconds)
        async with polled(server, "a large adapter loads"):
            await reload(http, seconds)
        async with polled(server, f"{clients} streams, and a large adapter loads"):
            await asyncio.gather(generate(http, names, clients, seconds), reload(http, seconds))
        async with polled(
            server, f"{clients} streams with {TOPS} runner-ups, and {SLOW} adapters come from a slow source"
        ):
            over = asyncio.Event()
            await asyncio.gather(chat(http, names, clients, over), register_slow(http, over))
        async with polled(server, f"128 answers with {TOPS} runner-ups"):
            await answer_many(http, base)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rank", type=int, default=1024, help="of the large adapter")
    parser.add_argument(
        "--late", type=float, default=10, help="seconds after which the slow hub's weights come"
    )
    asked = parser.parse_args()
    end_cleanly_when_told()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        adapters.make(root, asked.clients)
        adapters.write(root / "large", asked.rank, seed=1)
        size = (root / "large" / "adapter_model.safetensors").stat().st_size
        print(f"the large adapter: rank {asked.rank}, {size / 1e6:.0f} MB")
        for number in range(SLOW):
            adapters.write(Path(folder) / "hub" / str(number), 16, seed=100 + number)
        pool = {"pool_rank": str(2 * asked.rank), "max_rank": str(asked.rank)}
        settings = {"base": "demo", "adapters_dir": str(root), "hub": f"{OWNER}/*", **pool}
        with (
            slow_hub(Path(folder) / "hub", asked.late, Path(folder) / "cache") as hub,
            started(settings, Path(folder) / "log", environment=hub) as server,
        ):
            asyncio.run(measure(server, asked.clients, asked.seconds))


if __name__ == "__main__":
    main()
