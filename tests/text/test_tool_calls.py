"""Calls in the text of answers: each family's format, good calls beside bad ones, and what comes when."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from service.text.tool_calls import (
    AnswerParser,
    CallDelta,
    CallFormat,
    CallParser,
    HarmonyParser,
    ToolCallText,
    declared_format,
)

HERMES, QWEN, MISTRAL = CallFormat.HERMES, CallFormat.QWEN_XML, CallFormat.MISTRAL
LLAMA, PYTHONIC = CallFormat.LLAMA, CallFormat.PYTHONIC
PHI, HARMONY = CallFormat.PHI, CallFormat.HARMONY
NAMES = ["add", "now"]
SCHEMAS = {"add": {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}}
ADD = '{"name": "add", "arguments": {"a": 1, "b": "é"}}'
ADDED = ToolCallText("add", '{"a": 1, "b": "é"}')
NOW = ToolCallText("now", "{}")
FOO = '{"name": "foo", "arguments": {"x": [1, "}"]}}'
XML = "<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\né\n</parameter>\n</function>"


def pieces(text: str, chance: random.Random) -> Iterator[str]:
    while text:
        length = chance.randint(1, 5)
        yield text[:length]
        text = text[length:]


def read(
    whole: str, format: CallFormat | None, seed: int, **options: Any
) -> tuple[str, list[ToolCallText], list[CallDelta]]:
    kind = HarmonyParser if format is HARMONY else partial(CallParser, format)
    parser: AnswerParser = kind(NAMES, schemas=SCHEMAS, **options)
    content, deltas = "", list[CallDelta]()
    for piece in pieces(whole, random.Random(seed)):
        content += parser.push_text(piece)
        deltas += parser.take_deltas()
    rest, calls = parser.finish_calls()
    return content + rest, calls, deltas + parser.take_deltas()


def join_deltas(deltas: list[CallDelta]) -> list[ToolCallText]:
    """The calls that a client makes of a stream."""
    joined: list[list[str]] = []
    for delta in deltas:
        if delta.name is not None:
            assert delta.index == len(joined)
            joined.append([delta.name, ""])
        joined[delta.index][1] += delta.arguments
    return [ToolCallText(*call) for call in joined]


START = "<|start|>assistant"
THOUGHT = f"<|channel|>analysis<|message|>Two numbers.<|end|>{START}"
ADDRESSED = f"<|channel|>commentary to=functions.add <|constrain|>json<|message|>{ADDED.arguments}<|call|>"
CASES: list[tuple[CallFormat | None, str, str, list[ToolCallText]]] = [
    (HERMES, f"<tool_call>\n{ADD}\n</tool_call>", "", [ADDED]),
    (
        HERMES,
        f'Well. <tool_call>{ADD}</tool_call>\n<tool_call>{{"name": "now"}}</tool_call>',
        "Well. ",
        [ADDED, NOW],
    ),
    (HERMES, f"\n{ADD}\n", "\n", [ADDED]),
    (HERMES, "a <tool_cal is no call", "a <tool_cal is no call", []),
    (HERMES, f"<tool_call>{ADD}</tool_call>\nDone.", "Done.", [ADDED]),
    (HERMES, f"<tool_call>{ADD}</tool_call> Done. <tool_call>{ADD}</tool_call>", "Done. ", [ADDED, ADDED]),
    (HERMES, f"<tool_call>{ADD}</tool_call><tool_call>{FOO}</tool_call>", "", [ADDED]),
    (HERMES, f"<tool_call>{FOO}</tool_call> So. <tool_call>{ADD}</tool_call>", "So. ", [ADDED]),
    (HERMES, f"<tool_call>{{broken</tool_call><tool_call>{ADD}</tool_call>", "", [ADDED]),
    (HERMES, f"<tool_call>{ADD[:-1]}\n</tool_call>", "", [ADDED]),
    (HERMES, "<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
    (HERMES, f"<tool_call>{FOO}</tool_call> So.", f"<tool_call>{FOO}</tool_call> So.", []),
    (HERMES, FOO, FOO, []),
    (HERMES, '{"arguments": {"a": 1}, "name": "add"}', "", [ToolCallText("add", '{"a": 1}')]),
    (HERMES, '{"name": "add", "arguments": "{}"}', "", [ToolCallText("add", "{}")]),
    (HERMES, '{"name": "now", "arguments": null}', "", [NOW]),
    (HERMES, '{"name": "add", "arguments": "\\udc00"}', '{"name": "add", "arguments": "\\udc00"}', []),
    (HERMES, '{"name": ["add"], "arguments": {}}', '{"name": ["add"], "arguments": {}}', []),
    (HERMES, "[" * 5000, "[" * 5000, []),
    (HERMES, '{"a": 1}', '{"a": 1}', []),
    (HERMES, '{"type": "circle", "name": "add"}', '{"type": "circle", "name": "add"}', []),
    (HERMES, "[1, 2]", "[1, 2]", []),
    (QWEN, f"<tool_call>\n{XML}\n</tool_call>", "", [ADDED]),
    (QWEN, f"So.\n{XML}\n</tool_call>\n<tool_call>\n<function=now>\n</function>", "So.\n", [ADDED, NOW]),
    (QWEN, f"<tool_call>{ADD}</tool_call>", "", [ADDED]),
    (QWEN, f"<tool_call>{XML.replace('add', 'foo')}</tool_call><tool_call>{XML}</tool_call>", "", [ADDED]),
    (
        QWEN,
        "<function=add><parameter=b>\n1\n2 > 1 </p>\n</parameter><parameter=c>[1]</parameter></function>",
        "",
        [ToolCallText("add", '{"b": "1\\n2 > 1 </p>", "c": [1]}')],
    ),
    (MISTRAL, f"[TOOL_CALLS][{ADD}, {ADD}]", "", [ADDED, ADDED]),
    (MISTRAL, f"[{ADD}]", "", [ADDED]),
    (MISTRAL, f"[TOOL_CALLS]add[ARGS]{ADDED.arguments}", "", [ADDED]),
    (MISTRAL, f"[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{ADDED.arguments}", "", [ADDED]),
    (MISTRAL, f"[TOOL_CALLS]now{{}}[TOOL_CALLS]add[ARGS]{ADDED.arguments}", "", [NOW, ADDED]),
    (MISTRAL, f"[TOOL_CALLS]foo[ARGS]{{}}[TOOL_CALLS]add[ARGS]{ADDED.arguments}", "", [ADDED]),
    (MISTRAL, f"[TOOL_CALLS]add[ARGS]{ADDED.arguments} Done", "Done", [ADDED]),
    (LLAMA, '{"name": "now", "parameters": {}}; ' + ADD.replace("arguments", "parameters"), "", [NOW, ADDED]),
    (LLAMA, f"<|python_tag|>{ADD}", "", [ADDED]),
    (LLAMA, f'{{"type": "function", {ADD[1:]}', "", [ADDED]),
    (LLAMA, "[add(a=1, b='é'), now()]", "", [ADDED, NOW]),
    (PYTHONIC, r'[add(a=[True, None, -1.5], b={"x": "(\"\n"})]', "", [
        ToolCallText("add", '{"a": [true, null, -1.5], "b": {"x": "(\\"\\n"}}'),
    ]),
    (PYTHONIC, "[add(1)]", "[add(1)]", []),
    (PYTHONIC, "[add(a=open('x'))]", "[add(a=open('x'))]", []),
    (PYTHONIC, "[add(a=" + "[" * 3000, "[add(a=" + "[" * 3000, []),
    (PYTHONIC, "[adding is fun]", "[adding is fun]", []),
    (PHI, f"<|tool_call|>[{ADD}, {ADD}]<|/tool_call|>", "", [ADDED, ADDED]),
    (PHI, f"So. <|tool_call|>{ADD}<|/tool_call|>", "So. ", [ADDED]),
    (PHI, f"functools[{ADD}]", "", [ADDED]),
    (PHI, f"<|tool_call|>[{FOO}]<|/tool_call|><|tool_call|>[{ADD}]<|/tool_call|>", "", [ADDED]),
    (PHI, "functools[0] is no call", "functools[0] is no call", []),
    (HARMONY, f"{THOUGHT}{ADDRESSED}", "", [ADDED]),
    (HARMONY, f"<|channel|>commentary<|message|>I add.<|end|>{START}{ADDRESSED}", "I add.", [ADDED]),
    (HARMONY, f"{START} to=functions.add<|channel|>commentary json<|message|>{ADDED.arguments}", "", [ADDED]),
    (HARMONY, f"{ADDRESSED}{START} to=functions.now<|channel|>commentary<|message|>", "", [ADDED, NOW]),
    (HARMONY, f"{ADDRESSED.replace('add', 'foo')}{START}{ADDRESSED}", "", [ADDED]),
    (HARMONY, "<|channel|>commentary to=functions.foo<|message|>{}<|call|>", "{}", []),
    (HARMONY, f"{THOUGHT}<|channel|>final<|message|>a < b <|c|> d", "a < b <|c|> d", []),
    (HARMONY, "<|chan", "<|chan", []),
    (HARMONY, "Plain.", "Plain.", []),
    (HARMONY, ADD, "", [ADDED]),
    (None, ADD, ADD, []),
]  # fmt: skip


@pytest.mark.parametrize(("format", "whole", "content", "calls"), CASES, ids=lambda value: str(value)[:50])
def test_calls_are_read_however_the_text_comes(
    format: CallFormat | None, whole: str, content: str, calls: list[ToolCallText]
) -> None:
    for seed in range(30):
        told, found, deltas = read(whole, format, seed)
        assert (told.strip(), found) == (content.strip(), calls)
        assert join_deltas(deltas) == calls


@pytest.mark.parametrize("format", [None, HERMES, QWEN, MISTRAL, LLAMA])
def test_a_forced_call_is_read_in_any_format(format: CallFormat | None) -> None:
    assert read(ADD, format, 0, forced=True)[:2] == ("", [ADDED])
    assert read('{"name": "now", "arguments": {}}', format, 0, forced=True)[:2] == ("", [NOW])
    assert read("Sorry.", format, 0, forced=True)[:2] == ("Sorry.", [])


def test_of_several_calls_only_the_first_may_count() -> None:
    for text, format in ((f"<tool_call>{ADD}</tool_call>", HERMES), (ADDRESSED + START, HARMONY)):
        content, calls, deltas = read(text * 3, format, 0, single=True)
        assert (content, calls, join_deltas(deltas)) == ("", [ADDED], [ADDED])


def test_thoughts_are_told_as_they_come() -> None:
    parser = HarmonyParser(NAMES)
    parser.push_text("<|channel|>analysis<|message|>")
    for char in "Two numbers.":
        assert parser.push_text(char) == ""
        assert parser.take_thoughts() == char
    assert parser.push_text(f"<|end|>{START}<|channel|>final<|message|>3") == "3"
    assert parser.take_thoughts() == ""
    assert parser.finish_calls() == ("", [])


LONG = json.dumps({"b": "word " * 20})


@pytest.mark.parametrize(
    ("format", "begins"),
    [
        (HERMES, '<tool_call>\n{"name": "add", "arguments": '),
        (LLAMA, '{"type": "function", "name": "add", "parameters": '),
        (MISTRAL, "[TOOL_CALLS]add[ARGS]"),
    ],
)
def test_arguments_are_told_as_they_come(format: CallFormat, begins: str) -> None:
    parser = CallParser(format, NAMES)
    assert parser.push_text(begins) == ""
    parser.take_deltas()
    for char in LONG:
        parser.push_text(char)
        (delta, *more) = [delta for delta in parser.take_deltas() if delta.name is None]
        assert (delta.arguments, more) == (char, [])


def test_a_call_that_is_cut_is_told_as_far_as_it_came() -> None:
    whole = '{"name": "add", "arguments": {"b": "wo'
    content, calls, deltas = read(whole, HERMES, 0)
    assert (content, calls) == ("", [ToolCallText("add", '{"b": "wo')])
    assert join_deltas(deltas) == calls
    assert read('{"name": "add", "argu', HERMES, 0)[:2] == ('{"name": "add", "argu', [])


@pytest.mark.parametrize(
    ("format", "text", "at"),
    [
        (HERMES, '{"answer": 1}', '{"an'),
        (HERMES, '{"name": "Ada"}', '{"name": "A'),
        (HERMES, '{"type": "circle"}', '{"type": "c'),
        (HERMES, "[1, 2, 3]", "[1"),
        (LLAMA, "[ada(x=1)]", "[ada"),
        (HERMES, "<b>bold</b>", "<b"),
    ],
)
def test_text_is_held_no_longer_than_it_could_be_a_call(format: CallFormat, text: str, at: str) -> None:
    parser = CallParser(format, NAMES)
    held = [parser.push_text(char) for char in at]
    assert held == [""] * (len(at) - 1) + [at]
    assert parser.push_text(text[len(at) :]) == text[len(at) :]


def test_a_template_declares_its_format() -> None:
    assert declared_format("... <tool_call> ...") is HERMES
    assert declared_format("<tool_call>\n<function=x>\n<parameter=y>") is QWEN
    assert declared_format("[TOOL_CALLS] [") is MISTRAL
    assert declared_format("<|python_tag|>") is LLAMA
    assert declared_format('Respond in the format {"name": function name, "parameters": dictionary}') is LLAMA
    assert declared_format("[func_name1(params_name1=params_value1)]") is PYTHONIC
    assert declared_format("<|tool|>{{ message['tools'] }}<|/tool|>") is PHI
    assert declared_format("<|start|>assistant<|channel|>final<|message|>") is HARMONY
    assert declared_format("{{ tools }}") is None


def test_a_long_answer_is_read_in_time() -> None:
    """A value that is not whole yet is not looked through again with each piece."""
    parser = CallParser(QWEN, NAMES)
    parser.push_text("<function=add><parameter=b>")
    for _ in range(30_000):
        parser.push_text("<a> ")
    parser.push_text("</parameter></function>")
    _, (call,) = parser.finish_calls()
    assert len(call.arguments) > 120_000
