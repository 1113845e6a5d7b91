"""How long a new version of an adapter takes from the start of its upload to its first token, alone and
beside requests for the base and for other adapters.

    python -m deploy.bench.replacing [--versions 30] [--rank 16] [--clients 0,15]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from .adapters import make, write
from .bars import settings
from .grid import OUT
from .load import Job, Shape, ask, closed, connect, jobs, prompt
from .servers import Server, end_cleanly_when_told, models, started

ADAPTER = "trained"
FILES = ("adapter_config.json", "adapter_model.safetensors")
WORDS = 16  # of a prompt


async def replace_once(client: httpx.AsyncClient, folder: Path, seed: int) -> tuple[float, float]:
    """Uploads a version and asks for its first tokens: the seconds until the upload was answered, and
    until the first token. Raises RuntimeError where that fails.
    """
    files = {name: (folder / name).read_bytes() for name in FILES}
    began = time.perf_counter()
    answer = await client.put(f"/adapters/{ADAPTER}/upload", files=files)
    uploaded = time.perf_counter() - began
    digest = answer.raise_for_status().json()["digest"]
    sample = await ask(client, Job(f"{ADAPTER}@{digest}", prompt(WORDS, f"version {seed}"), 2), began)
    if sample.error is not None:
        raise RuntimeError(sample.error)
    return uploaded, sample.first


async def replace_beside(server: Server, folders: list[Path], clients: int) -> dict[str, float]:
    """Milliseconds, over all versions but the first, while `clients` ask for the base and other adapters."""
    base, adapters = models(server)
    async with connect(server.url) as client:
        others = jobs([base, *adapters], "uniform", 100 * len(folders), Shape(), seed=clients)
        load = asyncio.create_task(closed(client, others, clients))
        await asyncio.sleep(2)
        found = [await replace_once(client, folder, seed) for seed, folder in enumerate(folders)]
        load.cancel()
    uploads, firsts = (
        sorted(1000 * seconds for seconds in column) for column in zip(*found[1:], strict=True)
    )
    told = {
        "upload": statistics.median(uploads),
        "first token": statistics.median(firsts),
        "worst": firsts[-1],
    }
    return {name: round(value, 1) for name, value in told.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", type=int, default=30)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--clients", default="0,15", help="comma-separated: how many others ask meanwhile")
    asked = parser.parse_args()
    end_cleanly_when_told()
    shared = OUT / "adapters-16-rank-16"
    make(shared, 16)
    with (
        TemporaryDirectory() as made,
        started(settings(shared, 512), OUT / "replacing.log") as server,
    ):
        for clients in map(int, asked.clients.split(",")):
            folders = [Path(made) / f"{clients}-{i}" for i in range(asked.versions)]
            for seed, folder in enumerate(folders):
                write(folder, asked.rank, seed=1000 * (clients + 1) + seed)
            found = asyncio.run(replace_beside(server, folders, clients))
            print(json.dumps({f"beside {clients}": found}), flush=True)
        httpx.delete(f"{server.url}/adapters/{ADAPTER}?purge=true", timeout=60, trust_env=False)


if __name__ == "__main__":
    main()
