"""A conversation as chat templates take it, whichever dialect it came in: turns, tools, forced calls,
and the calls read out of its answer. API process; must not know a dialect.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...text.template_options import PLAIN, TemplateOptions
from .admission import Admission, chat_prompt

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

Turn = dict[str, Any]
PLAIN_ROLE = {"developer": "system"}  # where a template does not know the one


@dataclass(frozen=True)
class PastCall:
    """An earlier turn's call of a function; `arguments` are JSON text or what it says."""

    id: str | None
    name: str
    arguments: Any

    @property
    def template_form(self) -> Turn:
        function = {"name": self.name, "arguments": parse_json(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}


def parse_json(text: Any) -> Any:
    """The value of JSON text; the text itself where it is none."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def make_turn(role: str, text: str, calls: Sequence[PastCall] = (), **named: str | None) -> Turn:
    """A message as templates expect it: its text in one piece, the arguments of calls as objects.

    `named` are further fields, such as `tool_call_id`; those that are None are left out.
    """
    turn: Turn = {"role": role, "content": text}
    turn |= {name: value for name, value in named.items() if value is not None}
    if calls:
        turn["tool_calls"] = [call.template_form for call in calls]
    return turn


@dataclass(frozen=True)
class Conversation:
    """The turns, the tools as templates get them, and how the text ends."""

    turns: Sequence[Turn]
    tools: Sequence[Turn] = ()
    template: TemplateOptions = field(default=PLAIN)


async def render_conversation(
    admission: Admission, tokenizer: AdapterTokenizer, conversation: Conversation, special: bool = False
) -> tuple[int, ...]:
    """The ids of the conversation; `special` as in `chat_prompt`.

    Raises BadRequest with the template's own reason, Overloaded, NotReady.
    """
    turns, tools = conversation.turns, conversation.tools
    if tools:
        tokenizer.tool_format()
    if not tokenizer.names_word("developer", tools=bool(tools)):
        turns = [turn | {"role": PLAIN_ROLE.get(turn["role"], turn["role"])} for turn in turns]
    return await chat_prompt(admission, tokenizer, turns, tools, conversation.template, special)
