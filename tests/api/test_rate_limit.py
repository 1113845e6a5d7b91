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

from .scripted_app import ScriptedApp, serve_script
from .served_app import serve_app

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
    with serve_script(tmp_path, api_keys=key_file(tmp_path, "sk-slow rate=0.01", "sk-fast")) as api:
        assert api.http.post("/generate", json=BODY, headers=bearer("sk-slow")).status_code == 200
        failures, refusals = read_refusals()
        refused = api.http.post("/generate", json=BODY, headers=bearer("sk-slow"))
        assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
        assert 90 <= int(refused.headers["retry-after"]) <= 100
        body = {"model": "tiny", "prompt": "Hi"}
        dialect = api.http.post("/v1/completions", json=body, headers=bearer("sk-slow"))
        error = dialect.json()["error"]
        assert (dialect.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "overloaded")
        assert read_refusals() == (failures + 2, refusals + 2)
        for _ in range(5):
            assert api.http.post("/generate", json=BODY, headers=bearer("sk-fast")).status_code == 200
        assert len(api.engine.requests) == 6, "what is refused never reaches the engine"


def read_refusals() -> tuple[float, float]:
    """The requests that failed as overloaded, and those that a key's limit refused."""
    read_sample = metrics.REGISTRY.get_sample_value
    failures = read_sample("adapterd_request_failure_total", {"code": "overloaded"})
    return failures or 0, read_sample("adapterd_key_refusals_total") or 0


def test_all_keys_have_the_settings_rate_unless_they_have_their_own(tmp_path: Path) -> None:
    with serve_app(api_keys=key_file(tmp_path, "sk-a", "sk-b rate=1000"), key_rate="0.01") as served:
        codes = {
            key: [served.http.get("/adapters", headers=bearer(key)).status_code for _ in range(3)]
            for key in ("sk-a", "sk-b")
        }
        assert codes == {"sk-a": [200, 429, 429], "sk-b": [200, 200, 200]}


def test_probes_and_the_pages_are_free_and_a_refused_key_takes_no_share(tmp_path: Path) -> None:
    with serve_app(api_keys="sk-a", key_rate="0.01") as served:
        for path in ("/metrics", "/health", "/console/app.js", "/docs", "/openapi.json") * 2:
            assert served.http.get(path, headers=bearer("sk-a")).status_code == 200
        for _ in range(3):
            assert served.http.get("/adapters", headers=bearer("sk-wrong")).status_code == 401
        assert served.http.get("/adapters", headers=bearer("sk-a")).status_code == 200


def test_without_keys_nobody_is_counted() -> None:
    with serve_app(key_rate="0.01", key_concurrency="1") as served:
        assert [served.http.get("/adapters").status_code for _ in range(3)] == [200] * 3


# ---- so much at once


class LimitedApp:
    """The rate limit over an app that waits at `gate`, called as a server would."""

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
    layer = LimitedApp(read_settings({}, {"base": "org/none", "key_concurrency": "2"}))
    key, other, wide = Key("sha256:a"), Key("sha256:b"), Key("sha256:c", concurrency=3)
    running = [asyncio.create_task(layer.ask(api)) for api in (key, key, other, wide, wide, wide)]
    await asyncio.sleep(0)
    status, refusal = await layer.ask(key)
    assert (status, refusal["error_type"]) == (429, "overloaded")
    assert "2 requests at once" in refusal["error"]
    assert (await layer.ask(wide))[0] == 429
    layer.gate.set()
    assert [status for status, _ in await asyncio.gather(*running)] == [200] * 6
    assert (await layer.ask(key))[0] == 200, "what has ended counts no more"


async def test_a_request_that_breaks_gives_its_place_back() -> None:
    layer = LimitedApp(read_settings({}, {"base": "org/none", "key_concurrency": "1"}))
    layer.gate.set()
    layer.fails = True
    for _ in range(3):
        with pytest.raises(RuntimeError):
            await layer.ask(Key("sha256:a"))
    layer.fails = False
    assert (await layer.ask(Key("sha256:a")))[0] == 200


# ---- which adapters


PAGES = ("", "/summary", "/architecture", "/architecture/norms")


def asked(api: ScriptedApp, key: str, id: str) -> list[tuple[int, str]]:
    """What every way to name an adapter answers, with the id taken out."""
    generate = {"inputs": "Hi", "parameters": {"adapter_id": id, "max_new_tokens": 1}}
    chat = {"model": id, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    ways: list[tuple[str, str, Any]] = [
        ("POST", "/generate", generate),
        ("POST", "/generate_stream", generate),
        ("POST", "/v1/completions", {"model": id, "prompt": "Hi", "max_tokens": 1}),
        ("POST", "/v1/completions", {"model": f"tiny:{id}", "prompt": "Hi", "max_tokens": 1}),
        ("POST", "/v1/chat/completions", chat),
        ("GET", f"/v1/models/{id}", None),
        *(("GET", f"/adapters/{id}{page}", None) for page in PAGES),
        ("DELETE", f"/adapters/{id}", None),
    ]
    answers = [api.http.request(method, path, json=body, headers=bearer(key)) for method, path, body in ways]
    return [(answer.status_code, answer.text.replace(id, "ID")) for answer in answers]


def test_a_key_does_not_learn_of_an_adapter_that_is_not_on_its_list(tmp_path: Path) -> None:
    keys = key_file(tmp_path, "sk-own adapters=x", "sk-all")
    with serve_script(tmp_path, api_keys=keys, base_id="tiny") as api:
        assert {status for status, _ in asked(api, "sk-own", "x")[:10]} == {200}
        hidden, unknown = asked(api, "sk-own", "org/y"), asked(api, "sk-own", "org/z")
        assert hidden == unknown
        assert {status for status, _ in hidden} == {404, 403}
        assert {status for status, _ in asked(api, "sk-all", "org/y")[:10]} == {200}


def test_no_list_shows_a_key_an_adapter_that_is_not_on_its_own(tmp_path: Path) -> None:
    keys = key_file(tmp_path, "sk-own adapters=x", "sk-all")
    with serve_script(tmp_path, api_keys=keys, base_id="tiny") as api:
        for path in ("/adapters", "/v1/models", "/metrics", "/base", "/info"):
            assert "org/y" not in api.http.get(path, headers=bearer("sk-own")).text
        adapters = api.http.get("/adapters", headers=bearer("sk-own")).json()["adapters"]
        assert [card["id"] for card in adapters] == ["x"]
        models = api.http.get("/v1/models", headers=bearer("sk-own")).json()["data"]
        assert [model["id"] for model in models] == ["tiny", "x"]
        for path in ("/adapters", "/v1/models", "/metrics"):
            assert "org/y" in api.http.get(path, headers=bearer("sk-all")).text
        assert api.http.post("/generate", json=BODY, headers=bearer("sk-own")).status_code == 200, (
            "the base is no adapter"
        )


def test_the_pools_rows_are_shown_by_the_same_list(tmp_path: Path) -> None:
    keys = key_file(tmp_path, "sk-a adapters=a", "sk-none adapters=other")
    with serve_app(api_keys=keys) as served:
        served.registry.cards["a"] = {"id": "a", "digest": "sha256:a"}
        shown = {
            key: served.json("GET", "/base", headers=bearer(key))["pool"]["placements"]
            for key in ("sk-a", "sk-none")
        }
        assert [placement["digest"] for placement in shown["sk-a"]] == ["sha256:a"]
        assert shown["sk-none"] == []
