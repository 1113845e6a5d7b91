"""/v1/responses: the shapes of OpenAI's Responses, functions, formats, events and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests import making
from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script
from .test_chat import END, SAID, TOOLS_TEMPLATE, prompt

NUMBER = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ADD = {"type": "function", "name": "add", "description": "Adds.", "parameters": NUMBER, "strict": True}
NOW = {"type": "function", "name": "now"}
HI = {"role": "user", "content": "Hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "2"}
PATH = "/v1/responses"


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("responses"), template=TOOLS_TEMPLATE) as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def fresh(api: ScriptedApp) -> Iterator[None]:
    api.says(END)
    api.engine.fails = None
    yield
    assert api.quiet, "a request left a lease or a ticket behind"


def ask(api: ScriptedApp, given: Any = "Hi", status: int = 200, **fields: Any) -> Any:
    return api.post(PATH, {"model": "x", "input": given, **fields}, status).json()


def stream(api: ScriptedApp, **fields: Any) -> list[Any]:
    events = api.named_events(PATH, {"model": "x", "input": "Hi", "stream": True, **fields})
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_the_plain_answer(api: ScriptedApp) -> None:
    answer = api.post(
        PATH, {"model": "x", "input": "Hi", "max_output_tokens": 4, "store": True, "metadata": {"a": "b"}}
    )
    told = answer.json()
    assert (told["object"], told["model"], told["store"]) == ("response", "x", False)
    assert told["adapter"] == {"id": "x", "digest": DIGEST}
    assert answer.headers["x-adapter-digest"] == DIGEST
    assert (told["status"], told["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    (item,) = told["output"]
    text = making.tokenizer().decode(making.ids(END)[:4])
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "incomplete")
    assert item["content"] == [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    given = len(api.request.prompt)
    assert told["usage"] == {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 4,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + 4,
    }


def test_an_answer_that_ends_is_completed(api: ScriptedApp) -> None:
    told = ask(api)
    assert (told["status"], told["incomplete_details"]) == ("completed", None)
    api.says("")
    assert ask(api)["output"][0]["content"][0]["text"] == ""


SPOKEN: list[Any] = [
    "Hi",
    [HI],
    [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
    [{"role": "user", "content": [{"type": "input_text", "text": "H"}, {"type": "input_text", "text": "i"}]}],
]


@pytest.mark.parametrize("given", SPOKEN)
def test_the_ways_to_say_the_same(api: ScriptedApp, given: Any) -> None:
    ask(api, given, instructions="Be brief.")
    assert prompt(api).startswith("system:Be brief.\nuser:Hi\n")


def test_an_answer_goes_back_as_it_came(api: ScriptedApp) -> None:
    api.says("Well: " + SAID)
    output = ask(api, tools=[ADD], max_output_tokens=200)["output"]
    assert [item["type"] for item in output] == ["message", "function_call"]
    assert len(output[1]["call_id"]) == 9
    assert json.loads(output[1]["arguments"]) == {"a": 1}
    result = {**RESULT, "call_id": output[1]["call_id"]}
    ask(api, [HI, *output, result, HI], tools=[ADD])
    said = f"user:Hi\nassistant:Well: !add 1\ntool:2{output[1]['call_id']}\nuser:Hi\n"
    assert said in prompt(api)


def test_calls_thoughts_and_results_reach_the_template(api: ScriptedApp) -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]}
    text = {"role": "assistant", "content": [{"type": "output_text", "text": "Wait.", "annotations": []}]}
    results = {**RESULT, "output": [{"type": "input_text", "text": "2"}]}
    ask(api, [HI, thought, text, CALL, CALL, results, text, text, HI])
    said = "user:Hi\nassistant:Wait.!add 1!add 1\ntool:2c1\nassistant:Wait.\nassistant:Wait.\nuser:Hi\n"
    assert said in prompt(api)


CHOICES: list[tuple[Any, bool, bool]] = [
    (None, True, False),
    ("auto", True, False),
    ("none", False, False),
    ("required", True, True),
    ({"type": "function", "name": "add"}, True, True),
]


@pytest.mark.parametrize(("choice", "shown", "bound"), CHOICES)
def test_which_functions_may_and_must_be_called(
    api: ScriptedApp, choice: Any, shown: bool, bound: bool
) -> None:
    api.says(SAID.removeprefix("<tool_call>").removesuffix("</tool_call>") if bound else END)
    told = ask(api, tools=[ADD, NOW], tool_choice=choice, max_output_tokens=200)
    assert ('"name": "add"' in prompt(api)) == shown
    assert (api.request.sampling.grammar is not None) == bound
    assert [item["type"] for item in told["output"]] == ["function_call" if bound else "message"]
    assert told["tools"][0]["name"] == "add"


FORMATS: list[tuple[dict[str, Any] | None, bool]] = [
    (None, False),
    ({"type": "text"}, False),
    ({"type": "json_object"}, True),
    ({"type": "json_schema", "name": "x", "strict": True, "schema": NUMBER}, True),
]


@pytest.mark.parametrize(("format", "bound"), FORMATS)
def test_a_format_binds_the_text(api: ScriptedApp, format: dict[str, Any] | None, bound: bool) -> None:
    told = ask(api, text={"format": format, "verbosity": "low"})
    assert (api.request.sampling.grammar is not None) == bound
    assert told["text"]["format"]["type"] == (format or {"type": "text"})["type"]


def test_sampling_is_as_asked(api: ScriptedApp) -> None:
    told = ask(api, temperature=0.5, top_p=0.9, reasoning={"effort": "low"})
    assert (api.request.sampling.temperature, api.request.sampling.top_p) == (0.5, 0.9)
    assert (told["temperature"], told["reasoning"]["effort"]) == (0.5, "low")


def test_the_events_of_a_text(api: ScriptedApp) -> None:
    events = stream(api, max_output_tokens=4)
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ]
    text = making.tokenizer().decode(making.ids(END)[:4])
    assert "".join(deltas) == events[-4]["text"] == text
    last = events[-1]["response"]
    assert last["id"] == events[0]["response"]["id"]
    assert (events[0]["response"]["status"], last["status"]) == ("in_progress", "incomplete")
    assert last["output"] == [events[-2]["item"]]
    assert last["usage"]["output_tokens"] == 4


def test_the_events_of_a_call(api: ScriptedApp) -> None:
    api.says("Well: " + SAID)
    events = stream(api, tools=[ADD], max_output_tokens=200)
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [(event["output_index"], event["item"]["type"]) for event in added] == [
        (0, "message"),
        (1, "function_call"),
    ]
    kind = "response.function_call_arguments"
    pieces = [event["delta"] for event in events if event["type"] == f"{kind}.delta"]
    assert len(pieces) > 1, "they come as they are made"
    (done,) = (event for event in events if event["type"] == f"{kind}.done")
    assert done["arguments"] == "".join(pieces)
    assert json.loads(done["arguments"]) == {"a": 1}
    assert events[-1]["type"] == "response.completed"
    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message", "function_call"]


def test_an_item_ends_where_the_next_begins(api: ScriptedApp) -> None:
    api.says(f"{SAID} And {SAID}"[:-20])
    events = stream(api, tools=[ADD], max_output_tokens=200)
    steps = [event for event in events if event["type"].startswith("response.output_item.")]
    assert [event["output_index"] for event in steps] == [0, 0, 1, 1, 2, 2]
    output = events[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["function_call", "message", "function_call"]
    assert output == [event["item"] for event in steps[1::2]]


def test_the_events_of_nothing(api: ScriptedApp) -> None:
    api.says("")
    events = stream(api)
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == ""


def test_an_error_in_the_midst_is_the_last_event(api: ScriptedApp) -> None:
    api.engine.fails = ("internal", "broken")
    last = stream(api)[-1]
    assert (last["type"], last["error"]["message"]) == ("error", "broken")


IMAGE = {"type": "input_image", "image_url": "http://127.0.0.1/x.png"}
DEEP: dict[str, Any] = {}
for _ in range(150):
    DEEP = {"items": DEEP}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{**ADD, "parameters": DEEP}]}, "tools.0.parameters: is nested over 100 levels deep"),
    ({"text": {"format": {"type": "json_schema", "schema": DEEP}}}, "nested over 100 levels deep"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"no_such": 1}, "no_such: unknown field"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 10**6}, "maximum context length is 512"),
    ({"input": []}, "input"),
    ({"input": None}, "input"),
    ({"input": [5]}, "input"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input.0"),
    ({"input": "\ud800"}, "surrogate"),
    ({"tools": [{"type": "web_search"}]}, "tools.0"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice"),
    ({"tools": [{**ADD, "parameters": {"type": "no type"}}], "tool_choice": "required"}, "tools"),
    ({"text": {"format": {"type": "json_schema", "schema": {"type": "no type"}}}}, "text.format"),
]


@pytest.mark.parametrize(("fields", "word"), WRONG)
def test_what_is_refused(api: ScriptedApp, fields: dict[str, Any], word: str) -> None:
    refused = api.post(PATH, {"model": "x", "input": "Hi", **fields}, 400).json()["error"]
    assert refused["type"] == "invalid_request_error"
    assert word in refused["message"]


def test_an_unknown_model(api: ScriptedApp) -> None:
    refused = api.post(PATH, {"model": "none", "input": "Hi"}, 404).json()["error"]
    assert refused["code"] == "model_not_found"
    assert "none" in refused["message"]


def test_a_call_or_the_bound_text_where_both_are_asked_for(api: ScriptedApp) -> None:
    """Else a format would make the offered functions unreachable without a word."""
    bound = {"format": {"type": "json_schema", "name": "n", "schema": NUMBER}}
    ask(api, text=bound)
    alone = api.request.sampling.grammar
    ask(api, text=bound, tools=[ADD])
    joined = api.request.sampling.grammar
    assert alone is not None
    assert joined is not None
    assert "<tool_call>" in joined
    assert "<tool_call>" not in alone


def test_a_template_that_drops_calls_is_told_by_their_place(tmp_path_factory: pytest.TempPathFactory) -> None:
    deaf = "{% for m in messages %}{{ m.content }}{% endfor %}{# tool_calls #}"
    with serve_script(tmp_path_factory.mktemp("deaf"), template=deaf) as api:
        refusal = ask(api, [HI, CALL, RESULT], 400)
        assert refusal["error"]["param"] == "input.1"
