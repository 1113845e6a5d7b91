"""/v1/chat/completions: shapes, templates, tools, log probabilities, formats."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from service.text.template_renderer import TemplateRenderer
from service.text.tokenizers import AdapterTokenizer
from tests import making
from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script
from .test_generate import each

END = " the end of it all"
TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}!{{ c.function.name }} {{ c.function.arguments.a }}{% endfor %}"
    "{{ m.tool_call_id or '' }}\n{% endfor %}"
)
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/N"}},
            "$defs": {"N": {"type": "integer"}},
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
SAID = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("chat")) as scripted:
        yield scripted


@pytest.fixture(scope="module")
def tooled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("tooled"), template=TOOLS_TEMPLATE) as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def fresh(api: ScriptedApp, tooled: ScriptedApp) -> Iterator[None]:
    api.says(END)
    api.engine.fails = None
    yield
    assert api.quiet, "a request left a lease or a ticket behind"
    assert tooled.quiet, "a request left a lease or a ticket behind"


def prompt(api: ScriptedApp) -> str:
    return str(making.tokenizer().decode(list(api.request.prompt)))


def content(events: list[Any], index: int = 0) -> str:
    return "".join(
        c["delta"].get("content") or "" for e in events for c in e["choices"] if c["index"] == index
    )


def test_the_plain_answer(api: ScriptedApp) -> None:
    completion = api.chat(model="x", max_tokens=4)
    assert (completion["object"], completion["model"], completion["adapter"]) == (
        "chat.completion",
        "x",
        {"id": "x", "digest": DIGEST},
    )
    message = {
        "role": "assistant",
        "content": making.tokenizer().decode(making.ids(END)[:4]),
        "refusal": None,
    }
    assert completion["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}
    ]
    rendered = making.ids("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert api.request.prompt == tuple(rendered)
    assert completion["usage"] == making.usage(len(rendered), 4)


def test_without_a_limit_the_context_is_it(api: ScriptedApp) -> None:
    completion = api.chat()
    assert api.request.max_tokens == 512 - completion["usage"]["prompt_tokens"]
    assert completion["choices"][0]["finish_reason"] == "stop"
    api.chat(max_completion_tokens=7)
    assert api.request.max_tokens == 7


def test_text_parts_are_one_text(api: ScriptedApp) -> None:
    api.chat([{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}])
    whole = api.request.prompt
    api.chat("Hi")
    assert api.request.prompt == whole


def test_a_message_of_an_earlier_answer_may_come_back_as_it_was(api: ScriptedApp) -> None:
    earlier = {
        "role": "assistant",
        "content": "Ho",
        "refusal": None,
        "tool_calls": None,
        "function_call": None,
        "audio": None,
    }
    api.chat([USER, earlier, USER])


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}
NO_MESSAGES: list[Any] = [
    [],
    "text",
    [5],
    [{"role": "user", "content": None}],
    [{"role": "user"}],
    [{"content": "x"}],
    [{**USER, "extra": 1}],
    [{"role": "user", "content": [IMAGE]}],
    [{"role": "user", "content": "\ud800"}],
]


@pytest.mark.parametrize("messages", NO_MESSAGES)
def test_messages_that_are_none(api: ScriptedApp, messages: Any) -> None:
    error = api.post("/v1/chat/completions", {"model": "tiny", "messages": messages}, 400).json()["error"]
    assert error["type"] == "invalid_request_error"


def test_a_template_that_refuses_gives_its_reason(api: ScriptedApp) -> None:
    folder = api.registry.root / "org"
    folder.mkdir(exist_ok=True)
    (folder / "y").mkdir(exist_ok=True)
    (folder / "y" / "chat_template.jinja").write_text("{{ raise_exception('only aliens') }}")
    assert "only aliens" in api.chat(model="org/y", status=400)["error"]["message"]


def test_a_stream(api: ScriptedApp) -> None:
    body = {
        "model": "x",
        "messages": [USER],
        "max_completion_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    events = api.stream("/v1/chat/completions", body)
    assert {e["object"] for e in events} == {"chat.completion.chunk"}
    assert len({e["id"] for e in events}) == 1
    assert all(e["adapter"] == {"id": "x", "digest": DIGEST} for e in events)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content(events) == making.tokenizer().decode(making.ids(END)[:5])
    assert (events[-2]["choices"][0]["delta"], events[-2]["choices"][0]["finish_reason"]) == ({}, "length")
    assert (events[-1]["choices"], events[-1]["usage"]["completion_tokens"], events[0]["usage"]) == (
        [],
        5,
        None,
    )


def test_several_answers(api: ScriptedApp) -> None:
    api.engine.script = lambda request: making.ids("abc"[request.sampling.seed % 3])
    completion = api.chat(n=3, seed=0)
    contents = [(c["index"], c["message"]["content"]) for c in completion["choices"]]
    assert contents == [(0, "a"), (1, "b"), (2, "c")]
    events = api.stream(
        "/v1/chat/completions", {"model": "x", "messages": [USER], "n": 3, "seed": 0, "stream": True}
    )
    assert [content(events, i) for i in range(3)] == ["a", "b", "c"]
    assert [e["choices"][0]["delta"].get("role") for e in events].count("assistant") == 3


def test_logprobs(api: ScriptedApp) -> None:
    api.says("é")
    (choice,) = api.chat(logprobs=True, top_logprobs=2, max_tokens=2)["choices"]
    first, second = choice["logprobs"]["content"]
    assert (first["logprob"], first["token"]) == (-0.5, "\ufffd")
    assert bytes(first["bytes"] + second["bytes"]) == "é".encode()
    assert [top["logprob"] for top in second["top_logprobs"]] == [-0.1, -1.5]
    assert second["top_logprobs"][0]["bytes"] == list(making.tokenizer().decode([70]).encode())
    events = api.stream(
        "/v1/chat/completions", {"model": "x", "messages": [USER], "logprobs": True, "stream": True}
    )
    assert len([e for e in events if e["choices"][0]["logprobs"]]) == len(making.ids("é")) + 1


GOOD = {
    "tool_choice": "null",
    "tools": "null []",
    "logit_bias": "null",
    "top_logprobs": "null",
    "logprobs": "false true",
    "stop": '"x"',
}
BAD = {
    "max_tokens": "0 -2 true 513",
    "max_completion_tokens": "0 1e9",
    "top_logprobs": "1 100",
    "logprobs": "1",
    "tool_choice": '"auto" {"type":"function"}',
    "tools": '5 [{"type":"x"}] [{"type":"function","function":{"name":"a"}}]',
    "temperature": "-1 NaN",
    "n": "129",
    "no_such_field": "1",
    "suffix": '"x"',
    "echo": "true",
}


@pytest.mark.parametrize(("field", "value"), each(GOOD))
def test_values_with_a_meaning_are_taken(api: ScriptedApp, field: str, value: str) -> None:
    api.post(
        "/v1/chat/completions",
        f'{{"model": "x", "messages": {json.dumps([USER])}, "{field}": {value}}}'.encode(),
    )


@pytest.mark.parametrize(
    ("field", "value"), [*each(BAD), ("tools", '[{"type":"function","function":{"name":"not a name"}}]')]
)
def test_odd_values_are_400_by_name(api: ScriptedApp, field: str, value: str) -> None:
    before = len(api.engine.requests)
    error = api.post(
        "/v1/chat/completions",
        f'{{"model": "x", "messages": {json.dumps([USER])}, "{field}": {value}}}'.encode(),
        400,
    ).json()
    assert field in error["error"]["message"]
    assert len(api.engine.requests) == before


def test_two_limits_must_be_the_same(api: ScriptedApp) -> None:
    api.chat(max_tokens=5, max_completion_tokens=5)
    assert (
        "max_completion_tokens"
        in api.chat(max_tokens=5, max_completion_tokens=6, status=400)["error"]["message"]
    )


def test_a_limit_over_the_context_is_called_as_it_was_sent(api: ScriptedApp) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        error = api.chat(status=400, **{name: 513})["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", name)
        assert f"{name} 513" in error["message"]
        assert error["message"].startswith("This model's maximum context length is 512 tokens"), "for litellm"


def test_a_schema_becomes_a_grammar(api: ScriptedApp) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    api.chat(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema, "strict": True},
        }
    )
    assert '"age"' in str(api.request.sampling.grammar)


def test_no_format_can_be_kept_to_in_another_vocabulary(api: ScriptedApp) -> None:
    """The worker's grammars are over the base's: the same ids would mean other texts."""
    folder = api.registry.root / "swapped"
    folder.mkdir()
    words = json.loads(making.tokenizer().backend_tokenizer.to_str())
    vocabulary = words["model"]["vocab"]
    words["model"]["vocab"] = vocabulary | {"H": vocabulary["i"], "i": vocabulary["H"]}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    api.registry.cards["swapped"] = {"id": "swapped", "digest": DIGEST, "source": "swapped"}
    api.complete("Hi", model="swapped", max_tokens=1)
    assert api.request.prompt == tuple(reversed(making.ids("Hi")))
    error = api.chat(model="swapped", response_format={"type": "json_object"}, status=400)["error"]
    assert "another vocabulary" in error["message"]
    api.generate("Hi", adapter_id="swapped", response_format={"type": "json_object"}, status=422)
    del api.registry.cards["swapped"]


def test_a_schema_in_the_other_dialects_place_is_told_where_it_goes(api: ScriptedApp) -> None:
    error = api.chat(response_format={"type": "json_schema", "schema": {}}, status=400)["error"]
    assert "json_schema.json_schema: is required" in error["message"]
    assert "json_schema.schema: unknown field" in error["message"]


# ---- tools


def test_a_call(tooled: ScriptedApp) -> None:
    tooled.says("Well. " + SAID)
    (choice,) = tooled.chat(tools=[ADD, NOW])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "Well. "
    assert re.fullmatch("[A-Za-z0-9]{9}", call["id"])
    assert (call["type"], call["function"]) == ("function", {"name": "add", "arguments": '{"a": 1}'})
    assert '"name": "add"' in prompt(tooled)
    tooled.says(SAID)
    assert tooled.chat(tools=[ADD])["choices"][0]["message"]["content"] is None


def test_of_several_calls_one_is_told_where_more_are_not_wanted(tooled: ScriptedApp) -> None:
    tooled.says(SAID + SAID)
    for wanted, count in ((None, 2), (True, 2), (False, 1)):
        (choice,) = tooled.chat(tools=[ADD], parallel_tool_calls=wanted)["choices"]
        assert len(choice["message"]["tool_calls"]) == count


def test_a_streamed_call_shows_nothing_of_its_text(tooled: ScriptedApp) -> None:
    tooled.says("Well. " + SAID)
    events = tooled.stream(
        "/v1/chat/completions", {"model": "x", "messages": [USER], "tools": [ADD], "stream": True}
    )
    assert content(events) == "Well. "
    first, *others = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", [])]
    assert re.fullmatch("[A-Za-z0-9]{9}", first["id"])
    assert (first["index"], first["type"], first["function"]["name"]) == (0, "function", "add")
    assert all(piece.keys() == {"index", "function"} for piece in others)
    assert "".join(piece["function"]["arguments"] for piece in (first, *others)) == '{"a": 1}'
    assert len([piece for piece in others if piece["function"]["arguments"]]) > 2, "as they come"
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_no_call_is_text_in_both_ways(tooled: ScriptedApp) -> None:
    tooled.says('{"no": "call"} <tool_cal')
    assert tooled.chat(tools=[ADD])["choices"][0]["message"] == {
        "role": "assistant",
        "content": '{"no": "call"} <tool_cal',
        "refusal": None,
    }
    events = tooled.stream(
        "/v1/chat/completions", {"model": "x", "messages": [USER], "tools": [ADD], "stream": True}
    )
    assert content(events) == '{"no": "call"} <tool_cal'
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("value", [r'{"a": "\ud800"}', '{"a": NaN}', '{"a": 1', '{"a": "<tool_call>"}'])
def test_arguments_are_told_as_the_model_wrote_them(tooled: ScriptedApp, value: str) -> None:
    tooled.says('{"name": "add", "arguments": ' + value)
    (choice,) = tooled.chat(tools=[ADD])["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": value}
    body = {"model": "x", "messages": [USER], "tools": [ADD], "stream": True}
    events = tooled.stream("/v1/chat/completions", body)
    pieces = [c for e in events for c in e["choices"][0]["delta"].get("tool_calls", [])]
    assert "".join(piece["function"]["arguments"] for piece in pieces) == value
    assert content(events) == ""


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_is_held_by_a_grammar(tooled: ScriptedApp, choice: Any) -> None:
    tooled.says('{"name": "add", "arguments": {"a": 1}}')
    (answer,) = tooled.chat(tools=[ADD, NOW], tool_choice=choice)["choices"]
    assert answer["message"]["tool_calls"][0]["function"]["name"] == "add"
    grammar = str(tooled.request.sampling.grammar)
    assert '"add"' in grammar
    assert ('"now"' in grammar) == (choice == "required")


def test_tools_are_shown_to_the_template_as_given(tooled: ScriptedApp) -> None:
    deep: Any = {"type": "integer", "default": None}
    for _ in range(300):
        deep = {"items": deep}
    # Too long
    tooled.chat(tools=[function_tool("add", deep)], max_tokens=1, status=400)
    tool = function_tool("add", {"properties": {"a": {"default": None}}})
    tooled.chat(tools=[tool])
    assert prompt(tooled).startswith(json.dumps([tool]) + "<tool_call>")
    unwritable = function_tool("add", {"const": float("nan")})
    body = {"model": "tiny", "messages": [USER], "tools": [unwritable]}
    assert "tools" in tooled.post("/v1/chat/completions", body, 400).json()["error"]["message"]


def function_tool(name: str, parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


class LoopCalls:
    """Stubs that record whether they were called on the event loop or off it."""

    def __init__(self) -> None:
        self.on_the_loop: list[bool] = []
        self.awaited = 0

    def make_stub(self, answer: Any) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                self.on_the_loop.append(False)
            else:
                self.on_the_loop.append(True)
            return answer

        return call

    def make_async_stub(self, answer: Any) -> Callable[..., Any]:
        async def call(*_: Any) -> Any:
            self.awaited += 1
            return answer

        return call


@pytest.mark.parametrize("large", ["text", "tools", "messages", "calls", "prompts", "nothing"])
def test_what_is_large_in_whatever_way_is_tokenized_off_the_event_loop(
    tooled: ScriptedApp, monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    """/health and every stream wait for what is done on it."""
    calls = LoopCalls()
    monkeypatch.setattr(AdapterTokenizer, "encode", calls.make_stub((1, 2)))
    rendered = "a" * 30_000 if large == "calls" else "Hi"
    monkeypatch.setattr(AdapterTokenizer, "render_here", calls.make_stub(rendered))
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "a" * 30_000, "arguments": "{}"}}]}
    if large == "prompts":
        tooled.complete(["a" * 5000] * 10, max_tokens=1)
    else:
        messages: dict[str, Any] = {
            "text": "a" * 30_000,
            "messages": [{"role": "user", "content": ""}] * 1000,
            "calls": [USER, call],
        }
        large_tool = {"type": "function", "function": {"name": "a", "description": "a" * 30_000}}
        tool = large_tool if large == "tools" else ADD
        tooled.chat(messages.get(large, "Hi"), tools=[tool], max_tokens=1)
    assert set(calls.on_the_loop) == {large == "nothing"}


def test_an_adapters_own_template_and_tokenizer_are_never_run_on_the_event_loop(
    api: ScriptedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = api.registry.root / "own"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} of its own")
    words = json.loads(making.tokenizer().backend_tokenizer.to_str())
    (folder / "tokenizer.json").write_text(json.dumps(words | {"normalizer": {"type": "Lowercase"}}))
    api.registry.cards["own"] = {"id": "own", "digest": DIGEST, "source": "own"}
    calls = LoopCalls()
    monkeypatch.setattr(AdapterTokenizer, "encode", calls.make_stub((1, 2)))
    monkeypatch.setattr(TemplateRenderer, "render", calls.make_async_stub("Hi"))
    monkeypatch.setattr(AdapterTokenizer, "render_here", calls.make_stub("Hi"))
    api.chat("Hi", model="own", max_tokens=1)
    api.complete("Hi", model="own", max_tokens=1)
    api.generate("Hi", adapter_id="own", max_new_tokens=1)
    del api.registry.cards["own"]
    assert calls.on_the_loop == [False] * 3
    assert calls.awaited == 1


def test_no_choice_is_no_tools(tooled: ScriptedApp) -> None:
    tooled.says(SAID)
    choice = tooled.chat(tools=[ADD], tool_choice="none")["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (SAID, "stop")
    assert "add" not in prompt(tooled)


def test_results_of_calls_go_into_the_prompt(tooled: ScriptedApp) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 41}'}}
    tooled.chat(
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "42"},
        ]
    )
    assert prompt(tooled) == "user:Hi\nassistant:!add 41\ntool:42call_1\n"


@pytest.mark.parametrize(
    "parameters", [{"$defs": []}, {"$defs": 5}, {"$defs": {"a": 5}}, {"$ref": "#/nowhere"}, {"$ref": "#"}]
)
def test_odd_schemas_of_tools_are_taken_or_refused(tooled: ScriptedApp, parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    body = {"model": "tiny", "messages": [USER], "tools": [tool], "tool_choice": "required"}
    answer = tooled.http.post("/v1/chat/completions", json=body)
    assert answer.status_code in (200, 400), answer.text
    assert answer.status_code == 200 or "tools" in answer.json()["error"]["message"]


@pytest.mark.parametrize("arguments", ["[" * 100_000, "9" * 5000, '{"a": ' * 900 + "1" + "}" * 900])
def test_arguments_that_are_no_sensible_json_do_no_harm(api: ScriptedApp, arguments: str) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    body = {"model": "tiny", "messages": [USER, {"role": "assistant", "tool_calls": [call]}, USER]}
    answer = api.http.post("/v1/chat/completions", json=body)
    assert answer.status_code in (200, 400), answer.text


def test_what_cannot_go_together(tooled: ScriptedApp) -> None:
    named = {"type": "function", "function": {"name": "other"}}
    assert "tool_choice" in tooled.chat(tools=[ADD], tool_choice=named, status=400)["error"]["message"]
    tooled.chat(tools=[ADD], tool_choice="required", ignore_eos=True, status=400)
    broken = {"type": "function", "function": {"name": "add", "parameters": {"type": "nonsense"}}}
    assert "tools" in tooled.chat(tools=[broken], tool_choice="required", status=400)["error"]["message"]


DEVELOPER = {"role": "developer", "content": "Be brief."}


def test_a_developer_is_the_system_where_the_template_knows_none(
    api: ScriptedApp, tmp_path_factory: pytest.TempPathFactory
) -> None:
    api.chat([DEVELOPER, USER])
    assert prompt(api).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    knows = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}{# developer #}"
    with serve_script(tmp_path_factory.mktemp("developer"), template=knows) as other:
        other.chat([DEVELOPER, USER])
        assert prompt(other) == "developer:Be brief.\nuser:Hi\n"


@pytest.mark.parametrize("role", ["banana", "User", "human", ""])
def test_a_role_that_is_none_is_named(api: ScriptedApp, role: str) -> None:
    error = api.chat([{"role": role, "content": "x"}, USER], status=400)["error"]
    assert (error["param"], repr(role) in error["message"]) == ("messages.0.role", True)


# ---- tools beside other things

OTHER = {"type": "regex", "regex": "[0-9]+"}


def follows(api: ScriptedApp, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), api.request.sampling.grammar)
    taken = matcher.try_consume_tokens(list(text.encode()))
    return bool(taken == len(text.encode()) and matcher.is_accepting())


FRAMED = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    "bound",
    [
        {"response_format": OTHER},
        {"structured_outputs": {"regex": "[0-9]+"}},
        {"guided_grammar": "start: /[0-9]+/"},
        {"guided_json": {"type": "integer"}},
    ],
)
def test_where_an_answer_is_bound_it_is_that_or_a_call(tooled: ScriptedApp, bound: dict[str, Any]) -> None:
    tooled.says(FRAMED)
    (choice,) = tooled.chat(tools=[ADD], **bound)["choices"]
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'
    assert follows(tooled, FRAMED)
    assert follows(tooled, "12")
    assert not follows(tooled, FRAMED.replace("add", "foo"))
    assert not follows(tooled, "x")
    tooled.chat(tools=[ADD], tool_choice="none", **bound)
    assert not follows(tooled, FRAMED)


def test_a_forced_calls_grammar_wins(tooled: ScriptedApp) -> None:
    tooled.chat(tools=[ADD], tool_choice="required", response_format=OTHER)
    assert follows(tooled, '{"name": "add", "arguments": {"a": 1}}')
    assert not follows(tooled, "12")


def test_a_forced_call_works_on_a_base_whose_template_knows_no_tools(api: ScriptedApp) -> None:
    api.says('{"name": "now", "arguments": {}}')
    named = {"type": "function", "function": {"name": "now"}}
    (choice,) = api.chat(tools=[ADD, NOW], tool_choice=named)["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert follows(api, '{"name": "now", "arguments": {}}')
    assert not follows(api, '{"name": "now", "arguments": {"a": 1}}')
    assert api.chat(tools=[ADD], status=400)["error"]["param"] == "tools"


def dress(api: ScriptedApp, name: str, template: str, **settings: Any) -> None:
    folder = api.registry.root / name
    folder.mkdir(exist_ok=True)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    digest = "sha256:" + (name * 64)[:64]
    api.registry.cards[name] = {"id": name, "digest": digest, "source": name}


UNKNOWN = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{{ messages[0].content }}"


def test_a_form_that_is_not_known_is_refused_unless_the_adapter_names_one(api: ScriptedApp) -> None:
    dress(api, "a", UNKNOWN)
    error = api.chat(model="a", tools=[ADD], status=400)["error"]
    assert "tool_call_format" in error["message"]
    api.says(FRAMED)
    dress(api, "b", UNKNOWN, tool_call_format="hermes")
    (choice,) = api.chat(model="b", tools=[ADD])["choices"]
    assert choice["finish_reason"] == "tool_calls"
    dress(api, "c", UNKNOWN, tool_call_format="nonsense")
    assert "nonsense" in api.chat(model="c", tools=[ADD], status=400)["error"]["message"]
    for name in "abc":
        del api.registry.cards[name]


def test_a_marker_that_is_a_special_token_is_found(api: ScriptedApp) -> None:
    """A tokenizer leaves special tokens out of the text, where the parser would look for it."""
    dress(api, "d", "{% if tools %}{# [TOOL_CALLS] #}{% endif %}{{ messages[0].content }}")
    words = json.loads(making.tokenizer().backend_tokenizer.to_str())
    marks = {"[TOOL_CALLS]": len(making.tokenizer()), "[ARGS]": len(making.tokenizer()) + 1}
    for text, id in marks.items():
        words["added_tokens"].append(words["added_tokens"][0] | {"id": id, "content": text})
    (api.registry.root / "d" / "tokenizer.json").write_text(json.dumps(words))
    first, second = marks.values()
    api.engine.script = lambda _: [first, *making.ids("add"), second, *making.ids('{"a": 1}')]
    (choice,) = api.chat(model="d", tools=[ADD])["choices"]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 1}'}
    assert choice["message"]["content"] is None
    del api.registry.cards["d"]


CALLED = [
    USER,
    {
        "role": "assistant",
        "content": "So.",
        "tool_calls": [{"id": "a", "function": {"name": "add", "arguments": '{"a": 41}'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "forty-two"},
]


def test_past_calls_are_text_where_the_template_knows_none(api: ScriptedApp) -> None:
    api.chat(CALLED)
    assert 'assistant\nSo.\n{"name": "add", "arguments": {"a": 41}}<|im_end|>' in prompt(api)
    assert "tool\nforty-two<|im_end|>" in prompt(api)


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{# tool_calls #}", "messages.1.tool_calls"),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}", "messages.2"),
    ],
)
def test_a_template_that_drops_past_calls_is_told_by_their_place(
    api: ScriptedApp, template: str, place: str
) -> None:
    dress(api, "e" + place[9], template)
    assert api.chat(CALLED, model="e" + place[9], status=400)["error"]["param"] == place
    del api.registry.cards["e" + place[9]]
