"""Server-sent events, framed by hand: one frame an event, errors as the last event. Knows no dialect's shapes but the error body."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from ...errors import AdapterdError
from ..errors import body, internal, note, openai_dialect
from .rendering import dumped, render_pieces

log = logging.getLogger("adapterd.stream")

UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
EVENT = {"type": "object", "properties": {"data": {"type": "string", "description": "JSON"}}, "required": ["data"]}
EVENTS: dict[int | str, dict[str, Any]] = {  # of a route's OpenAPI: what it may answer beside a JSON object
    200: {"description": "the answer; where it is streamed, as server-sent events", "content": {"text/event-stream": {"schema": EVENT}}}
}


class Json(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dumped(content)


def frame(value: Mapping[str, Any]) -> bytes:
    return b"data: " + dumped(value) + b"\n\n"


def streamed(request: Request, events: AsyncIterator[Mapping[str, Any]], headers: Mapping[str, str]) -> StreamingResponse:
    """The response that sends these events as they come; under /v1 it ends with [DONE]. An error becomes the last event."""
    return StreamingResponse(_frames(request, events), headers={**headers, **UNBUFFERED}, media_type="text/event-stream")


async def _frames(request: Request, events: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
    openai = openai_dialect(request.scope["path"])
    try:
        async for event in events:
            first, *rest = await render_pieces(event)
            yield b"".join((b"data: ", first, b"" if rest else b"\n\n"))
            for piece in rest:
                yield piece
            if rest:
                yield b"\n\n"
    except AdapterdError as error:
        note(error, request.scope)
        yield frame(body(error, openai))
    except Exception:
        log.exception("a defect in a stream")
        defect = internal(request.scope)
        note(defect, request.scope)
        yield frame(body(defect, openai))
    if openai:
        yield DONE
