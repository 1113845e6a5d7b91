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
from service.errors import AdapterdError
from service.settings import Settings
from service.telemetry import logs, metrics
from service.threads import DISK, run_in
from service.worker.client import WorkerClient

from .call import Call
from .turns import changing, version

LOOK_S = 1.0  # how often it looks whether others have changed what is registered
TYPICAL_RANK = 16


class Shared(Registry):
    """A registry whose directory others change, too; the ingress sees to it that changes are made
    in turn (see turns.py).
    """

    def __init__(self, settings: Settings, device: WorkerClient) -> None:
        super().__init__(settings, device)
        self._root = settings.state
        self._seen = (0, 0)
        self._following = asyncio.Lock()

    async def is_behind(self) -> bool:
        """Whether something was remembered that this one has not taken over; its own changes count."""
        return await self._version() != self._seen

    async def _version(self) -> tuple[int, int]:
        return await run_in(DISK, version, self._root)

    async def open_catalog(self) -> None:
        await run_in(
            DISK, self.claim_state, True
        )  # beside other engines; a service of its own would not follow
        async with changing(self._root):  # what it reads while it opens, nobody changes
            await super().open_catalog()
            self._seen = await self._version()

    async def follow_state_file(self) -> None:
        async with self._following:
            if await self.is_behind():
                seen = await self._version()
                await super().follow_state_file()
                self._seen = seen


class Engine:
    """Serve sends nothing to a replica before its `reconfigure` has ended."""

    async def reconfigure(self, told: dict[str, Any]) -> None:
        """Opens the service with these settings; Serve calls it once, before anything else.

        Raises RuntimeError where that cannot be.
        """
        self.settings = settings = Settings.model_validate(told)
        logs.set_up_logging(settings.log_format, settings.log_level)
        client = WorkerClient(settings)
        self.registry = Shared(settings, client)
        client.watch_loads(self.registry.note_load)
        self.app = create_app(settings, client, self.registry)
        self.rooms: Services = self.app.state.services
        self.rooms.usage.keep_in(settings.state)
        most = max(1, settings.pool_rank // TYPICAL_RANK)
        self.place = serve.multiplexed(max_num_models_per_replica=most)(_itself)
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()
        await self._opened()
        self._watcher = asyncio.create_task(self._watch())

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
        running = asyncio.create_task(self._run(call, gone, messages))
        remembering = asyncio.create_task(self._remembered(messages)) if call.changes else None
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
        self._watcher.cancel()
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

    async def _remembered(self, messages: asyncio.Queue[Message | None]) -> None:
        while not await self.registry.is_behind():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.02)
        messages.put_nowait(None)

    async def _watch(self) -> None:
        """For the moments in which nobody calls `follow`: it was starting, or whoever changed
        something died.
        """
        while True:
            await asyncio.sleep(LOOK_S)
            if await self.registry.is_behind():
                async with changing(self.settings.state):
                    await self.follow()


END = "end"


async def _itself(id: str) -> str:
    return id


async def _drained(messages: asyncio.Queue[Any]) -> AsyncIterator[Message | None]:
    while (message := await messages.get()) is None or message["type"] != END:
        yield message
