"""The wire shapes of OpenAI's Responses. API process; must not know the engine.

A field that would be ignored is refused, but labels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from .openai import Limit, one_finding
from .shared import (
    MAX_PARTS,
    MAX_TOOLS,
    AnyText,
    Caller,
    JsonObject,
    JsonSchema,
    Label,
    NamedSchema,
    OnlyNull,
    Probability,
    StrictModel,
    Temperature,
    ToldObject,
    kind_discriminator,
)

Many = Field(max_length=MAX_PARTS, fail_fast=True)


class SpokenPart(StrictModel):
    """Text, of either side."""

    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: Label = None
    logprobs: Label = None


class RefusalPart(StrictModel):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


SpokenPartOrRefusal = Annotated[
    Annotated[SpokenPart, Tag("input_text")]
    | Annotated[SpokenPart, Tag("output_text")]
    | Annotated[SpokenPart, Tag("text")]
    | Annotated[RefusalPart, Tag("refusal")],
    kind_discriminator("input_text", "output_text", "text", "refusal"),
]


def _as_spoken(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of parts")
    return value


SpokenParts = Annotated[
    Annotated[list[SpokenPartOrRefusal], Many],
    BeforeValidator(_as_spoken, json_schema_input_type=str | list[SpokenPartOrRefusal]),
]


class MessageItem(StrictModel):
    """One turn's text."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: SpokenParts
    id: Label = None
    status: Label = None
    phase: Label = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


class CallItem(StrictModel):
    """A function call of an earlier answer; `arguments` are JSON text."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: Label = None
    status: Label = None
    namespace: OnlyNull = None


class CallOutputItem(StrictModel):
    """A call's result."""

    type: Literal["function_call_output"]
    call_id: str
    output: SpokenParts
    id: Label = None
    status: Label = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.output)


class ReasoningText(StrictModel):
    type: Literal["summary_text", "reasoning_text"]
    text: str


class ReasoningItem(StrictModel):
    """What the assistant thought before, for a template that reads it."""

    type: Literal["reasoning"]
    summary: Annotated[list[ReasoningText], Many] | None = None
    content: Annotated[list[ReasoningText], Many] | None = None
    encrypted_content: OnlyNull = None
    id: Label = None
    status: Label = None

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or self.summary or ())


def _item_kind(value: Any) -> str | None:
    """Its `type`; an item without one that has a role is a message."""
    given = value if isinstance(value, dict) else vars(value) if isinstance(value, StrictModel) else {}
    kind = given.get("type") or ("message" if "role" in given else None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    kind_discriminator("message", "function_call", "function_call_output", "reasoning", by=_item_kind),
]


def _as_items(value: Any) -> Any:
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise ValueError("must be a text or a list of items")
    return value


Items = Annotated[
    Annotated[list[Item], Many, Field(min_length=1)],
    BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
]


class ResponseTool(StrictModel):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: ToldObject | None = None
    strict: bool | None = None


class NamedFunction(StrictModel):
    type: Literal["function"]
    name: str


class SchemaFormat(StrictModel):
    """JSON of a schema, whose name stands beside it."""

    type: Literal["json_schema"]
    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: ToldObject = Field(alias="schema")

    @property
    def bound(self) -> JsonSchema:
        named = NamedSchema.model_validate({"name": self.name, "schema": self.schema_})
        return JsonSchema(type="json_schema", json_schema=named)


TextFormat = Annotated[
    Annotated[AnyText, Tag("text")]
    | Annotated[JsonObject, Tag("json_object")]
    | Annotated[SchemaFormat, Tag("json_schema")],
    kind_discriminator("text", "json_object", "json_schema"),
]


class TextOptions(StrictModel):
    format: TextFormat | None = None
    verbosity: Label = None


class Reasoning(StrictModel):
    """`effort` reaches the template as `reasoning_effort`."""

    effort: Annotated[str, Field(max_length=64)] | None = None
    summary: Label = None
    generate_summary: Label = None


class ResponseStream(StrictModel):
    include_obfuscation: Literal[False] | None = None


class ResponseRequest(StrictModel):
    """A conversation to answer."""

    model: str = Field(description="an adapter, the base, or base:adapter")
    input: Items
    instructions: str | None = Field(default=None, description="the system's message, before the input")
    max_output_tokens: Limit = Field(default=None, description="what the context leaves, unless given")
    temperature: Temperature | None = Field(default=None, description="1 unless given")
    top_p: Probability | None = None
    stream: bool | None = None
    stream_options: ResponseStream | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedFunction | None,
        one_finding("must be none, auto, required or a function of the tools"),
    ] = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    include: Annotated[list[Literal["reasoning.encrypted_content"]], Field(max_length=16)] | None = Field(
        default=None, description="there is none, so nothing is added"
    )
    store: Label = None
    metadata: Label = None
    user: Caller = None
    service_tier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Label = None
    safety_identifier: Label = None
    client_metadata: Label = None
    previous_response_id: OnlyNull = Field(default=None, description="nothing is stored")
    conversation: OnlyNull = None
    prompt: OnlyNull = None
    max_tool_calls: OnlyNull = None

    @model_validator(mode="after")
    def _check_choice(self) -> ResponseRequest:
        choice, names = self.tool_choice, [tool.name for tool in self.tools or ()]
        if (choice == "required" or isinstance(choice, NamedFunction)) and not names:
            raise ValueError("tool_choice: a call can only be forced where there are tools")
        if isinstance(choice, NamedFunction) and choice.name not in names:
            raise ValueError(f"tool_choice: {choice.name[:64]!r} is none of the tools")
        return self

    @property
    def offered(self) -> list[ResponseTool]:
        """The tools that the model may know of."""
        return [] if self.tool_choice == "none" else list(self.tools or ())

    @property
    def forced(self) -> list[str]:
        """The names of the functions one of which must be called; none where the model may choose."""
        if isinstance(self.tool_choice, NamedFunction):
            return [self.tool_choice.name]
        return [tool.name for tool in self.offered] if self.tool_choice == "required" else []

    @property
    def bound(self) -> JsonObject | JsonSchema | None:
        """What the answer must be."""
        wanted = self.text.format if self.text else None
        if isinstance(wanted, SchemaFormat):
            return wanted.bound
        return wanted if isinstance(wanted, JsonObject) else None

    @property
    def template_variables(self) -> dict[str, Any]:
        effort = self.reasoning.effort if self.reasoning else None
        return {} if effort is None else {"reasoning_effort": effort}
