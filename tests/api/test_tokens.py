"""/tokenize and /detokenize: ids and text as the adapter's tokenizer and template have them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests import making
from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script
from .test_chat import ADD, TOOLS_TEMPLATE, USER

TEXT = "the end, 😀"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    root = tmp_path_factory.mktemp("tokens")
    (root / "x").mkdir()
    (root / "x" / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    with serve_script(root) as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def nothing_left(api: ScriptedApp) -> Iterator[None]:
    yield
    assert api.quiet, "a request left a lease behind"


def test_a_text_becomes_ids_and_they_become_it(api: ScriptedApp) -> None:
    told = api.post("/tokenize", {"model": "org/y", "prompt": TEXT})
    ids = making.ids(TEXT)
    adapter = {"id": "org/y", "digest": DIGEST}
    assert told.json() == {
        "count": len(ids),
        "max_model_len": 512,
        "tokens": ids,
        "token_strs": None,
        "adapter": adapter,
    }
    assert told.headers["x-adapter-digest"] == DIGEST
    back = api.post("/detokenize", {"model": "org/y", "tokens": ids})
    assert back.json() == {"prompt": TEXT, "adapter": adapter}
    assert back.headers["x-adapter-digest"] == DIGEST


@pytest.mark.parametrize("model", [{}, {"model": None}, {"model": "tiny"}, {"model": "base"}])
def test_no_model_is_the_base(api: ScriptedApp, model: dict[str, Any]) -> None:
    assert api.post("/tokenize", {"prompt": "Hi", **model}).json()["adapter"] is None
    assert api.post("/detokenize", {"tokens": [1], **model}).json()["prompt"] == "<|im_start|>"


def test_names_of_tokens(api: ScriptedApp) -> None:
    told = api.post("/tokenize", {"prompt": " the😀", "return_token_strs": True}).json()
    assert told["token_strs"] == making.tokenizer().convert_ids_to_tokens(told["tokens"])
    many = api.post("/tokenize", {"prompt": "no " * 9000, "return_token_strs": True}).json()
    assert len(many["tokens"]) == len(many["token_strs"]) == many["count"] > 9000


def test_nothing_is_no_tokens(api: ScriptedApp) -> None:
    assert api.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert api.post("/detokenize", {"tokens": []}).json()["prompt"] == ""


CHATS: list[dict[str, Any]] = [
    {},
    {"add_generation_prompt": False},
    {"continue_final_message": True},
    {"chat_template_kwargs": {"enable_thinking": False}},
]


@pytest.mark.parametrize("model", ["tiny", "x"])
@pytest.mark.parametrize("fields", CHATS)
def test_a_chat_counts_as_its_prompt(api: ScriptedApp, model: str, fields: dict[str, Any]) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, USER]
    body = {"model": model, "messages": messages, **fields}
    told = api.post("/tokenize", body).json()
    api.post("/v1/chat/completions", body)
    assert told["tokens"] == list(api.request.prompt)


def test_tools_calls_and_results_count(api: ScriptedApp) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    messages = [USER, said, {"role": "tool", "tool_call_id": "c1", "content": "2"}]
    body = {"model": "x", "messages": messages, "tools": [ADD]}
    told = api.post("/tokenize", body).json()
    api.post("/v1/chat/completions", body)
    assert told["tokens"] == list(api.request.prompt)


WRONG: list[tuple[str, dict[str, Any], int, str]] = [
    ("/tokenize", {}, 422, "needs either prompt or messages"),
    ("/tokenize", {"prompt": "x", "messages": [USER]}, 422, "needs either prompt or messages"),
    ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, 422, "add_generation_prompt"),
    ("/tokenize", {"prompt": "x", "no_such": 1}, 422, "no_such: unknown field"),
    ("/tokenize", {"prompt": "\ud800"}, 422, "surrogate"),
    ("/tokenize", {"messages": []}, 422, "messages"),
    ("/tokenize", {"messages": [USER], "tools": [ADD]}, 422, "takes none"),
    ("/tokenize", {"model": "none", "prompt": "x"}, 404, "none"),
    ("/tokenize", {"model": "", "prompt": "x"}, 404, "no adapter"),
    ("/detokenize", {"model": "none", "tokens": [1]}, 404, "none"),
    ("/detokenize", {"tokens": [10**9]}, 422, "tokens: no token has the id 1000000000"),
    ("/detokenize", {"tokens": [-1]}, 422, "tokens.0"),
    ("/detokenize", {"tokens": [10**30]}, 422, "tokens.0"),
    ("/detokenize", {"tokens": ["a"]}, 422, "tokens.0"),
    ("/detokenize", {}, 422, "tokens"),
    ("/detokenize", {"tokens": [1], "no_such": 1}, 422, "no_such: unknown field"),
]


@pytest.mark.parametrize(("path", "body", "status", "word"), WRONG)
def test_what_is_refused(api: ScriptedApp, path: str, body: dict[str, Any], status: int, word: str) -> None:
    assert word in api.post(path, body, status).json()["error"]
