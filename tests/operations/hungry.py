"""Run as a program in a memory group: a client whose worker takes memory until the system ends it.

`loading`: while it loads; prints the reason for which no worker comes. `reading`: while it reads an adapter;
prints the load's code and words, and the state of the next worker.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable

from service.core.adapter import Adapter
from service.core.base_info import BaseInfo
from service.errors import NotReady
from service.settings import Settings
from service.worker.client import WorkerClient
from tests.fakes import FakeRunner, adapter, card

PIECE = 8 << 20
SETTINGS = Settings(max_rows=2, max_context=64, pool_rank=16, max_rank=16)


class HungryRunner(FakeRunner):
    def load_adapter(self, adapter: Adapter) -> int:
        take_memory()
        raise AssertionError("nobody ended it")


def take_memory() -> None:
    taken = []
    while True:
        taken.append(b"\1" * PIECE)


def build_loading(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    take_memory()
    raise AssertionError("nobody ended it")


def build_reading(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    return HungryRunner(2, 64, 16), card(settings)


async def main(what: str) -> None:
    client = WorkerClient(SETTINGS, f"tests.operations.hungry:build_{what}")
    await client.start_worker()
    try:
        await client.wait_ready()
        one = adapter("a", size=1000)
        client.add_adapter(one)
        load = await client.wait_until_loaded(one.digest)
        await client.wait_ready()
        print(load.code, load.error, client.state, sep="\n")
    except NotReady as error:
        print(error.message)
    finally:
        await client.stop_worker(0)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
