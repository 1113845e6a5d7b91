"""Response formats as grammars that a sampler can run; an impossible one is refused here, before
anything runs. Knows no tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache, partial
from hashlib import sha256
from typing import Any, NamedTuple
from urllib.parse import unquote

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from ...engine.lru import LRU
from ...errors import BadRequest
from ...threads import GRAMMAR, run_in
from ..schemas.shared import AnyText, JsonGrammar, JsonObject, JsonSchema, PlainSchema, Regex, RegexGrammar

Wanted = JsonObject | JsonSchema | PlainSchema | Regex | AnyText | JsonGrammar | RegexGrammar

DEEPEST = 500  # the compiler descends on the stack and would end the process near 1500
LARGEST = 100_000  # characters of a grammar
# Beyond these a sampler takes seconds, and its batch waits
LIMITS = {"max_grammar_size": 20_000, "initial_lexer_fuel": 200_000}
# The compiler makes a state for each remainder; a million take a sampler 6 s, and ten million its
# worker's life
MULTIPLE = 10_000
COMPILING_S = 2.0  # of processor time, for what a sampler does in half of it
TOO_LONG = "it takes too long to compile"
TOLD = 300  # characters of its complaint
REMEMBERED = 16_000_000  # bytes of grammars that need no second check
ENTRY = 500  # bytes that one takes beside its texts

# one space where people write one, none elsewhere: a model that may write white space between any
# two tokens may never end
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Verdict(NamedTuple):
    """A grammar's text, or what is `wrong` with what it was asked for."""

    grammar: str
    wrong: str = ""


