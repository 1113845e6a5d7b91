"""Run as a program:

`serve` with nothing behind its door, for tests of the process itself. `/dribble` ends, `/flood`
does not.

`--hasty` waits less than a second, `--poor` has few files; with `--held` a source answers in a
million seconds.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from service import app as root
from service.__main__ import main
from service.api import wire
from service.threads import DOWNLOAD
from tests.api.served_app import NoTokenizers
from tests.doubles.engine import FakeEngine
from tests.doubles.registry import FakeRegistry


async def dribble() -> AsyncIterator[str]:
    for number in range(20):
        yield f"{number}\n"
        await asyncio.sleep(0.05)


async def flood() -> AsyncIterator[str]:
    while True:
        yield "x" * 100_000
        await asyncio.sleep(0)


async def stuck(grace_s: float) -> None:
    await asyncio.Event().wait()


def make(*given: Any, **named: Any) -> FastAPI:
    engine = FakeEngine()
    if "--stuck" in sys.argv:
        vars(engine)["stop_worker"] = stuck
    if "--held" in sys.argv:
        DOWNLOAD.submit(time.sleep, 1e6)
    if "--broken" in sys.argv:
        engine.base, engine.reason = None, "the folder holds\nno config.json"
    app: FastAPI = root_create(
        *given, client=engine, registry=FakeRegistry(), text=lambda folder: NoTokenizers(), **named
    )
    for path, made in (("/dribble", dribble), ("/flood", flood)):
        app.get(path)(answer(made))
    return app


def answer(made: Any) -> Any:
    async def stream() -> StreamingResponse:
        return StreamingResponse(made(), media_type="text/plain")

    return stream


if "--hasty" in sys.argv:
    wire.PATIENCE_S, wire.PIECE_BYTES = 0.8, 4
if "--poor" in sys.argv:
    resource.setrlimit(resource.RLIMIT_NOFILE, (320, 320))
root_create: Any = root.create_app
root.create_app = make

if __name__ == "__main__":
    sys.exit(
        main(
            [
                word
                for word in sys.argv[1:]
                if word not in ("--broken", "--held", "--hasty", "--poor", "--stuck")
            ]
        )
    )
