"""What the grid does not show: more adapters than fit, mixed ranks, the second turn of a chat, sampled and
streamed requests, prompts that begin alike, and processors that others have, each as a ratio within one run.

python -m deploy.bench.bars [zipf] [ranks] [turn] [kinds] [decode] [shared] [crowded] [busy] [quota]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from . import processors, request_kinds
from .adapters import make
from .bench import Load, fresh_seed, run
from .grid import OUT
from .load import Job, ask, connect, prompt
from .servers import Server, end_cleanly_when_told, models, started

CLIENTS, REPEATS, ROUNDS = 16, 3, 4
HISTORY, QUESTION = 500, 16
MIXED, FLAT = (8, 16, 32, 64), 16
ROWS = 4 * sum(MIXED)
CROWDED, TOKEN_BYTES = 8192, 23040  # KV positions; bytes of one, of the demo base in bfloat16


def settings(folder: Path, pool: int) -> dict[str, str]:
    shared = {"base": "demo", "dtype": "bfloat16", "quantization": "none", "max_rows": str(CLIENTS)}
    return shared | {"adapters_dir": str(folder), "pool_rank": str(pool), "max_rank": str(min(pool, 64))}


def few_adapters(name: str = "adapters-16-rank-16") -> Path:
    """A folder of 16 adapters of rank 16; each service has its own."""
    folder = OUT / name
    make(folder, 16)
    return folder


def compare(
    names: tuple[str, str], pools: tuple[int, int], folders: tuple[Path, Path], popularity: tuple[str, str]
) -> dict[str, float]:
    """Tokens a second of two set-ups of ours in turn, and the first's over the second's."""
    rates: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(started(settings(folder, pool), OUT / f"{name}.log", name))
            for name, folder, pool in zip(names, folders, pools, strict=True)
        ]
        for repeat in range(REPEATS):
            for server, how in zip(servers, popularity, strict=True):
                load = Load(CLIENTS, CLIENTS * ROUNDS, popularity=how)
                rates[server.name].append(run(server, models(server)[1], load, seed=repeat).tokens_per_s)
    middle = {name: statistics.median(found) for name, found in rates.items()}
    return middle | {"ratio": round(middle[names[0]] / middle[names[1]], 3)}


def zipf() -> dict[str, float]:
    """256 adapters, popularity Zipf(1.0), a pool for 16 of them, against 16 that all fit."""
    many = OUT / "adapters-256-rank-16"
    make(many, 256)
    folders = many, few_adapters()
    return compare(("256 registered", "16 resident"), (256, 256), folders, ("zipf:1.0", "round-robin"))


def ranks() -> dict[str, float]:
    """16 adapters of ranks 8 to 64 against as many of rank 16 as fill the same rows."""
    mixed, flat = OUT / "adapters-16-mixed", OUT / "adapters-rank-16"
    make(mixed, 16, MIXED)
    make(flat, ROWS // FLAT)
    return compare(("mixed ranks", "rank 16"), (ROWS, ROWS), (mixed, flat), ("round-robin", "round-robin"))


async def turns(server: Server, model: str, seed: int) -> tuple[float, float]:
    """Time to the first token, in seconds: of a prompt never seen, and of one whose first HISTORY
    tokens were.
    """
    async with connect(server.url) as client:
        history = prompt(HISTORY, f"history {seed}")
        found: list[float] = []
        for words in (prompt(HISTORY, f"cold {seed}"), history, history):
            job = Job(model, f"{words} {prompt(QUESTION, f'{seed} {len(found)}')}", 8)
            sample = await ask(client, job, time.perf_counter())
            if sample.error is not None:
                raise RuntimeError(sample.error)
            found.append(sample.first)
    return found[0], found[2]


def turn() -> dict[str, float]:
    """The second turn of a chat over a prompt of the same length that nobody has asked before."""
    with started(settings(few_adapters(), 256), OUT / "turn.log") as server:
        model = models(server)[1][0]
        asyncio.run(turns(server, model, -1))
        pairs = [asyncio.run(turns(server, model, seed)) for seed in range(9)]
    cold, warm = (1000 * statistics.median(one) for one in zip(*pairs, strict=True))
    return {"cold_ms": round(cold, 1), "second_turn_ms": round(warm, 1), "ratio": round(warm / cold, 3)}


def time_kinds(words: int, tokens: int) -> dict[str, float]:
    """Greedy requests' time over that of other kinds, on the base."""
    with started(settings(few_adapters(), 256), OUT / "kinds.log") as server:
        return asyncio.run(request_kinds.compare_kinds(server, words, tokens, REPEATS))


