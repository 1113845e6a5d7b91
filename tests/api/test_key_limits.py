"""What a key allows its requests: the lowest priority, and so many tokens a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.generation.key_limits import TokenBudgets, choose_priority
from service.errors import Forbidden, Overloaded
from service.keys import Key
from service.settings import Settings
from service.telemetry import metrics
from tests import making

from .scripted_app import ScriptedApp, serve_script

KEYS = "sk-any\nsk-batch name=batch max_priority=5\nsk-urgent max_priority=-2\nsk-small tokens=11\n"
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
COMPLETE = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ScriptedApp]:
    (tmp_path / "keys").write_text(KEYS)
    with serve_script(tmp_path, api_keys=f"@{tmp_path / 'keys'}") as scripted:
        yield scripted


def ask(api: ScriptedApp, key: str, path: str, body: Any) -> Any:
    return api.http.post(path, json=body, headers={"authorization": f"Bearer {key}"})


def generate(api: ScriptedApp, key: str, **parameters: Any) -> Any:
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 2} | parameters}
    return ask(api, key, "/generate", body)


# ---- priority


def test_a_priority_reaches_the_engine_from_each_dialect_that_has_one(api: ScriptedApp) -> None:
    assert generate(api, "sk-any", priority=-7).status_code == 200
    assert api.request.priority == -7
    for path, body in (("/v1/completions", COMPLETE), ("/v1/chat/completions", CHAT)):
        assert ask(api, "sk-any", path, body | {"priority": 9}).status_code == 200
        assert api.request.priority == 9
        assert ask(api, "sk-any", path, body | {"priority": None}).status_code == 200
        assert api.request.priority == 0


@pytest.mark.parametrize("wrong", ["x", 1.5, True, 2**31, -(2**31) - 1, [1]])
def test_a_priority_that_is_none_is_refused_by_name(api: ScriptedApp, wrong: Any) -> None:
    native = generate(api, "sk-any", priority=wrong)
    assert (native.status_code, native.json()["error_type"]) == (422, "validation")
    assert "priority" in native.json()["error"]
    for path, body in (("/v1/completions", COMPLETE), ("/v1/chat/completions", CHAT)):
        refused = ask(api, "sk-any", path, body | {"priority": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "priority")
    assert not api.engine.requests


def test_a_key_has_no_request_before_its_lowest_priority(api: ScriptedApp) -> None:
    refused = generate(api, "sk-batch", priority=4)
    assert (refused.status_code, refused.json()["error_type"]) == (403, "forbidden")
    assert "5" in refused.json()["error"]
    dialect = ask(api, "sk-batch", "/v1/completions", COMPLETE | {"priority": 0})
    assert (dialect.status_code, dialect.json()["error"]["param"]) == (403, "priority")
    assert not api.engine.requests
    assert generate(api, "sk-batch", priority=6).status_code == 200
    assert api.request.priority == 6
    anthropic = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    for path, body in (("/v1/messages", anthropic), ("/v1/completions", COMPLETE)):
        assert ask(api, "sk-batch", path, body).status_code == 200
        assert api.request.priority == 5, "a request that says nothing has the lowest that it may"


def test_the_lowest_priority_of_a_key_is_no_default_where_it_is_under_0() -> None:
    urgent = Key("", max_priority=-2)
    assert [choose_priority(urgent, wanted) for wanted in (None, 0, -2)] == [0, 0, -2]
    with pytest.raises(Forbidden, match="-2, not -3"):
        choose_priority(urgent, -3)
    assert [choose_priority(key, None) for key in (None, Key(""))] == [0, 0]


# ---- tokens a minute


def test_a_key_that_has_used_its_tokens_gets_429_and_another_key_is_served(api: ScriptedApp) -> None:
    size = len(making.ids("Hi"))
    read_sample = metrics.REGISTRY.get_sample_value
    before = read_sample("adapterd_key_refusals_total") or 0
    used = 0
    while used < 11:
        assert generate(api, "sk-small").status_code == 200, used
        used += size + 2
    refused = generate(api, "sk-small")
    assert (refused.status_code, refused.json()["error_type"]) == (429, "overloaded")
    assert "11 tokens a minute" in refused.json()["error"]
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    dialect = ask(api, "sk-small", "/v1/chat/completions", CHAT)
    assert (dialect.status_code, dialect.json()["error"]["code"]) == (429, "overloaded")
    assert read_sample("adapterd_key_refusals_total") == before + 2
    reading = api.http.get("/adapters", headers={"authorization": "Bearer sk-small"})
    assert reading.status_code == 200, "what uses no tokens goes on"
    assert generate(api, "sk-any").status_code == 200


def test_all_keys_have_the_settings_tokens_unless_they_have_their_own(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-a\nsk-b tokens=1000\n")
    with serve_script(tmp_path, api_keys=f"@{tmp_path / 'keys'}", key_tokens="1") as api:
        codes = {key: [generate(api, key).status_code for _ in range(3)] for key in ("sk-a", "sk-b")}
    assert codes == {"sk-a": [200, 429, 429], "sk-b": [200, 200, 200]}


def test_tokens_come_back_all_the_time_and_a_minutes_worth_at_most() -> None:
    now = [0.0]
    budgets, key = TokenBudgets(Settings(base="demo"), lambda: now[0]), Key("sha256:a", tokens=60)
    budgets.require_left(key)
    budgets.take_tokens(key, 90)
    with pytest.raises(Overloaded) as refused:
        budgets.require_left(key)
    assert refused.value.retry_after == 30
    now[0] = 30.5
    budgets.require_left(key)
    now[0] = 10_000.0
    budgets.take_tokens(key, 60)
    with pytest.raises(Overloaded):
        budgets.require_left(key)
    budgets.require_left(Key("sha256:b", tokens=60))
    budgets.require_left(Key("sha256:c"))
    budgets.require_left(None)
