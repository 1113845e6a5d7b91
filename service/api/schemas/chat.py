"""The wire shapes of a chat: messages, tools, and which of them must be called.

API process; must not know the engine. A field that would be ignored is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from .openai import Limit, OpenAIRequest, one_finding
from .shared import (
    MAX_PARTS,
    MAX_TOOLS,
    MAX_TOP,
    Label,
    OnlyNull,
    StrictModel,
    WritableObject,
    check_writable,
)

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Variables of a template that are set by other fields, or by nobody
TAKEN = frozenset(
    {
        "messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "return_assistant_tokens_mask",
    }
)  # fmt: skip


class TextPart(StrictModel):
    type: Literal["text"]
    text: str
    cache_control: Label = None


def _refuse_media(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise ValueError(f"{kind[:40]} is not served here, only text")
    return value


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list | None):
        raise ValueError("must be a text or a list of text parts")
    return value


Many = Field(max_length=MAX_PARTS, fail_fast=True)  # else each wrong one would be reported
Part = Annotated[TextPart, BeforeValidator(_refuse_media, json_schema_input_type=TextPart)]
Parts = Annotated[list[Part], Many]
# Always a list once it is read, so that a finding names the part and no kind of content
Content = Annotated[Parts | None, BeforeValidator(_as_parts, json_schema_input_type=str | Parts | None)]


def _check_role(value: str) -> str:
    if value not in ROLES:
        raise ValueError(f"{value[:40]!r} is no role; roles are {', '.join(ROLES)}")
    return value


Role = Annotated[str, AfterValidator(_check_role), WithJsonSchema({"type": "string", "enum": list(ROLES)})]


def _no_arguments(value: Any) -> Any:
    return "{}" if value is None else value


class FunctionCall(StrictModel):
    name: str
    arguments: Annotated[str, BeforeValidator(_no_arguments, json_schema_input_type=str | None)] = "{}"


class ToolCall(StrictModel):
    id: str | None = None
    index: int | None = Field(default=None, description="as a stream has it; ignored")
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(StrictModel):
    """One turn. Only an assistant's may be without content."""

    role: Role
    content: Content = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Many] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = Field(default=None, description="another name of `reasoning_content`")
    # of an earlier answer, as clients send it back
    id: Label = None
    refusal: Label = None
    annotations: Label = None
    provider_specific_fields: Label = None
    cache_control: Label = None
    audio: OnlyNull = None
    function_call: OnlyNull = None

    @model_validator(mode="after")
    def _check_whole(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required")
        return self

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content or ())


class FunctionSpec(StrictModel):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: WritableObject | None = None
    strict: bool | None = None


class Tool(StrictModel):
    type: Literal["function"]
    function: FunctionSpec
    cache_control: Label = None


def _check_variables(value: dict[str, Any]) -> dict[str, Any]:
    taken = sorted(TAKEN.intersection(value))
    if taken:
        raise ValueError(f"{taken[0]!r} is not for a request to set")
    return check_writable(value)


TemplateVariables = Annotated[dict[str, Any], AfterValidator(_check_variables)]


class ChosenName(StrictModel):
    name: str


class ChosenTool(StrictModel):
    type: Literal["function"]
    function: ChosenName


class ChatRequest(OpenAIRequest):
    """A conversation to answer."""

    messages: Annotated[list[ChatMessage], Many] = Field(min_length=1)
    max_tokens: Limit = Field(default=None, description="what the context leaves, unless given")
    max_completion_tokens: Limit = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ChosenTool | None,
        one_finding("must be none, auto, required or a function of the tools"),
    ] = None
    parallel_tool_calls: bool | None = Field(
        default=None, description="false: of several calls only the first one is told"
    )

    chat_template_kwargs: TemplateVariables | None = Field(default=None, description="reach the template")
    reasoning_effort: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, description="reaches the template"
    )
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="after")
    def _check_template(self) -> ChatRequest:
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt does not go with continue_final_message")
        return self

    @property
    def template_variables(self) -> dict[str, Any]:
        """The variables that a template gets beside messages, tools and special tokens."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    @model_validator(mode="after")
    def _check_sound(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes only with logprobs")
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise ValueError("tool_choice goes only with tools")
        if isinstance(self.tool_choice, ChosenTool) and self.tool_choice.function.name not in self.names:
            raise ValueError(f"tool_choice: {self.tool_choice.function.name[:64]!r} is none of the tools")
        return self

    @property
    def functions(self) -> list[FunctionSpec]:
        return [tool.function for tool in self.tools or ()]

    @property
    def names(self) -> list[str]:
        return [function.name for function in self.functions]

    @property
    def forced(self) -> list[FunctionSpec]:
        """The functions one of which must be called; none where the model may choose."""
        functions = self.functions
        if isinstance(self.tool_choice, ChosenTool):
            chosen = self.tool_choice.function.name
            return [f for f in functions if f.name == chosen]
        return functions if self.tool_choice == "required" else []
