"""Compiles response formats to grammars, and refuses an impossible one before anything runs.

API process; must not know tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache, partial
from hashlib import sha256
from typing import Any, NamedTuple

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from

from ...engine.lru import LRU
from ...errors import BadRequest
from ...threads import GRAMMAR, run_in
from ..schemas.shared import AnyText, JsonGrammar, JsonObject, JsonSchema, PlainSchema, Regex, RegexGrammar
from ..schemas.structured import Choices, GrammarRules
from .schema_edits import edit_schema, find_target
from .schema_faults import MAX_COMPLAINT, TOO_LONG, describe_complaint, find_fault, name_place

Wanted = (
    JsonObject
    | JsonSchema
    | PlainSchema
    | Regex
    | AnyText
    | JsonGrammar
    | RegexGrammar
    | Choices
    | GrammarRules
)

DEEPEST = 500  # the compiler descends on the stack and would end the process near 1500
LARGEST = 100_000  # characters of a grammar
# Beyond these a sampler takes seconds, and its batch waits
LIMITS = {"max_grammar_size": 20_000, "initial_lexer_fuel": 200_000}
# The compiler makes a state for each remainder; a million take a sampler 6 s, and ten million its
# worker's life
MULTIPLE = 10_000
COMPILING_S = 2.0  # of processor time; a sampler compiles the same in half of it
REMEMBERED = 16_000_000  # bytes of grammars that need no second check
FOREIGN = ("%json", "%lark", "%import")  # in a grammar's rules
ENTRY = 500  # bytes that a verdict takes beside its texts

# one space where people write one, none elsewhere: a model that may write white space between any
# two tokens may never end
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Verdict(NamedTuple):
    """A grammar's text, or the `problem` of the format that it was made from."""

    grammar: str
    problem: str = ""


class Verdicts:
    """Remembers the verdict on each text, so that the same text is compiled once however often it is
    sent.

    `capacity` is in bytes; the least recently used is forgotten first.
    """

    def __init__(self, capacity: int) -> None:
        self._held = LRU[bytes](capacity)
        self._known: dict[bytes, Verdict] = {}
        self._running: dict[bytes, asyncio.Task[Verdict]] = {}

    async def find_or_check(self, text: str, check: Callable[[], Verdict]) -> Verdict:
        """The verdict of `check`, which is to depend on the text alone; it runs in a thread."""
        key = sha256(text.encode("utf-8", "surrogatepass")).digest()
        self._held.touch_key(key)
        verdict = self._known.get(key)
        if verdict is not None:
            return verdict
        if key not in self._running:
            task = self._running[key] = asyncio.create_task(run_in(GRAMMAR, check))
            task.add_done_callback(partial(self._remember_verdict, key))
        return await asyncio.shield(self._running[key])

    def _remember_verdict(self, key: bytes, task: asyncio.Task[Verdict]) -> None:
        del self._running[key]
        if task.cancelled() or task.exception() is not None:
            return
        verdict = task.result()
        cost = ENTRY + sys.getsizeof(verdict.grammar) + sys.getsizeof(verdict.problem)
        for old in self._held.choose_victims(cost) or ():
            self._held.remove_key(old)
            del self._known[old]
        self._held.add_key(key, cost)
        self._known[key] = verdict


VERDICTS = Verdicts(REMEMBERED)


async def compile_grammar(wanted: Wanted | None, param: str = "response_format") -> str | None:
    """The grammar's text, checked; None for free text.

    Raises BadRequest naming `param` for a schema or expression that cannot be met.
    """
    if wanted is None or isinstance(wanted, AnyText):
        return None
    if isinstance(wanted, Regex | RegexGrammar):
        pattern = wanted.regex if isinstance(wanted, Regex) else wanted.value
        return await regex_grammar(pattern, param)
    if isinstance(wanted, Choices):
        return await regex_grammar("|".join(map(_escape_text, wanted.texts)), param)
    if isinstance(wanted, GrammarRules):
        return await check_text("rules", wanted.rules, partial(_check_rules, wanted.rules), param)
    return await schema_grammar(_schema_of(wanted), param)


