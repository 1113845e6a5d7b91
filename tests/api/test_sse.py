"""Streams that wait for their first event say that they are alive, and nothing more afterwards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from service.api.generation import sse

from .scripted_app import ScriptedApp, serve_script

HI = [{"role": "user", "content": "Hi"}]
STREAMS = [
    ("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 4}}),
    ("/v1/completions", {"model": "x", "prompt": "Hi", "max_tokens": 4, "stream": True}),
    ("/v1/chat/completions", {"model": "x", "messages": HI, "max_tokens": 4, "stream": True}),
]


class SlowGate(asyncio.Event):
    """Every token takes a quarter of a second."""

    async def wait(self) -> Any:
        await asyncio.sleep(0.25)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("sse")) as scripted:
        yield scripted


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_a_stream_that_waits_sends_comments_until_its_first_token(
    api: ScriptedApp, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    monkeypatch.setattr(sse, "WAITING_S", 0.1)
    monkeypatch.setattr(api.engine, "gate", SlowGate())
    frames = api.post(path, body).text.split("\n\n")
    comments = frames.count(": waiting")
    assert frames[:comments] == [": waiting"] * comments
    assert comments in (1, 2)
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames[comments:] if "{" in frame]
    assert len(events) >= 4


def test_a_stream_without_a_wait_sends_none(api: ScriptedApp) -> None:
    assert sse.WAITING_S == 15
    for path, body in STREAMS:
        assert ": waiting" not in api.post(path, body).text


def test_who_leaves_while_it_waits_ends_what_it_waits_for() -> None:
    ended: list[str] = []

    async def wait_for_ever() -> AsyncIterator[dict[str, Any]]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("ended")
        yield {}

    async def leave() -> None:
        events = sse._wait_for_events(wait_for_ever())
        reading = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        reading.cancel()
        await asyncio.wait({reading})
        await asyncio.sleep(0.01)
        assert ended == ["ended"]

    asyncio.run(leave())
