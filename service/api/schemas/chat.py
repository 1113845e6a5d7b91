"""The wire shapes of a chat: messages, tools, and which of them must be called.

API process; must not know the engine. A field that would be ignored is refused.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from .openai import OpenAIRequest, one_finding
from .shared import MAX_TOP, StrictModel, Tokens

MAX_TOOLS = 128
MAX_PARTS = 10_000  # messages, parts of one, calls in one


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


Many = Field(max_length=MAX_PARTS, fail_fast=True)  # else each wrong one would be reported
Parts = Annotated[list[TextPart], Many]


class FunctionCall(StrictModel):
    name: str
    arguments: str


class ToolCall(StrictModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(StrictModel):
    """One turn.

    Content is a text or a list of text parts; only an assistant that calls tools may leave it out.
    """

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[
        str | Parts | None, one_finding(f"must be a text or a list of up to {MAX_PARTS} text parts")
    ] = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Many] | None = None
    tool_call_id: str | None = None
    # fields of an earlier answer that OpenAI's client sends back; always null in ours
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: None = None

    @model_validator(mode="after")
    def _check_whole(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is required")
        return self

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


def _check_writable(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError("holds a number that JSON does not have, or is nested too deep") from None
    return value


class FunctionSpec(StrictModel):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_writable)] | None = None
    strict: bool | None = None

    @property
    def template_form(self) -> dict[str, Any]:
        """The function as a template gets it: the fields that were given, and no others."""
        fields = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": self.strict,
        }
        given = {name: value for name, value in fields.items() if value is not None}
        return {"type": "function", "function": given}


class Tool(StrictModel):
    type: Literal["function"]
    function: FunctionSpec


class ChosenName(StrictModel):
    name: str


class ChosenTool(StrictModel):
    type: Literal["function"]
    function: ChosenName


class ChatRequest(OpenAIRequest):
    """A conversation to answer."""

    messages: Annotated[list[ChatMessage], Many] = Field(min_length=1)
    max_tokens: Tokens | None = Field(default=None, description="what the context leaves, unless given")
    max_completion_tokens: Tokens | None = None
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
    def names(self) -> list[str]:
        return [tool.function.name for tool in self.tools or ()]

    @property
    def forced(self) -> list[FunctionSpec]:
        """The functions one of which must be called; none where the model may choose."""
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, ChosenTool):
            chosen = self.tool_choice.function.name
            return [f for f in functions if f.name == chosen]
        return functions if self.tool_choice == "required" else []
