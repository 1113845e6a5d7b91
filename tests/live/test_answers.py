"""Whose answer it is, and that it is whole: adapters, batches, names, stop strings, characters,
templates, eos, formats.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from typing import Any

import pytest

from tests import making

from .conftest import ROWS, SILENT, Asking, LiveService

pytestmark = pytest.mark.anyio

ALPHABET = " L M N O P Q R S"
USER = {"role": "user", "content": "Hi"}
EMOJI = "😀日é👩‍👩‍👧 the on 😃"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def saying(text: str) -> dict[str, Any]:
    """A format that lets the model say this text only, token by token as it likes."""
    return {"type": "regex", "regex": re.escape(text)}


async def test_every_answer_in_a_mixed_crowd_is_its_own_adapters(live: LiveService, asking: Asking) -> None:
    """B1: markers of both lanes, noise and base at once, half of them streaming."""
    base = await asking.streamed("Hello there", n=8, ignore_eos_token=True)
    names: list[str | None] = [*(name for name in live.letters if name != SILENT), None]

    async def ask(i: int) -> None:
        name, streams = names[i % len(names)], i // len(names) % 2
        if streams:
            text = await asking.streamed("Hello there", name, ignore_eos_token=True)
        else:
            text = (await asking.generate("Hello there", name, ignore_eos_token=True))["generated_text"]
        assert text == (live.letters[name] * 8 if name else base)

    await asyncio.gather(*(ask(i) for i in range(8 * len(names))))


@pytest.mark.parametrize("name", ["typo", "M0", "m0 ", " m0", "", "m0/x", "gone"])
async def test_an_unknown_name_is_never_the_base(asking: Asking, name: str) -> None:
    """B2: mistyped, in another case, with a space, empty, or just deleted; in both dialects, whole
    and streamed.
    """
    await asking.post("/adapters", {"id": "gone", "source": "n2"}, 201)
    assert (await asking.http.delete("/adapters/gone")).status_code == 200
    for path in ("/generate", "/generate_stream", "/"):
        told = await asking.post(path, {"inputs": "Hi", "parameters": {"adapter_id": name}}, 404)
        assert told["error_type"] == "adapter_not_found"
    for path, what in (
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        for stream in (False, True):
            told = await asking.post(path, {"model": name, "stream": stream, **what}, 404)
            assert told["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("adapter", [None, "n1", "n3"])
async def test_a_row_says_the_same_alone_and_among_all_others(
    live: LiveService, asking: Asking, adapter: str | None
) -> None:
    """B8: a short prompt beside fifteen long ones, under its own and other adapters; and what it
    says is PEFT's.
    """
    alone = await asking.ids("Hi", adapter, 24)
    together, _ = await asyncio.gather(
        asking.ids("Hi", adapter, 24), asking.crowd(ROWS - 1, (adapter, "n1", "n2", None, "m9"))
    )
    assert together == alone == live.greedy(adapter, "Hi", 24)


@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (["N O"], " L M "),
        (["M", "N O"], " L "),
        (["N Q"], ALPHABET),
        (["S zzz"], ALPHABET),
        ([" L M N O P Q R S"], ""),
        (["Q R S", "O P zzz", "x", "y", "R S"], " L M N O P "),
        ([], ALPHABET),
    ],
)
async def test_nothing_of_a_stop_string_leaks_and_nothing_before_it_is_lost(
    asking: Asking, stop: list[str], kept: str
) -> None:
    """B9: over several tokens, begun and not completed, held at the very end; whole and streamed,
    in both dialects.
    """
    more: dict[str, Any] = {"stop": stop, "response_format": saying(ALPHABET)}
    told = await asking.generate("A B", "n1", 40, details=True, **more)
    assert told["generated_text"] == kept
    assert told["details"]["finish_reason"] == ("eos_token" if kept == ALPHABET else "stop_sequence")
    assert await asking.streamed("A B", "n1", 40, **more) == kept
    (choice,) = (await asking.complete("A B", "n1", 40, **more))["choices"]
    assert choice == {"index": 0, "text": kept, "logprobs": None, "finish_reason": "stop"}
    body = {"model": "n1", "prompt": "A B", "max_tokens": 40, "stream": True, **more}
    events = await asking.stream("/v1/completions", body)
    assert "".join(event["choices"][0]["text"] for event in events) == kept


async def test_an_empty_stop_string_is_refused(asking: Asking) -> None:
    """B9."""
    assert "stop" in (await asking.generate("A", stop=[""], status=422))["error"]


async def test_characters_are_whole_at_every_length_and_streams_say_the_same(asking: Asking) -> None:
    """B10: every token is a byte or two, so almost every length cuts a character."""
    ids, format = making.ids(EMOJI), saying(EMOJI)
    body = {"model": "n1", "prompt": "Hi", "temperature": 0, "stream": True, "response_format": format}
    for n in (*range(1, 16), len(ids), len(ids) + 1):
        whole = (await asking.generate("Hi", "n1", n, response_format=format))["generated_text"]
        assert await asking.streamed("Hi", "n1", n, response_format=format) == whole
        events = await asking.stream("/v1/completions", {**body, "max_tokens": n})
        assert "".join(event["choices"][0]["text"] for event in events) == whole
        characters = whole.removesuffix("\ufffd")
        assert EMOJI.startswith(characters)
        assert len(characters) >= len(making.tokenizer().decode(ids[:n]).rstrip("\ufffd"))
    assert whole == EMOJI


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "text",
        [{"role": "user", "content": None}],
        [{"role": "user"}],
        [{"content": "x"}],
        [{**USER, "content": [{"type": "image_url"}]}],
    ],
)
async def test_messages_that_are_none_are_refused(asking: Asking, messages: Any) -> None:
    """B15."""
    told = await asking.post("/v1/chat/completions", {"model": "tiny", "messages": messages}, 400)
    assert told["error"]["type"] == "invalid_request_error"


async def test_a_template_is_the_adapters_own_where_it_has_one(live: LiveService, asking: Asking) -> None:
    """B15: text parts are one text; bos is there once; and what answers is the adapter on exactly
    that prompt.
    """

    async def chat(model: str, content: Any) -> Any:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 8,
            "temperature": 0,
            "ignore_eos": True,
        }
        return await asking.post("/v1/chat/completions", body)

    rendered = {
        "n1": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        "own": "<|im_start|>One sentence of its own. Hi",
    }
    for model, prompt in rendered.items():
        told = await chat(model, "Hi")
        assert told["usage"]["prompt_tokens"] == len(making.ids(prompt))
        parts = await chat(model, [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}])
        answers = {told["choices"][0]["message"]["content"], parts["choices"][0]["message"]["content"]}
        assert answers == {making.tokenizer().decode(live.greedy(model, prompt, 8), skip_special_tokens=True)}


async def test_a_changed_template_is_other_content_once_it_is_registered_again(
    live: LiveService, asking: Asking
) -> None:
    """By PUT, by vLLM's name for it, and by DELETE and POST; equal files answer alike under one
    digest.
    """
    folder = making.edit(live.adapters / "n1", live.adapters / "dressed")
    source = {"id": "dressed", "source": "dressed"}
    loading = {"lora_name": "dressed", "lora_path": "dressed", "load_inplace": True}
    requests = (
        ("POST", "/adapters", source, 201, "One."),
        ("PUT", "/adapters/dressed", source, 200, "Two long sentences. That is them."),
        ("POST", "/v1/load_lora_adapter", loading, 200, "Three"),
    )
    digests = []
    for method, path, body, status, sentence in requests:
        template = "{{ bos_token }}" + sentence + " {{ messages[-1]['content'] }}"
        (folder / "chat_template.jinja").write_text(template)
        assert (await asking.http.request(method, path, json=body)).status_code == status
        digests.append(await chat_with_dressed(asking, sentence))
    assert len(set(digests)) == 3
    assert (await asking.http.delete("/adapters/dressed")).status_code == 200
    await asking.post("/adapters", source, 201)
    assert await chat_with_dressed(asking, "Three") == digests[-1]
    await asking.http.delete("/adapters/dressed")
    shutil.rmtree(folder)


async def chat_with_dressed(asking: Asking, sentence: str) -> str:
    """The digest of the content that answers, whose template must be the one with this sentence."""
    body = {"model": "dressed", "messages": [USER], "max_tokens": 1}
    answer = await asking.post("/v1/chat/completions", body)
    assert answer["usage"]["prompt_tokens"] == len(making.ids(f"<|im_start|>{sentence} Hi"))
    return str(answer["adapter"]["digest"])


async def test_every_listed_eos_ends_an_answer_unless_it_is_ignored(
    live: LiveService, asking: Asking
) -> None:
    """B16: the second of the list, which the marker says at once."""
    told = await asking.generate("Hi", SILENT, 6, details=True)
    details = told["details"]
    assert (told["generated_text"], details["finish_reason"]) == ("", "eos_token")
    assert details["generated_tokens"] == 1
    assert await asking.streamed("Hi", SILENT, 6) == ""
    body = {"model": SILENT, "messages": [USER], "max_tokens": 6, "temperature": 0}
    (choice,) = (await asking.post("/v1/chat/completions", body))["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    told = await asking.generate("Hi", SILENT, 6, details=True, ignore_eos_token=True)
    assert (told["generated_text"], told["details"]["finish_reason"]) == (live.letters[SILENT] * 6, "length")
    (choice,) = (await asking.complete("Hi", SILENT, 6, ignore_eos=True))["choices"]
    assert (choice["text"], choice["finish_reason"]) == (live.letters[SILENT] * 6, "length")


async def test_several_answers_are_all_the_adapters_own(live: LiveService, asking: Asking) -> None:
    """B17: indexed, the prompt counted once; greedy ones are the same."""
    for model in ("m0", "m9"):
        told = await asking.complete("Tell me", model, 4, n=3, temperature=1, ignore_eos=True)
        assert [(choice["index"], choice["text"]) for choice in told["choices"]] == [
            (i, live.letters[model] * 4) for i in range(3)
        ]
        prompt = len(making.ids("Tell me"))
        assert told["usage"] == making.usage(prompt, 12)
    greedy = await asking.complete("Tell me", "n1", 4, n=2, ignore_eos=True)
    assert greedy["choices"][0]["text"] == greedy["choices"][1]["text"]


async def test_formats_hold_beside_free_rows_and_change_nothing_there(
    live: LiveService, asking: Asking
) -> None:
    """Both dialects' schemas and a regular expression in one batch with free rows, sampled and
    greedy, on base and adapters.
    """
    free = await asking.ids("Hello", "n1", 24)
    openai = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    warm: dict[str, Any] = {"do_sample": True, "temperature": 1.5}
    native = warm | {"response_format": {"type": "json_object", "schema": PERSON}}
    regex = warm | {"response_format": {"type": "regex", "regex": "[cd]{4}"}}
    people = [asking.generate("A person:", model, 150, **native) for model in (None, "n1", "n2", "m9")]
    more: dict[str, Any] = {"response_format": openai, "temperature": 1}
    completions = [asking.complete("A person:", model, 150, **more) for model in ("tiny", "n1", "m0")]
    words = [asking.generate("Cd:", model, 12, **regex) for model in (None, "n2")]
    neighbours = [asking.ids("Hello", "n1", 24) for _ in range(4)]
    answers = await asyncio.gather(*people, *completions, *words, *neighbours)
    for answer in answers[:4]:
        check_person(answer["generated_text"])
    for answer in answers[4:7]:
        check_person(answer["choices"][0]["text"])
    assert all(re.fullmatch("[cd]{4}", answer["generated_text"]) for answer in answers[7:9])
    assert answers[9:] == [free] * 4


def check_person(text: str) -> None:
    person = json.loads(text)
    assert person.keys() == {"name", "age"}
    assert 0 <= person["age"] <= 120


async def test_models_are_dated_by_their_registration(asking: Asking) -> None:
    told = {model["id"]: model["created"] for model in (await asking.http.get("/v1/models")).json()["data"]}
    await asyncio.sleep(1.1)
    await asking.post("/adapters", {"id": "late", "source": "n2"}, 201)
    late = (await asking.http.get("/v1/models/late")).json()["created"]
    assert (await asking.http.delete("/adapters/late")).status_code == 200
    assert late > told["n2"] >= told["tiny"]
