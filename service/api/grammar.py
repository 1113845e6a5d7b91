"""Response formats as grammars that a sampler can run; an impossible one is refused here, before anything runs. Knows no tokens."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ..errors import BadRequest
from .schemas import AnyText, JsonGrammar, JsonObject, JsonSchema, PlainSchema, Regex, RegexGrammar

Wanted = JsonObject | JsonSchema | PlainSchema | Regex | AnyText | JsonGrammar | RegexGrammar

DEEPEST = 500  # the compiler descends on the stack and would end the process near 1500
LARGEST = 100_000  # characters of a grammar
LIMITS = {"max_grammar_size": 20_000, "initial_lexer_fuel": 200_000}  # beyond these a sampler takes seconds, and its batch waits
MULTIPLE = 10_000  # the compiler makes a state for each remainder; a million take a sampler 6 s, and ten million its worker's life
COMPILING_S = 2.0  # of processor time, for what a sampler does in half of it
TOO_LONG = "it takes too long to compile"
TOLD = 300  # characters of its complaint

# one space where people write one, none elsewhere: a model that may write white space between any two tokens may never end
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


async def compiled(wanted: Wanted | None, param: str = "response_format") -> str | None:
    """The grammar's text, checked; None for free text. Raises BadRequest naming `param` for a schema or expression that cannot be met."""
    if wanted is None or isinstance(wanted, AnyText):
        return None
    if isinstance(wanted, Regex | RegexGrammar):
        pattern = wanted.regex if isinstance(wanted, Regex) else wanted.value
        try:
            return await checked(LLMatcher.grammar_from_regex(pattern), param)
        except UnicodeEncodeError:
            raise BadRequest(f"{param}: the expression holds a lone surrogate", param=param) from None
    return await of_schema(_schema(wanted), param)


async def of_schema(schema: dict[str, Any], param: str) -> str:
    """The grammar of JSON that fits this schema. Raises BadRequest naming `param` when nothing can."""
    _bounded(len(json.dumps(schema, ensure_ascii=False)), param)  # before it is walked through: that takes longer than to read it
    if reach(schema) > DEEPEST:
        raise BadRequest(f"{param}: the schema is nested too deep: its levels and those it refers to are over {DEEPEST}", param=param)
    if multiple(schema) > MULTIPLE:
        raise BadRequest(f"{param}: what all `multipleOf` in it have in common is over {MULTIPLE}", param=param)
    try:
        text = LLMatcher.grammar_from_json_schema(json.dumps(schema, allow_nan=False), overrides=SPACING)
    except ValueError as error:
        raise BadRequest(f"{param}: not a JSON schema: {error}", param=param) from None
    return await checked(text, param)


async def checked(grammar: str, param: str) -> str:
    """The same text, if the grammar can be met; compiled off the event loop, for a big one takes a while."""
    _bounded(len(grammar), param)
    if wrong := await asyncio.to_thread(_tried, grammar):
        raise BadRequest(f"{param}: {wrong.strip()[:TOLD]}", param=param)
    return grammar


def _bounded(size: int, param: str) -> None:
    if size > LARGEST:
        raise BadRequest(f"{param}: as a grammar it has {size} characters, and {LARGEST} are the most", param=param)


def _tried(grammar: str) -> str:
    """What is wrong with the grammar. Some limits of a sampler only show when its first tokens are taken, so two are, of bytes."""
    began = time.thread_time()
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        return "; ".join(messages)
    matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False, **LIMITS))
    for _ in range(2):
        allowed = b"" if matcher.is_error() else matcher.compute_bitmask()
        if not any(allowed) or matcher.is_stopped():
            break
        matcher.consume_token(next(id for id in range(8 * len(allowed)) if allowed[id // 8] >> id % 8 & 1))
    error: str = matcher.get_error()
    return error.partition("\n")[0] or (TOO_LONG if time.thread_time() - began > COMPILING_S else "")


@cache
def _bytes() -> LLTokenizer:
    return LLTokenizer("byte")


async def of_calls(functions: Mapping[str, dict[str, Any]], param: str) -> str:
    """The grammar of one call of one of these functions, each given with the schema of its arguments. Raises as `of_schema`."""
    called = [_called(name, f"#/$defs/{at}") for at, name in enumerate(functions)]
    inside = {str(at): _moved(schema, f"#/$defs/{at}") for at, schema in enumerate(functions.values())}
    return await of_schema({"anyOf": called, "$defs": inside}, param)


def _called(name: str, arguments: str) -> dict[str, Any]:
    properties = {"name": {"const": name}, "arguments": {"$ref": arguments}}
    return {"type": "object", "properties": properties, "required": ["name", "arguments"], "additionalProperties": False}


def _moved(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A copy of the schema whose references to its own root name the place that it now has."""
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    found: list[Any] = [copy]
    for value in found:  # grows as it is walked
        if isinstance(value, dict) and isinstance(ref := value.get("$ref"), str) and ref.startswith("#"):
            value["$ref"] = place + ref[1:]
        found.extend(_inside(value))
    return copy


def reach(schema: Any) -> int:
    """The most levels that compiling the schema can descend: its own and, once each, those of everything it refers to."""
    found = [schema]
    for value in found:  # grows as it is walked
        found.extend(_inside(value))
    depths: dict[int, int] = {}
    for value in reversed(found):
        depths[id(value)] = 1 + max((depths[id(inner)] for inner in _inside(value)), default=0)
    named = {value["$ref"] for value in found if isinstance(value, dict) and isinstance(value.get("$ref"), str)}
    return depths[id(schema)] + sum(depths.get(id(_target(schema, ref)), depths[id(schema)]) for ref in named)


def multiple(schema: Any) -> int:
    """The least common multiple of every `multipleOf` in the schema, as whole numbers: where they meet, the compiler uses that."""
    found, least = [schema], 1
    for value in found:  # grows as it is walked
        found.extend(_inside(value))
        step = value.get("multipleOf") if isinstance(value, dict) else None
        if isinstance(step, int | float) and step > 0 and least <= MULTIPLE:
            least = math.lcm(least, Fraction(repr(step) if isinstance(step, float) else step).numerator)
    return least


def _inside(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [v for v in inner if isinstance(v, dict | list)]


def _target(schema: Any, ref: str) -> Any:
    """What a reference within the schema points at; None where that cannot be told."""
    found = schema
    for part in ref.removeprefix("#").split("/")[1:]:
        if not isinstance(found, dict):
            return None
        found = found.get(unquote(part).replace("~1", "/").replace("~0", "~"))
    return found


def _schema(wanted: JsonObject | JsonSchema | PlainSchema | JsonGrammar) -> dict[str, Any]:
    if isinstance(wanted, JsonSchema):
        return wanted.json_schema.schema_
    if isinstance(wanted, JsonGrammar):
        return wanted.value
    return wanted.schema_ if wanted.schema_ is not None else {"type": "object"}
