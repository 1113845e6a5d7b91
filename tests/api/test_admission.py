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

from .fakes import Stage, stage

GENERATE = {"inputs": "Hi", "parameters": {"adapter_id": "x", "max_new_tokens": 50}}
COMPLETE = {"model": "x", "prompt": ["Hi", "Ho"], "n": 2}


@pytest.fixture
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("admission")) as made:
        yield made


class Leaver:
    """A client, as the server tells of it: sends the body, and is gone when `gone` is set.

    `dead`: nothing can be sent to it.
    """

    def __init__(self, path: str, body: Any, dead: bool = False) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
        }
        self.scope |= {
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
        }
        self.scope |= {
            "server": ("test", 80),
            "client": ("test", 1),
            "headers": [(b"content-type", b"application/json")],
        }
        self.body: list[dict[str, Any]] = [
            {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        ]
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
        return sum(
            message["body"].count(b"data: ")
            for message in self.got
            if message["type"] == "http.response.body"
        )


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_000_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("what was waited for did not happen")


def leave(one: Stage, path: str, body: Any, when: Callable[[Leaver], bool], dead: bool = False) -> Leaver:
    """Asks, leaves once `when` says so, and waits until the service is done with it.

    Runs on the loop the service lives on.
    """

    async def go() -> Leaver:
        client = Leaver(path, body, dead)
        serving = asyncio.ensure_future(one.app(client.scope, client.receive, client.send))
        async with asyncio.timeout(20):
            await until(lambda: when(client) or serving.done())
            client.gone.set()
            await asyncio.wait([serving])
        return client

    portal: Any = one.knock.portal
    left: Leaver = portal.call(go)
    return left


def shut(one: Stage, early: int) -> None:
    """The engine gives `early` tokens of each request and then nothing."""
    one.engine.gate.clear()
    one.engine.early = early


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", GENERATE),
        ("/v1/completions", COMPLETE),
        ("/v1/chat/completions", {"model": "x", "messages": [{"role": "user", "content": "Hi"}]}),
    ],
)
def test_a_client_that_leaves_a_whole_answer_cancels_it(one: Stage, path: str, body: Any) -> None:
    shut(one, early=2)
    leave(one, path, body, lambda _: bool(one.engine.asked) and one.engine.tickets[-1].last is not None)
    assert sorted(one.engine.cancelled) == [request.id for request in one.engine.asked] != []
    assert one.quiet


@pytest.mark.parametrize(
    ("path", "body"), [("/generate_stream", GENERATE), ("/v1/completions", COMPLETE | {"stream": True})]
)
def test_a_client_that_leaves_a_stream_cancels_it(
    one: Stage, caplog: pytest.LogCaptureFixture, path: str, body: Any
) -> None:
    shut(one, early=3)
    with caplog.at_level(logging.INFO, "adapterd.access"):
        left = leave(one, path, body, lambda client: client.frames >= 2)
    assert [
        (line.__dict__["fields"]["status"], line.__dict__["fields"]["outcome"]) for line in caplog.records
    ] == [(499, "cancelled")]
    assert left.frames >= 2
    assert sorted(one.engine.cancelled) == [request.id for request in one.engine.asked] != []
    assert one.quiet


def test_a_client_that_leaves_before_the_first_byte_cancels_too(one: Stage) -> None:
    shut(one, early=0)
    leave(one, "/generate_stream", GENERATE, lambda _: True, dead=True)
    assert one.engine.asked
    assert one.quiet


def test_a_finished_answer_cancels_nothing(one: Stage) -> None:
    one.post("/generate", GENERATE)
    one.stream("/generate_stream", GENERATE)
    assert not one.engine.cancelled
    assert one.quiet


def test_a_stop_string_ends_the_engines_work(one: Stage) -> None:
    one.says("a stop b" * 9)
    one.generate(stop=["stop"], max_new_tokens=60)
    (ticket,) = one.engine.tickets
    assert ticket.stopped
    assert not one.engine.cancelled


def test_each_adapter_is_counted_once_with_its_tokens(one: Stage) -> None:
    def counted() -> tuple[float, float]:
        lines = dict(
            line.rsplit(" ", 1) for line in one.knock.get("/metrics").text.splitlines() if "#" not in line
        )
        names = (
            'adapterd_adapter_requests_total{adapter="x"}',
            'adapterd_adapter_generation_tokens_total{adapter="x"}',
        )
        return float(lines.get(names[0], 0)), float(lines.get(names[1], 0))

    requests, tokens = counted()
    one.complete(["Hi", "Ho"], model="x", n=2, max_tokens=3)
    one.complete(model="x", prompt=[], status=400)
    one.generate(max_new_tokens=3)
    assert counted() == (requests + 1, tokens + 12)


def test_while_the_base_loads_the_answer_is_503(one: Stage) -> None:
    one.engine.ready, one.engine.state = False, "restarting"
    assert one.generate(status=503)["error_type"] == "not_ready"
    assert one.complete(status=503)["error"]["code"] == "not_ready"


def test_long_prompts_are_read_off_the_event_loop(one: Stage) -> None:
    assert one.generate("a" * 30_000, status=422)["error_type"] == "context_length_exceeded"
    assert one.generate("a" * 30_000, truncate=5, details=True)["details"]["prompt_tokens"] == 5
    one.chat("a" * 30_000, status=400)


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
