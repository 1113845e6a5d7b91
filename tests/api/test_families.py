"""Tools on the templates of model families: a call read, forced, beside a format, and told again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.text.tool_calls import declared_format
from tests import making

from .families import FAMILIES, Family
from .scripted_app import ScriptedApp, serve_script
from .test_chat import OTHER, dress, follows

NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"type": "function", "function": {"name": "add", "parameters": NUMBER}}
USER = {"role": "user", "content": "Hi"}
CALLED = {"name": "add", "arguments": '{"a": 1}'}
TOOLED = {name: family for name, family in FAMILIES.items() if family.format}
WITHOUT = sorted(FAMILIES.keys() - TOOLED.keys())


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("families")) as scripted:
        for name, family in FAMILIES.items():
            dress(scripted, name, family.template)
        yield scripted


def call(api: ScriptedApp, name: str, family: Family, **fields: Any) -> dict[str, Any]:
    api.says(family.said)
    (choice,) = api.chat([USER], model=name, tools=[ADD], **fields)["choices"]
    assert [each["function"] for each in choice["message"]["tool_calls"]] == [CALLED]
    message: dict[str, Any] = choice["message"]
    return message


@pytest.mark.parametrize("name", TOOLED)
def test_a_call_is_read_and_goes_back_with_its_result(api: ScriptedApp, name: str) -> None:
    family = FAMILIES[name]
    assert declared_format(family.template) is family.format
    message = call(api, name, family)
    assert "<" not in (message["content"] or "").replace("</think>", "")
    shown = making.tokenizer().decode(api.request.prompt)
    assert "integer" in shown, "the tool is shown"
    (given,) = message["tool_calls"]
    result = {"role": "tool", "tool_call_id": given["id"], "content": "forty-two"}
    api.chat([USER, message, result], model=name, tools=[ADD])
    shown = making.tokenizer().decode(api.request.prompt)
    assert "forty-two" in shown
    assert shown.index("add", shown.index("Hi")) < shown.index("forty-two")


@pytest.mark.parametrize("name", TOOLED)
def test_a_streamed_call_is_the_same(api: ScriptedApp, name: str) -> None:
    api.says(FAMILIES[name].said)
    asked = {"model": name, "messages": [USER], "tools": [ADD], "stream": True}
    deltas = [event["choices"][0]["delta"] for event in api.stream("/v1/chat/completions", asked)]
    pieces = [piece["function"] for delta in deltas for piece in delta.get("tool_calls", ())]
    assert [piece["name"] for piece in pieces if "name" in piece] == ["add"]
    assert "".join(piece["arguments"] for piece in pieces) == CALLED["arguments"]


@pytest.mark.parametrize("name", TOOLED)
def test_beside_a_format_the_grammar_has_the_familys_call(api: ScriptedApp, name: str) -> None:
    family = FAMILIES[name]
    call(api, name, Family("", said=family.bound), response_format=OTHER)
    assert follows(api, family.bound)
    assert follows(api, "12")
    assert not follows(api, family.bound.replace("add", "foo"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forced_call_works_on_each(api: ScriptedApp, name: str) -> None:
    forced = '{"name": "add", "arguments": {"a": 1}}'
    call(api, name, Family("", said=forced), tool_choice="required")
    assert follows(api, forced)


@pytest.mark.parametrize("name", WITHOUT)
def test_a_family_that_takes_no_tools_says_so(api: ScriptedApp, name: str) -> None:
    assert api.chat([USER], model=name, tools=[ADD], status=400)["error"]["param"] == "tools"


THOUGHT = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>final<|message|>Two."


def test_thoughts_in_channels_are_parted_from_the_content(api: ScriptedApp) -> None:
    api.says(THOUGHT)
    (choice,) = api.chat([USER], model="gpt-oss")["choices"]
    message = choice["message"]
    assert (message["content"], message["reasoning_content"]) == ("Two.", "Easy.")
    asked = {"model": "gpt-oss", "messages": [USER], "stream": True}
    deltas = [event["choices"][0]["delta"] for event in api.stream("/v1/chat/completions", asked)]
    for name, text in (("content", "Two."), ("reasoning_content", "Easy.")):
        assert "".join(delta.get(name) or "" for delta in deltas) == text
    answer = api.post("/v1/messages", {"model": "gpt-oss", "messages": [USER], "max_tokens": 99}).json()
    assert answer["content"] == [{"type": "text", "text": "Two."}]


def test_a_thought_goes_back_with_its_call(api: ScriptedApp) -> None:
    message = call(api, "gpt-oss", FAMILIES["gpt-oss"])
    assert message["reasoning_content"] == "Well, one."
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "2"}
    api.chat([USER, message, result], model="gpt-oss")
    assert "analysis<|message|>Well, one.<|end|>" in making.tokenizer().decode(api.request.prompt)
    api.chat(
        [USER, message | {"content": "So."}, result], model="gpt-oss"
    )  # all three, which its template refuses
