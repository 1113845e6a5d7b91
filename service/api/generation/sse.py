"""Server-sent events, framed by hand: one frame an event, errors as the last event. API process;
must not know a dialect's shapes but the error body.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from ...errors import AdapterdError
from ..errors import body_at, internal_error, note_error, openai_dialect
from .rendering import dump_json, render_pieces

log = logging.getLogger("adapterd.stream")

UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
# A comment, which clients skip, and how often one is sent: proxies cut a connection that is silent for 60 s
WAITING, WAITING_S = b": waiting\n\n", 15.0


@dataclass(frozen=True, slots=True)
class Framing:
    """How the dialect of a path has its events.

    `named`: a line before each tells its `type`; `numbered`: each has its number in the stream; `done`:
    [DONE] is the last.
    """

    named: bool = False
    numbered: bool = False
    done: bool = False


FRAMINGS = {
    "/v1/messages": Framing(named=True),
    "/v1/responses": Framing(named=True, numbered=True),
}
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
    """The response that sends these events as they come, framed as the request's path has them.

    An error becomes the last event.
    """
    return StreamingResponse(
        _iterate_frames(request, events), headers={**headers, **UNBUFFERED}, media_type="text/event-stream"
    )


async def _iterate_frames(request: Request, events: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    framing, number = framing_of(request.scope["path"]), 0
    try:
        async for event in _wait_for_events(events):
            if event is None:
                yield WAITING
                continue
            first, *rest = await render_pieces(_number_event(event, framing, number))
            number += 1
            yield b"".join((_name_line(event, framing), b"data: ", first, b"" if rest else b"\n\n"))
            for piece in rest:
                yield piece
            if rest:
                yield b"\n\n"
    except AdapterdError as error:
        yield _end_noted(error, request, number)
    except Exception:
        log.exception("a defect in a stream")
        yield _end_noted(internal_error(request.scope), request, number)
    else:
        if framing.done:
            yield DONE


def framing_of(path: str) -> Framing:
    return FRAMINGS.get(path) or Framing(done=openai_dialect(path))


def _number_event(event: Mapping[str, Any], framing: Framing, number: int) -> Mapping[str, Any]:
    return {**event, "sequence_number": number} if framing.numbered else event


def _name_line(event: Mapping[str, Any], framing: Framing) -> bytes:
    return f"event: {event['type']}\n".encode() if framing.named else b""


def end_frames(error: AdapterdError, path: str, number: int = 0) -> bytes:
    """What ends a stream of this path in which so many events were sent: the error's event, and
    [DONE] where that is the last.
    """
    framing = framing_of(path)
    event: Mapping[str, Any] = body_at(error, path)
    if framing.named:
        event = {"type": "error", **event}
    named = _name_line(event, framing)
    return named + frame_event(_number_event(event, framing, number)) + (DONE if framing.done else b"")


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


def _end_noted(error: AdapterdError, request: Request, number: int) -> bytes:
    note_error(error, request.scope)
    return end_frames(error, request.scope["path"], number)
