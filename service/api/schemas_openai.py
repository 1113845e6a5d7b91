"""The wire shapes of the OpenAI dialect. Refuses what it would ignore (but `user`); knows no engine."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ..engine.request import Sampling
from .schemas import COLD, MAX_SEQUENCES, MAX_TOP, Factor, OpenAIFormat, Penalty, Seed, StopList, Strict, TopK

MAX_TOOLS = 128
BIAS, MAX_BIASES = 100.0, 1024


class StreamOptions(Strict):
    include_usage: bool = False


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _biases(value: dict[str, float]) -> dict[str, float]:
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal()) or abs(bias) > BIAS:
            raise ValueError(f"maps token ids to numbers from -100 to 100, not {key[:40]!r} to {bias}")
    return value


def _one_finding(message: str) -> WrapValidator:
    """Of a union's many findings only one is worth telling."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(validate)


class Asked(Strict):
    """What completions and chat share."""

    model: str = Field(description="an adapter, the base, or base:adapter")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(default=None, description="1 unless given; 0: greedy")
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    stop: Annotated[StopList | None, BeforeValidator(_listed)] = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_biases), Field(max_length=MAX_BIASES)] | None = None
    response_format: OpenAIFormat | None = None
    top_k: TopK | None = Field(default=None, description="-1 and 0: off")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Factor | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    user: str | None = Field(default=None, description="taken and ignored")

    @model_validator(mode="after")
    def _whole(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes only with stream")
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained and (self.ignore_eos or self.min_tokens):
            raise ValueError("ignore_eos and min_tokens cannot go with a response_format, which ends the text")
        return self

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, logprobs: int | None, grammar: str | None) -> Sampling:
        temperature = 1.0 if self.temperature is None else self.temperature
        if self.top_p == 0:
            temperature = 0.0  # the least mass that holds a token is the best token alone
        return Sampling(
            temperature=temperature if temperature >= COLD else 0.0,
            top_k=max(self.top_k or 0, 0),
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=tuple((int(id), bias) for id, bias in (self.logit_bias or {}).items()),
            logprobs=logprobs,
            grammar=grammar,
            min_tokens=self.min_tokens or 0,
        )


# ---- completions

Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]
Many = Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)
Prompt = Annotated[
    str | Ids | Annotated[list[str], Many] | Annotated[list[Ids], Many],
    _one_finding(
        f"must be a text, up to {MAX_SEQUENCES} texts, token ids (none below 0), or up to {MAX_SEQUENCES} lists of them; none empty"
    ),
]


class CompletionRequest(Asked):
    """A prompt, or several, to continue."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(default=None, description="16 unless given")
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]

    @model_validator(mode="after")
    def _few(self) -> CompletionRequest:
        if len(self.prompts) * (self.n or 1) > MAX_SEQUENCES:
            raise ValueError(f"prompt and n make over {MAX_SEQUENCES} answers together")
        return self


# ---- chat


class TextPart(Strict):
    type: Literal["text"]
    text: str


class FunctionCall(Strict):
    name: str
    arguments: str


class ToolCall(Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Strict):
    """One turn. Content is a text or a list of text parts; only an assistant that calls tools may leave it out."""

    role: str = Field(min_length=1, max_length=64)
    content: Annotated[str | list[TextPart] | None, _one_finding("must be a text or a list of text parts")] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # what OpenAI's client sends back of an earlier answer, always null here
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: None = None

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is required")
        return self

    @property
    def text(self) -> str:
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


def _writable(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise ValueError("holds a number that JSON does not have, or is nested too deep") from None
    return value


class Function(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_writable)] | None = None
    strict: bool | None = None

    @property
    def told(self) -> dict[str, Any]:
        """As a template sees it: what was given, and nothing else."""
        given = {"name": self.name, "description": self.description, "parameters": self.parameters, "strict": self.strict}
        return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenName(Strict):
    name: str


class ChosenTool(Strict):
    type: Literal["function"]
    function: ChosenName


class ChatRequest(Asked):
    """A conversation to answer."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(default=None, description="what the context leaves, unless given")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | ChosenTool | None, _one_finding("must be none, auto, required or a function of the tools")
    ] = None

    @model_validator(mode="after")
    def _sound(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes only with logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
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
    def forced(self) -> list[Function]:
        """The functions one of which must be called; none where the model may choose."""
        functions = [tool.function for tool in self.tools or ()]
        if isinstance(self.tool_choice, ChosenTool):
            chosen = self.tool_choice.function.name
            return [f for f in functions if f.name == chosen]
        return functions if self.tool_choice == "required" else []
