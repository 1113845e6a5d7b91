"""vLLM's ways to bind an answer, beside OpenAI's `response_format`. API process; must not know a route."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .shared import JsonObject, JsonSchema, NamedSchema, NotOffered, Regex, StrictModel

MAX_CHOICES = 10_000


@dataclass(frozen=True)
class Choices:
    """One of these texts."""

    texts: tuple[str, ...]


@dataclass(frozen=True)
class GrammarRules:
    """A text of this grammar, in Lark's or in GBNF's notation."""

    rules: str


Bound = JsonObject | JsonSchema | Regex | Choices | GrammarRules


def _read_schema(value: Any) -> Any:
    """A schema that is given as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("is a text that is no JSON") from None


SchemaOrText = Annotated[
    dict[str, Any], BeforeValidator(_read_schema, json_schema_input_type=dict[str, Any] | str)
]
ChoiceList = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]


def _check_some(value: bool) -> bool:
    if not value:
        raise ValueError("is true, or left out")
    return value


class StructuredOutputs(StrictModel):
    """Exactly one of vLLM's ways to bind the answer."""

    json_: SchemaOrText | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: ChoiceList | None = None
    grammar: str | None = None
    json_object: Annotated[bool, AfterValidator(_check_some)] | None = None
    disable_fallback: NotOffered = None
    disable_any_whitespace: NotOffered = None
    disable_additional_properties: NotOffered = None
    whitespace_pattern: NotOffered = None
    structural_tag: NotOffered = None

    @model_validator(mode="after")
    def _check_one(self) -> StructuredOutputs:
        if len(self.bounds) != 1:
            raise ValueError("holds one of json, regex, choice, grammar and json_object")
        return self

    @property
    def bounds(self) -> list[Bound]:
        given = list_bounds(self.json_, self.regex, self.choice, self.grammar)
        return [*given, JsonObject(type="json_object")] if self.json_object else given


def list_bounds(
    schema: dict[str, Any] | None = None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> list[Bound]:
    """Those that are given, each as what the grammar is made from."""
    bounds: list[Bound] = []
    if schema is not None:
        named = NamedSchema.model_validate({"schema": schema})
        bounds.append(JsonSchema(type="json_schema", json_schema=named))
    if regex is not None:
        bounds.append(Regex(type="regex", regex=regex))
    if choice is not None:
        bounds.append(Choices(tuple(choice)))
    if grammar is not None:
        bounds.append(GrammarRules(grammar))
    return bounds
