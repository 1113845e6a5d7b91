"""Aliases over HTTP: setting and removing them, and the target that each request goes to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.telemetry import metrics
from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script

BOTH = [{"id": "x", "weight": 1}, {"id": "org/y", "weight": 1}]
HI = [{"role": "user", "content": "Hi"}]
NAMING: dict[str, Any] = {
    "/v1/completions": lambda user: {"prompt": "Hi", "max_tokens": 1, "user": user},
    "/v1/chat/completions": lambda user: {"messages": HI, "max_tokens": 1, "user": user},
    "/v1/responses": lambda user: {"input": "Hi", "max_output_tokens": 1, "user": user},
    "/v1/messages": lambda user: {"messages": HI, "max_tokens": 1, "metadata": {"user_id": user}},
}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ScriptedApp]:
    metrics.alias_removed("prod")
    with serve_script(tmp_path, template="{{ messages[0].content }}") as app:
        yield app
        assert app.quiet


def put(api: ScriptedApp, status: int = 200, name: str = "prod", **body: Any) -> Any:
    answer = api.http.put(f"/aliases/{name}", json={"targets": BOTH} | body)
    assert answer.status_code == status, answer.text
    return answer.json()


def answered(api: ScriptedApp, path: str, body: Any, **headers: str) -> str:
    answer = api.http.post(path, json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.headers["x-adapter-id"])


def test_an_alias_is_set_changed_listed_and_removed(api: ScriptedApp) -> None:
    made = put(api, 201, sticky="user")
    assert (made["name"], made["sticky"]) == ("prod", "user")
    assert made["targets"] == [target | {"digest": None} for target in BOTH]
    assert put(api, targets=[{"id": "x", "weight": 0.5, "digest": DIGEST[:15]}])["sticky"] is None
    put(api, 201, name="org/canary")
    assert [one["name"] for one in api.http.get("/aliases").json()["aliases"]] == ["org/canary", "prod"]
    assert api.http.delete("/aliases/org%2Fcanary").json()["name"] == "org/canary"
    assert api.http.delete("/aliases/org/canary").status_code == 404
    assert api.http.delete("/aliases/").status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        {"targets": []},
        {"targets": None},
        {"targets": [{"id": "x"}]},
        {"targets": [{"id": "x", "weight": -1}]},
        {"targets": [{"id": "x", "weight": 0}]},
        {"targets": [{"id": "x", "weight": 1e7}]},
        {"targets": [{"id": "x", "weight": True}]},
        {"targets": [{"id": "x", "weight": 1, "digest": "sha256:"}]},
        {"targets": [{"id": "x", "weight": 1, "more": 1}]},
        {"targets": BOTH * 2},
        {"targets": [{"id": f"x{i}", "weight": 1} for i in range(40)]},
        {"sticky": ""},
        {"sticky": "x tenant"},
        {"sticky": "x" * 65},
        {"sticky": 5},
        {"more": 1},
    ],
)
def test_a_wrong_alias_is_a_validation_error(api: ScriptedApp, body: Any) -> None:
    told = put(api, 422, **body)
    assert told["error_type"] == "validation"
    assert not api.registry.aliases.list_aliases()


def test_weights_that_json_does_not_have_are_refused(api: ScriptedApp) -> None:
    for weight in ("NaN", "Infinity", "1e999"):
        body = f'{{"targets": [{{"id": "x", "weight": {weight}}}]}}'
        headers = {"content-type": "application/json"}
        assert api.http.put("/aliases/prod", content=body, headers=headers).status_code == 422


def test_an_unknown_target_is_404(api: ScriptedApp) -> None:
    told = put(api, 404, targets=[*BOTH, {"id": "none", "weight": 0}])
    assert told["error_type"] == "adapter_not_found"


def test_answers_name_the_target_and_its_digest(api: ScriptedApp) -> None:
    put(api, 201, targets=[{"id": "org/y", "weight": 1}])
    told = api.generate(adapter_id="prod", max_new_tokens=1)
    assert told["adapter"] == {"id": "org/y", "digest": DIGEST}
    told = api.complete(model="prod", max_tokens=1)
    assert (told["model"], told["adapter"]) == ("prod", {"id": "org/y", "digest": DIGEST})
    assert api.complete(model="tiny:prod", max_tokens=1)["adapter"]["id"] == "org/y"
    events = api.stream("/generate_stream", {"inputs": "Hi", "parameters": {"adapter_id": "prod"}})
    assert events[-1]["adapter"] == {"id": "org/y", "digest": DIGEST}
    parts = [{"id": "prod", "weight": 1}, {"id": "x", "weight": 1}]
    mixed = api.generate(adapters=parts, max_new_tokens=1)["adapter"]["parts"]
    assert [part["id"] for part in mixed] == ["org/y", "x"]
    refused = api.complete(model=f"prod@{DIGEST}", status=400)
    assert "alias" in refused["error"]["message"]
    put(api, targets=[{"id": "org/y", "weight": 1, "digest": DIGEST[:15]}])
    api.registry.cards["org/y"]["digest"] = "sha256:" + "b" * 64
    assert api.generate(adapter_id="prod", status=409)["error_type"] == "digest_mismatch"


def test_requests_are_shared_and_counted_by_target(api: ScriptedApp) -> None:
    put(api, 201)
    went = [api.complete(model="prod", max_tokens=2)["adapter"]["id"] for _ in range(40)]
    assert set(went) == {"x", "org/y"}
    shown = api.http.get("/metrics").text
    for id in set(went):
        labels = f'{{adapter="{id}",alias="prod",digest="{DIGEST}"}}'
        assert f"adapterd_alias_requests_total{labels} {went.count(id)}.0" in shown
        assert f"adapterd_alias_e2e_request_latency_seconds_count{labels} {went.count(id)}.0" in shown


@pytest.mark.parametrize("path", NAMING)
def test_the_same_user_gets_the_same_target_in_every_dialect(api: ScriptedApp, path: str) -> None:
    put(api, 201, sticky="user")
    api.engine.limit = 10_000
    ask = NAMING[path]
    went = {
        user: {answered(api, path, ask(user) | {"model": "prod"}) for _ in range(4)}
        for user in map("user-{}".format, range(16))
    }
    assert {len(targets) for targets in went.values()} == {1}
    assert set.union(*went.values()) == {"x", "org/y"}
    plain = {answered(api, "/v1/completions", {"model": "prod", "prompt": "Hi", "user": u}) for u in went}
    assert plain == {"x", "org/y"}
    nobodies: tuple[object, ...] = (None, "", 5, ["a"], {})
    for nobody in nobodies:
        drawn = {answered(api, path, ask(nobody) | {"model": "prod"}) for _ in range(40)}
        assert drawn == {"x", "org/y"}, "nobody is named"


def test_a_header_may_name_the_caller(api: ScriptedApp) -> None:
    put(api, 201, sticky="X-Tenant")
    body = {"inputs": "Hi", "parameters": {"adapter_id": "prod", "max_new_tokens": 1}}
    went = [
        {answered(api, "/generate", body, **{"x-tenant": tenant}) for _ in range(4)}
        for tenant in map("tenant-{}".format, range(16))
    ]
    assert {len(targets) for targets in went} == {1}
    assert set.union(*went) == {"x", "org/y"}


def test_models_list_aliases_with_their_targets(api: ScriptedApp) -> None:
    put(api, 201)
    (model,) = [m for m in api.http.get("/v1/models").json()["data"] if m["id"] == "prod"]
    assert model == api.http.get("/v1/models/prod").json()
    assert (model["object"], model["parent"], model["adapter"]) == ("model", "tiny", None)
    assert [target["id"] for target in model["targets"]] == ["x", "org/y"]


def test_a_key_may_use_the_aliases_on_its_list_alone(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-prod name=prod adapters=prod\nsk-x name=x adapters=x\n")
    (tmp_path / "app").mkdir()
    with serve_script(tmp_path / "app", api_keys=f"@{keys}", admin_keys="sk-admin") as api:
        for method, path in (("GET", "/aliases"), ("PUT", "/aliases/prod"), ("DELETE", "/aliases/prod")):
            refused = api.http.request(method, path, headers={"authorization": "Bearer sk-x"})
            assert refused.status_code == 403
        api.http.headers["authorization"] = "Bearer sk-admin"
        put(api, 201)
        api.http.headers["authorization"] = "Bearer sk-prod"
        api.complete(model="prod", max_tokens=1)
        api.complete(model="x", status=404)
        api.http.headers["authorization"] = "Bearer sk-x"
        api.complete(model="prod", status=404)
        assert [model["id"] for model in api.http.get("/v1/models").json()["data"]] == ["tiny", "x"]
