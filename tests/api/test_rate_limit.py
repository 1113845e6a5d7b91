"""A key's shares: so much a second, so much at once, and never another key's; and which adapters a
key may know of.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.types import Message, Receive, Scope, Send

from service.api.middleware.rate_limit import KeyUsage, RateLimit
from service.keys import Key
from service.settings import Settings, read_settings
from service.telemetry import metrics

from .fakes import Stage, stage
from .house import house

pytestmark = pytest.mark.anyio

BODY = {"inputs": "Hi", "parameters": {"max_new_tokens": 2}}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def key_file(folder: Path, *lines: str) -> str:
    (folder / "keys").write_text("\n".join(lines))
    return f"@{folder / 'keys'}"


# ---- so much a second


def test_a_share_refills_at_its_rate_and_holds_a_second_of_it() -> None:
    account = KeyUsage(left=2.0, at=0.0)
    assert [account.seconds_to_wait(2.0, 0.0) for _ in range(3)] == [0.0, 0.0, 0.5]
    assert account.seconds_to_wait(2.0, 0.5) == 0.0
    assert account.seconds_to_wait(2.0, 0.5) == 0.5
    assert [account.seconds_to_wait(2.0, 1000.0) for _ in range(3)] == [0.0, 0.0, 0.5], (
        "an hour of quiet does not save up"
    )
    slow = KeyUsage(left=1.0, at=0.0)
    assert [slow.seconds_to_wait(0.1, 0.0) for _ in range(2)] == [0.0, 10.0]


def test_over_its_rate_a_key_gets_429_with_retry_after_and_another_key_is_served(tmp_path: Path) -> None:
    with stage(tmp_path, api_keys=key_file(tmp_path, "sk-slow rate=0.01", "sk-fast")) as one:
        assert one.knock.post("/generate", json=BODY, headers=bearer("sk-slow")).status_code == 200
        before = (
            metrics.REGISTRY.get_sample_value("adapterd_request_failure_total", {"code": "overloaded"}) or 0
        )
        keys = metrics.REGISTRY.get_sample_value("adapterd_key_refusals_total") or 0
        refused = one.knock.post("/generate", json=BODY, headers=bearer("sk-slow"))
        assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
        assert 90 <= int(refused.headers["retry-after"]) <= 100
        dialect = one.knock.post(
            "/v1/completions", json={"model": "tiny", "prompt": "Hi"}, headers=bearer("sk-slow")
        )
        assert (dialect.status_code, dialect.json()["error"]["type"], dialect.json()["error"]["code"]) == (
            429,
            "rate_limit_error",
            "overloaded",
        )
        assert (
            metrics.REGISTRY.get_sample_value("adapterd_request_failure_total", {"code": "overloaded"})
            == before + 2
        )
        assert metrics.REGISTRY.get_sample_value("adapterd_key_refusals_total") == keys + 2
        for _ in range(5):
            assert one.knock.post("/generate", json=BODY, headers=bearer("sk-fast")).status_code == 200
        assert len(one.engine.asked) == 6, "what is refused never reaches the engine"


def test_all_keys_have_the_settings_rate_unless_they_have_their_own(tmp_path: Path) -> None:
    with house(api_keys=key_file(tmp_path, "sk-a", "sk-b rate=1000"), key_rate="0.01") as home:
        codes = {
            key: [home.knock.get("/adapters", headers=bearer(key)).status_code for _ in range(3)]
            for key in ("sk-a", "sk-b")
        }
        assert codes == {"sk-a": [200, 429, 429], "sk-b": [200, 200, 200]}


def test_probes_and_the_pages_are_free_and_a_refused_key_takes_no_share(tmp_path: Path) -> None:
    with house(api_keys="sk-a", key_rate="0.01") as home:
        for path in ("/metrics", "/health", "/console/app.js", "/docs", "/openapi.json") * 2:
            assert home.knock.get(path, headers=bearer("sk-a")).status_code == 200
        for _ in range(3):
            assert home.knock.get("/adapters", headers=bearer("sk-wrong")).status_code == 401
        assert home.knock.get("/adapters", headers=bearer("sk-a")).status_code == 200


def test_without_keys_nobody_is_counted() -> None:
    with house(key_rate="0.01", key_concurrency="1") as home:
        assert [home.knock.get("/adapters").status_code for _ in range(3)] == [200] * 3


# ---- so much at once


class Layer:
    """The layer over an app that waits at `gate`, asked as a server would."""

    def __init__(self, settings: Settings) -> None:
        self.gate = asyncio.Event()
        self.fails = False
        self.layer = RateLimit(self.app, settings)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.gate.wait()
        if self.fails:
            raise RuntimeError("a defect")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def ask(self, key: Key) -> tuple[int, Any]:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "path": "/generate",
            "method": "POST",
            "headers": [],
            "state": {"key": key, "log": {}},
        }
        await self.layer(scope, cast(Receive, None), send)
        return sent[0]["status"], json.loads(sent[1]["body"])


async def test_over_its_concurrency_a_key_gets_429_and_another_key_is_served() -> None:
    layer = Layer(read_settings({}, {"base": "org/none", "key_concurrency": "2"}))
    key, other, wide = Key("sha256:a"), Key("sha256:b"), Key("sha256:c", concurrency=3)
    running = [asyncio.create_task(layer.ask(one)) for one in (key, key, other, wide, wide, wide)]
    await asyncio.sleep(0)
    status, told = await layer.ask(key)
    assert (status, told["error_type"]) == (429, "overloaded")
    assert "2 requests at once" in told["error"]
    assert (await layer.ask(wide))[0] == 429
    layer.gate.set()
    assert [status for status, _ in await asyncio.gather(*running)] == [200] * 6
    assert (await layer.ask(key))[0] == 200, "what has ended counts no more"


async def test_a_request_that_breaks_gives_its_place_back() -> None:
    layer = Layer(read_settings({}, {"base": "org/none", "key_concurrency": "1"}))
    layer.gate.set()
    layer.fails = True
    for _ in range(3):
        with pytest.raises(RuntimeError):
            await layer.ask(Key("sha256:a"))
    layer.fails = False
    assert (await layer.ask(Key("sha256:a")))[0] == 200


# ---- which adapters


def asked(one: Stage, key: str, id: str) -> list[tuple[int, str]]:
    """What every way to name an adapter answers, with the id taken out."""
    ways = [
        ("POST", "/generate", {"inputs": "Hi", "parameters": {"adapter_id": id, "max_new_tokens": 1}}),
        ("POST", "/generate_stream", {"inputs": "Hi", "parameters": {"adapter_id": id, "max_new_tokens": 1}}),
        ("POST", "/v1/completions", {"model": id, "prompt": "Hi", "max_tokens": 1}),
        ("POST", "/v1/completions", {"model": f"tiny:{id}", "prompt": "Hi", "max_tokens": 1}),
        (
            "POST",
            "/v1/chat/completions",
            {"model": id, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
        ),
        ("GET", f"/v1/models/{id}", None),
        ("GET", f"/adapters/{id}", None),
        ("GET", f"/adapters/{id}/summary", None),
        ("GET", f"/adapters/{id}/architecture", None),
        ("GET", f"/adapters/{id}/architecture/norms", None),
        ("DELETE", f"/adapters/{id}", None),
    ]
    answers = [one.knock.request(method, path, json=body, headers=bearer(key)) for method, path, body in ways]
    return [(answer.status_code, answer.text.replace(id, "ID")) for answer in answers]


def test_a_key_does_not_learn_of_an_adapter_that_is_not_on_its_list(tmp_path: Path) -> None:
    with stage(tmp_path, api_keys=key_file(tmp_path, "sk-own adapters=x", "sk-all"), base_id="tiny") as one:
        assert {status for status, _ in asked(one, "sk-own", "x")[:10]} == {200}
        hidden, unknown = asked(one, "sk-own", "org/y"), asked(one, "sk-own", "org/z")
        assert hidden == unknown
        assert {status for status, _ in hidden} == {404, 403}
        assert {status for status, _ in asked(one, "sk-all", "org/y")[:10]} == {200}
        for path in ("/adapters", "/v1/models", "/metrics", "/base", "/info"):
            assert "org/y" not in one.knock.get(path, headers=bearer("sk-own")).text
        assert [
            card["id"] for card in one.knock.get("/adapters", headers=bearer("sk-own")).json()["adapters"]
        ] == ["x"]
        assert [
            card["id"] for card in one.knock.get("/v1/models", headers=bearer("sk-own")).json()["data"]
        ] == ["tiny", "x"]
        for path in ("/adapters", "/v1/models", "/metrics"):
            assert "org/y" in one.knock.get(path, headers=bearer("sk-all")).text
        assert one.knock.post("/generate", json=BODY, headers=bearer("sk-own")).status_code == 200, (
            "the base is no adapter"
        )


def test_the_pools_rows_are_shown_by_the_same_list(tmp_path: Path) -> None:
    keys = key_file(tmp_path, "sk-a adapters=a", "sk-none adapters=other")
    with house(api_keys=keys) as home:
        home.shelf.names["a"] = {"id": "a", "digest": "sha256:a"}
        shown = {
            key: home.json("GET", "/base", headers=bearer(key))["pool"]["placements"]
            for key in ("sk-a", "sk-none")
        }
        assert [one["digest"] for one in shown["sk-a"]] == ["sha256:a"]
        assert shown["sk-none"] == []