async def regex_grammar(pattern: str, param: str) -> str:
    """The grammar of texts that match. Raises BadRequest naming `param` when none can."""
    return await check_text("regex", pattern, partial(_check_regex, pattern), param)


async def schema_grammar(schema: dict[str, Any], param: str) -> str:
    """The grammar of JSON that fits this schema.

    Raises BadRequest naming `param` when nothing can.
    """
    text = json.dumps(schema, ensure_ascii=False)
    return await check_text("schema", text, partial(_check_schema, schema), param)


async def calls_grammar(functions: Mapping[str, dict[str, Any]], param: str) -> str:
    """The grammar of one call of one of these functions, each given with the schema of its
    arguments. Raises as `schema_grammar`.
    """
    text = json.dumps(functions, ensure_ascii=False)
    return await check_text("calls", text, partial(_check_calls, functions), param)


async def check_text(kind: str, text: str, check: Callable[[], Verdict], param: str) -> str:
    """The grammar of the text.

    A text that is too large is refused before it is walked through: that takes longer than to read
    it.
    """
    problem = _size_problem(text)
    if problem:
        verdict = Verdict("", problem)
    else:
        verdict = await VERDICTS.find_or_check(f"{kind} {text}", check)
    if verdict.problem:
        raise BadRequest(f"{param}: {verdict.problem}", param=param)
    return verdict.grammar


def _escape_text(text: str) -> str:
    """The expression that this text alone matches."""
    return re.sub(r"([\\.+*?()|\[\]{}^$#&~-])", r"\\\1", text)


# ---- in a thread


def _check_rules(rules: str) -> Verdict:
    """Rules that refer to each other are compiled on the stack, and a schema within them would be
    compiled with none of the limits that schemas have.
    """
    if rules.count("\n") > DEEPEST or rules.count("::=") > DEEPEST:
        return Verdict("", f"the grammar has over {DEEPEST} lines or rules")
    foreign = next((word for word in FOREIGN if word in rules), None)
    if foreign:
        return Verdict("", f"{foreign} is not served within a grammar")
    try:
        return check_grammar(grammar_from("grammar", rules))
    except ValueError:  # a lone surrogate's, too
        return Verdict("", "these are no rules of a grammar")


def _check_regex(pattern: str) -> Verdict:
    try:
        return check_grammar(LLMatcher.grammar_from_regex(pattern))
    except UnicodeEncodeError:
        return Verdict("", "the expression holds a lone surrogate")


def _check_schema(schema: dict[str, Any]) -> Verdict:
    if schema_depth(schema) > DEEPEST:
        problem = f"the schema is nested too deep: its levels and those it refers to are over {DEEPEST}"
        return Verdict("", problem)
    if common_multiple(schema) > MULTIPLE:
        return Verdict("", f"what all `multipleOf` in it have in common is over {MULTIPLE}")
    edited = edit_schema(schema)
    try:
        text = _write_schema(edited)
    except ValueError as error:
        return Verdict("", f"not a JSON schema: {error}"[:MAX_COMPLAINT])
    size_problem = _size_problem(text)
    if size_problem:
        return Verdict("", size_problem)
    complaint = _try_grammar(text)
    return Verdict("", _locate_complaint(edited, complaint)) if complaint else Verdict(text)


def _write_schema(schema: dict[str, Any]) -> str:
    text: str = LLMatcher.grammar_from_json_schema(json.dumps(schema, allow_nan=False), overrides=SPACING)
    return text


def _locate_complaint(schema: dict[str, Any], complaint: str) -> str:
    reason = describe_complaint(complaint)
    if complaint == TOO_LONG:
        return reason
    place = find_fault(schema, complaint, lambda part: _try_grammar(_write_schema(part)))
    return f"{name_place(place)}: {reason}" if place else reason


def _check_calls(functions: Mapping[str, dict[str, Any]]) -> Verdict:
    calls, definitions = [], {}
    for at, (name, schema) in enumerate(functions.items()):
        reference = f"#/$defs/{at}"
        calls.append(_call_schema(name, reference))
        definitions[str(at)] = _move_schema(schema, reference)
    verdict = _check_schema({"anyOf": calls, "$defs": definitions})
    return Verdict(verdict.grammar, _name_function(verdict.problem, list(functions)))


