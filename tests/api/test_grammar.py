"""Response formats as grammars: what cannot be met is refused, and no schema can take the process
down.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from service.api.generation import grammar, schema_faults
from service.api.generation.grammar import Verdict, Verdicts
from service.api.generation.schema_edits import FORMATS
from service.api.schemas.shared import JsonObject, Regex
from service.errors import BadRequest


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is remembered of other tests."""
    monkeypatch.setattr(grammar, "VERDICTS", Verdicts(grammar.REMEMBERED))


def compiled(schema: dict[str, Any]) -> str:
    return asyncio.run(grammar.schema_grammar(schema, "response_format"))


def chain(length: int, nested: int = 0) -> dict[str, Any]:
    """Definitions that each refer to the next one, from within `nested` lists."""
    inner: dict[str, Any] = {"type": "integer"}
    definitions = {f"a{length}": inner}
    for i in reversed(range(length)):
        inner = {"$ref": f"#/$defs/a{i + 1}"}
        for _ in range(nested + 1):
            inner = {"type": "array", "items": inner}
        definitions[f"a{i}"] = inner
    return {"$ref": "#/$defs/a0", "$defs": definitions}


@pytest.mark.parametrize("schema", [chain(1400), chain(200, 10), chain(100, 30)])
def test_references_that_would_overflow_the_stack_are_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="response_format: the schema is nested too deep"):
        compiled(schema)


def test_a_schema_over_the_limit_is_not_walked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 MB of empty lists took the event loop seconds."""
    monkeypatch.setattr(grammar, "schema_depth", pytest.fail)
    with pytest.raises(BadRequest, match="100000 are the most"):
        compiled({"a": [[]] * 100_000})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 1_000_003},
        {"type": "number", "multipleOf": 1.00003},
        {"type": "integer", "allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]},
    ],
)
def test_multiples_that_would_take_a_sampler_seconds_are_refused(schema: dict[str, Any]) -> None:
    """A worker that says nothing for 30 s is killed, and everybody's answers with it."""
    with pytest.raises(BadRequest, match="`multipleOf`"):
        compiled(schema)


def test_what_takes_long_to_compile_is_refused_whatever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "COMPILING_S", 0.0)
    with pytest.raises(BadRequest, match="too long to compile"):
        compiled({"type": "integer"})


def test_usual_multiples_are_taken() -> None:
    steps = {
        name: {"type": "number", "multipleOf": step}
        for name, step in {"a": 0.01, "b": 100, "c": 5, "d": 0.25, "e": 60}.items()
    }
    assert compiled({"type": "object", "properties": steps})


def test_references_of_a_real_schema_are_taken() -> None:
    leaf = {
        "type": "object",
        "properties": {
            "next": {"$ref": "#/$defs/leaf"},
            "all": {"type": "array", "items": {"$ref": "#/$defs/other"}},
        },
    }
    definitions = {"leaf": leaf, "other": {"type": "string"}} | {
        f"m{i}": {"type": "object", "properties": {"a": {"type": "array"}}} for i in range(80)
    }
    properties = {name: {"$ref": f"#/$defs/{name}"} for name in definitions}
    assert compiled({"type": "object", "properties": properties, "$defs": definitions})


def test_the_reach_counts_each_reference_once() -> None:
    assert grammar.schema_depth({"type": "integer"}) == 1
    twice = {"allOf": [{"$ref": "#/$defs/a~1b"}, {"$ref": "#/$defs/a~1b"}], "$defs": {"a/b": {"items": {}}}}
    assert grammar.schema_depth(twice) == 4 + 2
    assert grammar.schema_depth({"$ref": "elsewhere", "items": {}}) == 2 + 2


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "no-such-type"},
        {"$ref": "#/nowhere"},
        {"enum": []},
        {"not": {}},
        {"type": "integer", "minimum": 5, "maximum": 1},
    ],
)
def test_what_nothing_can_meet_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="response_format"):
        compiled(schema)


def test_what_no_sampler_could_follow_is_refused_by_the_api() -> None:
    """What is never complete, or only shows its size when it is begun, would fail in the middle of
    a stream.
    """
    with pytest.raises(BadRequest, match="response_format: it is too large to be followed, or never ends"):
        compiled({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})
    with pytest.raises(BadRequest, match="response_format: it is too large to be followed, or never ends"):
        asyncio.run(grammar.compile_grammar(Regex(type="regex", regex="(a{1000}){1000}")))


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": ["x" * 100_000]},
        {"enum": [str(i) for i in range(20_000)]},
        {"properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
    ],
)
def test_what_would_make_everybody_wait_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="response_format"):
        compiled(schema)


