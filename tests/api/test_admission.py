"""Getting in and out: whoever leaves, at whatever moment, leaves no ticket and no lease behind."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.api.generation.answer import failure_error
from service.core.error_codes import ErrorCode
from service.core.request import Event, Finish
from service.errors import AdapterInvalid, DeadlineExceeded, Internal, NotReady

from .scripted_app import ScriptedApp, serve_script

GENERATE = {"inputs": "Hi", "parameters": {"adapter_id": "x", "max_new_tokens": 50}}
COMPLETE = {"model": "x", "prompt": ["Hi", "Ho"], "n": 2}


@pytest.fixture
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("admission")) as scripted:
        yield scripted


class LeavingClient:
    """A client as an ASGI server presents it: sends the body, and is gone when `gone` is set.

    `dead`: nothing can be sent to it.
    """

    def __init__(self, path: str, body: Any, dead: bool = False) -> None:
        self.scope: dict[str, Any] = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}}
        self.scope |= {"http_version": "1.1", "scheme": "http", "method": "POST"}
        self.scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": ""}
        self.scope |= {"server": ("test", 80), "client": ("test", 1)}
        self.scope["headers"] = [(b"content-type", b"application/json")]
        content = json.dumps(body).encode()
        self.body: list[dict[str, Any]] = [{"type": "http.request", "body": content, "more_body": False}]
        self.gone, self.got = asyncio.Event(), list[dict[str, Any]]()
        self.dead = dead

    async def receive(self) -> dict[str, Any]:
        if self.body:
            return self.body.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if self.dead:
            raise OSError("the client has left")
        self.got.append(message)

    @property
    def frames(self) -> int:
        bodies = [message["body"] for message in self.got if message["type"] == "http.response.body"]
        return sum(body.count(b"data: ") for body in bodies)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("what was waited for did not happen")


def leave(
    api: ScriptedApp, path: str, body: Any, when: Callable[[LeavingClient], bool], dead: bool = False
) -> LeavingClient:
    """Asks, leaves once `when` says so, and waits until the service is done with it.

    Runs on the loop the service lives on.
    """

    async def go() -> LeavingClient:
        client = LeavingClient(path, body, dead)
        serving = asyncio.ensure_future(api.app(client.scope, client.receive, client.send))
        async with asyncio.timeout(20):
            await until(lambda: when(client) or serving.done())
            client.gone.set()
            await asyncio.wait([serving])
        return client

    portal: Any = api.http.portal
    left: LeavingClient = portal.call(go)
    return left


def shut(api: ScriptedApp, early: int) -> None:
    """The engine gives `early` tokens of each request and then nothing."""
    api.engine.gate.clear()
    api.engine.early = early


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", GENERATE),
        ("/v1/completions", COMPLETE),
        ("/v1/chat/completions", {"model": "x", "messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_a_client_that_leaves_a_whole_answer_cancels_it(api: ScriptedApp, path: str, body: Any) -> None:
    shut(api, early=2)
    leave(api, path, body, lambda _: bool(api.engine.requests) and api.engine.tickets[-1].last is not None)
    assert sorted(api.engine.cancelled) == [request.id for request in api.engine.requests] != []
    assert api.quiet


@pytest.mark.parametrize(
    ("path", "body"), [("/generate_stream", GENERATE), ("/v1/completions", COMPLETE | {"stream": True})]
)
def test_a_client_that_leaves_a_stream_cancels_it(
    api: ScriptedApp, caplog: pytest.LogCaptureFixture, path: str, body: Any
) -> None:
    shut(api, early=3)
    with caplog.at_level(logging.INFO, "adapterd.access"):
        left = leave(api, path, body, lambda client: client.frames >= 2)
    assert [
        (line.__dict__["fields"]["status"], line.__dict__["fields"]["outcome"]) for line in caplog.records
    ] == [(499, "cancelled")]
    assert left.frames >= 2
    assert sorted(api.engine.cancelled) == [request.id for request in api.engine.requests] != []
    assert api.quiet


def test_a_client_that_leaves_before_the_first_byte_cancels_too(api: ScriptedApp) -> None:
    shut(api, early=0)
    leave(api, "/generate_stream", GENERATE, lambda _: True, dead=True)
    assert api.engine.requests
    assert api.quiet


def test_a_finished_answer_cancels_nothing(api: ScriptedApp) -> None:
    api.post("/generate", GENERATE)
    api.stream("/generate_stream", GENERATE)
    assert not api.engine.cancelled
    assert api.quiet


def test_a_stop_string_ends_the_engines_work(api: ScriptedApp) -> None:
    api.says("a stop b" * 9)
    api.generate(stop=["stop"], max_new_tokens=60)
    (ticket,) = api.engine.tickets
    assert ticket.stopped
    assert not api.engine.cancelled


def count_of_x(api: ScriptedApp) -> tuple[float, float]:
    """The requests and the generated tokens of adapter `x`, as the metrics have them."""
    lines = api.http.get("/metrics").text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if "#" not in line)
    requests = values.get('adapterd_adapter_requests_total{adapter="x"}', 0)
    tokens = values.get('adapterd_adapter_generation_tokens_total{adapter="x"}', 0)
    return float(requests), float(tokens)


def test_each_adapter_is_counted_once_with_its_tokens(api: ScriptedApp) -> None:
    requests, tokens = count_of_x(api)
    api.complete(["Hi", "Ho"], model="x", n=2, max_tokens=3)
    api.complete(model="x", prompt=[], status=400)
    api.generate(max_new_tokens=3)
    assert count_of_x(api) == (requests + 1, tokens + 12)


def test_while_the_base_loads_the_answer_is_503(api: ScriptedApp) -> None:
    api.engine.ready, api.engine.state = False, "restarting"
    assert api.generate(status=503)["error_type"] == "not_ready"
    assert api.complete(status=503)["error"]["code"] == "not_ready"


def test_long_prompts_are_read_off_the_event_loop(api: ScriptedApp) -> None:
    assert api.generate("a" * 30_000, status=422)["error_type"] == "context_length_exceeded"
    assert api.generate("a" * 30_000, truncate=5, details=True)["details"]["prompt_tokens"] == 5
    api.chat("a" * 30_000, status=400)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (ErrorCode.NOT_READY, NotReady),
        (ErrorCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (ErrorCode.INTERNAL, Internal),
        (ErrorCode.ADAPTER_INVALID, AdapterInvalid),
        (None, Internal),
    ],
)
def test_the_engines_codes_become_errors(code: ErrorCode | None, kind: type[Exception]) -> None:
    error = failure_error(Event(1, finish=Finish.FAILED, code=code, message="why"))
    assert type(error) is kind
    assert error.message == "why"
