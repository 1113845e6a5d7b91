"""The wire shapes of tokenizing, which are vLLM's. API process; must not know the engine.

A field that would be ignored is refused.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from .chat import ChatMessage, Many, TemplateVariables, Tool
from .openai import TokenId
from .shared import MAX_TOOLS, StrictModel

CHAT_FIELDS = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")
ModelName = Annotated[str | None, Field(description="an adapter, the base, or base:adapter; null: the base")]


class TokenizeRequest(StrictModel):
    """A text or a conversation to turn into ids."""

    model: ModelName = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Many, Field(min_length=1)] | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="true for a prompt, false for messages, whose template writes them"
    )
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = Field(default=None, description="true unless given")
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _check_one_text(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs either prompt or messages")
        given = [name for name in CHAT_FIELDS if getattr(self, name) is not None]
        if self.prompt is not None and given:
            raise ValueError(f"{given[0]} goes only with messages")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt does not go with continue_final_message")
        return self


class DetokenizeRequest(StrictModel):
    """Ids to turn into text."""

    model: ModelName = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
