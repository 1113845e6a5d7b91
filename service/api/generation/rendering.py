"""JSON of any length in pieces: the first is written on the event loop, all others in a thread.

One answer may have a million numbers. Written whole, in whatever thread, it keeps the interpreter
from everybody else. Knows no wire shapes.
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


def dumped(value: Any) -> bytes:
    """A short value as JSON.

    A lone surrogate, which an adapter's files or a call's arguments may hold, stays escaped, as
    JSON has it.
    """
    return _encode(value).encode("utf-8", "backslashreplace")


async def render_pieces(value: Any) -> list[bytes]:
    """The value as JSON, in pieces.

    A generator in it is a list, its elements made when they are written.
    """
    texts = _texts(value)
    piece, more = _write_piece(texts)
    pieces = [piece]
    while more:
        piece, more = await run_in(RENDER, _write_piece, texts)
        pieces.append(piece)
    return pieces


def made_later(count: int, elements: Iterator[T]) -> Iterator[T] | list[T]:
    """So many elements as a list for `render_pieces`: few are made at once, which takes the least
    time.
    """
    return list(elements) if count <= FEW else elements


class WholeAnswer(Response):
    """An answer of known length, sent in the pieces in which it was written: joined, it would be
    copied.
    """

    media_type = "application/json"

    def __init__(self, pieces: Sequence[bytes], headers: Mapping[str, str]) -> None:
        super().__init__(headers={**headers, "content-length": str(sum(map(len, pieces)))})
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for left, piece in zip(range(len(self.pieces) - 1, -1, -1), self.pieces, strict=True):
            await send({"type": "http.response.body", "body": piece, "more_body": left > 0})


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


def _texts(value: Any) -> Iterator[str]:
    if not _is_made_later(value):
        yield _encode(value)
    elif isinstance(value, dict):
        yield from _keyed(value)
    else:
        yield from _listed(value)


def _listed(values: Iterable[Any]) -> Iterator[str]:
    before = "["
    for value in values:
        yield before
        yield from _texts(value)
        before = ","
    yield "[]" if before == "[" else "]"


def _keyed(value: dict[str, Any]) -> Iterator[str]:
    """What is there already, in one piece, and then the rest."""
    later = {key: inner for key, inner in value.items() if _is_made_later(inner)}
    known = {key: inner for key, inner in value.items() if key not in later}
    yield _encode(known)[:-1]
    for key, inner in later.items():
        yield f"{',' if known else ''}{_encode(key)}:"
        known[key] = None
        yield from _texts(inner)
    yield "}"


def _is_made_later(value: Any) -> bool:
    """Whether a generator is in it. Lists are of one kind, so the first element tells."""
    if isinstance(value, dict):
        return any(map(_is_made_later, value.values()))
    return isinstance(value, GeneratorType) or (
        isinstance(value, list) and bool(value) and _is_made_later(value[0])
    )
