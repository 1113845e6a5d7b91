"""Versions over HTTP: a digest that a request demands, one that a registration expects, and rolling back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script
from .served_app import ServedApp, serve_app

OTHER = "sha256:" + "b" * 64
HI = [{"role": "user", "content": "Hi"}]
PATHS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": HI, "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
    "/v1/messages": {"messages": HI, "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": HI},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [5]},
}
FILES = {"file": ("a.zip", b"zip")}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("versions"), template="{{ messages[0].content }}") as app:
        yield app


@pytest.fixture
def served() -> Iterator[ServedApp]:
    with serve_app() as found:
        yield found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["x", "org/y", "tiny:x"])
def test_a_name_may_demand_a_digest_in_every_dialect(api: ScriptedApp, path: str, name: str) -> None:
    for digest in (DIGEST, DIGEST[:15]):
        answer = api.post(path, PATHS[path] | {"model": f"{name}@{digest}"})
        assert answer.headers["x-adapter-id"] == name.rpartition(":")[2]
        assert answer.headers["x-adapter-digest"] == DIGEST
    refused = api.post(path, PATHS[path] | {"model": f"{name}@{OTHER}"}, 409)
    assert refused.headers["x-should-retry"] == "false"
    assert "digest_mismatch" in refused.text or path.startswith("/v1/messages")
    invalid = 400 if path.startswith("/v1/") else 422
    api.post(path, PATHS[path] | {"model": f"{name}@sha256:short"}, invalid)
    api.post(path, PATHS[path] | {"model": f"none@{DIGEST}"}, 404)
    assert api.quiet


def test_a_name_may_demand_a_digest_in_tgis_dialect(api: ScriptedApp) -> None:
    told = api.generate(adapter_id=f"x@{DIGEST[:20]}", max_new_tokens=1)
    assert told["adapter"] == {"id": "x", "digest": DIGEST}
    assert api.generate(adapter_id=f"x@{OTHER}", status=409)["error_type"] == "digest_mismatch"
    parts = [{"id": f"x@{DIGEST}", "weight": 1}, {"id": "org/y", "weight": 1}]
    assert len(api.generate(adapters=parts, max_new_tokens=1)["adapter"]["parts"]) == 2
    parts[0]["id"] = f"x@{OTHER}"
    assert api.generate(adapters=parts, status=409)["error_type"] == "digest_mismatch"


def test_a_key_sees_no_more_by_a_digest(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-x name=x adapters=x\n")
    (tmp_path / "app").mkdir()
    with serve_script(tmp_path / "app", api_keys=f"@{keys}", admin_keys="sk-admin") as api:
        api.http.headers["authorization"] = "Bearer sk-x"
        api.complete(model=f"x@{DIGEST}", max_tokens=1)
        api.complete(model=f"org/y@{DIGEST}", status=404)
        assert api.http.get("/adapters/x/versions").status_code == 200
        assert api.http.get("/adapters/org/y/versions").status_code == 404
        assert api.http.post("/adapters/x/rollback", json={}).status_code == 403
        assert api.http.put("/adapters/x/upload", files=FILES).status_code == 403


def test_versions_are_listed_and_rolled_back_to(served: ServedApp) -> None:
    served.json("POST", "/adapters", {"id": "org/a", "source": "one"}, 201)
    told = served.json("GET", "/adapters/org%2Fa/versions")
    assert [version["digest"] for version in told["versions"]] == ["sha256:one"]
    served.json("GET", "/adapters/none/versions", status=404)
    assert served.json("POST", "/adapters/org/a/rollback", {})["id"] == "org/a"
    for digest in (DIGEST, DIGEST[:15], None):
        served.json("POST", "/adapters/org/a/rollback", {"digest": digest})
    assert [call[2] for call in served.registry.calls if call[0] == "roll_back"] == [
        None,
        DIGEST,
        DIGEST[:15],
        None,
    ]
    served.json("POST", "/adapters/none/rollback", {}, 404)
    for wrong in ("", "sha256:", "sha256:short", DIGEST + "a", "nonsense", 5, DIGEST.upper()):
        told = served.json("POST", "/adapters/org/a/rollback", {"digest": wrong}, 422)
        assert "digest" in told["error"]


def test_a_registration_may_expect_a_digest(served: ServedApp) -> None:
    served.json("POST", "/adapters", {"id": "a", "source": "one", "expect": DIGEST}, 201)
    for method, path in (("POST", "/adapters"), ("PUT", "/adapters/b")):
        told = served.json(method, path, {"id": "b", "source": "one", "expect": OTHER}, 422)
        assert told["error_type"] == "digest_mismatch"
        assert told["details"] == {"expected": OTHER, "digest": DIGEST}
    served.json("PUT", "/adapters/b", {"source": "one", "expect": None}, 201)
    asked = {"id": "a", "source": "one", "expect": DIGEST}
    assert served.json("POST", "/adapters/check", asked)["summary"]["expect"] == DIGEST
    for wrong in ("sha256:", "nonsense", 5, DIGEST[:-1], DIGEST.upper(), ""):
        for method, path in (("POST", "/adapters"), ("PUT", "/adapters/a"), ("POST", "/adapters/check")):
            told = served.json(method, path, {"id": "a", "source": "one", "expect": wrong}, 422)
            assert told["error"].startswith("expect: "), told


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_an_upload_may_expect_a_digest(served: ServedApp, method: str) -> None:
    path = "/adapters/up/upload"
    served.json(method, path, status=422, files=FILES, data={"expect": OTHER})
    served.json(method, path, status=201, files=FILES, data={"expect": DIGEST})
    for wrong in ({"expect": ""}, {"expect": "nonsense"}, {"expect": [DIGEST, DIGEST]}, {"expected": DIGEST}):
        told = served.json(method, path, status=422, files=FILES, data=wrong)
        assert told["error_type"] == "validation"


def test_an_upload_may_replace(served: ServedApp) -> None:
    served.json("PUT", "/adapters/org/up/upload", status=201, files=FILES)
    served.json("POST", "/adapters/a", {}, 405)
    served.json("PUT", "/adapters/org%2Fup/upload", status=200, files=FILES)
    assert [call[:2] for call in served.registry.calls if call[0] == "upload"] == [("upload", "org/up")] * 2
    assert [call[3] for call in served.registry.calls if call[0] == "register"] == [True, True]


def test_an_upload_that_replaces_has_the_limit_of_uploads() -> None:
    with serve_app(max_body_mb="0.001", max_upload_mb="0.01") as served:
        served.json("PUT", "/adapters/up/upload", status=201, files={"file": ("a.zip", b"z" * 5000)})
        served.json("PUT", "/adapters/up/upload", status=413, files={"file": ("a.zip", b"z" * 20_000)})
