"""A program: a registry that shares a directory, and stands still amid a registration, in its turn.

`python -m tests.catalog.registering_service BASE FOLDER ID SOURCE`; it says `writing` once it stands.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

from service.catalog.state_file import StateFile

from .conftest import RegistryFixture


def stand_still(*given: Any) -> None:
    print("writing", flush=True)
    time.sleep(1000)


async def register(base: Path, folder: Path, id: str, source: str) -> None:
    async with RegistryFixture(folder, base).opened(shared="on") as registry:
        setattr(StateFile, "write_file", stand_still)  # noqa: B010 - it is no such method
        await registry.register_adapter(id, source)


if __name__ == "__main__":
    asyncio.run(register(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]))