class Verdicts:
    """Remembers what came of checking a text, so that the same one is compiled once however often
    it is sent.

    `capacity` is in bytes; the least recently used is forgotten first.
    """

    def __init__(self, capacity: int) -> None:
        self._held = LRU[bytes](capacity)
        self._known: dict[bytes, Verdict] = {}
        self._running: dict[bytes, asyncio.Task[Verdict]] = {}

    async def of(self, text: str, check: Callable[[], Verdict]) -> Verdict:
        """What `check` says, which is to depend on the text alone; it runs in a thread."""
        key = sha256(text.encode("utf-8", "surrogatepass")).digest()
        self._held.touch_key(key)
        if (known := self._known.get(key)) is not None:
            return known
        if key not in self._running:
            task = self._running[key] = asyncio.create_task(run_in(GRAMMAR, check))
            task.add_done_callback(partial(self._ended, key))
        return await asyncio.shield(self._running[key])

    def _ended(self, key: bytes, task: asyncio.Task[Verdict]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        verdict = task.result()
        cost = ENTRY + sys.getsizeof(verdict.grammar) + sys.getsizeof(verdict.wrong)
        for old in self._held.choose_victims(cost) or ():
            self._held.remove_key(old)
            del self._known[old]
        self._held.add_key(key, cost)
        self._known[key] = verdict


VERDICTS = Verdicts(REMEMBERED)


async def compile_grammar(wanted: Wanted | None, param: str = "response_format") -> str | None:
    """The grammar's text, checked;

    None for free text. Raises BadRequest naming `param` for a schema or expression that cannot be
    met.
    """
    if wanted is None or isinstance(wanted, AnyText):
        return None
    if isinstance(wanted, Regex | RegexGrammar):
        return await of_regex(wanted.regex if isinstance(wanted, Regex) else wanted.value, param)
    return await schema_grammar(_schema_of(wanted), param)


async def of_regex(pattern: str, param: str) -> str:
    """The grammar of texts that match. Raises BadRequest naming `param` when none can."""
    return await _checked("regex", pattern, partial(_from_regex, pattern), param)


async def schema_grammar(schema: dict[str, Any], param: str) -> str:
    """The grammar of JSON that fits this schema.

    Raises BadRequest naming `param` when nothing can.
    """
    return await _checked(
        "schema", json.dumps(schema, ensure_ascii=False), partial(_from_schema, schema), param
    )


async def calls_grammar(functions: Mapping[str, dict[str, Any]], param: str) -> str:
    """The grammar of one call of one of these functions, each given with the schema of its
    arguments. Raises as `of_schema`.
    """
    return await _checked(
        "calls", json.dumps(functions, ensure_ascii=False), partial(_from_calls, functions), param
    )


async def _checked(kind: str, text: str, check: Callable[[], Verdict], param: str) -> str:
    """The grammar.

    What is too large is refused before it is walked through: that takes longer than to read it.
    """
    verdict = Verdict("", _oversize(text)) if _oversize(text) else await VERDICTS.of(f"{kind} {text}", check)
    if verdict.wrong:
        raise BadRequest(f"{param}: {verdict.wrong}", param=param)
    return verdict.grammar


# ---- in a thread


def _from_regex(pattern: str) -> Verdict:
    try:
        return _tested(LLMatcher.grammar_from_regex(pattern))
    except UnicodeEncodeError:
        return Verdict("", "the expression holds a lone surrogate")


def _from_schema(schema: dict[str, Any]) -> Verdict:
    if schema_depth(schema) > DEEPEST:
        return Verdict(
            "", f"the schema is nested too deep: its levels and those it refers to are over {DEEPEST}"
        )
    if common_multiple(schema) > MULTIPLE:
        return Verdict("", f"what all `multipleOf` in it have in common is over {MULTIPLE}")
    try:
        text = LLMatcher.grammar_from_json_schema(json.dumps(schema, allow_nan=False), overrides=SPACING)
    except ValueError as error:
        return Verdict("", f"not a JSON schema: {error}"[:TOLD])
    return _tested(text)


def _from_calls(functions: Mapping[str, dict[str, Any]]) -> Verdict:
    called = [_call_schema(name, f"#/$defs/{at}") for at, name in enumerate(functions)]
    inside = {str(at): _move_schema(schema, f"#/$defs/{at}") for at, schema in enumerate(functions.values())}
    return _from_schema({"anyOf": called, "$defs": inside})


def _tested(grammar: str) -> Verdict:
    wrong = _oversize(grammar) or _try_grammar(grammar).strip()[:TOLD]
    return Verdict("", wrong) if wrong else Verdict(grammar)


def _oversize(text: str) -> str:
    return (
        f"as a grammar it has {len(text)} characters, and {LARGEST} are the most"
        if len(text) > LARGEST
        else ""
    )


def _try_grammar(grammar: str) -> str:
    """What is wrong with the grammar.

    Some limits of a sampler only show when its first tokens are taken, so two are, of bytes.
    """
    began = time.thread_time()
    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        return "; ".join(messages)
    matcher = LLMatcher(
        _byte_tokenizer(), grammar, log_level=0, limits=LLParserLimits(verbose_errors=False, **LIMITS)
    )
    for _ in range(2):
        allowed = b"" if matcher.is_error() else matcher.compute_bitmask()
        if not any(allowed) or matcher.is_stopped():
            break
        matcher.consume_token(next(id for id in range(8 * len(allowed)) if allowed[id // 8] >> id % 8 & 1))
    error: str = matcher.get_error()
    return error.partition("\n")[0] or (TOO_LONG if time.thread_time() - began > COMPILING_S else "")


@cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


def _call_schema(name: str, arguments: str) -> dict[str, Any]:
    properties = {"name": {"const": name}, "arguments": {"$ref": arguments}}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _move_schema(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """A copy of the schema whose references to its own root name the place that it now has."""
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    found: list[Any] = [copy]
    for value in found:  # grows as it is walked
        if isinstance(value, dict) and isinstance(ref := value.get("$ref"), str) and ref.startswith("#"):
            value["$ref"] = place + ref[1:]
        found.extend(_inner_values(value))
    return copy


def schema_depth(schema: Any) -> int:
    """The most levels that compiling the schema can descend: its own and, once each, those of
    everything it refers to.
    """
    found = [schema]
    for value in found:  # grows as it is walked
        found.extend(_inner_values(value))
    depths: dict[int, int] = {}
    for value in reversed(found):
        depths[id(value)] = 1 + max((depths[id(inner)] for inner in _inner_values(value)), default=0)
    named = {
        value["$ref"] for value in found if isinstance(value, dict) and isinstance(value.get("$ref"), str)
    }
    return depths[id(schema)] + sum(
        depths.get(id(_find_target(schema, ref)), depths[id(schema)]) for ref in named
    )


def common_multiple(schema: Any) -> int:
    """The least common multiple of every `multipleOf` in the schema, as whole numbers: where they
    meet, the compiler uses that.
    """
    found, least = [schema], 1
    for value in found:  # grows as it is walked
        found.extend(_inner_values(value))
        step = value.get("multipleOf") if isinstance(value, dict) else None
        if isinstance(step, int | float) and step > 0 and least <= MULTIPLE:
            least = math.lcm(least, Fraction(repr(step) if isinstance(step, float) else step).numerator)
    return least


def _inner_values(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [v for v in inner if isinstance(v, dict | list)]


def _find_target(schema: Any, ref: str) -> Any:
    """What a reference within the schema points at; None where that cannot be told."""
    found = schema
    for part in ref.removeprefix("#").split("/")[1:]:
        if not isinstance(found, dict):
            return None
        found = found.get(unquote(part).replace("~1", "/").replace("~0", "~"))
    return found


def _schema_of(wanted: JsonObject | JsonSchema | PlainSchema | JsonGrammar) -> dict[str, Any]:
    if isinstance(wanted, JsonSchema):
        return wanted.json_schema.schema_
    if isinstance(wanted, JsonGrammar):
        return wanted.value
    return wanted.schema_ if wanted.schema_ is not None else {"type": "object"}
