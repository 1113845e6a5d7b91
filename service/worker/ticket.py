"""The caller's end of one request: its events and its times; runs in the API process.

Events come in order, and exactly one of them is the last. Lives on the event loop; must not know
processes, messages or HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..core.request import Event, Finish, Request


class Ticket:
    """An async iterator of the request's events, the terminal one last.

    Times are `time.monotonic` seconds, None until they are known. `submitted`: admitted; `started`: it
    began to run; `first` and `last`: tokens arrived; `ended`: the terminal event, which `failed` says was an
    error. `cached_tokens` of the prompt were not computed again.
    """

    def __init__(self, request: Request, cancelled: Callable[[Ticket], None]) -> None:
        self.request = request
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.cached_tokens = 0
        self.first: float | None = None
        self.last: float | None = None
        self.ended: float | None = None
        self.failed = False
        self.stopped = False
        self.leaving = False
        self._cancelled = cancelled
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._read_out = False

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Event:
        if self._read_out:
            raise StopAsyncIteration
        event = await self._events.get()
        self._read_out = event.finish is not None
        return event

    def cancel_request(self, stopped: bool = False) -> None:
        """Ends the request soon; does nothing the second time or after the end.

        `stopped`: the caller has all the text that it wanted.
        """
        if self.ended is None and not self.leaving:
            self.leaving, self.stopped = True, stopped
            self._cancelled(self)

    def move_to(self, cancelled: Callable[[Ticket], None]) -> None:
        """Another worker has the request, which has not begun: it is told of a cancel."""
        self._cancelled = cancelled

    def deliver_event(self, event: Event, now: float) -> None:
        """Adds the next event; none may follow the terminal one."""
        assert self.ended is None, f"request {self.request.id} got an event after its last"
        if event.token is not None:
            self.first = self.first or now
            self.last = now
        if event.finish is not None:
            self.ended = now
            self.failed = event.finish is Finish.FAILED
        self._events.put_nowait(event)