def test_a_large_schema_of_a_real_kind_is_taken() -> None:
    inner = {f"field_{i}": {"type": ["string", "null"], "maxLength": 100} for i in range(20)}
    properties = {
        f"part_{i}": {"type": "object", "properties": inner, "required": list(inner)} for i in range(20)
    }
    assert compiled({"type": "object", "properties": properties, "required": list(properties)})
    assert compiled({"enum": [f"value {i}" for i in range(3000)]})


def follows(text: str, whole: str) -> bool:
    matcher = LLMatcher(LLTokenizer("byte"), text)
    return bool(matcher.try_consume_tokens(list(whole.encode())) == len(whole) and matcher.is_accepting())


def test_references_in_the_parameters_of_functions_keep_their_meaning() -> None:
    """Two functions may name different things alike, and one may refer to its own whole."""
    first = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/N"}, "in": {"$ref": "#"}},
        "$defs": {"N": {"type": "integer"}},
    }
    second = {"type": "object", "properties": {"a": {"$ref": "#/$defs/N"}}, "$defs": {"N": {"const": "x"}}}
    text = asyncio.run(grammar.calls_grammar({"add": first, "say": second}, "tools"))
    assert follows(text, '{"name": "add", "arguments": {"a": 1, "in": {"a": 2}}}')
    assert follows(text, '{"name": "say", "arguments": {"a": "x"}}')
    assert not follows(text, '{"name": "say", "arguments": {"a": 1}}')
    assert not follows(text, '{"name": "run", "arguments": {}}')
    assert first["properties"] == {"a": {"$ref": "#/$defs/N"}, "in": {"$ref": "#"}}, (
        "what was given stays as it is"
    )


def test_a_number_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(BadRequest, match="response_format"):
        compiled({"const": float("nan")})


def test_a_complaint_is_short() -> None:
    with pytest.raises(BadRequest) as caught:
        asyncio.run(grammar.compile_grammar(Regex(type="regex", regex="(" * 10_000)))
    assert len(caught.value.message) < 400


def test_any_object_where_no_schema_is_given() -> None:
    text = asyncio.run(grammar.compile_grammar(JsonObject(type="json_object")))
    assert json.loads(str(text))["grammars"][0]["json_schema"]["type"] == "object"


