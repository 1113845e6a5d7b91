"""/v1/completions and /v1/models: shapes, prompts of every kind, model names, log probabilities,
odd values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service.api.generation.openai_objects import STARTED
from tests import making
from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script
from .test_generate import each

END = " the end of it all"
USAGE = making.usage(2, 4)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("completions")) as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def fresh(api: ScriptedApp) -> Iterator[None]:
    api.says(END)
    api.engine.fails, api.engine.limit = None, 10_000
    yield
    assert api.quiet, "a request left a lease or a ticket behind"


def cut(n: int) -> str:
    return str(making.tokenizer().decode(making.ids(END)[:n]))


def test_the_plain_completion(api: ScriptedApp) -> None:
    completion = api.complete(model="x", max_tokens=4)
    assert completion["object"] == "text_completion"
    assert completion["id"].startswith("cmpl-")
    assert completion["model"] == "x"
    assert isinstance(completion["created"], int)
    assert completion["adapter"] == {"id": "x", "digest": DIGEST}
    assert completion["choices"] == [
        {"index": 0, "text": cut(4), "logprobs": None, "finish_reason": "length"}
    ]
    assert completion["usage"] == USAGE
    sampling = api.request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.logprobs) == (1.0, 1.0, 0, None)


def test_headers_name_the_adapter_here_too(api: ScriptedApp) -> None:
    answer = api.post("/v1/completions", {"model": "x", "prompt": "Hi"})
    assert (
        answer.headers["x-adapter-id"],
        answer.headers["x-adapter-digest"],
        answer.headers["x-prompt-tokens"],
    ) == ("x", DIGEST, "2")


def test_sixteen_tokens_unless_told(api: ScriptedApp) -> None:
    api.complete()
    assert api.request.max_tokens == 16
    api.complete("a" * 508)
    assert api.request.max_tokens == 4


@pytest.mark.parametrize(
    ("model", "id"),
    [
        ("tiny", None),
        ("base", None),
        ("__base__", None),
        ("x", "x"),
        ("tiny:x", "x"),
        ("base:x", "x"),
        ("org/y",) * 2,
        ("tiny:org/y", "org/y"),
    ],
)
def test_model_names(api: ScriptedApp, model: str, id: str | None) -> None:
    adapter = api.complete(model=model)["adapter"]
    assert (adapter and adapter["id"]) == id
    assert api.request.adapter == (DIGEST if id else None)


@pytest.mark.parametrize(
    "model", ["typo", "", "X", "x ", "tiny:", "tiny:base", "tiny:typo", "other:x", "x:tiny"]
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unknown_models_are_never_the_base(api: ScriptedApp, path: str, model: str) -> None:
    what = {"prompt": "Hi"} if "chat" not in path else {"messages": [{"role": "user", "content": "Hi"}]}
    error = api.post(path, {"model": model, **what}, 404).json()["error"]
    assert error["code"] == "model_not_found"
    assert error["param"] == "model"


def test_prompts_of_every_kind(api: ScriptedApp) -> None:
    ids = making.ids("Hi")
    for prompt in ("Hi", ids):
        assert [c["index"] for c in api.complete(prompt)["choices"]] == [0]
        assert api.request.prompt == tuple(ids)
    for prompts in (["Hi", "you"], [ids, making.ids("you")]):
        completion = api.complete(prompts, max_tokens=4)
        assert [c["index"] for c in completion["choices"]] == [0, 1]
        assert [r.prompt for r in api.engine.requests[-2:]] == [tuple(ids), tuple(making.ids("you"))]
        assert completion["usage"] == making.usage(5, 8)


def test_n_choices_have_seeds_of_their_own_and_count_the_prompt_once(api: ScriptedApp) -> None:
    completion = api.complete(["Hi", "Ho"], n=2, max_tokens=4, seed=2**64 - 1)
    assert [c["index"] for c in completion["choices"]] == [0, 1, 2, 3]
    assert [r.sampling.seed for r in api.engine.requests[-4:]] == [2**64 - 1, 0, 2**64 - 1, 0]
    assert completion["usage"] == making.usage(4, 16)
    greedy = api.complete(n=2, temperature=0)["choices"]
    assert greedy[0]["text"] == greedy[1]["text"]


def test_echo(api: ScriptedApp) -> None:
    assert api.complete("Hi", echo=True, max_tokens=4)["choices"][0]["text"] == "Hi" + cut(4)
    assert api.complete(making.ids("Hi"), echo=True, max_tokens=4)["choices"][0]["text"] == "Hi" + cut(4)
    assert api.request.prompt_logprobs is None


@pytest.mark.parametrize("streamed", [False, True])
def test_scoring_a_prompt_without_a_new_token(api: ScriptedApp, streamed: bool) -> None:
    body = {"model": "x", "prompt": "Hi", "echo": True, "max_tokens": 0, "logprobs": 1}
    if streamed:
        completion, *_ = api.stream("/v1/completions", body | {"stream": True})
    else:
        completion = api.post("/v1/completions", body).json()
    (choice,) = completion["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi", "length")
    assert choice["logprobs"] == {
        "tokens": ["H", "i"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"i": -1.0, making.tokenizer().decode([70]): -0.1}],
        "text_offset": [0, 1],
    }
    assert api.request.max_tokens == 0


def test_nothing_asked_is_nothing_given(api: ScriptedApp) -> None:
    completion = api.complete(max_tokens=0)
    assert completion["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}
    assert completion["usage"]["completion_tokens"] == 0


def test_logprobs_begin_behind_the_prompt_and_hold_the_chosen_token(api: ScriptedApp) -> None:
    logprobs = api.complete(max_tokens=3, logprobs=1)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [making.tokenizer().decode([id]) for id in making.ids(END)[:3]]
    assert logprobs["token_logprobs"] == [-0.5, -1.5, -2.5]
    assert logprobs["text_offset"] == [
        2,
        2 + len(logprobs["tokens"][0]),
        2 + len("".join(logprobs["tokens"][:2])),
    ]
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    none = api.complete(max_tokens=1, logprobs=0)["choices"][0]["logprobs"]
    assert none["top_logprobs"] == [{none["tokens"][0]: -0.5}]


def test_a_stream_has_one_id_and_its_text_is_the_whole(api: ScriptedApp) -> None:
    body = {"model": "x", "prompt": "Hi", "max_tokens": 5, "stream": True}
    events = api.stream("/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert len({e["id"] for e in events}) == 1
    assert all(e["adapter"] == {"id": "x", "digest": DIGEST} for e in events)
    assert {e["object"] for e in events} == {"text_completion"}
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == cut(5)
    assert [e["choices"][0]["finish_reason"] for e in events[:-1]] == [None] * 4 + ["length"]
    assert [e["usage"] for e in events[:-1]] == [None] * 5
    assert (events[-1]["choices"], events[-1]["usage"]["completion_tokens"]) == ([], 5)


def test_every_token_is_an_event_also_without_text(api: ScriptedApp) -> None:
    api.says("😀")
    body = {"model": "x", "prompt": "Hi", "max_tokens": 12, "stream": True, "ignore_eos": True}
    assert len(api.stream("/v1/completions", body)) == 12
    chat = {key: value for key, value in body.items() if key != "prompt"} | {
        "messages": [{"role": "user", "content": "Hi"}]
    }
    assert len(api.stream("/v1/chat/completions", chat)) == 12 + 2


def test_streams_of_several_are_told_apart(api: ScriptedApp) -> None:
    api.engine.script = lambda request: making.ids(
        "one two three" if request.prompt[0] == making.ids("a")[0] else "x"
    )
    for echo in (False, True):
        events = api.stream(
            "/v1/completions",
            {"model": "x", "prompt": ["a", "b"], "n": 2, "stream": True, "echo": echo, "logprobs": 0},
        )
        texts = [
            "".join(c["text"] for e in events for c in e["choices"] if c["index"] == i) for i in range(4)
        ]
        assert texts == ["a" * echo + "one two three"] * 2 + ["b" * echo + "x"] * 2
        assert len([e for e in events if e["choices"][0]["finish_reason"] == "stop"]) == 4
        tokens = [t for e in events for c in e["choices"] if c["index"] == 0 for t in c["logprobs"]["tokens"]]
        assert "".join(tokens) == "a" * echo + "one two three<|im_end|>"


def test_a_failure_among_several_ends_the_stream_with_an_error(api: ScriptedApp) -> None:
    api.engine.fails = ("deadline_exceeded", "took too long")
    events = api.stream("/v1/completions", {"model": "x", "prompt": ["a", "b", "c"], "stream": True})
    assert events[-1]["error"] == {
        "message": "took too long",
        "type": "service_unavailable_error",
        "param": None,
        "code": "deadline_exceeded",
    }
    assert api.complete(status=504)["error"]["code"] == "deadline_exceeded"


def test_a_queue_that_fills_up_halfway_cancels_what_it_took(api: ScriptedApp) -> None:
    api.engine.limit = len(api.engine.requests) + 1
    assert api.complete(["a", "b"], status=429)["error"]["code"] == "overloaded"
    assert api.quiet


def test_stop_strings_as_one_or_as_a_list(api: ScriptedApp) -> None:
    for stop in ("end", ["zzz", "end"]):
        (choice,) = api.complete(stop=stop)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (" the ", "stop")
        events = api.stream("/v1/completions", {"model": "x", "prompt": "Hi", "stop": stop, "stream": True})
        assert "".join(e["choices"][0]["text"] for e in events) == " the "


def test_stop_strings_count_only_after_min_tokens(api: ScriptedApp) -> None:
    assert api.complete(stop="e", min_tokens=6)["choices"][0]["text"].startswith(" the ")
    assert api.request.sampling.min_tokens == 6


def test_extensions_reach_the_engine(api: ScriptedApp) -> None:
    api.complete(
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.2,
        ignore_eos=True,
        presence_penalty=-1,
        frequency_penalty=1,
        logit_bias={"5": -100, "6": 1.5},
    )
    sampling = api.request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.repetition_penalty) == (3, 0.1, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.logit_bias) == (
        -1,
        1,
        ((5, -100.0), (6, 1.5)),
    )
    assert api.request.eos == frozenset()
    api.complete(top_p=0)
    assert api.request.sampling.temperature == 0


GOOD = {
    "temperature": "0 2 null",
    "top_p": "0 1",
    "user": '"me"',
    "n": "null 3",
    "stop": "null [] ",
    "logit_bias": "{} null",
    "echo": "false",
    "response_format": '{"type":"text"} {"type":"json_object"} '
    '{"type":"json_schema","json_schema":{"name":"a","schema":{}}}'
    ' {"type":"regex","regex":"[ab]+"}',
    "stream": "false",
}
BAD = {
    "temperature": "-1 NaN 2.5 true",
    "top_p": "1.5",
    "max_tokens": "-2 1e20 true 513",
    "n": "0 10000 1.0",
    "seed": "18446744073709551616 -2 true",
    "presence_penalty": "NaN 3",
    "logprobs": "-1 1000",
    "logit_bias": '{"x":1} {"1":101} {"1":NaN} {"99999999":1} {"-1":1} {"1":"2"}',
    "no_such_field": "1",
    "stop": '[1] "" 5',
    "stream_options": '{"include_usage":true} {"x":1}',
    "prompt": '5 [] {"a":1} [[]] [[-1]] [99999999] ["a",1] [true] [1.5] "" null [null]',
    "response_format": '{"type":"regex"} {"type":"regex","regex":"("} {"type":"grammar"} '
    '{"type":"json_schema"}'
    ' {"type":"json_schema","json_schema":{"schema":{"type":"x"}}}',
    "min_p": "2",
    "min_tokens": "-1",
    "best_of": "2",
    "suffix": '"x"',
}


@pytest.mark.parametrize(("field", "value"), each(GOOD))
def test_values_with_a_meaning_are_taken(api: ScriptedApp, field: str, value: str) -> None:
    api.post("/v1/completions", f'{{"model": "x", "prompt": "Hi", "{field}": {value}}}'.encode())


@pytest.mark.parametrize(("field", "value"), each(BAD))
def test_odd_values_are_400_by_name(api: ScriptedApp, field: str, value: str) -> None:
    """B13."""
    before = len(api.engine.requests)
    prompt = "" if field == "prompt" else '"prompt": "Hi", '
    error = api.post("/v1/completions", f'{{"model": "x", {prompt}"{field}": {value}}}'.encode(), 400).json()[
        "error"
    ]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert field in error["message"]
    assert error["code"] == ("context_length_exceeded" if value == "513" else "invalid_request_error")
    assert len(api.engine.requests) == before


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_new_tokens", "logit_bias"])
def test_a_number_that_nobody_could_spell_again_is_refused(api: ScriptedApp, field: str) -> None:
    """Python writes no number of more than 4300 digits, and an answer may have to name it."""
    most = "9" * 4300
    if field == "max_new_tokens":
        path, body = "/generate", f'{{"inputs": "Hi", "parameters": {{"{field}": {most}}}}}'
    elif field == "max_completion_tokens":
        path = "/v1/chat/completions"
        body = f'{{"model": "x", "messages": [{{"role": "user", "content": "Hi"}}], "{field}": {most}}}'
    else:
        value = most if field == "max_tokens" else f'{{"{most}9": 1}}'
        path, body = "/v1/completions", f'{{"model": "x", "prompt": "Hi", "{field}": {value}}}'
    error = api.post(path, body.encode(), 422 if path == "/generate" else 400).json()["error"]
    assert field in (error if path == "/generate" else error["message"])


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"prompt": "Hi"}', b'{"model": "base"}', b'{"model": 5, "prompt": "Hi"}']
)
def test_broken_bodies(api: ScriptedApp, body: bytes) -> None:
    assert api.post("/v1/completions", body, 400).json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "id", ["2147483648", "1099511627776", "9" * 400, "9" * 4000, "9" * 5000, "-" + "9" * 4000]
)
@pytest.mark.parametrize("prompt", ["[{}]", "[[1], [{}]]"])
def test_ids_that_fit_no_machine_word_are_refused(api: ScriptedApp, prompt: str, id: str) -> None:
    """B13, B14: a token id of any size is a bad number, and the message stays short."""
    body = f'{{"model": "x", "echo": true, "prompt": {prompt.format(id)}}}'.encode()
    assert len(api.post("/v1/completions", body, 400).json()["error"]["message"]) < 300


def test_what_cannot_go_together(api: ScriptedApp) -> None:
    for fields in ({"ignore_eos": True}, {"min_tokens": 3}):
        api.complete(response_format={"type": "json_object"}, status=400, **fields)
    api.complete(["a"] * 64, n=3, status=400)


# ---- models


def test_models(api: ScriptedApp) -> None:
    listing = api.http.get("/v1/models").json()
    assert listing["object"] == "list"
    cards: dict[str, Any] = {m["id"]: m for m in listing["data"]}
    assert list(cards) == ["tiny", "x", "org/y"]
    assert (cards["tiny"]["parent"], cards["x"]["parent"]) == (None, "tiny")
    assert cards["x"]["created"] == 1795608000, "an adapter's is when it was registered"
    assert cards["tiny"]["created"] == STARTED
    assert cards["x"]["adapter"] == {"id": "x", "digest": DIGEST}
    assert all(m.keys() >= {"id", "object", "created", "owned_by", "root", "parent"} for m in cards.values())


@pytest.mark.parametrize(
    ("asked", "id"),
    [
        ("tiny", "tiny"),
        ("base", "tiny"),
        ("x", "x"),
        ("org/y", "org/y"),
        ("org%2Fy", "org/y"),
        ("tiny:x", "x"),
    ],
)
def test_one_model(api: ScriptedApp, asked: str, id: str) -> None:
    assert api.http.get(f"/v1/models/{asked}").json()["id"] == id


def test_no_such_model(api: ScriptedApp) -> None:
    answer = api.http.get("/v1/models/none")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_mix_goes_with_the_base_alone(api: ScriptedApp) -> None:
    parts = [{"id": "x", "weight": 1}, {"id": "org/y", "weight": 2}]
    mixed = api.complete(model="base", adapters=parts)
    assert [part["weight"] for part in mixed["adapter"]["parts"]] == [1.0, 2.0]
    assert "base" in api.complete(model="x", adapters=parts, status=400)["error"]["message"]
    assert api.chat(model="base", adapters=parts)["adapter"]["id"] is None
