"""The TGI and LoRAX dialect: shapes, odd values, streams that equal the whole, and what is refused
before anything runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests import making
from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script

END = " the end of it all"
EMOJI = "😀日é👩‍👩‍👧 the on"
BACKSLASH_U = b'{"inputs": "a\\ud800"}'


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("generate")) as scripted:
        yield scripted


@pytest.fixture(autouse=True)
def fresh(api: ScriptedApp) -> Iterator[None]:
    api.says(END)
    api.engine.fails, api.engine.limit = None, 10_000
    yield
    assert api.quiet, "a request left a lease or a ticket behind"


def test_the_plain_answer(api: ScriptedApp) -> None:
    assert api.generate(max_new_tokens=64) == {"generated_text": END, "adapter": None}
    request = api.request
    assert request.prompt == tuple(making.ids("Hi"))
    assert (request.max_tokens, request.adapter, request.eos) == (64, None, frozenset({2}))
    assert (request.sampling.temperature, request.sampling.logprobs, request.prompt_logprobs) == (
        0,
        None,
        None,
    )


def test_an_adapters_answer_names_it_in_body_and_headers(api: ScriptedApp) -> None:
    body = {"inputs": "Hi", "parameters": {"adapter_id": "org/y", "max_new_tokens": 3}}
    answer = api.post("/generate", body)
    assert answer.json()["adapter"] == {"id": "org/y", "digest": DIGEST}
    assert api.request.adapter == DIGEST
    wanted = {"x-adapter-id": "org/y", "x-adapter-digest": DIGEST}
    wanted |= {"x-prompt-tokens": "2", "x-generated-tokens": "3"}
    assert {name: answer.headers[name] for name in wanted} == wanted
    for name in ("x-queue-time", "x-inference-time", "x-time-per-token", "x-total-time"):
        assert float(answer.headers[name]) >= 0
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("name", ["typo", "X", "x ", "", "x/y"])
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
def test_an_unknown_adapter_is_never_the_base(api: ScriptedApp, path: str, name: str) -> None:
    before = len(api.engine.requests)
    body = api.post(path, {"inputs": "Hi", "parameters": {"adapter_id": name}}, 404).json()
    assert body["error_type"] == "adapter_not_found"
    assert len(api.engine.requests) == before


@pytest.mark.parametrize("name", ["base", "__base__", "tiny", None])
def test_the_bases_names(api: ScriptedApp, name: str | None) -> None:
    assert api.generate(adapter_id=name)["adapter"] is None
    assert api.request.adapter is None


def test_details(api: ScriptedApp) -> None:
    details = api.generate(max_new_tokens=4, details=True, seed=7, do_sample=True)["details"]
    ids = making.ids(END)[:4]
    assert {k: v for k, v in details.items() if k != "tokens"} == {
        "finish_reason": "length",
        "prompt_tokens": 2,
        "generated_tokens": 4,
        "seed": 7,
        "prefill": [],
    }
    assert [t["id"] for t in details["tokens"]] == ids
    assert [t["logprob"] for t in details["tokens"]] == [-0.5, -1.5, -2.5, -3.5]
    assert not any(t["special"] for t in details["tokens"])
    sampling = api.request.sampling
    assert (sampling.seed, sampling.temperature, sampling.logprobs) == (7, 1.0, 0)


def test_the_eos_token_is_told_and_is_no_text(api: ScriptedApp) -> None:
    answer = api.generate(details=True)
    last = answer["details"]["tokens"][-1]
    assert answer["generated_text"] == END
    assert answer["details"]["finish_reason"] == "eos_token"
    assert (last["id"], last["text"], last["special"]) == (2, "<|im_end|>", True)
    assert answer["details"]["generated_tokens"] == len(making.ids(END)) + 1


def test_ignore_eos_goes_past_it(api: ScriptedApp) -> None:
    details = api.generate(max_new_tokens=20, details=True, ignore_eos_token=True)["details"]
    assert (details["finish_reason"], details["generated_tokens"], api.request.eos) == (
        "length",
        20,
        frozenset(),
    )


def test_prefill_and_top_tokens(api: ScriptedApp) -> None:
    details = api.generate(
        "Hi there", max_new_tokens=2, details=True, decoder_input_details=True, top_n_tokens=3
    )["details"]
    ids = making.ids("Hi there")
    assert [p["id"] for p in details["prefill"]] == ids
    assert [p["logprob"] for p in details["prefill"]] == [None] + [-1.0] * (len(ids) - 1)
    assert "".join(p["text"] for p in details["prefill"]) == "Hi there"
    assert [[t["id"] for t in top] for top in details["top_tokens"]] == [
        [70, id, 71] for id in making.ids(END)[:2]
    ]
    assert (api.request.prompt_logprobs, api.request.sampling.logprobs) == (0, 3)


def test_minus_infinity_is_a_number_that_json_has(api: ScriptedApp) -> None:
    tops = api.generate(max_new_tokens=1, details=True, top_n_tokens=4)["details"]["top_tokens"][0]
    assert tops[-1]["logprob"] == -9999.0


def test_full_text_and_truncation(api: ScriptedApp) -> None:
    assert api.generate("Hi you", return_full_text=True)["generated_text"] == "Hi you" + END
    details = api.generate("abcdefgh", truncate=3, details=True)["details"]
    assert details["prompt_tokens"] == 3
    assert api.request.prompt == tuple(making.ids("fgh"))


def test_the_best_of_several_is_the_likeliest(api: ScriptedApp) -> None:
    api.engine.script = lambda request: making.ids("abc"[: 1 + request.sampling.seed % 3])
    answer = api.generate(best_of=3, do_sample=True, seed=0, details=True)
    assert answer["generated_text"] == "a"
    assert [other["generated_text"] for other in answer["details"]["best_of_sequences"]] == ["ab", "abc"]
    assert len(api.engine.requests) >= 3


def test_the_root_answers_a_list(api: ScriptedApp) -> None:
    assert api.post("/", {"inputs": "Hi"}).json() == [{"generated_text": END, "adapter": None}]


# ---- streams


@pytest.mark.parametrize(
    ("path", "more"), [("/generate_stream", {}), ("/generate", {"stream": True}), ("/", {"stream": True})]
)
def test_a_stream_is_one_event_a_token_and_the_last_tells_all(
    api: ScriptedApp, path: str, more: dict[str, Any]
) -> None:
    events = api.stream(
        path, {"inputs": "Hi", "parameters": {"adapter_id": "x", "max_new_tokens": 5}, **more}
    )
    assert len(events) == 5
    assert all(
        e.keys() == {"token", "generated_text", "details"} and e["details"] is None for e in events[:-1]
    )
    assert [e["token"]["id"] for e in events] == making.ids(END)[:5]
    last = events[-1]
    assert last["generated_text"] == "".join(e["token"]["text"] for e in events)
    assert last["adapter"] == {"id": "x", "digest": DIGEST}
    assert last["details"] == {
        "finish_reason": "length",
        "prompt_tokens": 2,
        "generated_tokens": 5,
        "seed": None,
    }


def test_streams_equal_the_whole_at_every_length(api: ScriptedApp) -> None:
    api.says(EMOJI)
    for n in range(1, len(making.ids(EMOJI)) + 2):
        whole = api.generate(max_new_tokens=n)["generated_text"]
        events = api.stream("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": n}})
        assert "".join(e["token"]["text"] for e in events) == whole == events[-1]["generated_text"]
        assert "\ufffd" not in whole[:-1]
        assert len(events) == n


@pytest.mark.parametrize(
    "stop", [["end"], ["d of", "zzz"], ["the end of it all"], [" "], ["all "], ["it", "f it"]]
)
def test_stop_strings_never_leak(api: ScriptedApp, stop: list[str]) -> None:
    answer = api.generate(stop=stop, details=True)
    places = [END.index(s) for s in stop if s in END]
    assert answer["generated_text"] == (END[: min(places)] if places else END)
    assert answer["details"]["finish_reason"] == ("stop_sequence" if places else "eos_token")
    events = api.stream("/generate_stream", {"inputs": "Hi", "parameters": {"stop": stop}})
    streamed = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
    assert streamed == answer["generated_text"] == events[-1]["generated_text"]
    assert not api.engine.cancelled


def test_text_held_for_a_stop_string_comes_with_the_eos(api: ScriptedApp) -> None:
    events = api.stream("/generate_stream", {"inputs": "Hi", "parameters": {"stop": ["all together"]}})
    assert (events[-1]["token"]["text"], events[-1]["token"]["special"]) == ("all", False)


def test_a_failure_in_mid_stream_is_the_last_event(api: ScriptedApp) -> None:
    """B11: at the third token; then the stream ends."""
    api.engine.fails = ("not_ready", "the worker died")
    events = api.stream("/generate_stream", {"inputs": "Hi"})
    assert len(events) == 3
    assert events[-1] == {"error": "the worker died", "error_type": "not_ready"}
    api.generate(status=503)


def test_a_stream_tells_the_prompts_tokens_at_its_end(api: ScriptedApp) -> None:
    last = api.stream("/generate_stream", {"inputs": "Hi", "parameters": {"decoder_input_details": True}})[-1]
    assert [(p["id"], p["logprob"]) for p in last["details"]["prefill"]] == list(
        zip(making.ids("Hi"), [None, -1.0], strict=True)
    )


def test_top_tokens_stream_too(api: ScriptedApp) -> None:
    events = api.stream("/generate_stream", {"inputs": "Hi", "parameters": {"top_n_tokens": 2}})
    assert [[t["id"] for t in e["top_tokens"]] for e in events[:2]] == [
        [70, id] for id in making.ids(END)[:2]
    ]


# ---- refusals

GOOD = {
    "temperature": "0 1e-9 null",
    "top_p": "1",
    "top_k": "-1 0 1000000000",
    "seed": "18446744073709551615",
    "watermark": "false",
    "api_token": "null",
    "merged_adapters": "false",
    "grammar": "null false",
    "adapter_source": "null false",
    "stop": "null",
    "best_of": "1",
    "truncate": "1000000",
    "response_format": '{"type":"text"} null',
}
BAD = {
    "temperature": '-1 NaN 1e999 "hot" -Infinity true',
    "top_p": "0 1.5 -1",
    "top_k": "-2 1.0",
    "typical_p": "2 0",
    "max_new_tokens": "0 -1 1e20 true 1.5 513",
    "repetition_penalty": "0 -1 NaN 1e-45 5e-324 101",
    "seed": "-1 18446744073709551616 1.0",
    "best_of": "0 2",
    "truncate": "0",
    "stop": '5 [""] [1]',
    "do_sample": '"maybe" 1',
    "adapter_id": "7",
    "watermark": "true",
    "merged_adapters": '{"ids":["a"],"weights":[1.0]}',
    "api_token": '"hf_x"',
    "return_k_alternatives": "2",
    "no_such_field": "1",
    "adapter_source": '"s3"',
    "top_n_tokens": "1000000",
    "details": "1",
    "response_format": '{"type":"json_object","schema":{"type":"no-such-type"}} '
    '{"type":"no-such-format"} {"type":"regex","regex":"("} 5',
    "grammar": '{"type":"json","value":{"type":"x"}} {"type":"regex"}',
}


def each(table: dict[str, str]) -> list[tuple[str, str]]:
    return [(field, value) for field, values in table.items() for value in values.split()]


def body_with(field: str, value: str) -> bytes:
    return f'{{"inputs": "Hi", "parameters": {{"{field}": {value}}}}}'.encode()


@pytest.mark.parametrize(("field", "value"), each(GOOD))
def test_values_with_a_meaning_are_taken(api: ScriptedApp, field: str, value: str) -> None:
    api.post("/generate", body_with(field, value))
    assert api.request.sampling.temperature in (0, 1)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
@pytest.mark.parametrize(("field", "value"), each(BAD))
def test_odd_values_are_refused_by_name_before_anything_runs(
    api: ScriptedApp, path: str, field: str, value: str
) -> None:
    """B13."""
    before = len(api.engine.requests)
    refusal = api.post(path, body_with(field, value), 422).json()
    assert field in refusal["error"]
    assert refusal["error_type"] == ("context_length_exceeded" if value == "513" else "validation")
    assert len(api.engine.requests) == before


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", b"", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, BACKSLASH_U),
        *(b'{"inputs": 5}', b'{"inputs": ""}', b'{"inputs": "Hi", "no_such": 1}', b'{"parameters": {}}'),
        *(b'{"inputs": "Hi", "stream": "yes"}', b'{"inputs": "Hi", "parameters": []}'),
    ],
)
def test_broken_bodies_are_validation_errors(api: ScriptedApp, body: bytes) -> None:
    assert api.post("/generate", body, 422).json()["error_type"] == "validation"


def test_streaming_the_best_of_several_is_refused(api: ScriptedApp) -> None:
    body = {"inputs": "Hi", "parameters": {"best_of": 2, "do_sample": True}}
    assert "best_of" in api.post("/generate_stream", body, 422).json()["error"]
    assert "best_of" in api.post("/generate", body | {"stream": True}, 422).json()["error"]


def test_a_source_must_be_the_true_one(api: ScriptedApp) -> None:
    api.generate(adapter_id="x", adapter_source="local")
    api.generate(adapter_id="org/y", adapter_source="hub")
    assert "adapter_source" in api.generate(adapter_id="x", adapter_source="hub", status=422)["error"]
    assert "adapter_source" in api.generate(adapter_id="org/y", adapter_source="local", status=422)["error"]


def test_the_context_is_the_limit_and_the_default_fits_into_it(api: ScriptedApp) -> None:
    refusal = api.generate("a" * 505, max_new_tokens=8, status=422)
    assert refusal["error_type"] == "context_length_exceeded"
    assert refusal["details"] == {"context": 512, "prompt_tokens": 505, "max_tokens": 8}
    assert "512" in refusal["error"]
    assert "505" in refusal["error"]
    api.generate("a" * 505, max_new_tokens=7)
    api.generate("a" * 505)
    assert api.request.max_tokens == 7
    api.generate("a")
    assert api.request.max_tokens == 128
    assert api.generate("a" * 512, status=422)["error_type"] == "context_length_exceeded"


def test_a_source_without_an_adapter_is_refused(api: ScriptedApp) -> None:
    assert "adapter_source" in api.generate(adapter_source="local", status=422)["error"]


@pytest.mark.parametrize("stop", [["x" * 10_000], ["x"] * 17])
def test_stop_strings_have_a_limit(api: ScriptedApp, stop: list[str]) -> None:
    assert "stop" in api.generate(stop=stop, status=422)["error"]
    api.generate(stop=["x" * 1000] * 16)


def test_a_lone_surrogate_is_refused_wherever_it_stands(api: ScriptedApp) -> None:
    lone = "\ud800"
    for format in ({"type": "regex", "regex": lone}, {"type": "json_object", "schema": {"const": lone}}):
        assert "response_format" in api.generate(response_format=format, status=422)["error"]
    api.generate(adapter_id=lone, status=404)
    assert "stop" in api.generate(stop=[lone], status=422)["error"]


def test_sampling_parameters_reach_the_engine(api: ScriptedApp) -> None:
    api.generate(
        temperature=0.5,
        top_k=5,
        top_p=0.9,
        typical_p=0.8,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        seed=11,
    )
    sampling = api.request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.typical_p) == (0.5, 5, 0.9, 0.8)
    assert (
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
        sampling.seed,
    ) == (1.1, 0.2, 0.3, 11)


def test_sampling_without_a_seed_draws_one_and_tells_it(api: ScriptedApp) -> None:
    seeds = {api.generate(do_sample=True, details=True)["details"]["seed"] for _ in range(2)}
    assert len(seeds) == 2
    assert api.request.sampling.seed in seeds


@pytest.mark.parametrize(
    ("field", "value", "inside"),
    [
        ("response_format", {"type": "json_object"}, '"object"'),
        ("response_format", {"type": "json_object", "schema": {"type": "integer"}}, '"integer"'),
        ("response_format", {"type": "json_schema", "schema": {"type": "integer"}}, '"integer"'),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}},
            '"integer"',
        ),
        ("response_format", {"type": "regex", "regex": "[ab]+"}, "[ab]+"),
        ("grammar", {"type": "json", "value": {"type": "integer"}}, '"integer"'),
        ("grammar", {"type": "regex", "value": "[ab]+"}, "[ab]+"),
    ],
)
def test_formats_become_grammars(api: ScriptedApp, field: str, value: dict[str, Any], inside: str) -> None:
    api.post("/generate", {"inputs": "Hi", "parameters": {field: value}})
    assert api.request.sampling.grammar is not None
    assert json.loads(api.request.sampling.grammar)["grammars"]
    assert inside in api.request.sampling.grammar


def test_a_format_that_is_text_constrains_nothing(api: ScriptedApp) -> None:
    text = {"type": "text"}
    api.generate(response_format=text, ignore_eos_token=True)
    assert (api.request.sampling.grammar, api.request.eos) == (None, frozenset())
    api.generate(response_format=text, grammar={"type": "regex", "value": "[ab]+"})
    assert "[ab]+" in str(api.request.sampling.grammar)


def test_a_full_queue_is_429_also_for_streams(api: ScriptedApp) -> None:
    api.engine.limit = 0
    answer = api.post("/generate", {"inputs": "Hi"}, 429)
    assert answer.json()["error_type"] == "overloaded"
    assert answer.headers["retry-after"]
    api.post("/generate_stream", {"inputs": "Hi", "parameters": {"adapter_id": "x"}}, 429)


def test_ends_that_the_vocabulary_does_not_have_never_reach_the_batch(api: ScriptedApp) -> None:
    folder = api.registry.root / "odd"
    folder.mkdir()
    end = making.ids("d")[0]
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [end, -1, len(making.tokenizer()), 10**30]})
    )
    api.registry.cards["odd"] = api.registry.cards["x"]
    api.generate(adapter_id="odd")
    assert api.request.eos == {2, end}


def test_files_that_were_edited_after_their_registration_answer_nothing(
    api: ScriptedApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = api.registry.root / "edited"
    folder.mkdir()
    api.registry.cards["edited"] = api.registry.cards["x"]
    lease = api.registry.lease_adapter

    @contextmanager
    def edited(id: str) -> Iterator[Any]:
        with lease(id) as generation:
            (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
            yield generation

    monkeypatch.setattr(api.registry, "lease_adapter", edited)
    (folder / "generation_config.json").write_text('{"eos_token_id": 8}')
    answer = api.generate(adapter_id="edited", status=422)
    assert answer["error_type"] == "adapter_invalid"
    assert "register it again (PUT)" in answer["error"]


def test_an_adapters_own_words_are_used(api: ScriptedApp) -> None:
    folder = api.registry.root / "x2"
    folder.mkdir()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": making.ids("d")}))
    api.registry.cards["x2"] = api.registry.cards["x"]
    answer = api.generate(adapter_id="x2", details=True)
    assert answer["generated_text"] == " the en"
    assert answer["details"]["finish_reason"] == "eos_token"