def _name_function(problem: str, names: Sequence[str]) -> str:
    """The problem with the function's name in place of its number among the definitions."""
    return re.sub(r"^\$defs\.(\d+)", lambda found: names[int(found[1])], problem)


def check_grammar(grammar: str) -> Verdict:
    size_problem = _size_problem(grammar)
    if size_problem:
        return Verdict("", size_problem)
    complaint = _try_grammar(grammar)
    return Verdict("", describe_complaint(complaint)) if complaint else Verdict(grammar)


def _size_problem(text: str) -> str:
    if len(text) <= LARGEST:
        return ""
    return f"as a grammar it has {len(text)} characters, and {LARGEST} are the most"


def _try_grammar(grammar: str) -> str:
    """The grammar's problem, or an empty text."""
    began = time.thread_time()
    problem, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if problem:
        return "; ".join(messages)
    error, _, _ = _take_first_tokens(grammar).partition("\n")
    if error:
        return error
    return TOO_LONG if time.thread_time() - began > COMPILING_S else ""


def _take_first_tokens(grammar: str) -> str:
    """The sampler's error at the first two tokens, of bytes: some of its limits only show there."""
    limits = LLParserLimits(verbose_errors=False, **LIMITS)
    matcher = LLMatcher(_byte_tokenizer(), grammar, log_level=0, limits=limits)
    for _ in range(2):
        allowed = b"" if matcher.is_error() else matcher.compute_bitmask()
        if not any(allowed) or matcher.is_stopped():
            break
        matcher.consume_token(_first_allowed(allowed))
    error: str = matcher.get_error()
    return error


def _first_allowed(bitmask: bytes) -> int:
    return next(id for id in range(8 * len(bitmask)) if bitmask[id // 8] >> id % 8 & 1)


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


def _move_schema(schema: dict[str, Any], root: str) -> dict[str, Any]:
    """A copy of the schema, to stand at `root` of another one: its references to itself are moved."""
    copy: dict[str, Any] = json.loads(json.dumps(schema))
    for value in _walk_values(copy):
        ref = _reference_of(value)
        if ref is not None and ref.startswith("#"):
            value["$ref"] = root + ref[1:]
    return copy


def schema_depth(schema: Any) -> int:
    """The most levels that compiling the schema can descend: its own and, once each, those of
    every part that it refers to.
    """
    values = _walk_values(schema)
    depths: dict[int, int] = {}
    for value in reversed(values):
        inner_depths = [depths[id(inner)] for inner in _inner_values(value)]
        depths[id(value)] = 1 + max(inner_depths, default=0)
    own_depth = depths[id(schema)]
    references = {ref for value in values if (ref := _reference_of(value)) is not None}
    targets = [find_target(schema, ref) for ref in references]
    return own_depth + sum(depths.get(id(target), own_depth) for target in targets)


def common_multiple(schema: Any) -> int:
    """The least common multiple of every `multipleOf` in the schema, as whole numbers: where they
    meet, the compiler uses that.
    """
    least = 1
    for value in _walk_values(schema):
        step = value.get("multipleOf") if isinstance(value, dict) else None
        if isinstance(step, int | float) and step > 0 and least <= MULTIPLE:
            exact = Fraction(repr(step) if isinstance(step, float) else step)
            least = math.lcm(least, exact.numerator)
    return least


def _walk_values(schema: Any) -> list[Any]:
    """The schema and every object and list within it, each before those within it."""
    values = [schema]
    for value in values:  # grows as it is walked
        values.extend(_inner_values(value))
    return values


def _reference_of(value: Any) -> str | None:
    ref = value.get("$ref") if isinstance(value, dict) else None
    return ref if isinstance(ref, str) else None


def _inner_values(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    return [v for v in inner if isinstance(v, dict | list)]


def _schema_of(wanted: JsonObject | JsonSchema | PlainSchema | JsonGrammar) -> dict[str, Any]:
    if isinstance(wanted, JsonSchema):
        return wanted.json_schema.schema_
    if isinstance(wanted, JsonGrammar):
        return wanted.value
    return wanted.schema_ if wanted.schema_ is not None else {"type": "object"}
