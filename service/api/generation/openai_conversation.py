"""Messages and tools in OpenAI's shapes as a conversation, for chat and for counting its tokens.

API process; must not know a route.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...text.template_options import TemplateOptions
from ..schemas.chat import ChatMessage, FunctionSpec
from .conversation import OfferedTool, PastCall, Turn


def read_turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    return [_read_turn(message, f"messages.{at}") for at, message in enumerate(messages)]


def _read_turn(message: ChatMessage, place: str) -> Turn:
    calls = [
        PastCall(call.id, call.function.name, call.function.arguments, f"{place}.tool_calls")
        for call in message.tool_calls or ()
    ]
    named = {
        "name": message.name,
        "reasoning_content": message.reasoning_content or message.reasoning,
        "tool_call_id": message.tool_call_id,
    }
    return Turn(message.role, message.text, place, calls, named)


def offer_functions(functions: Sequence[FunctionSpec]) -> list[OfferedTool]:
    return [OfferedTool(each.name, each.description, each.parameters, each.strict) for each in functions]


def end_turns(
    variables: Mapping[str, Any], opens_turn: bool | None, continues: bool | None
) -> TemplateOptions:
    """How the prompt ends; without a word the assistant's turn is opened, unless the last one goes on."""
    opens = not continues if opens_turn is None else opens_turn
    return TemplateOptions(variables, opens, bool(continues))