def kinds() -> dict[str, float]:
    """With prompts of 64 tokens that nobody has asked before."""
    return time_kinds(64, 64)


def decode() -> dict[str, float]:
    """In decode alone: prompts of four tokens."""
    return time_kinds(4, 128)


def shared() -> dict[str, float]:
    """A start of 1,000 tokens under one adapter, 16 at once; eight answers to a prompt of as many."""
    with started(settings(few_adapters(), 256), OUT / "shared.log") as server:
        model = models(server)[1][0]
        found: dict[str, float] = {}
        for count in (1, CLIENTS):
            found |= asyncio.run(request_kinds.share_start(server, model, count, 1000, 16))
        return found | asyncio.run(request_kinds.count_answers(server, model, 1000, 8))


def crowded() -> dict[str, float]:
    """64 requests of 100 to 1,500 tokens, and one of 8,000 beside 15 of 100, in the KV memory of 8,192
    tokens, and in plenty: how many answers are the same.
    """
    few = settings(few_adapters(), 256) | {"kv_mb": str(-(-CROWDED * TOKEN_BYTES // 10**6))}
    with started(few, OUT / "few.log") as server:
        narrow = _answer_crowd(server)
        preemptions = request_kinds.read_counters(server)["preemptions_total"]
    with started(settings(few_adapters(), 256), OUT / "wide.log") as server:
        wide = _answer_crowd(server)
    equal = sum(a == b for a, b in zip(narrow, wide, strict=True))
    return {"answers": len(wide), "equal": equal, "preemptions": preemptions}


def _answer_crowd(server: Server) -> list[str]:
    """What the base says to all of `crowded`."""
    base = models(server)[0]
    prompts = [(7900, "long"), *((100, f"{i}") for i in range(15))]
    bodies = [request_kinds.make_body(request_kinds.GREEDY, base, prompt(*each), 32) for each in prompts]
    crowd = request_kinds.make_crowd(base, 64)
    return [text for each in (crowd, bodies) for text in asyncio.run(request_kinds.answer_all(server, each))]


def busy() -> dict[str, float]:
    """One stream while another process has one of the processors, over the same in quiet: by the kernels,
    and by torch in float32.
    """
    found = {}
    for name, dtype in (("kernels", "bfloat16"), ("torch", "float32")):
        with started(settings(few_adapters(), 256) | {"dtype": dtype}, OUT / "busy.log") as server:
            quiet, taken = [], []
            for _ in range(REPEATS):
                quiet.append(_base_rate(server, 1))
                with processors.busy_neighbour():
                    taken.append(_base_rate(server, 1))
        found[f"{name}_quiet"], found[f"{name}_busy"] = map(statistics.median, (quiet, taken))
        found[f"{name}_ratio"] = round(found[f"{name}_busy"] / found[f"{name}_quiet"], 3)
    return found


def quota() -> dict[str, float]:
    """A server that a control group gives one processor's time, over one that is pinned to one: one stream,
    and sixteen.
    """
    with ExitStack() as stack:
        group = stack.enter_context(processors.quota_group())
        with processors.starting_in(group):
            limited = stack.enter_context(started(settings(few_adapters(), 256), OUT / "quota.log"))
        with processors.starting_pinned():
            pinned = stack.enter_context(started(settings(few_adapters("pinned"), 256), OUT / "pinned.log"))
        found = {}
        for clients in (1, CLIENTS):
            pairs = [(_base_rate(limited, clients), _base_rate(pinned, clients)) for _ in range(REPEATS)]
            quota_rate, pin_rate = map(statistics.median, zip(*pairs, strict=True))
            found |= {f"quota_{clients}": quota_rate, f"pinned_{clients}": pin_rate}
            found[f"ratio_{clients}"] = round(quota_rate / pin_rate, 3)
        return found


def _base_rate(server: Server, clients: int) -> float:
    """Tokens a second on the base, of prompts that no run has seen."""
    load = Load(clients, clients * ROUNDS)
    return run(server, [models(server)[0]], load, seed=fresh_seed()).tokens_per_s


BARS = {
    "zipf": zipf,
    "ranks": ranks,
    "turn": turn,
    "kinds": kinds,
    "decode": decode,
    "shared": shared,
    "crowded": crowded,
    "busy": busy,
    "quota": quota,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bars", nargs="*", help=f"of {', '.join(BARS)}; all, where none is named")
    asked = parser.parse_args().bars or list(BARS)
    if unknown := set(asked) - set(BARS):
        parser.error(f"no such bar: {', '.join(unknown)}")
    end_cleanly_when_told()
    for name in asked:
        print(json.dumps({name: BARS[name]()}), flush=True)


if __name__ == "__main__":
    main()
