"""Puts one server under one load and says what it took: the load generator by itself, for any
OpenAI-compatible URL.

python -m deploy.bench.bench ours=http://127.0.0.1:8080 --clients 16 --requests 64 python -m
deploy.bench.bench ours=http://127.0.0.1:8080 --rate 5 --requests 300 --popularity zipf:1.0
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass, field, replace

from .load import Lengths, Shape, closed, connect, jobs, opened
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
    shape: Shape = field(default_factory=Shape)


async def _run(server: Server, names: list[str], load: Load, seed: int, key: str | None) -> Summary:
    work = jobs(names, load.popularity, load.requests, load.shape, seed)
    # As many as will run at once, so that every size of batch has been seen; and other prompts than
    # those that count.
    many = max(load.clients, min(len(names), 2 * load.clients))
    warm = jobs(names, "round-robin", many, replace(load.shape, tokens=WARM_TOKENS), -seed - 1)
    async with connect(server.url, key) as client:
        await closed(client, warm, load.clients)
        start = time.perf_counter()
        samples = await (
            closed(client, work, load.clients) if load.rate is None else opened(client, work, load.rate, seed)
        )
        return summarize(samples, time.perf_counter() - start)


def fresh_seed() -> int:
    """A seed whose prompts no server has seen: of one that it has, its prefix cache is measured."""
    return random.SystemRandom().getrandbits(48)


def run(server: Server, names: list[str], load: Load, *, seed: int = 0, key: str | None = None) -> Summary:
    """Warms the server up, then measures."""
    return asyncio.run(_run(server, names, load, seed, key))


def add_shape(parser: argparse.ArgumentParser) -> None:
    """The options that `shape_of` reads."""
    parser.add_argument(
        "--words", type=Lengths.parse, default="64", help="of a prompt: N, or LEAST-MOST by Zipf"
    )
    parser.add_argument("--shared", type=int, default=0, help="words that all prompts begin with, and more")
    parser.add_argument("--tokens", type=int, default=64, help="generated for every request")
    parser.add_argument("--sampled", action="store_true", help="temperature 0.8 and top_p 0.9, else greedy")


def shape_of(asked: argparse.Namespace) -> Shape:
    return Shape(asked.words, asked.tokens, asked.shared, asked.sampled)


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
    add_shape(found)
    found.add_argument("--seed", type=int, help="of prompts and order; else prompts that no run has seen")
    found.add_argument("--key", help="the API key")
    return found


def main() -> None:
    asked = parser().parse_args()
    base, adapters = models(asked.server, asked.key)
    names = asked.models.split(",") if asked.models else adapters or [base]
    load = Load(asked.clients, asked.requests, asked.rate, asked.popularity, shape_of(asked))
    seed = fresh_seed() if asked.seed is None else asked.seed
    summary = run(asked.server, names, load, seed=seed, key=asked.key)
    weight = {"memory_mb": round(memory_mb(asked.server.pid), 1)} if asked.server.pid else {}
    print(json.dumps(asdict(load) | {"seed": seed} | asdict(summary) | weight, indent=1))


if __name__ == "__main__":
    main()
