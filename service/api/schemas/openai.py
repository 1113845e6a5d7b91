"""The wire shapes of the OpenAI dialect. API process; must not know the engine.

A field that would be ignored is refused, but labels; `service/api/schemas/fields.py` says of which kind
each is.
"""

from __future__ import annotations

from collections.abc import Sequence
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

from ...core.sampling import Sampling
from .shared import (
    COLD,
    LARGEST,
    MAX_SEQUENCES,
    MAX_TOP,
    AdapterParts,
    AnyText,
    Caller,
    Factor,
    Label,
    NotOffered,
    OnlyNull,
    OpenAIFormat,
    Penalty,
    Priority,
    Probability,
    Seed,
    StopList,
    StrictModel,
    Temperature,
    Tokens,
    TopK,
    one_unless,
)
from .structured import Bound, ChoiceList, SchemaOrText, StructuredOutputs, list_bounds

BIAS, MAX_BIASES, ID_DIGITS = 100.0, 1024, 10
MAX_STOP_IDS = 128
MAX_BAD_WORDS, MAX_BAD_WORD = 128, 100


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="usage in every chunk")
    include_obfuscation: NotOffered = None


def _unset_minus_one(value: Any) -> Any:
    """None for -1, with which clients leave a number to the server."""
    return None if value == -1 and not isinstance(value, bool) else value


OptionalSeed = Annotated[
    Seed | None, BeforeValidator(_unset_minus_one, json_schema_input_type=Seed | Literal[-1] | None)
]
Limit = Annotated[
    Tokens | None, BeforeValidator(_unset_minus_one, json_schema_input_type=Tokens | Literal[-1] | None)
]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD)]


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
    adapters: AdapterParts | None = Field(default=None, description="added up, each weighted, on the base")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = Field(default=None, description="1 unless given; 0: greedy")
    top_p: Probability | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    stop: Annotated[StopList | None, BeforeValidator(_as_list)] = None
    seed: OptionalSeed = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Biases | None = None
    response_format: OpenAIFormat | None = None
    top_k: TopK | None = Field(default=None, description="-1 and 0: off")
    min_p: Probability | None = None
    repetition_penalty: Factor | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    structured_outputs: StructuredOutputs | None = Field(default=None, description="vLLM's")
    guided_json: SchemaOrText | None = None
    guided_regex: str | None = None
    guided_choice: ChoiceList | None = None
    guided_grammar: str | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(default=None, description="true unless given")
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    return_token_ids: bool | None = None
    priority: Priority | None = Field(
        default=None, description="of those that wait the lowest is next; 0 unless given"
    )
    user: Caller = None
    store: Label = None
    metadata: Label = None
    service_tier: Label = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Label = None
    safety_identifier: Label = None
    verbosity: Label = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: OnlyNull = None
    prediction: OnlyNull = None
    suffix: OnlyNull = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None

    @model_validator(mode="after")
    def _check_whole(self) -> OpenAIRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes only with stream")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs does not go with stream")
        given = self._list_bounds()
        if len(given) > 1:
            raise ValueError(f"{given[0][0]} and {given[1][0]} say the same; send one of them")
        if given and (self.ignore_eos or self.min_tokens):
            raise ValueError(f"ignore_eos and min_tokens cannot go with {given[0][0]}, which ends the text")
        return self

    @property
    def bound(self) -> tuple[str, Bound] | None:
        """What the answer must be, and the field that says so."""
        return next(iter(self._list_bounds()), None)

    def _list_bounds(self) -> list[tuple[str, Bound]]:
        wanted, structured = self.response_format, self.structured_outputs
        given: dict[str, Sequence[Bound]] = {
            "response_format": [] if wanted is None or isinstance(wanted, AnyText) else [wanted],
            "structured_outputs": structured.bounds if structured else [],
            "guided_json": list_bounds(schema=self.guided_json),
            "guided_regex": list_bounds(regex=self.guided_regex),
            "guided_choice": list_bounds(choice=self.guided_choice),
            "guided_grammar": list_bounds(grammar=self.guided_grammar),
        }
        return [(name, bound) for name, bounds in given.items() for bound in bounds]

    @property
    def weights(self) -> list[tuple[str, float]]:
        """The adapters to be added up, by id, each with its weight."""
        return [(part.id, part.weight) for part in self.adapters or ()]

    @property
    def usage_wanted(self) -> bool:
        """Whether a last chunk has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_everywhere(self) -> bool:
        """Whether every chunk has the usage so far."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

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

Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Many = Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)
Prompt = Annotated[
    str | Ids | Annotated[list[str], Many] | Annotated[list[Ids], Many],
    one_finding(
        f"must be a text, up to {MAX_SEQUENCES} texts, token ids (0 to 2147483647) "
        f"or up to {MAX_SEQUENCES} lists of them; none empty"
    ),
]


Count = Annotated[int, Field(ge=0, lt=LARGEST)]
LimitOrNone = Annotated[
    Count | None, BeforeValidator(_unset_minus_one, json_schema_input_type=Count | Literal[-1] | None)
]


def _count_top(value: Any) -> Any:
    """0 for true, which wants the chosen tokens alone."""
    if isinstance(value, bool):
        return 0 if value else None
    return value


def _refuse_false(value: bool) -> bool:
    if not value:
        raise ValueError("is about tools, which completions have not; only null and true are taken")
    return value


TopCount = Annotated[int, Field(ge=0, le=MAX_TOP)]
TopTokens = Annotated[
    TopCount | None, BeforeValidator(_count_top, json_schema_input_type=TopCount | bool | None)
]


class CompletionRequest(OpenAIRequest):
    """A prompt, or several, to continue."""

    prompt: Prompt
    max_tokens: LimitOrNone = Field(default=None, description="16 unless given")
    logprobs: TopTokens = Field(default=None, description="true: of the chosen tokens alone")
    echo: bool | None = None
    parallel_tool_calls: Annotated[bool, AfterValidator(_refuse_false)] | None = None

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
