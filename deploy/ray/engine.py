"""An engine: the whole service behind one worker, in a Serve replica.

Requests come as calls, answers go as ASGI messages.

The registry in it owns residency; Serve is only told which adapters were asked for here, so that
their next requests come here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from starlette.types import Message

from service.api.services import Services
from service.app import create_app
from service.catalog.registry import Registry
from service.catalog.turns import FileVersion, read_version
from service.errors import AdapterdError
from service.settings import Settings
from service.telemetry import logs, metrics
from service.threads import DISK, run_in
from service.worker.client import WorkerClient

from .call import Call

TYPICAL_RANK = 16


class Engine:
    """Serve sends nothing to a replica before its `reconfigure` has ended."""

    async def reconfigure(self, told: dict[str, Any]) -> None:
        """Opens the service with these settings; Serve calls it once, before anything else.

        Raises RuntimeError where that cannot be.
        """
        settings = Settings.model_validate(told | {"shared": "on"})  # beside other engines
        logs.set_up_logging(settings.log_format, settings.log_level)
        client = WorkerClient(settings)
        self.registry = Registry(settings, client)
        self.state = settings.state
        client.watch_loads(self.registry.note_load)
        self.app = create_app(settings, client, self.registry)
        self.rooms: Services = self.app.state.services
        self.rooms.usage.keep_in(settings.state)
        most = max(1, settings.pool_rank // TYPICAL_RANK)
        self.place = serve.multiplexed(max_num_models_per_replica=most)(_itself)
        await run_in(DISK, self.registry.claim_state)
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()
        await self._opened()

    async def _opened(self) -> None:
        while not self.rooms.opened:
            if self.rooms.failure:
                raise RuntimeError(self.rooms.failure)
            await asyncio.sleep(0.1)

    # ---- what Serve and the ingress ask

    def check_health(self) -> None:
        """Raises where only a new process would help; a worker that died comes back by itself."""
        if self.rooms.state == "failed":
            raise RuntimeError(self.rooms.reason)

    async def exchange(self, call: Call) -> AsyncIterator[Message | None]:
        """The answer's messages; before them None, once a change is remembered that the others
        should follow.
        """
        if call.adapter and self._has(call.adapter):
            await self.place(call.adapter)
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        gone = asyncio.Event()
        before = await self._version() if call.changes else None
        running = asyncio.create_task(self._run(call, gone, messages))
        remembering = asyncio.create_task(self._remembered(before, messages)) if before else None
        try:
            async for message in _drained(messages):
                yield message
        finally:
            gone.set()
            if remembering is not None:
                remembering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    async def follow(self) -> None:
        """Takes over what another engine has changed."""
        await self.registry.follow_state_file()

    async def exposition(self) -> tuple[str, str]:
        """This replica's name and its metrics."""
        text, _ = metrics.render_metrics("text/plain")
        return serve.get_replica_context().replica_id.unique_id, text.decode()

    async def __del__(self) -> None:
        """Serve calls it when the replica is to end, after the requests in it have."""
        self.rooms.draining = True
        await self._life.__aexit__(None, None, None)

    # ---- inside

    def _has(self, id: str) -> bool:
        """Only what is registered may push another one out of what Serve believes to be here."""
        try:
            self.registry.card_of(id)
        except AdapterdError:
            return False
        return True

    async def _run(self, call: Call, gone: asyncio.Event, messages: asyncio.Queue[Message | None]) -> None:
        asked = iter([{"type": "http.request", "body": call.body, "more_body": False}])

        async def receive() -> Message:
            if (message := next(asked, None)) is not None:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        try:
            await self.app({**call.scope, "state": {}}, receive, messages.put)
        finally:
            messages.put_nowait({"type": END})

    async def _version(self) -> FileVersion:
        return await run_in(DISK, read_version, self.state)

    async def _remembered(self, before: FileVersion, messages: asyncio.Queue[Message | None]) -> None:
        while await self._version() == before:  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.02)
        messages.put_nowait(None)


END = "end"


async def _itself(id: str) -> str:
    return id


async def _drained(messages: asyncio.Queue[Any]) -> AsyncIterator[Message | None]:
    while (message := await messages.get()) is None or message["type"] != END:
        yield message
