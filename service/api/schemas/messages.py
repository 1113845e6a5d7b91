"""The wire shapes of Anthropic's Messages. API process; must not know the engine.

A field that would be ignored is refused, but labels.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, Tag, model_validator

from .shared import (
    MAX_PARTS,
    MAX_TOOLS,
    JsonSchema,
    Label,
    NamedSchema,
    OnlyNull,
    Probability,
    StopList,
    StrictModel,
    Temperature,
    Tokens,
    TopK,
    WritableObject,
    kind_discriminator,
)

Many = Field(max_length=MAX_PARTS, fail_fast=True)


def _as_blocks(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if not isinstance(value, list | None):
        raise ValueError("must be a text or a list of blocks")
    return value


class TextBlock(StrictModel):
    type: Literal["text"]
    text: str
    cache_control: Label = None
    citations: Label = None


TextBlocks = Annotated[
    Annotated[list[TextBlock], Many],
    BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock]),
]


class ThinkingBlock(StrictModel):
    """What the assistant thought before, for a template that reads it."""

    type: Literal["thinking"]
    thinking: str
    signature: Label = None


class RedactedBlock(StrictModel):
    """Thought that nobody can read; left out."""

    type: Literal["redacted_thinking"]
    data: Label = None


class ToolUseBlock(StrictModel):
    """A tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: WritableObject
    cache_control: Label = None
    caller: Label = None


class ToolResultBlock(StrictModel):
    """A call's result."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: TextBlocks | None = None
    is_error: bool | None = Field(default=None, description="taken and ignored: the content says it")
    cache_control: Label = None

    @property
    def text(self) -> str:
        return "".join(block.text for block in self.content or ())


Block = Annotated[
    Annotated[TextBlock, Tag("text")]
    | Annotated[ToolUseBlock, Tag("tool_use")]
    | Annotated[ToolResultBlock, Tag("tool_result")]
    | Annotated[ThinkingBlock, Tag("thinking")]
    | Annotated[RedactedBlock, Tag("redacted_thinking")],
    kind_discriminator("text", "tool_use", "tool_result", "thinking", "redacted_thinking"),
]
Blocks = Annotated[
    Annotated[list[Block], Many], BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block])
]


class ClaudeMessage(StrictModel):
    """One turn: a user's text and results, or an assistant's text, thought and calls."""

    role: Literal["user", "assistant"]
    content: Blocks

    @model_validator(mode="after")
    def _check_side(self) -> ClaudeMessage:
        """Each kind of block comes from one side."""
        foreign = (
            (ToolResultBlock,) if self.role == "assistant" else (ToolUseBlock, ThinkingBlock, RedactedBlock)
        )
        for block in self.content:
            if isinstance(block, foreign):
                raise ValueError(f"{block.type} is not in a message of the role {self.role}")
        return self

    @property
    def text(self) -> str:
        return "".join(block.text for block in self.content if isinstance(block, TextBlock))


class ClaudeTool(StrictModel):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    input_schema: WritableObject
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Label = None


class ToolChoice(StrictModel):
    """`any` and `tool` force a call, `none` hides the tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("name goes with the type tool, and with no other")
        return self


class Thinking(StrictModel):
    """Whether the template lets the model think, where it knows `enable_thinking`."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Label = None
    display: Label = None


class OutputFormat(StrictModel):
    """JSON of a schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")

    @property
    def bound(self) -> JsonSchema:
        named = NamedSchema.model_validate({"schema": self.schema_})
        return JsonSchema(type="json_schema", json_schema=named)


class OutputConfig(StrictModel):
    """`effort` reaches the template as `reasoning_effort`."""

    format: OutputFormat | None = None
    effort: Annotated[str, Field(max_length=64)] | None = None


class CountTokensRequest(StrictModel):
    """A conversation whose prompt is to be counted."""

    model: str = Field(description="an adapter, the base, or base:adapter")
    messages: Annotated[list[ClaudeMessage], Many] = Field(min_length=1)
    system: TextBlocks | None = None
    tools: Annotated[list[ClaudeTool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Label = None

    @model_validator(mode="after")
    def _check_choice(self) -> CountTokensRequest:
        choice = self.tool_choice
        if choice is None or choice.type in ("auto", "none"):
            return self
        names = [tool.name for tool in self.tools or ()]
        if not names:
            raise ValueError("tool_choice: a call can only be forced where there are tools")
        if choice.name is not None and choice.name not in names:
            raise ValueError(f"tool_choice: {choice.name[:64]!r} is none of the tools")
        return self

    @property
    def system_text(self) -> str | None:
        return None if self.system is None else "".join(block.text for block in self.system)

    @property
    def offered(self) -> list[ClaudeTool]:
        """The tools that the model may know of."""
        is_hidden = self.tool_choice is not None and self.tool_choice.type == "none"
        return [] if is_hidden else list(self.tools or ())

    @property
    def forced(self) -> list[ClaudeTool]:
        """The tools one of which must be called; none where the model may choose."""
        choice = self.tool_choice
        if choice is None or choice.type not in ("any", "tool"):
            return []
        return [tool for tool in self.offered if choice.name in (None, tool.name)]

    @property
    def takes_one_call(self) -> bool:
        return self.tool_choice is not None and bool(self.tool_choice.disable_parallel_tool_use)

    @property
    def template_variables(self) -> dict[str, Any]:
        variables: dict[str, Any] = {}
        if self.thinking is not None and self.thinking.type != "adaptive":
            variables["enable_thinking"] = self.thinking.type == "enabled"
        if self.output_config is not None and self.output_config.effort is not None:
            variables["reasoning_effort"] = self.output_config.effort
        return variables

    @property
    def bound(self) -> JsonSchema | None:
        """What the answer must be."""
        wanted = self.output_config.format if self.output_config else None
        return wanted.bound if wanted else None


class MessagesRequest(CountTokensRequest):
    """A conversation to answer."""

    max_tokens: Tokens
    stream: bool | None = None
    stop_sequences: StopList | None = None
    temperature: Temperature | None = Field(default=None, description="1 unless given")
    top_p: Probability | None = None
    top_k: TopK | None = None
    metadata: Annotated[Any, Field(description="`user_id` is the caller, as an alias may know it")] = None
    service_tier: Label = None
    container: OnlyNull = None
    mcp_servers: OnlyNull = None

    @property
    def user(self) -> object:
        """The caller, where the metadata names it."""
        return self.metadata.get("user_id") if isinstance(self.metadata, dict) else None
