"""B13: clients that mean no good.

Nothing that is sent may give a 5xx or a hang, and nobody else's answer may change.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests import making

from .conftest import Asking, LiveService

pytestmark = pytest.mark.anyio

JSON = "application/json"
LONE = "\ud800"


def nested(depth: int, key: str) -> str:
    return f'{{"{key}":' * depth + "{}" + "}" * depth


def native(**parameters: Any) -> list[tuple[str, str]]:
    return native_text(json.dumps(parameters))


def native_text(parameters: str) -> list[tuple[str, str]]:
    comma = ", " if len(parameters) > 2 else ""
    body = f'{{"inputs": "Hi", "parameters": {parameters[:-1]}{comma}"max_new_tokens": 4}}}}'
    return [("/generate", body), ("/generate_stream", body)]


def openai(**fields: Any) -> list[tuple[str, str]]:
    text = json.dumps({"model": "tiny", "max_tokens": 4, **fields})
    return [("/v1/completions", json.dumps(json.loads(text) | {"prompt": "Hi"})), ("/v1/completions", text)]


def chat(messages: Any = None, **fields: Any) -> list[tuple[str, str]]:
    messages = messages or [{"role": "user", "content": "Hi"}]
    return [
        (
            "/v1/chat/completions",
            json.dumps({"model": "tiny", "messages": messages, "max_tokens": 4, **fields}),
        )
    ]


def format(schema: Any) -> list[tuple[str, str]]:
    tool = {"type": "function", "function": {"name": "a", "parameters": schema}}
    return native(response_format={"type": "json_object", "schema": schema}) + chat(
        tools=[tool], tool_choice="required"
    )


def pattern(regex: str) -> list[tuple[str, str]]:
    return native(response_format={"type": "regex", "regex": regex}) + native(
        grammar={"type": "regex", "value": regex}
    )


WARM = {"do_sample": True}
BIASES = {str(id): -100 for id in range(len(making.tokenizer()))}
CALLED = {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[" * 100_000}}]}
SCHEMAS: tuple[dict[str, Any], ...] = (
    {"type": "string", "minLength": 10**9},
    {"type": "array", "minItems": 10**30},
    {"type": "number", "multipleOf": 1e-300},
    {"enum": [str(i) for i in range(20_000)]},
    {"enum": ["x" * 300_000]},
    {"properties": {f"p{i}": {"type": "string"} for i in range(5000)}},
    {"$ref": "#"},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"$ref": "http://127.0.0.1:1/x"},
    {"$defs": []},
    {"type": "string", "pattern": "(a+)+$"},
)
CASES: dict[str, list[tuple[str, str]]] = {
    "small numbers": [
        case
        for value in (5e-324, 1e-300, 1e-45, 1e-38, 1e-5)
        for name in ("top_p", "typical_p", "repetition_penalty", "temperature")
        for case in native(**WARM, **{name: value})
    ],
    "large numbers": [
        *native(top_k=10**30, **WARM),
        *native(max_new_tokens=10**30),
        # One more token would be a number that Python does not spell
        *native_text('{"max_new_tokens": ' + "9" * 4300 + "}"),
        *native(truncate=10**30),
        *native(temperature=100, repetition_penalty=0.01, frequency_penalty=2),
        *openai(n=10**30),
        *openai(min_tokens=10**30),
        *openai(seed=2**64),
        *native_text('{"seed": ' + "9" * 5000 + "}"),
    ],
    "ids": [
        ("/v1/completions", f'{{"model": "tiny", "prompt": [{id}]}}')
        for id in ("264", "1e3", "9" * 20, "9" * 4000, "9" * 5000)
    ],
    "biases": [*openai(logit_bias=BIASES), *openai(logit_bias={"1" * 5000: 1}), *openai(logit_bias={"٣": 1})],
    "many": [
        *openai(n=128, max_tokens=1),
        *native(best_of=16, details=True, decoder_input_details=True, **WARM),
    ],
    "stops": [
        *native(stop=["x" * 10_000]),
        *native(stop=["x"] * 17),
        *native(stop=["ab" * 500] * 16),
        *native(stop=["\0"]),
    ],
    "lone surrogates": [
        *native(stop=[LONE]),
        *native(adapter_id=LONE),
        *openai(user=LONE),
        *chat([{"role": LONE, "content": LONE, "name": LONE}]),
        *format({"const": LONE}),
        *format({"properties": {LONE: {"pattern": LONE}}}),
        *pattern(LONE),
        ("/generate", json.dumps({"inputs": LONE, LONE: LONE})),
    ],
    "depth": [
        (path, body.replace('"DEEP"', nested(depth, key)))
        for depth in (450, 900, 20_000)
        for key in ("items", "properties", "x")
        for path, body in (*format("DEEP"), ("/generate", '{"inputs": "Hi", "x": "DEEP"}'))
    ]
    + chat([CALLED]),
    "schemas": [case for schema in SCHEMAS for case in format(schema)],
    "patterns": [
        case
        for regex in (
            "a{1000000}",
            "(a{1000}){1000}",
            "(.*a){300}",
            ".*" * 1000,
            "(" * 100_000,
            "(?=a)b",
            "\\b",
            "",
            "\0",
            "\\",
        )
        for case in pattern(regex)
    ],
    "bodies": [
        (path, body)
        for path in ("/generate", "/v1/completions", "/")
        for body in ("null", "1", '""', "{}", "[]", "NaN", "{", "")
    ]
    + [("/generate", '{"inputs": "a", "inputs": "Hi", "parameters": {"seed": 1, "seed": 2}}')],
}


@pytest.mark.parametrize("kind", CASES)
async def test_no_body_is_too_much(live: LiveService, asking: Asking, kind: str) -> None:
    """While it is sent, a neighbour asks for what is known, and gets it."""
    known, over = live.greedy("n1", "Hello", 12), asyncio.Event()

    async def neighbour() -> int:
        count = 0
        while not over.is_set():
            assert await asking.ids("Hello", "n1", 12) == known
            count += 1
        return count

    beside = asyncio.create_task(neighbour())
    for path, body in CASES[kind]:
        await post_odd_body(asking, path, body)
    over.set()
    assert await beside > 0


async def post_odd_body(asking: Asking, path: str, body: str) -> None:
    answer = await asking.http.post(path, content=body.encode(), headers={"content-type": JSON})
    assert answer.status_code < 500, (path, body[:200], answer.text)
    assert '"error_type":"internal"' not in answer.text, (path, body[:200], answer.text)
    if answer.status_code >= 400:
        assert answer.json()["error"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/plain", b'{"inputs": "Hi"}'),
        ("application/x-www-form-urlencoded", b"inputs=Hi"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"--x"),
        ("application/json; charset=utf-16", b'{"inputs": "Hi"}'),
        ("\x7f", b'{"inputs": "Hi"}'),
        (JSON, b"\xff\xfe"),
        (JSON, '{"inputs": "Hi"}'.encode("utf-32")),
    ],
)
async def test_no_content_type_is_too_much(asking: Asking, kind: str, body: bytes) -> None:
    for path in ("/generate", "/v1/completions"):
        answer = await asking.http.post(path, content=body, headers={"content-type": kind})
        assert answer.status_code in (200, 400, 422), answer.text
        assert answer.status_code == 200 or answer.json()["error"]


@pytest.mark.parametrize(
    "path",
    [
        "/generate",
        "/v1/completions",
        "/v1/models",
        "/v1/models/tiny",
        "/v1/models/%00",
        "/v1/",
        "//v1/models",
    ],
)
async def test_no_method_is_too_much(asking: Asking, path: str) -> None:
    for method in ("HEAD", "OPTIONS", "GET", "PUT", "DELETE", "TRACE"):
        answer = await asking.http.request(method, path)
        assert answer.status_code in (200, 404, 405), (method, answer.text)
        if answer.status_code == 405:
            assert answer.headers["allow"]
        if answer.status_code != 200 and method != "HEAD":
            assert answer.json()["error"]


async def test_ends_that_the_vocabulary_does_not_have_harm_nobody(live: LiveService, asking: Asking) -> None:
    known = live.greedy("n1", "Hello", 24)
    folder = making.edit(live.adapters / "n2", live.adapters / "odd")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 10**6]}))
    await asking.post("/adapters", {"id": "odd", "source": "odd"}, 201)
    limited = (asking.complete("Hi", "odd", min_tokens=1) for _ in range(4))
    answers = await asyncio.gather(*(asking.ids("Hello", "n1", 24) for _ in range(4)), *limited)
    assert answers[:4] == [known] * 4
    await asking.http.delete("/adapters/odd")


async def test_whoever_leaves_in_the_middle_changes_nobodys_answer(live: LiveService, asking: Asking) -> None:
    """B12."""
    known = live.greedy("n1", "Hello", 24)

    async def leave() -> None:
        parameters = {"max_new_tokens": 200, "ignore_eos_token": True, "adapter_id": "n2"}
        body = {"inputs": "x", "parameters": parameters}
        async with asking.http.stream("POST", "/generate_stream", json=body) as answer:
            async for _ in answer.aiter_lines():
                return

    for _ in range(3):
        staying = [asking.ids("Hello", "n1", 24) for _ in range(8)]
        answers = await asyncio.gather(*staying, *(leave() for _ in range(12)))
        assert answers[:8] == [known] * 8
