"""The fields of OpenAI's dialect by their kinds: labels and no-ops change nothing, and what is honoured
reaches template, engine and answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from service.api.schemas.fields import BOTH, MESSAGE, FieldKind, FieldRow
from tests import making
from tests.doubles.engine import EOS

from .scripted_app import ScriptedApp, serve_script

END = " the end of it all"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if reasoning_effort %}Effort: {{ reasoning_effort }}\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
HI = {"role": "user", "content": "Hi"}
PLAIN = "<|im_start|>user\nHi<|im_end|>\n"
OPEN = "<|im_start|>assistant\n"
KINDS = ("chat", "completions")
LABELS: tuple[Any, ...] = (None, True, {"run": "1"}, "auto", [], {})
NO_OPS: dict[str, Any] = {
    "modalities": ["text"],
    "audio": None,
    "prediction": None,
    "suffix": None,
    "best_of": 1,
}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("fields"), template=TEMPLATE) as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def fresh(api: ScriptedApp) -> Iterator[None]:
    api.says(END)
    api.engine.requests.clear()
    yield
    assert api.quiet, "a request left a lease or a ticket behind"


def ask(api: ScriptedApp, kind: str, /, status: int = 200, **fields: Any) -> Any:
    return api.chat(status=status, **fields) if kind == "chat" else api.complete(status=status, **fields)


def said(answer: Any) -> str:
    (choice,) = answer["choices"]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def prompt(api: ScriptedApp) -> str:
    return str(making.tokenizer().decode(list(api.request.prompt)))


def names_of(kind: FieldKind, rows: tuple[FieldRow, ...] = BOTH) -> list[str]:
    return [name for row in rows if row.kind is kind for name in row.names.split()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", names_of(FieldKind.LABEL))
def test_a_label_is_taken_with_any_value_and_changes_nothing(api: ScriptedApp, kind: str, name: str) -> None:
    plain = said(ask(api, kind, seed=1))
    before = api.request
    for value in LABELS:
        assert said(ask(api, kind, seed=1, **{name: value})) == plain
        assert (api.request.prompt, api.request.sampling) == (before.prompt, before.sampling)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", names_of(FieldKind.NO_OP))
def test_a_no_op_is_taken_with_its_value_alone(api: ScriptedApp, kind: str, name: str) -> None:
    ask(api, kind, **{name: NO_OPS[name]})
    nothing: dict[str, Any] = {name: None}
    ask(api, kind, **nothing)
    error = ask(api, kind, 400, **{name: ["audio"] if name == "modalities" else 2})["error"]
    assert error["param"].startswith(name)


@pytest.mark.parametrize("name", names_of(FieldKind.LABEL, MESSAGE))
def test_a_label_of_a_past_turn_is_taken(api: ScriptedApp, name: str) -> None:
    for value in LABELS:
        api.chat([HI, {"role": "assistant", "content": "Ho", name: value}, HI])
        assert prompt(api) == f"{PLAIN}<|im_start|>assistant\nHo<|im_end|>\n{PLAIN}{OPEN}"


def test_history_is_taken_as_an_answer_or_a_stream_gave_it(api: ScriptedApp) -> None:
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "now", "arguments": None}}
    turn = {"role": "assistant", "content": None, "refusal": None, "audio": None, "function_call": None}
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    pasts: tuple[dict[str, Any], ...] = (turn, turn | {"tool_calls": []}, {"role": "assistant"})
    for past in (*pasts, turn | {"tool_calls": [call]}):
        api.chat([HI, past, {"role": "user", "content": [part]}])
    error = api.chat([HI, turn | {"function_call": {"name": "now"}}, HI], status=400)["error"]
    assert error["param"] == "messages.1.function_call"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [{"type": "text", "text": "See"}, {"type": "image_url", "image_url": {}}],
            "1: image_url is not served",
        ),
        ([{"type": "input_audio"}], "0: input_audio is not served here, only text"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(api: ScriptedApp, content: Any, message: str) -> None:
    error = api.chat([HI, {"role": "user", "content": content}], status=400)["error"]
    assert f"messages.1.content.{message}" in error["message"]


@pytest.mark.parametrize("kind", KINDS)
def test_minus_one_is_no_seed_and_no_limit(api: ScriptedApp, kind: str) -> None:
    ask(api, kind)
    usual = api.request.max_tokens
    ask(api, kind, seed=-1, max_tokens=-1)
    assert api.request.max_tokens == usual
    assert api.request.sampling.seed >= 0


# ---- the template


def test_variables_reach_the_template(api: ScriptedApp) -> None:
    api.chat(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert prompt(api) == f"{PLAIN}Effort: low\n{OPEN}<think></think>"


@pytest.mark.parametrize("name", ["messages", "tools", "chat_template", "add_generation_prompt", "eos_token"])
def test_no_variable_takes_the_place_of_another(api: ScriptedApp, name: str) -> None:
    error = api.chat(chat_template_kwargs={name: "x"}, status=400)["error"]
    assert name in error["message"]
    assert error["param"] == "chat_template_kwargs"


def test_a_conversation_may_stay_open(api: ScriptedApp) -> None:
    api.chat(add_generation_prompt=False)
    assert prompt(api) == PLAIN
    turns = [HI, {"role": "assistant", "content": "Hel"}]
    for given in ({}, {"add_generation_prompt": False}):
        api.chat(turns, continue_final_message=True, **given)
        assert prompt(api) == PLAIN + OPEN + "Hel"
    api.chat(turns, continue_final_message=True, add_generation_prompt=True, status=400)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_of_a_past_turn_reaches_the_template(api: ScriptedApp, name: str) -> None:
    api.chat([HI, {"role": "assistant", "content": "Ho", name: "Hm."}, HI])
    assert "<think>Hm.</think>Ho" in prompt(api)
    for nothing in (None, ""):
        api.chat([HI, {"role": "assistant", "content": "Ho", name: nothing}, HI])
        assert "<think>" not in prompt(api)


# ---- how it ends, and what may come


@pytest.mark.parametrize("kind", KINDS)
def test_a_stop_token_ends_the_answer(api: ScriptedApp, kind: str) -> None:
    stop = making.ids(" the end")[2]
    for ignored in (False, True):
        answer = ask(api, kind, stop_token_ids=[stop], ignore_eos=ignored, max_tokens=9)
        assert (said(answer), answer["choices"][0]["finish_reason"]) == (" the ", "stop")
        assert api.request.eos == {stop} if ignored else {stop, EOS}
    assert said(ask(api, kind, stop_token_ids=[stop], include_stop_str_in_output=True)) == " the e"
    error = ask(api, kind, 400, stop_token_ids=[10**6])["error"]
    assert error["param"] == "stop_token_ids"


@pytest.mark.parametrize("kind", KINDS)
def test_the_stop_string_may_be_part_of_the_text(api: ScriptedApp, kind: str) -> None:
    assert said(ask(api, kind, stop="end")) == " the "
    assert said(ask(api, kind, stop="end", include_stop_str_in_output=True)) == " the end"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_may_be_text(api: ScriptedApp, kind: str) -> None:
    api.engine.script = lambda _: [*making.ids("a"), 1, *making.ids("b")]
    assert said(ask(api, kind)) == "ab"
    assert said(ask(api, kind, skip_special_tokens=False)) == "a<|im_start|>b"


@pytest.mark.parametrize("kind", KINDS)
def test_bad_words_are_banned_at_the_start_and_behind_a_space(api: ScriptedApp, kind: str) -> None:
    ask(api, kind, bad_words=["the", "w"])
    spelled = [making.ids(text) for text in ("the", " the", "w", " w")]
    assert api.request.sampling.bad_words == tuple(map(tuple, spelled))
    ask(api, kind, bad_words=[])
    assert api.request.sampling.bad_words == ()
    body = b'{"model": "x", "prompt": "Hi", "bad_words": ["\\ud800"]}'
    assert api.post("/v1/completions", body, 400).json()["error"]["param"] == "bad_words.0"


# ---- structured output


def follows(api: ScriptedApp, text: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), api.request.sampling.grammar)
    taken = matcher.try_consume_tokens(list(text.encode()))
    return bool(taken == len(text.encode()) and matcher.is_accepting())


BOUND: list[tuple[dict[str, Any], str, str]] = [
    ({"guided_choice": ["yes", "no (a|b)"]}, "no (a|b)", "no a"),
    ({"guided_regex": "ab{3}"}, "abbb", "ab"),
    ({"guided_json": {"type": "boolean"}}, "true", "1"),
    ({"guided_json": '{"type": "boolean"}'}, "false", "1"),
    ({"guided_grammar": 'start: "a" | "b"'}, "b", "c"),
    ({"guided_grammar": 'root ::= "a" | "b"'}, "b", "c"),
    ({"structured_outputs": {"choice": ["yes", "n\no"]}}, "n\no", "no"),
    ({"structured_outputs": {"regex": "[0-9]{2}"}}, "12", "1"),
    ({"structured_outputs": {"json": {"type": "integer"}}}, "12", "a"),
    ({"structured_outputs": {"json_object": True}}, '{"a": 1}', "1"),
    ({"structured_outputs": {"grammar": 'start: "x"', "regex": None}}, "x", "y"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fields", "right", "wrong"), BOUND, ids=str)
def test_vllms_ways_to_bind_an_answer(
    api: ScriptedApp, kind: str, fields: dict[str, Any], right: str, wrong: str
) -> None:
    ask(api, kind, **fields)
    assert follows(api, right)
    assert not follows(api, wrong)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_regex": "("}, "guided_regex"),
    ({"guided_grammar": "nonsense"}, "guided_grammar"),
    ({"guided_grammar": 'start: %json {"type": "integer"}'}, "%json"),
    ({"guided_grammar": "\n".join(f"r{i}: r{i + 1}" for i in range(5000))}, "rules"),
    ({"guided_grammar": "start: " + "(" * 40_000 + '"a"' + ")" * 40_000}, "guided_grammar"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structural_tag"),
    ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=lambda given: str(given)[:60])
def test_what_cannot_bind_an_answer_is_refused_in_one_line(
    api: ScriptedApp, fields: dict[str, Any], named: str
) -> None:
    message = api.complete(status=400, **fields)["error"]["message"]
    assert named in message
    assert "\n" not in message


# ---- usage and tokens in streams


@pytest.mark.parametrize(
    ("kind", "path", "given"),
    [
        ("chat", "/v1/chat/completions", {"messages": [HI]}),
        ("completions", "/v1/completions", {"prompt": "Hi"}),
    ],
)
def test_options_of_streams(api: ScriptedApp, kind: str, path: str, given: dict[str, Any]) -> None:
    body = {"model": "x", "stream": True, "max_tokens": 3, **given}
    for options in ({"include_usage": None}, {"include_obfuscation": False}, None):
        assert not any("usage" in event for event in api.stream(path, body | {"stream_options": options}))
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = api.stream(path, body | {"stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts[0] == 1
    assert counts[-2:] == [3, 3]
    assert events[-1]["choices"] == []
    api.post(path, body | {"stream_options": {"include_obfuscation": True}}, 400)


def test_token_ids_of_completions(api: ScriptedApp) -> None:
    prompts = ["Hi", "Ho"]
    choices = api.complete(prompts, n=2, max_tokens=3, return_token_ids=True)["choices"]
    assert [choice["token_ids"] for choice in choices] == [making.ids(END)[:3]] * 4
    assert [choice["prompt_token_ids"] for choice in choices] == [
        making.ids(text) for text in prompts for _ in range(2)
    ]
    assert "token_ids" not in api.complete()["choices"][0]
    body = {"model": "x", "prompt": "Hi", "max_tokens": 3, "stream": True, "return_token_ids": True}
    streamed = [event["choices"][0] for event in api.stream("/v1/completions", body)]
    assert [id for choice in streamed for id in choice["token_ids"]] == making.ids(END)[:3]
    assert [choice.get("prompt_token_ids") for choice in streamed] == [making.ids("Hi"), None, None]


def test_token_ids_of_a_chat(api: ScriptedApp) -> None:
    answer = api.chat(return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [*making.ids(END), EOS]
    assert len(choice["token_ids"]) == answer["usage"]["completion_tokens"]
    assert answer["prompt_token_ids"] == list(api.request.prompt)
    body = {"model": "x", "messages": [HI], "stream": True, "return_token_ids": True}
    events = api.stream("/v1/chat/completions", body)
    ids = [id for event in events for id in event["choices"][0].get("token_ids", [])]
    assert ids == [*making.ids(END), EOS]
    assert events[0]["prompt_token_ids"] == list(api.request.prompt)
    assert not any("prompt_token_ids" in event for event in events[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_log_probabilities_are_vllms_lists(api: ScriptedApp, kind: str) -> None:
    for wanted in (0, 1, 3):
        (choice,) = ask(api, kind, prompt_logprobs=wanted, max_tokens=1)["choices"]
        first, *others = choice["prompt_logprobs"]
        assert first is None
        assert len(others) == len(api.request.prompt) - 1
        for id, entry in zip(api.request.prompt[1:], others, strict=True):
            assert entry[str(id)]["logprob"] == -1.0
            assert wanted <= len(entry) <= wanted + 1
            assert [one["rank"] for one in entry.values() if one["rank"]].count(1) == min(wanted, 1)
    assert "prompt_logprobs" in ask(api, kind, 400, prompt_logprobs=1, stream=True)["error"]["message"]


def test_the_echo_and_a_prompts_log_probabilities_go_together(api: ScriptedApp) -> None:
    (choice,) = api.complete("Hi", echo=True, logprobs=0, prompt_logprobs=2, max_tokens=1)["choices"]
    assert [len(top or ()) for top in choice["logprobs"]["top_logprobs"]] == [0, 1, 1]
    assert len(choice["prompt_logprobs"][1]) == 2


def test_true_is_the_chosen_tokens_alone(api: ScriptedApp) -> None:
    (choice,) = api.complete(logprobs=True, max_tokens=2)["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-0.5, -1.5]
    assert api.request.sampling.logprobs == 0
    assert api.complete(logprobs=False)["choices"][0]["logprobs"] is None


def test_an_unknown_field_is_refused_by_name(api: ScriptedApp) -> None:
    for kind in KINDS:
        assert "temprature" in json.dumps(ask(api, kind, 400, temprature=1))
