"""The ingress of the cluster without a cluster: whose a request is, what it says when an engine dies,
how metrics become one text.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.ray.call import Call, call
from deploy.ray.exposition import merged
from service.settings import Settings

pytestmark = pytest.mark.anyio

SETTINGS = Settings(base_id="tiny")
DIGEST = "sha256:" + "a" * 64
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8")]
START = {"type": "http.response.start", "status": 200, "headers": EVENTS}
PART = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}
END = {"type": "http.response.body", "body": b"", "more_body": False}
Messages = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ingress() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own modules warn at import
        return importlib.import_module("deploy.ray.ingress")


class Engines:
    """A handle whose engines say what they are told to; where a script ends early, that engine
    dies.
    """

    def __init__(self, ingress: Any, *scripts: Messages) -> None:
        self.ingress, self.scripts, self.asked = ingress, list(scripts), 0
        self.exchange = self

    def options(self, **named: Any) -> Engines:
        return self

    def remote(self, asked: Call) -> Engines:
        self.asked += 1
        self.stream = self._say(self.scripts.pop(0))
        return self

    def __aiter__(self) -> AsyncIterator[Any]:
        return self.stream

    async def __anext__(self) -> Any:
        return await anext(self.stream)

    def cancel(self) -> None:
        return None

    async def _say(self, script: Messages) -> AsyncIterator[Any]:
        for message in script:
            yield message
        if script[-1:] != [END]:
            raise self.ingress.RayError("the actor died")


def scope(path: str, method: str = "POST") -> dict[str, Any]:
    return {"type": "http", "path": path, "method": method, "headers": [], "state": {"request_id": "r1"}}


async def heard(
    ingress: Any, engines: Engines, path: str, method: str = "POST", settings: Settings = SETTINGS
) -> Messages:
    """What the client is sent."""
    sent: Messages = []
    never = ingress.asyncio.Event()

    async def receive() -> dict[str, Any]:
        await never.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asked = scope(path, method)
    await ingress.Answer(engines, call(asked, b"{}", settings), settings)(asked, receive, send)
    return sent


async def test_one_that_dies_before_it_speaks_is_replaced_by_another(ingress: Any) -> None:
    engines = Engines(ingress, [], [START, PART, END])
    assert await heard(ingress, engines, "/generate") == [START, PART, END]
    assert engines.asked == 2


async def test_when_two_die_the_client_is_told(ingress: Any) -> None:
    start, body = await heard(ingress, Engines(ingress, [], []), "/v1/completions")
    assert (start["status"], dict(start["headers"])[b"retry-after"]) == (503, b"1")
    assert json.loads(body["body"])["error"]["code"] == "not_ready"


async def test_a_change_is_not_made_twice(ingress: Any, tmp_path: Path) -> None:
    engines = Engines(ingress, [], [START, END])
    start, body = await heard(ingress, engines, "/adapters/x", "DELETE", Settings(adapters_dir=tmp_path))
    assert (start["status"], json.loads(body["body"])["error_type"], engines.asked) == (503, "not_ready", 1)


@pytest.mark.parametrize(
    ("path", "done"), [("/generate_stream", b""), ("/v1/completions", b"data: [DONE]\n\n")]
)
async def test_a_stream_that_breaks_ends_with_an_error_event(ingress: Any, path: str, done: bytes) -> None:
    *before, last = await heard(ingress, Engines(ingress, [START, PART]), path)
    assert before == [START, PART]
    assert last["body"].startswith(b'data: {"error":')
    assert b"not_ready" in last["body"]
    assert (last["body"].endswith(b"}\n\n" + done), last["more_body"]) == (True, False)


async def test_a_body_that_breaks_is_cut(ingress: Any) -> None:
    whole = START | {"headers": [(b"content-type", b"application/json")]}
    assert await heard(ingress, Engines(ingress, [whole]), "/generate") == [whole]


@pytest.mark.parametrize(
    ("path", "body", "adapter"),
    [
        ("/generate", {"inputs": "Hi", "parameters": {"adapter_id": "a"}}, "a"),
        ("/generate", {"inputs": "Hi"}, ""),
        ("/generate_stream", {"inputs": "Hi", "parameters": {"adapter_id": "base"}}, ""),
        ("/", {"inputs": "Hi", "parameters": {"adapter_id": "org/a"}}, "org/a"),
        ("/generate", {"inputs": "Hi", "parameters": {"adapter_id": f"org/a@{DIGEST}"}}, "org/a"),
        ("/v1/completions", {"prompt": "Hi", "model": f"base:a@{DIGEST}"}, "a"),
        ("/v1/completions", {"model": "tiny:a", "prompt": "Hi"}, "a"),
        ("/v1/completions", {"model": "tiny", "prompt": "Hi"}, ""),
        ("/v1/chat/completions", {"model": "a", "messages": [{"role": "user", "content": "Hi"}]}, "a"),
        ("/generate", {"inputs": "Hi", "parameters": {"adapter_id": "a"}, "surprise": 1}, ""),
        ("/adapters", {"id": "a", "source": "a"}, ""),
    ],
)
def test_whose_a_request_is(path: str, body: dict[str, Any], adapter: str) -> None:
    assert call(scope(path), json.dumps(body).encode(), SETTINGS).adapter == adapter


@pytest.mark.parametrize(
    ("method", "path", "changes", "repeatable"),
    [
        ("POST", "/generate", False, True),
        ("GET", "/adapters", False, True),
        ("POST", "/adapters", True, False),
        ("POST", "/adapters/check", False, False),
        ("DELETE", "/adapters/a", True, False),
        ("PUT", "/adapters/a/upload", True, False),
        ("POST", "/adapters/a/rollback", True, False),
        ("PUT", "/aliases/a", True, False),
        ("GET", "/aliases", False, True),
        ("POST", "/v1/load_lora_adapter", True, False),
        ("PUT", "/some/route/to/come", True, False),
    ],
)
def test_what_changes_something_and_what_can_be_asked_again(
    method: str, path: str, changes: bool, repeatable: bool
) -> None:
    asked = call(scope(path, method), b"", SETTINGS)
    assert (asked.changes, asked.repeatable) == (changes, repeatable)


def test_metrics_of_several_engines_are_one_valid_text() -> None:
    text = (
        "# HELP a_total A.\n# TYPE a_total counter\na_total 1.0\n"
        '# HELP b B, {c}.\n# TYPE b gauge\nb{x="} 1"} 2.0\n'
    )
    families = {
        family.name: family for family in text_string_to_metric_families(merged({"r1": text, "r2": text}))
    }
    assert [(sample.labels, sample.value) for sample in families["a"].samples] == [
        ({"replica": "r1"}, 1),
        ({"replica": "r2"}, 1),
    ]
    assert [sample.labels for sample in families["b"].samples] == [
        {"replica": "r1", "x": "} 1"},
        {"replica": "r2", "x": "} 1"},
    ]
