"""JSON of any length in pieces: the first is written on the event loop, all others in a thread.

One answer may have a million numbers. Written whole, in whatever thread, it keeps the interpreter
from everything else. API process; must not know wire shapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any, TypeVar

from fastapi import Response
from starlette.types import Receive, Scope, Send

from ...threads import RENDER, run_in

PIECE = 16_000  # characters; written in about a millisecond
FEW = 8

T = TypeVar("T")

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def dump_json(value: Any) -> bytes:
    """A short value as JSON.

    A lone surrogate, which an adapter's files or a call's arguments may hold, stays escaped, as
    JSON has it.
    """
    return _encode(value).encode("utf-8", "backslashreplace")


async def render_pieces(value: Any) -> list[bytes]:
    """The value as JSON, in pieces.

    A generator in it is a list, its elements made when they are written.
    """
    texts = _encode_texts(value)
    piece, more = _write_piece(texts)
    pieces = [piece]
    while more:
        piece, more = await run_in(RENDER, _write_piece, texts)
        pieces.append(piece)
    return pieces


def defer_elements(count: int, elements: Iterator[T]) -> Iterator[T] | list[T]:
    """`count` elements as a list for `render_pieces`: few are made at once, which takes the least
    time, and more when they are written.
    """
    return list(elements) if count <= FEW else elements


class WholeAnswer(Response):
    """An answer of known length, sent in the pieces in which it was written: joined, it would be
    copied.
    """

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes], headers: Mapping[str, str]) -> None:
        length = sum(map(len, pieces))
        super().__init__(headers={**headers, "content-length": str(length)})
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for number, piece in enumerate(self.pieces, 1):
            more = number < len(self.pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more})


async def render_answer(value: Any, headers: Mapping[str, str]) -> WholeAnswer:
    """The response that is this value; see `render_pieces`."""
    return WholeAnswer(await render_pieces(value), headers)


def _write_piece(texts: Iterator[str]) -> tuple[bytes, bool]:
    """The next piece, and whether there may be another one."""
    piece: list[str] = []
    size = 0
    for text in texts:
        piece.append(text)
        size += len(text)
        if size >= PIECE:
            break
    return "".join(piece).encode("utf-8", "backslashreplace"), size >= PIECE


def _encode_texts(value: Any) -> Iterator[str]:
    if not _is_deferred(value):
        yield _encode(value)
    elif isinstance(value, dict):
        yield from _encode_object(value)
    else:
        yield from _encode_list(value)


def _encode_list(values: Iterable[Any]) -> Iterator[str]:
    before = "["
    for value in values:
        yield before
        yield from _encode_texts(value)
        before = ","
    yield "[]" if before == "[" else "]"


def _encode_object(value: dict[str, Any]) -> Iterator[str]:
    """The values that are there already, in one piece, and then the deferred ones."""
    deferred = {key: inner for key, inner in value.items() if _is_deferred(inner)}
    known = {key: inner for key, inner in value.items() if key not in deferred}
    yield _encode(known)[:-1]
    comma = "," if known else ""
    for key, inner in deferred.items():
        yield f"{comma}{_encode(key)}:"
        comma = ","
        yield from _encode_texts(inner)
    yield "}"


def _is_deferred(value: Any) -> bool:
    """Whether a generator is in it. Lists are of one kind, so the first element tells."""
    if isinstance(value, dict):
        return any(map(_is_deferred, value.values()))
    if isinstance(value, list):
        return bool(value) and _is_deferred(value[0])
    return isinstance(value, GeneratorType)
