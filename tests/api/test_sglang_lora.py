"""SGLang's two routes: its bodies and its one code for what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .served_app import ServedApp, serve_app

LOADING = {"lora_name": "a", "lora_path": "folder"}


@pytest.fixture
def served() -> Iterator[ServedApp]:
    with serve_app() as found:
        yield found


def test_loading_and_unloading_answer_as_sglang_does(served: ServedApp) -> None:
    told = served.json("POST", "/load_lora_adapter", LOADING)
    assert told["success"] is True
    assert told["error_message"] == ""
    assert list(told["loaded_adapters"]) == ["a"]
    served.json("POST", "/load_lora_adapter", {"lora_name": "b", "lora_path": "folder", "pinned": True})
    assert served.json("GET", "/adapters/b")["pinned"]
    told = served.json("POST", "/unload_lora_adapter", {"lora_name": "a", "lora_id": None})
    assert (told["success"], list(told["loaded_adapters"])) == (True, ["b"])


@pytest.mark.parametrize(
    ("path", "word"),
    [("other", "taken"), ("bad", "lora_B"), ("gone", "no such folder"), ("outside", "outside")],
)
def test_what_is_refused_is_400_with_the_reason_twice(served: ServedApp, path: str, word: str) -> None:
    served.json("POST", "/load_lora_adapter", LOADING)
    told = served.json("POST", "/load_lora_adapter", LOADING | {"lora_path": path}, 400)
    assert word in told["error_message"]
    assert (told["success"], told["error"]) == (False, told["error_message"])
    assert told["error_type"]
    assert list(told["loaded_adapters"]) == ["a"]


def test_an_unknown_adapter_is_400_and_an_unknown_field_422(served: ServedApp) -> None:
    told = served.json("POST", "/unload_lora_adapter", {"lora_name": "none"}, 400)
    assert told["error_type"] == "adapter_not_found"
    for path in ("/load_lora_adapter", "/unload_lora_adapter"):
        served.json("POST", path, LOADING | {"added_tokens_config": {"a": 1}, "more": 1}, 422)


def test_what_the_service_is_short_of_keeps_its_status() -> None:
    with serve_app(loading=True) as served:
        served.json("POST", "/load_lora_adapter", LOADING, 503)