# ---- what was checked before


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The grammars that were compiled."""
    made: list[str] = []
    compile: Callable[[str], str] = grammar._try_grammar

    def counted(text: str) -> str:
        made.append(text)
        return compile(text)

    monkeypatch.setattr(grammar, "_try_grammar", counted)
    return made


def test_the_same_text_is_compiled_once_whoever_sends_it(tried: list[str]) -> None:
    async def crowd() -> list[str]:
        first = await asyncio.gather(
            *(grammar.schema_grammar({"type": "integer"}, f"p{i}") for i in range(8))
        )
        return [*first, await grammar.schema_grammar({"type": "integer"}, "later")]

    assert len(set(asyncio.run(crowd()))) == 1
    assert compiled({"type": "integer"})
    assert len(tried) == 1
    assert compiled({"type": "string"})
    assert len(tried) == 2


def test_the_same_expression_and_the_same_functions_are_compiled_once(tried: list[str]) -> None:
    for _ in range(3):
        asyncio.run(grammar.compile_grammar(Regex(type="regex", regex="[a-f]+")))
        asyncio.run(grammar.calls_grammar({"add": {"type": "object"}}, "tools"))
    assert len(tried) == 2


def test_what_was_refused_is_refused_again_in_each_dialects_words(tried: list[str]) -> None:
    said = []
    for param in ("grammar", "response_format", "grammar"):
        with pytest.raises(BadRequest) as caught:
            asyncio.run(grammar.schema_grammar({"enum": []}, param))
        said.append((caught.value.param, caught.value.message.removeprefix(param)))
    assert [param for param, _ in said] == ["grammar", "response_format", "grammar"]
    assert len({message for _, message in said}) == 1
    assert len(tried) <= 1


def test_the_least_recently_used_is_forgotten_first() -> None:
    verdicts = Verdicts(2 * (grammar.ENTRY + 1300))
    asked: list[str] = []

    async def ask(text: str) -> None:
        def check() -> Verdict:
            asked.append(text)
            return Verdict(text * 1000)

        assert (await verdicts.find_or_check(text, check)).grammar == text * 1000

    async def go() -> None:
        for text in "abacab":
            await ask(text)

    asyncio.run(go())
    assert asked == ["a", "b", "c", "b"]


def test_a_defect_is_not_remembered_and_a_caller_who_leaves_takes_nobodys_answer() -> None:
    verdicts = Verdicts(1000)

    def broken() -> Verdict:
        raise MemoryError

    async def go() -> Verdict:
        with pytest.raises(MemoryError):
            await verdicts.find_or_check("a", broken)
        leaving = asyncio.create_task(verdicts.find_or_check("a", lambda: Verdict("fine")))
        staying = asyncio.create_task(verdicts.find_or_check("a", broken))
        await asyncio.sleep(0)
        leaving.cancel()
        return await staying

    assert asyncio.run(go()) == Verdict("fine")


def test_nothing_of_a_schema_is_walked_through_on_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def walked(schema: Any) -> int:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return 1

    for name in ("schema_depth", "common_multiple"):
        monkeypatch.setattr(grammar, name, walked)
    assert compiled({"type": "integer"})
    assert asyncio.run(grammar.calls_grammar({"add": {"type": "object"}}, "tools"))


# ---- what schemas mean here

ONE = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
MORE = '{"a": 1, "b": 2}'


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        (ONE, '{"a": 1}', True),
        (ONE, MORE, False),
        (ONE | {"additionalProperties": True}, MORE, True),
        (ONE | {"additionalProperties": {"type": "integer"}}, MORE, True),
        ({"type": "object"}, MORE, True),
        ({"type": "object", "properties": {}}, "{}", True),
        ({"type": "object", "properties": {}}, '{"a": 1}', False),
        ({"type": "array", "items": ONE}, f"[{MORE}]", False),
        ({"$ref": "#/$defs/x", "$defs": {"x": ONE}}, MORE, False),
        ({"anyOf": [ONE, {"type": "null"}]}, MORE, False),
        ({"allOf": [ONE]}, MORE, False),
        # What several describe together is as open as it was
        ({"allOf": [ONE, {"properties": {"b": {"type": "integer"}}}]}, MORE, True),
        ({"allOf": [{"$ref": "#/$defs/x"}, {"properties": {"b": {}}}], "$defs": {"x": ONE}}, MORE, True),
        (ONE | {"anyOf": [{"properties": {"b": {"type": "integer"}}}]}, MORE, True),
        # A property's name, and a value, are no schema
        ({"type": "object", "properties": {"properties": ONE}}, f'{{"properties": {MORE}}}', False),
        ({"const": {"properties": {"a": 1}}}, '{"properties": {"a": 1}}', True),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, '{"b": 1}', True),
        # Annotations
        ({"type": "object", "propertyNames": {"type": "string"}}, MORE, True),
        ({"type": "string", "format": "path"}, '"/a"', True),
        ({"type": "string", "format": "date"}, '"/a"', False),
        ({"type": "object", "properties": {"format": {"const": 1}}}, '{"format": 1}', True),
    ],
    ids=str,
)
def test_objects_are_closed_and_unknown_formats_annotate(
    schema: dict[str, Any], text: str, fits: bool
) -> None:
    before = json.dumps(schema)
    assert follows(compiled(schema), text) is fits
    assert json.dumps(schema) == before, "what was given stays as it is"


def test_every_format_that_is_kept_is_one_that_the_compiler_knows() -> None:
    for name in FORMATS:
        assert compiled({"type": "string", "format": name})
    unknown = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "format": "path"}))
    assert LLMatcher.validate_grammar_with_warnings(unknown)[0]


AHEAD = {"type": "string", "pattern": "^(?=.*[a-z]).*$"}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (
            {"type": "object", "properties": {"user": {"properties": {"secret": AHEAD}}}},
            "user.secret: the ex",
        ),
        ({"type": "array", "items": {"anyOf": [ONE, AHEAD]}}, "items.anyOf.1: the expression cannot be read"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"properties": {"y": AHEAD}}}}, "$defs.x.y: the expression"),
        ({"properties": {"a": {"not": {}}}}, "a: `not` is not served in a schema"),
        ({"properties": {"a": {"type": "text"}}}, "a: there is no type text"),
        (
            {"properties": {"properties": {"properties": {"b": {"type": "text"}}}}},
            "properties.b: there is ",
        ),
        ({"propertyNames": {"pattern": "^a"}}, "`propertyNames` is not served"),
        (AHEAD, "the expression cannot be read: look-around"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_named_by_its_place_in_one_line(
    schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        compiled(schema)
    assert caught.value.message.startswith(f"response_format: {message}")
    assert "\n" not in caught.value.message
    assert "regex parse error" not in caught.value.message


def test_a_functions_fault_is_named_by_the_function() -> None:
    broken = {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": AHEAD}}
    with pytest.raises(BadRequest, match=r"tools: say\.a: the expression"):
        asyncio.run(grammar.calls_grammar({"add": ONE, "say": broken}, "tools"))


def test_a_fault_that_takes_long_to_find_is_told_without_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema_faults, "SEARCH_S", -1.0)
    with pytest.raises(BadRequest, match="response_format: there is no type text"):
        compiled({"properties": {"a": {"type": "text"}}})
