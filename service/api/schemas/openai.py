"""The wire shapes of the OpenAI dialect. API process; must not know the engine.

A field that would be ignored is refused (but `user`).
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from ...core.sampling import Sampling
from .shared import (
    COLD,
    LARGEST,
    MAX_SEQUENCES,
    MAX_TOP,
    Factor,
    OpenAIFormat,
    Penalty,
    Seed,
    StopList,
    StrictModel,
    TopK,
    one_unless,
)

BIAS, MAX_BIASES, ID_DIGITS = 100.0, 1024, 10
Temperature = Annotated[float, Field(ge=0, le=2)]
Probability = Annotated[float, Field(ge=0, le=1)]


class StreamOptions(StrictModel):
    include_usage: bool = False


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > MAX_BIASES:
        raise ValueError(f"has {len(value)} entries, and {MAX_BIASES} are the most")
    return value


def _check_biases(value: dict[str, float]) -> dict[str, float]:
    for key, bias in value.items():
        is_id = key.isascii() and key.isdecimal() and len(key) <= ID_DIGITS
        if not is_id or abs(bias) > BIAS:
            raise ValueError(f"maps token ids to numbers from -100 to 100, not {key[:40]!r} to {bias}")
    return value


Biases = Annotated[dict[str, float], BeforeValidator(_check_few), AfterValidator(_check_biases)]


def one_finding(message: str) -> WrapValidator:
    """Reports one finding in place of a union's many."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(message) from None

    return WrapValidator(validate)


class OpenAIRequest(StrictModel):
    """The fields that completions and chat share."""

    model: str = Field(description="an adapter, the base, or base:adapter")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = Field(default=None, description="1 unless given; 0: greedy")
    top_p: Probability | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    stop: Annotated[StopList | None, BeforeValidator(_as_list)] = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    response_format: OpenAIFormat | None = None
    top_k: TopK | None = Field(default=None, description="-1 and 0: off")
    min_p: Probability | None = None
    repetition_penalty: Factor | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    user: str | None = Field(default=None, description="taken and ignored")

    @model_validator(mode="after")
    def _check_whole(self) -> OpenAIRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes only with stream")
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained and (self.ignore_eos or self.min_tokens):
            raise ValueError(
                "ignore_eos and min_tokens cannot go with a response_format, which ends the text"
            )
        return self

    @property
    def usage_wanted(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def make_sampling(self, logprobs: int | None, grammar: str | None) -> Sampling:
        biases = self.logit_bias or {}
        return Sampling(
            temperature=self._sampling_temperature(),
            top_k=max(self.top_k or 0, 0),
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            repetition_penalty=one_unless(self.repetition_penalty),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=tuple((int(id), bias) for id, bias in biases.items()),
            logprobs=logprobs,
            grammar=grammar,
            min_tokens=self.min_tokens or 0,
        )

    def _sampling_temperature(self) -> float:
        """The temperature, 0 for greedy."""
        temperature = one_unless(self.temperature)
        # A top_p of 0: the least mass that holds a token is the best token alone
        return 0.0 if temperature < COLD or self.top_p == 0 else temperature


# ---- completions

Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(min_length=1, fail_fast=True)]
Many = Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)
Prompt = Annotated[
    str | Ids | Annotated[list[str], Many] | Annotated[list[Ids], Many],
    one_finding(
        f"must be a text, up to {MAX_SEQUENCES} texts, token ids (0 to 2147483647) "
        f"or up to {MAX_SEQUENCES} lists of them; none empty"
    ),
]


class CompletionRequest(OpenAIRequest):
    """A prompt, or several, to continue."""

    prompt: Prompt
    max_tokens: Annotated[int, Field(ge=0, lt=LARGEST)] | None = Field(
        default=None, description="16 unless given"
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt by itself: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        if ids:
            return [ids]
        return [part for part in self.prompt if not isinstance(part, int)]

    @model_validator(mode="after")
    def _check_few(self) -> CompletionRequest:
        answers = len(self.prompts) * (self.n or 1)
        if answers > MAX_SEQUENCES:
            raise ValueError(f"prompt and n make over {MAX_SEQUENCES} answers together")
        return self
