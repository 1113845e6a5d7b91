"""A JSON schema as the compiler gets it: objects closed, annotations left out.

API process; must not know how a schema is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

# What the compiler holds a text to; any other `format` annotates
FORMATS = frozenset(
    {
        "date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri",
        "unknown",
    }
)  # fmt: skip
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SINGLES = (
    "items", "additionalProperties", "additionalItems", "contains", "propertyNames", "unevaluatedItems",
    "unevaluatedProperties",
)  # fmt: skip
# Parts that describe the same object as the schema beside them
JOINED = ("allOf", "anyOf", "oneOf", "$ref", "if", "then", "else", "not", "dependentSchemas")
SAY_NOTHING = {"type", "title", "description", "$comment"}
Place = tuple[str | int, ...]
Schema = dict[str, Any]


def edit_schema(schema: Schema) -> Schema:
    """The schema with every object closed that lists its properties and does not say whether it has
    others.

    An object that several schemas describe together stays as it is: closed, each would forbid what the
    others list.
    """
    together = _find_together(schema)
    edited: Schema = _edit(schema, together)
    return edited


def child_schemas(schema: Schema) -> Iterator[tuple[Place, Schema]]:
    """The schemas right within this one, each with its place."""
    for key in MAPS:
        named = schema.get(key)
        for name, inner in named.items() if isinstance(named, dict) else ():
            if isinstance(inner, dict):
                yield (key, name), inner
    for key in LISTS:
        listed = schema.get(key)
        for at, inner in enumerate(listed if isinstance(listed, list) else ()):
            if isinstance(inner, dict):
                yield (key, at), inner
    for key in SINGLES:
        inner = schema.get(key)
        if isinstance(inner, dict):
            yield (key,), inner


def _edit(schema: Schema, together: set[int]) -> Schema:
    edited = dict(schema)
    for (key, *name), inner in child_schemas(schema):
        value = _edit(inner, together)
        if not name:
            edited[str(key)] = value
            continue
        if edited[str(key)] is schema[str(key)]:
            edited[str(key)] = schema[str(key)].copy()
        edited[str(key)][name[0]] = value
    if "format" in schema and schema["format"] not in FORMATS:
        del edited["format"]
    if _is_any_name(schema.get("propertyNames")):
        del edited["propertyNames"]
    if _may_close(schema) and id(schema) not in together:
        edited["additionalProperties"] = False
    return edited


def _is_any_name(names: Any) -> bool:
    """Whether these `propertyNames`, which the compiler does not know, allow every name."""
    return isinstance(names, dict) and names.get("type", "string") == "string" and names.keys() <= SAY_NOTHING


def _may_close(schema: Schema) -> bool:
    properties, required = schema.get("properties"), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        return False
    says = "additionalProperties" in schema or "unevaluatedProperties" in schema
    return not says and all(isinstance(name, str) and name in properties for name in required)


def _find_together(root: Schema) -> set[int]:
    """The schemas, by their identity, that describe an object together with others."""
    together: set[int] = set()
    waiting: list[tuple[Schema, bool]] = [(root, False)]
    seen: set[tuple[int, bool]] = set()
    while waiting:
        schema, is_joined = waiting.pop()
        if (id(schema), is_joined) in seen:
            continue
        seen.add((id(schema), is_joined))
        own = "properties" in schema and any(key in schema for key in JOINED)
        whole = schema.get("allOf")
        shares = is_joined or own or (isinstance(whole, list) and len(whole) > 1)
        if shares:
            together.add(id(schema))
        for (key, *_), inner in child_schemas(schema):
            waiting.append((inner, shares and key in JOINED))
        target = find_target(root, schema.get("$ref"))
        if isinstance(target, dict):
            waiting.append((target, shares))
    return together


def find_target(schema: Any, ref: Any) -> Any:
    """The part of the schema that a reference points at; None where that cannot be told."""
    if not isinstance(ref, str):
        return None
    target = schema
    for part in ref.removeprefix("#").split("/")[1:]:
        if not isinstance(target, dict):
            return None
        target = target.get(unquote(part).replace("~1", "/").replace("~0", "~"))
    return target
