"""Errors as clients see them: one envelope a dialect, the field named, nothing of the host shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from service import errors as tree
from service.api.errors import error_body, error_response, status_of
from service.api.generation.answer import failure_error
from service.api.routes.adapters import Registration
from service.api.schemas.chat import ChatRequest
from service.api.schemas.generate import GenerateRequest
from service.api.schemas.openai import CompletionRequest
from service.core.request import Event, Finish
from service.errors import AdapterdError

from .served_app import ServedApp, serve_app


@pytest.fixture(scope="module")
def served() -> Iterator[ServedApp]:
    with serve_app() as found:
        yield found


def post(served: ServedApp, path: str, content: bytes, kind: str = "application/json") -> tuple[int, Any]:
    answer = served.http.post(path, content=content, headers={"content-type": kind})
    return answer.status_code, answer.json()


BROKEN = {
    "cut": b"{",
    "empty": b"",
    "not UTF-8": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "list": b"[]",
    "string": b'"x"',
    "NaN": b'{"id": "a", "source": "b", "pinned": NaN}',
    "infinity": b'{"id": "a", "source": 1e999}',
    "lone surrogate": b'{"id": "a", "source": "b", "\\ud800": 1}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_body_is_a_validation_error_in_each_dialect(served: ServedApp, content: bytes) -> None:
    code, told = post(served, "/adapters", content)
    assert (code, told["error_type"]) == (422, "validation")
    assert isinstance(told["error"], str)
    code, told = post(served, "/v1/load_lora_adapter", content)
    assert code == 400
    assert told["error"].keys() == {"message", "type", "param", "code"}
    assert told["error"]["code"] == told["error"]["type"] == "invalid_request_error"
    assert told["error"]["param"] in (None, "lora_name"), "a place in the text is no field"


def test_a_validation_error_names_its_fields(served: ServedApp) -> None:
    _, told = post(served, "/adapters", b'{"id": 5, "no_such": 1}')
    assert told["error"] == "source: is required; id: Input should be a valid string; no_such: unknown field"
    _, told = post(served, "/v1/load_lora_adapter", b'{"lora_name": "x"}')
    assert told["error"]["param"] == "lora_path"


@pytest.mark.parametrize("name", ["query", "body", "path"])
def test_a_field_that_is_called_as_a_part_of_a_request_is_named_too(served: ServedApp, name: str) -> None:
    _, told = post(served, "/adapters", json.dumps({"id": "a", "source": "b", name: 1}).encode())
    assert told["error"] == f"{name}: unknown field"
    assert (
        served.json("GET", f"/forecast?r=8&target_modules=q_proj&{name}=1", status=422)["error"]
        == f"{name}: unknown field"
    )


def test_many_findings_are_counted_rather_than_listed(served: ServedApp) -> None:
    _, told = post(served, "/adapters", json.dumps({f"f{i}": 1 for i in range(9)}).encode())
    assert told["error"].endswith("and 8 more")


FLOODS: dict[str, tuple[Any, Any]] = {
    "fields": (GenerateRequest, {"inputs": "a", **{str(i): 0 for i in range(10_000)}}),
    "fields within": (GenerateRequest, {"inputs": "a", "parameters": {str(i): 0 for i in range(10_000)}}),
    "fields of a source": (Registration, {"id": "a", "source": "b", **{str(i): 0 for i in range(10_000)}}),
    "messages": (ChatRequest, {"model": "a", "messages": [0] * 9999}),
    "too many messages": (
        ChatRequest,
        {"model": "a", "messages": [{"role": "user", "content": ""}] * 10_001},
    ),
    "parts": (ChatRequest, {"model": "a", "messages": [{"role": "user", "content": [0] * 9999}]}),
    "calls": (ChatRequest, {"model": "a", "messages": [{"role": "assistant", "tool_calls": [0] * 9999}]}),
    "tools": (
        ChatRequest,
        {"model": "a", "messages": [{"role": "user", "content": "a"}], "tools": [0] * 9999},
    ),
    "stops": (GenerateRequest, {"inputs": "a", "parameters": {"stop": [0] * 9999}}),
    "biases": (
        CompletionRequest,
        {"model": "a", "prompt": "a", "logit_bias": {str(i): "x" for i in range(9999)}},
    ),
    "prompts": (CompletionRequest, {"model": "a", "prompt": [[]] * 9999}),
}


@pytest.mark.parametrize("flood", FLOODS)
def test_what_is_wrong_a_thousand_times_is_found_a_few_times(flood: str) -> None:
    """4 MB of wrong messages kept the event loop for 9 seconds, and took gigabytes."""
    model, body = FLOODS[flood]
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(model).validate_python(body)
    assert caught.value.error_count() < 20


def test_a_body_that_is_not_called_json_is_told_so(served: ServedApp) -> None:
    code, told = post(served, "/adapters", b'{"id": "a", "source": "b"}', "text/plain")
    assert code == 422
    assert "application/json" in told["error"]


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [("GET", "/no-such", 404), ("GET", "/v1/no-such", 404), ("DELETE", "/health", 405)],
)
def test_no_such_route_or_method_has_the_envelope_too(
    served: ServedApp, method: str, path: str, code: int
) -> None:
    told = served.json(method, path, status=code)
    kind = told["error"]["code"] if path.startswith("/v1") else told["error_type"]
    assert kind == {404: "not_found", 405: "method_not_allowed"}[code]


def test_a_405_lists_every_method_of_the_path(served: ServedApp) -> None:
    answer = served.http.post("/adapters/some/name")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD, PUT, PATCH, DELETE"
    for path in ("/health", "/console/app.js", "/docs/none"):
        answer = served.http.options(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
        assert answer.json()["error"] == "OPTIONS is not allowed here; allowed: GET, HEAD"


def test_head_is_get_without_a_body(served: ServedApp) -> None:
    answer = served.http.head("/health")
    assert answer.status_code == 200
    assert served.http.head("/adapters/none").status_code == 404


def test_a_defect_is_a_500_that_shows_only_the_request_id(
    served: ServedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[Any]:
        raise RuntimeError("/secret/place sk-key")

    monkeypatch.setattr(served.registry, "list_cards", broken)
    answer = served.http.get("/adapters", headers={"x-request-id": "abc-1"})
    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "abc-1"
    assert answer.json()["error_type"] == "internal"
    assert answer.json()["details"] == {"request_id": "abc-1"}
    assert "secret" not in answer.text


def all_errors(kind: type[AdapterdError] = AdapterdError) -> Iterator[type[AdapterdError]]:
    for child in kind.__subclasses__():
        yield child
        yield from all_errors(child)


@pytest.mark.parametrize("kind", sorted(all_errors(), key=str))
def test_every_error_of_the_tree_has_both_envelopes(kind: type[AdapterdError]) -> None:
    error = kind(["what is wrong"]) if issubclass(kind, tree.AdapterInvalid) else kind("what is wrong")
    native, openai = error_body(error, openai=False), error_body(error, openai=True)
    assert (native["error"], native["error_type"]) == ("what is wrong", kind.code)
    assert openai["error"]["message"] == "what is wrong"
    assert status_of(error, openai=False) == kind.status
    as_openai = {} if issubclass(kind, tree.DigestMismatch) else {409: 400, 422: 400}
    assert status_of(error, openai=True) == as_openai.get(kind.status, kind.status)


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (tree.BadRequest("x"), "invalid_request_error", "invalid_request_error"),
        (tree.ContextLengthExceeded("x"), "context_length_exceeded", "invalid_request_error"),
        (tree.AdapterNotFound("x"), "model_not_found", "invalid_request_error"),
        (tree.Unauthorized("x"), "unauthorized", "authentication_error"),
        (tree.Overloaded("x"), "overloaded", "rate_limit_error"),
        (tree.Internal("x"), "internal", "server_error"),
    ],
)
def test_the_openai_envelope_says_what_its_clients_look_for(
    error: AdapterdError, code: str, kind: str
) -> None:
    told = error_body(error, openai=True)["error"]
    assert (told["code"], told["type"]) == (code, kind)


def test_the_problems_of_an_adapter_are_listed(served: ServedApp) -> None:
    told = served.json("POST", "/adapters", {"id": "x", "source": "bad"}, 422)
    assert told["error_type"] == "adapter_invalid"
    assert told["details"]["problems"] == ["lora_A of q_proj has no lora_B", "r is 0"]


@pytest.mark.parametrize(
    "kind",
    [tree.BadRequest, tree.ContextLengthExceeded, tree.AdapterNotFound, tree.Overloaded, tree.NotReady],
)
def test_what_the_engine_tells_by_code_is_the_plain_error_of_that_code(kind: type[AdapterdError]) -> None:
    assert type(failure_error(Event(1, finish=Finish.FAILED, code=kind.code, message="why"))) is kind


@pytest.mark.parametrize("path", ["/v1/v1/chat/completions", "/chat/completions", "/v1/chat/completions/"])
def test_a_path_that_is_none_is_named_with_its_method(served: ServedApp, path: str) -> None:
    answer = served.http.post(path, json={})
    assert answer.status_code == 404
    assert f"POST {path}" in answer.text


def test_the_models_are_listed_behind_a_slash_too(served: ServedApp) -> None:
    assert served.json("GET", "/v1/models/") == served.json("GET", "/v1/models")


TRIED = {
    tree.DeadlineExceeded: "false",
    tree.DigestMismatch: "false",
    tree.NotReady: None,
    tree.Overloaded: None,
}


def test_a_time_limit_that_passed_is_not_tried_again_by_openais_client() -> None:
    scope = {"type": "http", "path": "/v1/completions"}
    for kind, tried in TRIED.items():
        assert error_response(kind("x"), scope).headers.get("x-should-retry") == tried
