"""Server-sent events, framed by hand: one frame an event, errors as the last event.

Knows no dialect's shapes but the error body.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, StreamingResponse

from ...errors import AdapterdError
from ..errors import error_body, internal_error, note_error, openai_dialect
from .rendering import dumped, render_pieces

log = logging.getLogger("adapterd.stream")

UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
DONE = b"data: [DONE]\n\n"
EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "JSON"}},
    "required": ["data"],
}
# Of a route's OpenAPI: what it may answer beside a JSON object
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the answer; where it is streamed, as server-sent events",
        "content": {"text/event-stream": {"schema": EVENT}},
    }
}


class JsonAnswer(JSONResponse):
    def render(self, content: Any) -> bytes:
        return dumped(content)


def frame_event(value: Mapping[str, Any]) -> bytes:
    return b"data: " + dumped(value) + b"\n\n"


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
        note_error(error, request.scope)
        yield frame_event(error_body(error, openai))
    except Exception:
        log.exception("a defect in a stream")
        defect = internal_error(request.scope)
        note_error(defect, request.scope)
        yield frame_event(error_body(defect, openai))
    if openai:
        yield DONE
