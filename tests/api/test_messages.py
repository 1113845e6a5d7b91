"""/v1/messages: Anthropic's shapes, tools, events, counts and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from service.api.errors import body_at
from service.errors import AdapterdError, Overloaded
from tests import making
from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script
from .test_chat import END, SAID, TOOLS_TEMPLATE, prompt

HI = [{"role": "user", "content": "Hi"}]
NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"name": "add", "description": "Adds.", "input_schema": NUMBER}
NOW = {"name": "now", "input_schema": {"type": "object"}}
USE = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "2"}
PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("messages"), template=TOOLS_TEMPLATE) as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def fresh(api: ScriptedApp) -> Iterator[None]:
    api.says(END)
    api.engine.fails = None
    yield
    assert api.quiet, "a request left a lease or a ticket behind"


def make_body(**fields: Any) -> dict[str, Any]:
    return {"model": "x", "max_tokens": 40, "messages": HI} | fields


def ask(api: ScriptedApp, **fields: Any) -> Any:
    return api.post(PATH, make_body(**fields)).json()


def count(api: ScriptedApp, **fields: Any) -> int:
    body = {"model": "x", "messages": HI} | fields
    return int(api.post(COUNT, body).json()["input_tokens"])


def test_the_plain_answer(api: ScriptedApp) -> None:
    answer = api.post(PATH, make_body(max_tokens=4))
    message = answer.json()
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": "x",
        "adapter": {"id": "x", "digest": DIGEST},
        "content": [{"type": "text", "text": making.tokenizer().decode(making.ids(END)[:4])}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(api.request.prompt),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 4,
        },
    }
    assert answer.headers["x-adapter-digest"] == DIGEST
    assert count(api) == len(api.request.prompt)


def test_why_an_answer_ends(api: ScriptedApp) -> None:
    assert ask(api)["stop_reason"] == "end_turn"
    stopped = ask(api, stop_sequences=["of"])
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "of")
    api.says("")
    assert ask(api)["content"] == [{"type": "text", "text": ""}]


@pytest.mark.parametrize(
    "system", ["Be brief.", [{"type": "text", "text": "Be brief.", "cache_control": {}}]]
)
def test_the_system_goes_first(api: ScriptedApp, system: Any) -> None:
    ask(api, system=system)
    assert prompt(api).startswith("system:Be brief.\nuser:Hi\n")


def test_sampling_is_as_asked(api: ScriptedApp) -> None:
    ask(api, temperature=0.5, top_p=0.9, top_k=5)
    sampling = api.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 5)
    ask(api)
    assert api.request.sampling.temperature == 1
    ask(api, temperature=0)
    assert api.request.sampling.temperature == 0


def test_calls_and_results_of_the_past_reach_the_template(api: ScriptedApp) -> None:
    said = {"role": "assistant", "content": [{"type": "text", "text": "Wait."}, USE]}
    text = {"type": "text", "text": "And?"}
    messages = [*HI, said, {"role": "user", "content": [RESULT, {**RESULT, "content": [text]}, text]}]
    ask(api, messages=messages, tools=[ADD])
    assert "assistant:Wait.!add 1\ntool:2c1\ntool:And?c1\nuser:And?\n" in prompt(api)
    assert '"name": "add"' in prompt(api)
    assert count(api, messages=messages, tools=[ADD]) == len(api.request.prompt)


def test_an_assistants_end_goes_on(api: ScriptedApp) -> None:
    ask(api, messages=[*HI, {"role": "assistant", "content": "Ho"}])
    assert prompt(api).endswith("assistant:Ho")


def test_a_call_is_a_block(api: ScriptedApp) -> None:
    api.says("Well: " + SAID)
    message = ask(api, tools=[ADD], max_tokens=200)
    text, use = message["content"]
    assert text == {"type": "text", "text": "Well: "}
    assert len(use.pop("id")) == 9
    assert use == {"type": "tool_use", "name": "add", "input": {"a": 1}}
    assert message["stop_reason"] == "tool_use"
    api.says('<tool_call>{"name": "add", "arguments": "[NaN]"}</tool_call>')
    assert ask(api, tools=[ADD], max_tokens=200)["content"][0]["input"] == {"arguments": "[NaN]"}
    deep = '{"a": ' + "[" * 120 + "]" * 120 + "}"
    api.says('<tool_call>{"name": "add", "arguments": ' + deep + "}</tool_call>")
    assert ask(api, tools=[ADD], max_tokens=310)["content"][0]["input"] == {"arguments": deep}


CHOICES: list[tuple[dict[str, Any] | None, bool, bool]] = [
    (None, True, False),
    ({"type": "auto"}, True, False),
    ({"type": "auto", "disable_parallel_tool_use": True}, True, False),
    ({"type": "none"}, False, False),
    ({"type": "any"}, True, True),
    ({"type": "tool", "name": "add"}, True, True),
]


@pytest.mark.parametrize(("choice", "shown", "bound"), CHOICES)
def test_which_tools_may_and_must_be_called(
    api: ScriptedApp, choice: dict[str, Any] | None, shown: bool, bound: bool
) -> None:
    api.says(SAID.removeprefix("<tool_call>").removesuffix("</tool_call>") if bound else END)
    message = ask(api, tools=[ADD, NOW], tool_choice=choice, max_tokens=200)
    assert ('"name": "add"' in prompt(api)) == shown
    assert (api.request.sampling.grammar is not None) == bound
    assert [block["type"] for block in message["content"]] == ["tool_use" if bound else "text"]


def test_a_format_binds_the_text(api: ScriptedApp) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    config = {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}
    ask(api, output_config=config)
    assert '"a"' in (api.request.sampling.grammar or "")
    ask(api, output_config=config, tools=[ADD], tool_choice={"type": "any"})
    assert '"add"' in (api.request.sampling.grammar or ""), "a forced call goes before it"
    ask(api, output_config={"effort": "low"})
    assert api.request.sampling.grammar is None
    wrong = {"format": {"type": "json_schema", "schema": {"type": "none"}}}
    refused = api.post(PATH, make_body(output_config=wrong), 400).json()
    assert "output_config" in refused["error"]["message"]


def test_thinking_reaches_the_template(api: ScriptedApp) -> None:
    ask(api, thinking={"type": "enabled", "budget_tokens": 1024})
    ask(api, thinking={"type": "disabled"})
    thought = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
    ]
    ask(api, messages=[*HI, {"role": "assistant", "content": thought}, *HI])


def test_the_events_of_a_text(api: ScriptedApp) -> None:
    events = api.named_events(PATH, make_body(stream=True, max_tokens=4))
    kinds = [event["type"] for event in events]
    deltas = kinds[2:-3]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert deltas == ["content_block_delta"] * len(deltas)
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0]["message"]["adapter"] == {"id": "x", "digest": DIGEST}
    assert events[0]["message"]["usage"]["input_tokens"] == len(api.request.prompt)
    text = "".join(event["delta"]["text"] for event in events[2:-3])
    assert text == making.tokenizer().decode(making.ids(END)[:4])
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 4


def test_the_events_of_a_call(api: ScriptedApp) -> None:
    api.says("Well: " + SAID)
    events = api.named_events(PATH, make_body(stream=True, tools=[ADD], max_tokens=200))
    starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in starts] == ["text", "tool_use"]
    assert starts[1]["input"] == {}
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == "Well: "
    pieces = [delta["partial_json"] for delta in deltas if delta["type"] == "input_json_delta"]
    assert json.loads("".join(pieces)) == {"a": 1}
    assert len(pieces) > 1, "they come as they are made"
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_text_between_calls_is_a_block_between_theirs(api: ScriptedApp) -> None:
    api.says(f"{SAID} And {SAID}")
    events = api.named_events(PATH, make_body(stream=True, tools=[ADD], max_tokens=200))
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["tool_use", "text", "tool_use"]
    places = [event["index"] for event in events if "index" in event]
    assert places == sorted(places)
    assert [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2]


def test_a_calls_end_goes_before_the_text_that_comes_with_it(api: ScriptedApp) -> None:
    """A stop string holds both back, and lets them through at once."""
    api.says(f"{SAID} And so")
    body = make_body(stream=True, tools=[ADD], max_tokens=200, stop_sequences=[f"{SAID[-20:]} Andes"])
    events = api.named_events(PATH, body)
    starts = [event["content_block"]["type"] for event in events if event["type"] == "content_block_start"]
    assert starts == ["tool_use", "text"]
    deltas = [event for event in events if event["type"] == "content_block_delta"]
    assert json.loads("".join(e["delta"]["partial_json"] for e in deltas if e["index"] == 0)) == {"a": 1}
    assert "".join(e["delta"]["text"] for e in deltas if e["index"] == 1) == "And so"


def test_the_events_of_nothing(api: ScriptedApp) -> None:
    api.says("")
    events = api.named_events(PATH, make_body(stream=True))
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


def test_an_error_in_the_midst_is_the_last_event(api: ScriptedApp) -> None:
    api.engine.fails = ("internal", "broken")
    events = api.named_events(PATH, make_body(stream=True))
    assert events[-1] == {"type": "error", "error": {"type": "api_error", "message": "broken"}}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"role": "system", "content": "Hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    (
        {"messages": [{"role": "user", "content": []}] * 2 + [{"role": "user", "content": [IMAGE]}]},
        "messages.2.content.0",
    ),
    ({"messages": [{"role": "user", "content": [USE]}]}, "tool_use"),
    ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "tool_result"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "surrogate"),
    ({"no_such": 1}, "no_such: unknown field"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
    ({"tools": [{**ADD, "input_schema": {"type": "no type"}}], "tool_choice": {"type": "any"}}, "tools"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "tool", "name": "no"}}, "tool_choice"),
    ({"max_tokens": 10**6}, "maximum context length is 512"),
]


@pytest.mark.parametrize(("fields", "word"), WRONG)
def test_what_is_refused(api: ScriptedApp, fields: dict[str, Any], word: str) -> None:
    refused = api.post(PATH, make_body(**fields), 400).json()
    assert refused["type"] == "error"
    assert refused["error"]["type"] == "invalid_request_error"
    assert word in refused["error"]["message"]


@pytest.mark.parametrize("path", [PATH, COUNT])
def test_an_unknown_model(api: ScriptedApp, path: str) -> None:
    body = make_body(model="none") if path == PATH else {"model": "none", "messages": HI}
    refused = api.post(path, body, 404).json()
    assert refused["error"]["type"] == "not_found_error"
    assert "none" in refused["error"]["message"]


def test_errors_have_anthropics_envelope_there_alone() -> None:
    error: AdapterdError = Overloaded("full")
    told = {"type": "error", "error": {"type": "rate_limit_error", "message": "full"}}
    assert body_at(error, PATH) == body_at(error, COUNT) == told
    assert body_at(error, "/v1/messages2")["error"]["code"] == "overloaded"
    assert body_at(error, "/generate")["error_type"] == "overloaded"


def test_the_last_block_of_a_wrong_method_and_of_no_json(api: ScriptedApp) -> None:
    assert api.http.get(PATH).json()["type"] == "error"
    assert api.post(PATH, b"{", 400).json()["error"]["type"] == "invalid_request_error"


def test_a_key_may_come_as_anthropics_clients_send_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serve_script(tmp_path_factory.mktemp("keyed"), api_keys="sk-1") as keyed:
        codes = [
            keyed.http.post(COUNT, json={"model": "x", "messages": HI}, headers=headers).status_code
            for headers in ({}, {"x-api-key": "sk-2"}, {"x-api-key": "sk-1"})
        ]
        assert codes == [401, 401, 200]
        refused = keyed.http.post(COUNT, json={}).json()
        assert refused["error"]["type"] == "authentication_error"


def test_past_calls_are_text_where_the_template_knows_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    past = [*HI, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}]
    with serve_script(tmp_path_factory.mktemp("plain"), template=plain) as api:
        ask(api, messages=past)
        assert 'assistant: {"name": "add", "arguments": {"a": 1}}\ntool: 2\n' in prompt(api)


def test_a_template_that_drops_a_result_is_told_by_its_place(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    deaf = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    past = [*HI, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}]
    with serve_script(tmp_path_factory.mktemp("deaf"), template=deaf) as api:
        refusal = api.post(PATH, make_body(messages=past), 400).json()
        assert "messages.2" in refusal["error"]["message"]
