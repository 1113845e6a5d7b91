"""What /usage tells: each admitted request once, under its adapter and key, however it ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.errors import Internal
from service.keys import hash_secret
from service.telemetry.usage import FILE
from tests import making

from .scripted_app import ScriptedApp, serve_script
from .test_admission import leave, shut

SIZE = len(making.ids("Hi"))
ADMIN = {"authorization": "Bearer sk-admin"}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path) as scripted:
        yield scripted


def told(api: ScriptedApp, query: str = "", **headers: str) -> list[dict[str, Any]]:
    answer = api.http.get(f"/usage{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["usage"]
    return rows


def row(adapter: str | None, requests: int, prompt: int, generated: int, failures: int = 0) -> dict[str, Any]:
    counts = {"requests": requests, "prompt_tokens": prompt, "cached_tokens": 0}
    return {"adapter": adapter, "key": None, **counts, "generated_tokens": generated, "failures": failures}


def test_nothing_was_used_at_first(api: ScriptedApp) -> None:
    assert told(api) == []


def test_each_dialects_requests_count_with_their_tokens(api: ScriptedApp) -> None:
    api.generate("Hi", adapter_id="x", max_new_tokens=3)
    api.complete("Hi", model="x", max_tokens=2)
    api.stream("/generate_stream", {"inputs": "Hi", "parameters": {"adapter_id": "x", "max_new_tokens": 4}})
    api.generate("Hi", max_new_tokens=5)
    assert told(api) == [row(None, 1, SIZE, 5), row("x", 3, 3 * SIZE, 9)]
    assert told(api, "?by=adapter") == [
        {name: value for name, value in each.items() if name != "key"} for each in told(api)
    ]
    (whole,) = told(api, "?by=key")
    assert whole == {"key": None, "requests": 4, "prompt_tokens": 4 * SIZE, "cached_tokens": 0} | {
        "generated_tokens": 14,
        "failures": 0,
    }


def test_several_answers_are_one_request_and_their_prompt_counts_once(api: ScriptedApp) -> None:
    api.complete("Hi", n=3, max_tokens=2)
    assert told(api) == [row(None, 1, SIZE, 6)]
    api.complete(["Hi", "Hi"], n=2, max_tokens=2)
    assert told(api) == [row(None, 2, 3 * SIZE, 14)]


def test_several_adapters_of_one_request_are_one_group(api: ScriptedApp) -> None:
    parts = [{"id": "x", "weight": 0.5}, {"id": "org/y", "weight": 1.0}]
    api.generate("Hi", adapters=parts, max_new_tokens=2)
    assert told(api) == [row("org/y+x", 1, SIZE, 2)]


def test_a_request_that_fails_counts_with_the_tokens_it_had(api: ScriptedApp) -> None:
    api.engine.fails = ("internal", "the step failed")
    api.generate("Hi", 500, max_new_tokens=5)
    api.stream("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 5}})
    assert told(api) == [row(None, 2, 2 * SIZE, 4, failures=2)]


def test_a_client_that_leaves_is_no_failure(api: ScriptedApp) -> None:
    shut(api, early=2)
    body = {"inputs": "Hi", "parameters": {"max_new_tokens": 5}}
    leave(
        api, "/generate", body, lambda _: bool(api.engine.tickets) and api.engine.tickets[-1].last is not None
    )
    (counted,) = told(api)
    assert (counted["requests"], counted["failures"]) == (1, 0)


def test_a_defect_counts_as_a_failure(api: ScriptedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr("service.api.routes.generate._make_whole", break_down)
    api.generate("Hi", 500, max_new_tokens=2)
    assert told(api) == [row(None, 1, SIZE, 2, failures=1)]
    assert Internal.status == 500


def test_what_is_refused_is_not_counted(api: ScriptedApp) -> None:
    api.generate("Hi", 404, adapter_id="none")
    api.generate("Hi", 422, max_new_tokens=100_000)
    api.complete(["Hi", "Hi " * 600], 400)
    api.engine.limit = 2
    api.complete("Hi", 429, n=3)
    api.complete(["Hi", "Hi", "Hi"], 429)
    assert told(api) == []
    assert api.quiet


# ---- keys, and the span


def test_each_key_has_its_name_or_a_piece_of_its_hash_and_only_admins_are_told(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-user-1 name=web\nsk-user-2\n")
    with serve_script(tmp_path, api_keys=f"@{tmp_path / 'keys'}", admin_keys="sk-admin") as api:
        for key in ("sk-user-1", "sk-user-2", "sk-user-2"):
            body = {"inputs": "Hi", "parameters": {"max_new_tokens": 2}}
            api.http.post("/generate", json=body, headers={"authorization": f"Bearer {key}"})
        found = {each["key"]: each["requests"] for each in told(api, "?by=key", **ADMIN)}
        assert found == {"web": 1, hash_secret("sk-user-2")[:19]: 2}
        assert "sk-" not in api.http.get("/usage", headers=ADMIN).text
        user = {"authorization": "Bearer sk-user-1"}
        assert [api.http.get("/usage", headers=one).status_code for one in (user, {})] == [403, 401]


def test_the_span_is_of_whole_hours(api: ScriptedApp) -> None:
    now = [7200.0]
    api.app.state.services.usage._clock = lambda: now[0]
    for at in (7200.0, 10_799.0, 10_800.0):
        now[0] = at
        api.generate("Hi", max_new_tokens=1)
    counts = {
        "?since=1970-01-01T02:59:00Z": 3,
        "?since=1970-01-01T03:00:00": 1,
        "?since=1970-01-01T04:00:00%2B01:00": 1,
        "?since=1970-01-01T04:00:00+01:00": 1,
        "?until=1970-01-01T03:00:00Z": 2,
        "?until=1970-01-01T03:00:01Z": 3,
        "?since=1970-01-01&until=1970-01-02": 3,
        "?since=1970-01-02": 0,
    }
    for query, wanted in counts.items():
        assert sum(each["requests"] for each in told(api, query)) == wanted, query


WRONG = {
    "by=nonsense": "by",
    "by=": "by",
    "by=adapter,adapter": "by",
    "since=nonsense": "since",
    "since=": "since",
    "since=1700000000": "since",
    "until=2026-13-01": "until",
    "until=0001-01-01T00:00:00%2B23:59": "",
    "since=2026-01-02&until=2026-01-01": "until",
    "since=%00": "since",
    "form=text": "form",
}


@pytest.mark.parametrize("query", WRONG)
def test_a_wrong_query_is_422_naming_it(api: ScriptedApp, query: str) -> None:
    answer = api.http.get(f"/usage?{query}")
    if not WRONG[query]:
        assert answer.status_code in (200, 422)
        return
    assert (answer.status_code, answer.json()["error_type"]) == (422, "validation")
    assert answer.json()["error"].startswith(WRONG[query])


# ---- the file


def test_it_is_kept_over_a_restart(tmp_path: Path) -> None:
    for wanted in (1, 2):
        with serve_script(tmp_path) as api:
            api.app.state.services.usage.keep_in(tmp_path)
            api.generate("Hi", adapter_id="x", max_new_tokens=3)
            assert told(api) == [row("x", wanted, wanted * SIZE, wanted * 3)]
    assert (tmp_path / FILE).exists()


def test_what_cannot_be_read_is_503_with_the_reason(api: ScriptedApp, tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    api.app.state.services.usage.keep_in(tmp_path)
    api.generate("Hi", max_new_tokens=3)
    answer = api.http.get("/usage")
    assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
    assert "cannot be read" in answer.json()["error"]
    assert str(tmp_path) not in answer.text
    api.generate("Hi", max_new_tokens=3)
    (tmp_path / FILE).rmdir()
    assert told(api) == [row(None, 2, 2 * SIZE, 6)], "nothing was lost meanwhile"
