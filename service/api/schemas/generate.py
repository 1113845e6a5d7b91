"""The wire shapes of the TGI and LoRAX dialect. API process; must not know the engine.

A field that would be ignored is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from .shared import (
    MAX_TOP,
    MIXED,
    AdapterParts,
    Factor,
    Grammar,
    NotOffered,
    Penalty,
    Priority,
    ResponseFormat,
    Seed,
    Share,
    StopList,
    StrictModel,
    Tokens,
    TopK,
)


def _false_is_none(value: Any) -> Any:
    return None if value is False else value


class MergedAdapters(StrictModel):
    """LoRAX's several adapters. Of its strategies `linear` alone is a sum of their changes."""

    ids: Annotated[list[str], MIXED]
    weights: Annotated[list[float], MIXED]
    merge_strategy: str | None = None
    density: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="of other strategies"
    )
    majority_sign_method: str | None = Field(default=None, description="of other strategies")

    @model_validator(mode="after")
    def _check_sum(self) -> MergedAdapters:
        if self.merge_strategy not in (None, "linear"):
            raise ValueError(f"merge_strategy: {self.merge_strategy[:40]!r} is not offered, only 'linear' is")
        if len(self.weights) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids have {len(self.weights)} weights")
        return self


class Parameters(StrictModel):
    """How to continue the text. Absent and null mean the same everywhere."""

    adapter_id: str | None = Field(default=None, description="a registered adapter; null: the base")
    adapters: AdapterParts | None = Field(default=None, description="their changes are added, each weighted")
    merged_adapters: Annotated[MergedAdapters | None, BeforeValidator(_false_is_none)] = Field(
        default=None, description="LoRAX's way to say `adapters`"
    )
    adapter_source: Annotated[Literal["local", "hub"] | None, BeforeValidator(_false_is_none)] = None
    max_new_tokens: Tokens | None = Field(default=None, description="128 unless the context leaves less")
    do_sample: bool | None = Field(default=None, description="true: sample; a temperature over 0 implies it")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: TopK | None = Field(default=None, description="-1 and 0: off")
    top_p: Share | None = None
    typical_p: Share | None = None
    repetition_penalty: Factor | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: StopList | None = None
    truncate: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="keep this many tokens of the prompt, its last ones"
    )
    return_full_text: bool | None = None
    ignore_eos_token: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=16)] | None = Field(
        default=None, description="sample this many, answer with the likeliest"
    )
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    priority: Priority | None = Field(
        default=None, description="of those that wait the lowest is next; 0 unless given"
    )
    response_format: Annotated[ResponseFormat | None, BeforeValidator(_false_is_none)] = None
    grammar: Annotated[Grammar | None, BeforeValidator(_false_is_none)] = None
    api_token: NotOffered = None
    return_k_alternatives: NotOffered = None
    watermark: NotOffered = None

    @property
    def sampled(self) -> bool:
        return bool(self.do_sample) if self.temperature is None else self.temperature > 0

    @property
    def weights(self) -> list[tuple[str, float]]:
        """The adapters to be added up, by id, each with its weight; none where at most one is wanted."""
        if self.merged_adapters:
            return list(zip(self.merged_adapters.ids, self.merged_adapters.weights, strict=True))
        return [(part.id, part.weight) for part in self.adapters or ()]

    @model_validator(mode="after")
    def _check_adapters(self) -> Parameters:
        if [self.adapter_id, self.adapters, self.merged_adapters].count(None) < 2:
            raise ValueError("adapter_id, adapters and merged_adapters exclude each other; send one of them")
        return self

    @model_validator(mode="after")
    def _check_whole(self) -> Parameters:
        if (self.best_of or 1) > 1 and not self.sampled:
            raise ValueError("best_of over 1 needs sampling: set do_sample or a temperature")
        constrained = self.response_format is not None and self.response_format.type != "text"
        if self.grammar is not None and constrained:
            raise ValueError("grammar and response_format say the same; send one of them")
        if self.ignore_eos_token and (self.grammar or constrained):
            raise ValueError(
                "ignore_eos_token cannot go with a grammar or response_format, which end the text"
            )
        return self


class GenerateRequest(StrictModel):
    """A prompt to continue."""

    inputs: str
    parameters: Parameters | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _check_whole(self) -> GenerateRequest:
        if self.stream and self.parameters and (self.parameters.best_of or 1) > 1:
            raise ValueError("best_of over 1 cannot be streamed")
        return self
