"""Server-sent events, framed by hand: one frame an event, errors as the last event. API process;
must not know a dialect's shapes but the error body.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from ...errors import AdapterdError
from ..errors import error_body, internal_error, note_error, openai_dialect
from .rendering import dump_json, render_pieces

log = logging.getLogger("adapterd.stream")

UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
# A comment, which clients skip, and how often one is sent: proxies cut a connection that is silent for 60 s
WAITING, WAITING_S = b": waiting\n\n", 15.0
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "JSON"}},
    "required": ["data"],
}
# A route's responses in OpenAPI, beside a JSON object
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer; where it is streamed, as server-sent events",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}


class JsonAnswer(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dump_json(content)


def frame_event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + dump_json(value) + b"\n\n"


def stream_events(
    request: Request, events: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str]
) -> StreamingResponse:
    """The response that sends these events as they come; under /v1 it ends with [DONE].

    An error becomes the last event.
    """
    return StreamingResponse(
        _iterate_frames(request, events), headers={**headers, **UNBUFFERED}, media_type="text/event-stream"
    )


async def _iterate_frames(request: Request, events: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in _wait_for_events(events):
            if event is None:
                yield WAITING
                continue
            first, *rest = await render_pieces(event)
            yield b"".join((b"data: ", first, b"" if rest else b"\n\n"))
            for piece in rest:
                yield piece
            if rest:
                yield b"\n\n"
    except AdapterdError as error:
        yield _frame_error(error, request)
    except Exception:
        log.exception("a defect in a stream")
        yield _frame_error(internal_error(request.scope), request)
    if openai_dialect(request.scope["path"]):
        yield DONE


def _take_outcome(task: asyncio.Future[Any]) -> None:
    """So that nobody is told of an error that no reader was there for."""
    if not task.cancelled():
        task.exception()


async def _wait_for_events(
    events: AsyncIterator[Mapping[str, Any]],
) -> AsyncIterator[Mapping[str, Any] | None]:
    """The events; None for each `WAITING_S` in which the first one has not come."""
    iterator = aiter(events)
    first = asyncio.ensure_future(anext(iterator, None))
    first.add_done_callback(_take_outcome)
    try:
        while not (await asyncio.wait({first}, timeout=WAITING_S))[0]:
            yield None
        event = await first
    finally:
        first.cancel()
    while event is not None:
        yield event
        event = await anext(iterator, None)


def _frame_error(error: AdapterdError, request: Request) -> bytes:
    note_error(error, request.scope)
    return frame_event(error_body(error, openai_dialect(request.scope["path"])))
