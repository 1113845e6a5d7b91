"""Response formats as grammars that a sampler can run; an impossible one is refused here, before anything runs. Knows no tokens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from llguidance import LLMatcher

from ..errors import BadRequest
from .schemas import AnyText, JsonGrammar, JsonObject, JsonSchema, PlainSchema, Regex, RegexGrammar

Wanted = JsonObject | JsonSchema | PlainSchema | Regex | AnyText | JsonGrammar | RegexGrammar

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
    try:
        text = LLMatcher.grammar_from_json_schema(json.dumps(schema, allow_nan=False), overrides=SPACING)
    except ValueError as error:
        raise BadRequest(f"{param}: not a JSON schema: {error}", param=param) from None
    return await checked(text, param)


async def checked(grammar: str, param: str) -> str:
    """The same text, if the grammar can be met; compiled off the event loop, for a big one takes a while."""
    wrong, messages = await asyncio.to_thread(LLMatcher.validate_grammar_with_warnings, grammar)
    if wrong:
        raise BadRequest(f"{param}: {'; '.join(messages).strip()}", param=param)
    return grammar


def _schema(wanted: JsonObject | JsonSchema | PlainSchema | JsonGrammar) -> dict[str, Any]:
    if isinstance(wanted, JsonSchema):
        return wanted.json_schema.schema_
    if isinstance(wanted, JsonGrammar):
        return wanted.value
    return wanted.schema_ if wanted.schema_ is not None else {"type": "object"}
