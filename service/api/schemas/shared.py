"""The types that the wire shapes of both dialects share:
strict numbers, refused extras, stop strings, response formats. API process; must not know a route.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

MAX_STOPS, MAX_STOP_LENGTH = 16, 1000
MAX_SEQUENCES = 128  # answers to one HTTP request
MAX_UNKNOWN = 16  # fields
MAX_TOP = 20  # runner-up tokens with log probabilities
MAX_TOOLS = 128
TOLD_LEVELS = 100  # of JSON in an answer: writing it descends on the stack
MAX_PARTS = 10_000  # messages, parts of one, calls in one
# Of numbers that are counted and reported again: Python spells none of more than 4300 digits
LARGEST = 2**63
COLD = 1e-5  # a temperature under this is greedy: a quotient by it would not fit a float32


def one_unless(value: float | None) -> float:
    """The value that a client gives; 1, which changes nothing, where it gives none."""
    return 1.0 if value is None else value


class StrictModel(BaseModel):
    """Takes no unknown field, no bool for a number, no NaN and no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _check_few(cls, value: Any) -> Any:
        """Refuses a great many unknown fields at once: a finding takes much longer than the field that
        it is about.
        """
        if isinstance(value, dict) and len(value) > len(cls.model_fields) + MAX_UNKNOWN:
            known = {field.alias or name for name, field in cls.model_fields.items()}
            first = next(key for key in value if key not in known)
            raise ValueError(f"{len(value)} fields, and {len(known)} are known; {first[:40]!r} is not")
        return value


def _not_offered(value: Any) -> Any:
    if value is not None and value is not False:
        raise ValueError("is not offered here; only null and false are taken")
    return value


def _refuse_value(value: Any) -> Any:
    if value is not None:
        raise ValueError("is not offered here; only null is taken")
    return value


def is_nested_deeper(value: Any, levels: int) -> bool:
    """Whether objects and lists in the value, itself counted, are within each other over so many levels."""
    level = [value]
    for _ in range(levels):
        nested = [
            inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        level = [inner for inner in nested if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def _check_depth(value: dict[str, Any]) -> dict[str, Any]:
    if is_nested_deeper(value, TOLD_LEVELS):
        raise ValueError(f"is nested over {TOLD_LEVELS} levels deep")
    return check_writable(value)


def check_writable(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError("holds a number that JSON does not have, or is nested too deep") from None
    return value


Label = Annotated[Any, Field(description="taken and ignored")]
Caller = Annotated[Any, Field(description="the caller, as an alias may know it; any value is taken")]
OnlyNull = Annotated[None, BeforeValidator(_refuse_value, json_schema_input_type=None)]
WritableObject = Annotated[dict[str, Any], AfterValidator(check_writable)]
ToldObject = Annotated[dict[str, Any], AfterValidator(_check_depth)]  # one that the answer tells again
NotOffered = Annotated[Literal[False] | None, BeforeValidator(_not_offered)]


class AdapterPart(StrictModel):
    """An adapter whose change counts `weight` times, beside those of others."""

    id: Annotated[str, Field(min_length=1)]
    weight: float


MIXED = Field(min_length=2, max_length=8)
AdapterParts = Annotated[list[AdapterPart], MIXED]
Seed = Annotated[int, Field(ge=0, lt=2**64)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Share = Annotated[float, Field(gt=0, le=1)]
Factor = Annotated[float, Field(ge=0.01, le=100)]
Probability = Annotated[float, Field(ge=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=2)]
Tokens = Annotated[int, Field(ge=1, lt=LARGEST)]
TopK = Annotated[int, Field(ge=-1)]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopList = Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class AnyText(StrictModel):
    """No constraint."""

    type: Literal["text"]


class JsonObject(StrictModel):
    """Any JSON object, or one of this schema."""

    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class NamedSchema(StrictModel):
    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class JsonSchema(StrictModel):
    """JSON of a schema, in OpenAI's shape."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class PlainSchema(StrictModel):
    """JSON of a schema, written beside the type."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class Regex(StrictModel):
    """Text that matches a regular expression as a whole."""

    type: Literal["regex"]
    regex: str


class JsonGrammar(StrictModel):
    """TGI's way to say a JSON schema."""

    type: Literal["json"]
    value: dict[str, Any]


class RegexGrammar(StrictModel):
    """TGI's way to say a regular expression."""

    type: Literal["regex"]
    value: str


def _kind_of(value: Any) -> str | None:
    """Its `type`, of a dictionary or of a model; None where that is no text."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


def _kind_or_plain(value: Any) -> str | None:
    kind = _kind_of(value)
    is_plain = isinstance(value, dict) and "schema" in value and kind == "json_schema"
    return "plain_schema" if is_plain else kind


def kind_discriminator(*kinds: str, by: Callable[[Any], str | None] = _kind_of) -> Discriminator:
    """Tells the shapes of a union apart by their `type`, with one finding for any other."""
    message = f"the type must be one of {', '.join(kinds)}"
    return Discriminator(by, custom_error_type="kind", custom_error_message=message)


_Object = Annotated[JsonObject, Tag("json_object")]
_Schema = Annotated[JsonSchema, Tag("json_schema")]
_Plain = Annotated[PlainSchema, Tag("plain_schema")]
_Text = Annotated[AnyText, Tag("text")]
_Regex = Annotated[Regex, Tag("regex")]
ResponseFormat = Annotated[
    _Object | _Schema | _Plain | _Regex | _Text,
    kind_discriminator("text", "json_object", "json_schema", "regex", by=_kind_or_plain),
]
OpenAIFormat = Annotated[
    _Object | _Schema | _Regex | _Text, kind_discriminator("text", "json_object", "json_schema", "regex")
]
Grammar = Annotated[
    Annotated[JsonGrammar, Tag("json")] | Annotated[RegexGrammar, Tag("regex")],
    kind_discriminator("json", "regex"),
]
