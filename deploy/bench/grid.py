"""The grid behind `make bench`: clients by mixes of adapters, our server and any peers in turn,
each cell the median of its runs.

    python -m deploy.bench.grid [--adapters 16] [--clients 1,8,16] [--peer
    vllm=http://127.0.0.1:8011@PID]

Everything is measured in one run, and servers alternate within a repeat, so that what slows the
machine slows them all.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from .adapters import make
from .bench import Load, add_shape, fresh_seed, run, shape_of
from .load import Shape
from .report import BASE, Cell, Summary, median, write
from .servers import ROOT, Server, end_cleanly_when_told, memory_mb, models, started

OUT = ROOT / "build" / "bench"
OURS = "adapterd"


def mixes(server: Server, clients: int) -> dict[str, list[str]]:
    """The models of each mix; a single client has no use for different adapters."""
    base, adapters = models(server)
    found = {BASE: [base], "one adapter": adapters[:1], "all different": adapters[:clients]}
    return {mix: names for mix, names in found.items() if names and (mix != "all different" or clients > 1)}


def measure(servers: list[Server], counts: list[int], repeats: int, rounds: int, shape: Shape) -> list[Cell]:
    """Every cell of the grid; `rounds` are requests a client makes in one run. Prompts are new in each
    run, and the same for each server.
    """
    runs: dict[tuple[str, str, int], list[Summary]] = {}
    for repeat in range(repeats):
        for clients in counts:
            for mix in mixes(servers[0], clients):
                seed = fresh_seed()
                for server in servers:
                    names = mixes(server, clients).get(mix)
                    if names is None:  # a peer without LoRA
                        continue
                    summary = run(server, names, Load(clients, clients * rounds, shape=shape), seed=seed)
                    runs.setdefault((server.name, mix, clients), []).append(summary)
                    print(
                        f"{repeat + 1}/{repeats} {server.name}, {clients} × {mix}: "
                        f"{summary.tokens_per_s} tokens/s",
                        flush=True,
                    )
    return [Cell(server, mix, clients, median(found)) for (server, mix, clients), found in runs.items()]


@contextmanager
def ours(asked: argparse.Namespace) -> Iterator[Server]:
    """Our server on the demo base in bfloat16, with as many random adapters as asked for and a pool
    that holds them all.
    """
    ranks = [int(rank) for rank in asked.ranks.split(",")]
    folder = asked.out / f"adapters-{asked.adapters}-rank-{asked.ranks.replace(',', '-')}"
    make(folder, asked.adapters, ranks)
    held = sum(ranks[i % len(ranks)] for i in range(asked.adapters))
    settings = {
        "base": "demo",
        "dtype": "bfloat16",
        "quantization": "none",
        "adapters_dir": str(folder),
        "pool_rank": str(asked.pool or held),
    }
    settings["max_rank"] = str(max(ranks))
    settings["max_rows"] = str(max(asked.clients))
    with started(settings, asked.out / "adapterd.log", OURS) as server:
        yield server


def processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def facts(servers: list[Server], asked: argparse.Namespace) -> dict[str, object]:
    return {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "load": f"{shape_of(asked)}, {asked.rounds} requests a client, median of {asked.repeats}",
        "adapters": f"{asked.adapters} of rank {asked.ranks}",
    } | {
        f"memory of {server.name} (PSS, MB)": round(memory_mb(server.pid)) for server in servers if server.pid
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--adapters", type=int, default=16)
    found.add_argument("--ranks", default="16", help="comma-separated, taken in turn")
    found.add_argument("--pool", type=int, help="rank rows; else all adapters fit")
    found.add_argument(
        "--clients", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 16]
    )
    found.add_argument("--repeats", type=int, default=3)
    found.add_argument("--rounds", type=int, default=4, help="requests a client makes in one run")
    add_shape(found)
    found.add_argument(
        "--peer",
        type=Server.parse,
        action="append",
        default=[],
        help="NAME=URL[@PID] of a running server, repeatable",
    )
    found.add_argument("--out", type=Path, default=OUT)
    return found


def main() -> None:
    asked = parser().parse_args()
    end_cleanly_when_told()
    with ours(asked) as server:
        servers = [server, *asked.peer]
        cells = measure(servers, asked.clients, asked.repeats, asked.rounds, shape_of(asked))
        print(write(asked.out, cells, facts(servers, asked), OURS))


if __name__ == "__main__":
    main()
