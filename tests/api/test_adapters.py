"""Management over HTTP: statuses, bodies, ids with a slash in both spellings, text where it is
asked for, and vLLM's aliases.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.core.manifest import CONFIG, TEXT_FILES, WEIGHTS

from .served_app import ServedApp, serve_app

SPELLINGS = ("org/name.v1", "org%2Fname.v1")


@pytest.fixture
def served() -> Iterator[ServedApp]:
    with serve_app() as found:
        yield found


def load(served: ServedApp, id: str = "a", source: str = "folder") -> None:
    served.json("POST", "/adapters", {"id": id, "source": source}, 201)


def test_registering_is_201_then_200_then_409(served: ServedApp) -> None:
    card = served.json("POST", "/adapters", {"id": "a", "source": "folder", "pinned": True}, 201)
    assert (card["id"], card["pinned"]) == ("a", True)
    served.json("POST", "/adapters", {"id": "a", "source": "folder"}, 200)
    assert served.json("POST", "/adapters", {"id": "a", "source": "other"}, 409)["error_type"] == "conflict"
    assert (
        served.json("POST", "/adapters", {"id": "a", "source": "outside"}, 403)["error_type"] == "forbidden"
    )
    assert [card["id"] for card in served.json("GET", "/adapters")["adapters"]] == ["a"]


def test_all_fields_of_a_registration_arrive(served: ServedApp) -> None:
    body = {
        "id": "a",
        "source": "hub:org/x",
        "subfolder": "s",
        "revision": "r",
        "pinned": True,
        "preload": False,
    }
    served.json("POST", "/adapters", body, 201)
    rest = {"subfolder": "s", "revision": "r", "pinned": True, "preload": False}
    assert served.registry.calls == [("register", "a", "hub:org/x", False, rest)]


@pytest.mark.parametrize(
    "body",
    [
        {"id": "x"},
        {"source": "x"},
        {"id": "x", "source": "x", "pinned": "yes"},
        {"id": "x", "source": "x", "preload": 1},
    ],
)
def test_a_wrong_registration_is_a_validation_error(served: ServedApp, body: dict[str, Any]) -> None:
    assert served.json("POST", "/adapters", body, 422)["error_type"] == "validation"
    assert not served.registry.calls


def test_a_dry_run_registers_nothing(served: ServedApp) -> None:
    told = served.json(
        "POST", "/adapters/check", {"id": "a", "source": "folder", "subfolder": "s", "pinned": True}
    )
    asked = {"id": "a", "source": "folder", "subfolder": "s", "revision": None, "preload": True}
    assert told == {"ok": True, "problems": [], "summary": asked}
    assert served.json("GET", "/adapters") == {"adapters": []}


@pytest.mark.parametrize("written", SPELLINGS)
def test_an_id_with_a_slash_works_on_every_route(served: ServedApp, written: str) -> None:
    load(served, "org/name.v1")
    assert served.json("GET", f"/adapters/{written}")["id"] == "org/name.v1"
    assert served.json("GET", f"/adapters/{written}/summary")["rank"] == 4
    assert served.http.get(f"/adapters/{written}/architecture").text == "org/name.v1: base_layer"
    assert served.json("GET", f"/adapters/{written}/architecture/norms")["id"] == "org/name.v1"
    assert served.json("PATCH", f"/adapters/{written}", {"pinned": True})["pinned"] is True
    assert (
        served.json("PUT", f"/adapters/{written}", {"id": "org/name.v1", "source": "new"})["source"] == "new"
    )
    assert served.json("DELETE", f"/adapters/{written}")["id"] == "org/name.v1"


@pytest.mark.parametrize("id", ["norms", "org/norms", "architecture/norms"])
def test_the_route_to_the_norms_hides_no_id(served: ServedApp, id: str) -> None:
    load(served, id)
    assert served.json("GET", f"/adapters/{id}")["source"] == "folder"


def test_put_makes_or_replaces_and_takes_no_other_id(served: ServedApp) -> None:
    served.json("PUT", "/adapters/a", {"source": "one"}, 201)
    served.json("PUT", "/adapters/a", {"source": "two", "id": "a"}, 200)
    assert "id" in served.json("PUT", "/adapters/a", {"source": "two", "id": "b"}, 422)["error"]
    assert served.json("GET", "/adapters/a")["digest"] == "sha256:two"


@pytest.mark.parametrize("id", ["none", "", "..", "%2e%2e", "a%00b", "%C3%A9", "a/b/c", "check"])
def test_an_unknown_id_is_404_on_every_route(served: ServedApp, id: str) -> None:
    for method, suffix, body in (
        ("GET", "", None),
        ("GET", "/summary", None),
        ("GET", "/architecture", None),
        ("GET", "/architecture/norms", None),
        ("DELETE", "", None),
    ):
        # The client tidies these away; the server's own tests send them raw
        if not (id in ("", "..", "%2e%2e") and suffix == ""):
            told = served.json(method, f"/adapters/{id}{suffix}", body, 404)
            assert told["error_type"] in ("adapter_not_found", "not_found")


def test_the_summary_is_text_where_that_is_asked_for(served: ServedApp) -> None:
    load(served)
    for query, accept in (("", "text/plain"), ("?format=text", "application/json"), ("?format=text", "*/*")):
        answer = served.http.get(f"/adapters/a/summary{query}", headers={"accept": accept})
        assert answer.headers["content-type"].startswith("text/plain")
        assert answer.text == "a rank 4"
    for query, accept in (
        ("", "*/*"),
        ("?format=json", "text/plain"),
        ("", "application/json, text/plain, */*"),
    ):
        assert served.json("GET", f"/adapters/a/summary{query}", headers={"accept": accept})["rank"] == 4
    assert "format" in served.json("GET", "/adapters/a/summary?format=xml", status=422)["error"]


def test_delete_says_what_it_freed_and_purges_only_when_asked(served: ServedApp) -> None:
    for query, purge in (("", False), ("?purge=true", True)):
        load(served)
        told = served.json("DELETE", f"/adapters/a{query}")
        assert told == {
            "id": "a",
            "digest": "sha256:folder",
            "drained_requests": 0,
            "freed_bytes": 7,
            "purge": purge,
        }
        served.json("GET", "/adapters/a", status=404)


def test_an_upload_hands_its_files_over(served: ServedApp) -> None:
    files = {"adapter_config.json": ("c", b"{}"), "adapter_model.safetensors": ("w", b"w" * 3_000_000)}
    served.json("POST", "/adapters/org/up/upload", status=201, files=files)
    assert served.registry.calls[0] == (
        "upload",
        "org/up",
        {"adapter_config.json": b"{}", "adapter_model.safetensors": b"w" * 3_000_000},
    )
    served.json("POST", "/adapters/org%2Fup/upload", status=200, files={"file": ("a.zip", b"zip")})


def test_an_upload_hands_over_every_file_that_shapes_an_answer(served: ServedApp) -> None:
    names = [CONFIG, WEIGHTS, *TEXT_FILES, "vocab.json", "vocab.txt", "vocab.bpe"]
    served.json(
        "POST", "/adapters/up/upload", status=201, files={name: (name, name.encode()) for name in names}
    )
    assert served.registry.calls[0] == ("upload", "up", {name: name.encode() for name in names})
    told = served.json("GET", "/openapi.json")["paths"]["/adapters/{id}/upload"]["post"]["requestBody"]
    assert set(names) - {"vocab.bpe"} <= told["content"]["multipart/form-data"]["schema"]["properties"].keys()


@pytest.mark.parametrize(
    "sent",
    [
        {"data": {"file": "no file"}},
        {"files": [("file", ("a", b"1")), ("file", ("b", b"2"))]},
        {"files": [(f"f{i}", ("a", b"1")) for i in range(40)]},
        {"content": b"--x", "headers": {"content-type": "multipart/form-data"}},
    ],
)
def test_a_broken_upload_is_a_validation_error(served: ServedApp, sent: dict[str, Any]) -> None:
    assert served.json("POST", "/adapters/up/upload", status=422, **sent)["error_type"] == "validation"
    assert not served.registry.calls


def test_an_upload_that_cannot_be_stored_says_why(served: ServedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    async def full(*given: Any) -> None:
        raise OSError(28, "No space left on device", "/secret/place")

    monkeypatch.setattr(served.registry, "upload_adapter", full)
    told = served.json("POST", "/adapters/up/upload", status=507, files={"file": ("a.zip", b"zip")})
    assert told["error"] == "the upload cannot be stored: No space left on device"


def test_a_forecast_is_asked_with_a_shape(served: ServedApp) -> None:
    told = served.json("GET", "/forecast?r=32&target_modules=q_proj,%20v_proj&dtype=bfloat16")
    assert told == {"r": 32, "target_modules": ["q_proj", "v_proj"], "dtype": "bfloat16"}
    for query, word in (
        ("r=0&target_modules=q", "r: "),
        ("r=x&target_modules=q", "r: "),
        ("r=8", "target_modules"),
        ("r=8&target_modules=q&dtype=int3", "dtype"),
    ):
        told = served.json("GET", f"/forecast?{query}", status=422)
        assert (told["error_type"], word in told["error"]) == ("validation", True)
    assert (
        "no_such: unknown field"
        in served.json("GET", "/forecast?r=8&target_modules=q&no_such=1", status=422)["error"]
    )


def test_vllms_names_have_its_bodies_and_codes(served: ServedApp) -> None:
    loading = {"lora_name": "a", "lora_path": "folder"}
    answer = served.http.post("/v1/load_lora_adapter", json=loading)
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'a' added successfully.")
    assert answer.headers["content-type"].startswith("text/plain")
    for path, param in (("other", "lora_name"), ("bad", None), ("outside", "lora_path")):
        body = loading | {"lora_path": path}
        error = served.json("POST", "/v1/load_lora_adapter", body, 400)["error"]
        assert error["param"] == param
    missing = served.json("POST", "/v1/load_lora_adapter", loading | {"lora_path": "gone"}, 404)["error"]
    assert (missing["code"], missing["param"]) == ("not_found", "lora_path")
    replacing = loading | {"lora_path": "other", "load_inplace": True}
    assert served.http.post("/v1/load_lora_adapter", json=replacing).status_code == 200
    assert served.json("GET", "/adapters/a")["source"] == "other"
    answer = served.http.post("/v1/unload_lora_adapter", json={"lora_name": "a"})
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
    unknown = served.json("POST", "/v1/unload_lora_adapter", {"lora_name": "a"}, 404)["error"]
    assert (unknown["code"], unknown["param"]) == ("model_not_found", "lora_name")
    assert (
        served.json("POST", "/v1/unload_lora_adapter", {"lora_name": "a", "more": 1}, 400)["error"]["param"]
        == "more"
    )


def test_a_prefetch_is_202_with_where_each_one_is(served: ServedApp) -> None:
    for id in ("a", "org/b"):
        load(served, id)
    told = served.json("POST", "/adapters/prefetch", {"ids": ["a", "org/b"]}, 202)
    assert told == {"adapters": [{"id": id, "residency": "disk"} for id in ("a", "org/b")]}
    assert served.json("POST", "/adapters/prefetch", {"ids": []}, 202) == {"adapters": []}
    unknown = served.json("POST", "/adapters/prefetch", {"ids": ["a", "none"]}, 404)
    assert (unknown["error_type"], "'none'" in unknown["error"]) == ("adapter_not_found", True)


@pytest.mark.parametrize(
    "body", [{}, {"ids": "a"}, {"ids": [5]}, {"ids": None}, {"ids": ["a"], "more": 1}, {"ids": ["a"] * 1001}]
)
def test_a_wrong_prefetch_is_a_validation_error(served: ServedApp, body: dict[str, Any]) -> None:
    load(served)
    refused = served.json("POST", "/adapters/prefetch", body, 422)
    assert (refused["error_type"], "ids" in refused["error"] or "more" in refused["error"]) == (
        "validation",
        True,
    )
    assert len(served.registry.calls) == 1
