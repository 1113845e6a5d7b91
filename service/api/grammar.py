"""Response formats as grammars that a sampler can run; an impossible one is refused here, before anything runs. Knows no tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from urllib.parse import unquote

from llguidance import LLMatcher

from ..errors import BadRequest
from .schemas import AnyText, JsonGrammar, JsonObject, JsonSchema, PlainSchema, Regex, RegexGrammar

Wanted = JsonObject | JsonSchema | PlainSchema | Regex | AnyText | JsonGrammar | RegexGrammar

DEEPEST = 500  # the compiler descends on the stack and would end the process near 1500
TOLD = 300  # characters of its complaint

# one space where people write one, none elsewhere: a model that may write white space between any two tokens may never end
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


async def compiled(wanted: Wanted | None, param: str = "response_format") -> str | None:
    """The grammar's text, checked; None for free text. Raises BadRequest naming `param` for a schema or expression that cannot be met."""
    if wanted is None or isinstance(wanted, AnyText):
        return None
    if isinstance(wanted, Regex | RegexGrammar):
        pattern = wanted.regex if isinstance(wanted, Regex) else wanted.value
        return await checked(LLMatcher.grammar_from_regex(pattern), param)
    return await of_schema(_schema(wanted), param)


async def of_schema(schema: dict[str, Any], param: str) -> str:
    """The grammar of JSON that fits this schema. Raises BadRequest naming `param` when nothing can."""
    if reach(schema) > DEEPEST:
        raise BadRequest(f"{param}: the schema is nested too deep: its levels and those it refers to are over {DEEPEST}", param=param)
    try:
        text = LLMatcher.grammar_from_json_schema(json.dumps(schema, allow_nan=False), overrides=SPACING)
    except ValueError as error:
        raise BadRequest(f"{param}: not a JSON schema: {error}", param=param) from None
    return await checked(text, param)


async def checked(grammar: str, param: str) -> str:
    """The same text, if the grammar can be met; compiled off the event loop, for a big one takes a while."""
    wrong, messages = await asyncio.to_thread(LLMatcher.validate_grammar_with_warnings, grammar)
    if wrong:
        raise BadRequest(f"{param}: {'; '.join(messages).strip()[:TOLD]}", param=param)
    return grammar


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
