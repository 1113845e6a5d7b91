"""Puts one server under one load and says what it took: the load generator by itself, for any
OpenAI-compatible URL.

python -m deploy.bench.bench ours=http://127.0.0.1:8080 --clients 16 --requests 64 python -m
deploy.bench.bench ours=http://127.0.0.1:8080 --rate 5 --requests 300 --popularity zipf:1.0
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from dataclasses import asdict, dataclass

from .load import closed, connect, jobs, opened
from .report import Summary, summarize
from .servers import Server, memory_mb, models

WARM_TOKENS = 8


@dataclass(frozen=True)
class Load:
    """How a server is asked:

    `clients` in a closed loop, or, where `rate` is given, that many arrivals a second.
    """

    clients: int
    requests: int
    rate: float | None = None
    popularity: str = "round-robin"
    words: int = 64
    tokens: int = 64


async def _run(server: Server, names: list[str], load: Load, seed: int, key: str | None) -> Summary:
    work = jobs(names, load.popularity, load.requests, words=load.words, tokens=load.tokens, seed=seed)
    # As many as will run at once, so that every size of batch has been seen; and other prompts than
    # those that count.
    warm = jobs(
        names,
        "round-robin",
        max(load.clients, min(len(names), 2 * load.clients)),
        words=load.words,
        tokens=WARM_TOKENS,
        seed=-seed - 1,
    )
    async with connect(server.url, key) as client:
        await closed(client, warm, load.clients)
        start = time.perf_counter()
        samples = await (
            closed(client, work, load.clients) if load.rate is None else opened(client, work, load.rate, seed)
        )
        return summarize(samples, time.perf_counter() - start)


def run(server: Server, names: list[str], load: Load, *, seed: int = 0, key: str | None = None) -> Summary:
    """Warms the server up, then measures."""
    return asyncio.run(_run(server, names, load, seed, key))


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "server", type=Server.parse, help="NAME=URL, or NAME=URL@PID to weigh its processes too"
    )
    found.add_argument("--models", help="comma-separated; else every adapter that it lists, or its base")
    found.add_argument("--clients", type=int, default=8, help="closed loop: how many at once")
    found.add_argument("--rate", type=float, help="open loop: arrivals a second, Poisson")
    found.add_argument("--requests", type=int, default=32)
    found.add_argument("--popularity", default="round-robin", help="round-robin, uniform or zipf:S")
    found.add_argument("--words", type=int, default=64, help="a prompt's length")
    found.add_argument("--tokens", type=int, default=64, help="generated for every request")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--key", help="the API key")
    return found


def main() -> None:
    asked = parser().parse_args()
    base, adapters = models(asked.server, asked.key)
    names = asked.models.split(",") if asked.models else adapters or [base]
    load = Load(asked.clients, asked.requests, asked.rate, asked.popularity, asked.words, asked.tokens)
    summary = run(asked.server, names, load, seed=asked.seed, key=asked.key)
    weight = {"memory_mb": round(memory_mb(asked.server.pid), 1)} if asked.server.pid else {}
    print(json.dumps(asdict(load) | asdict(summary) | weight, indent=1))


if __name__ == "__main__":
    main()
