"""A conversation as chat templates take it, whichever dialect it came in: turns, tools, forced calls,
and the calls read out of its answer. API process; must not know a dialect.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ...core.sampling import Sampling
from ...text.template_options import PLAIN, TemplateOptions
from ...text.tool_calls import CallFormat, CallParser, ToolCallText
from ..schemas.shared import COLD, TOLD_LEVELS, is_nested_deeper, one_unless
from .admission import Admission, GenerationOptions, chat_prompt
from .answer import Answer
from .grammar import calls_grammar

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

Turn = dict[str, Any]
PLAIN_ROLE = {"developer": "system"}  # where a template does not know the one
NOTHING: Turn = {"type": "object", "properties": {}}  # the parameters of a function that has none


# ---- turns and tools


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
class OfferedTool:
    """A function that the model may call; `parameters` is the schema of its arguments."""

    name: str
    description: str | None = None
    parameters: Turn | None = None
    strict: bool | None = None

    @property
    def template_form(self) -> Turn:
        """The function as a template gets it: the fields that were given, and no others."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {"type": "function", "function": given}


@dataclass(frozen=True)
class Conversation:
    """The turns, the functions that may be called, and how the text ends.

    `forced` are the names of those one of which must be called; `single`: of several calls the first
    counts. `param` is the dialect's name for the turns.
    """

    turns: Sequence[Turn]
    tools: Sequence[OfferedTool] = ()
    forced: Sequence[str] = ()
    single: bool = False
    template: TemplateOptions = field(default=PLAIN)
    param: str = "messages"


async def render_conversation(
    admission: Admission, tokenizer: AdapterTokenizer, conversation: Conversation, special: bool = False
) -> tuple[int, ...]:
    """The ids of the conversation; `special` as in `chat_prompt`.

    Raises BadRequest with the template's own reason, Overloaded, NotReady.
    """
    turns = conversation.turns
    tools = [tool.template_form for tool in conversation.tools]
    _choose_format(tokenizer, conversation)  # raises where the template takes no tools
    if not tokenizer.names_word("developer", tools=bool(tools)):
        turns = [turn | {"role": PLAIN_ROLE.get(turn["role"], turn["role"])} for turn in turns]
    return await chat_prompt(admission, tokenizer, turns, tools, conversation.template, special=special)


# ---- the answer


def plain_sampling(temperature: float | None, top_p: float | None, top_k: int | None = None) -> Sampling:
    """How tokens are chosen by these alone; None is 1, 1 and off."""
    warmth = one_unless(temperature)
    is_greedy = warmth < COLD or top_p == 0
    return Sampling(temperature=0.0 if is_greedy else warmth, top_p=top_p or 1.0, top_k=max(top_k or 0, 0))


async def submit_conversation(
    admission: Admission,
    tokenizer: AdapterTokenizer,
    conversation: Conversation,
    options: GenerationOptions,
) -> AnswerReader:
    """Takes the ticket of the one answer; a forced call's grammar goes before the options' own.

    Raises as `render_conversation` and `Admission.submit_prompt`.
    """
    prompt = await render_conversation(admission, tokenizer, conversation)
    if conversation.forced:
        schemas = {tool.name: tool.parameters or NOTHING for tool in conversation.tools}
        grammar = await calls_grammar({name: schemas[name] for name in conversation.forced}, "tools")
        options = replace(options, sampling=replace(options.sampling, grammar=grammar))
    marks = tokenizer.call_marks if conversation.tools else frozenset()
    kept = options.kept_special | marks
    options = replace(options, prompt_param=conversation.param, kept_special=kept)
    (answer,) = admission.submit_prompt(tokenizer, prompt, options)
    return AnswerReader(answer, _make_parser(tokenizer, conversation))


def _make_parser(tokenizer: AdapterTokenizer, conversation: Conversation) -> CallParser:
    format = _choose_format(tokenizer, conversation)
    schemas = {tool.name: tool.parameters or NOTHING for tool in conversation.tools}
    return CallParser(format, [*schemas], bool(conversation.forced), conversation.single, schemas)


def _choose_format(tokenizer: AdapterTokenizer, conversation: Conversation) -> CallFormat | None:
    """The form of calls; a forced one may go without. Raises BadRequest where the template has none."""
    if not conversation.tools:
        return None
    return tokenizer.find_call_format() if conversation.forced else tokenizer.tool_format()


class AnswerReader:
    """An answer's text and calls, as they come or, once it was read to its end, whole."""

    def __init__(self, answer: Answer, parser: CallParser) -> None:
        self.answer, self._parser = answer, parser

    async def read_parts(self) -> AsyncIterator[tuple[str, list[ToolCallText]]]:
        """The text and the calls that each token adds, often none."""
        async for piece in self.answer.read_pieces():
            text = self._parser.push_text(piece.text)
            rest, calls = self._parser.finish_calls() if piece.ending else ("", [])
            yield text + rest, calls

    def split_text(self) -> tuple[str, list[ToolCallText]]:
        text = self._parser.push_text(self.answer.text)
        rest, calls = self._parser.finish_calls()
        return text + rest, calls


def new_call_id() -> str:
    """Nine alphanumerics, for some templates take no other id when the call comes back."""
    return uuid4().hex[:9]


def arguments_object(call: ToolCallText) -> Turn:
    """The call's arguments; a text that is no object of JSON, or one too deep to write, is under
    `arguments` in one.
    """
    value = parse_json(call.arguments)
    if not isinstance(value, dict) or is_nested_deeper(value, TOLD_LEVELS) or not _is_writable(value):
        return {"arguments": call.arguments}
    return value


def _is_writable(value: Turn) -> bool:
    """Whether JSON has all its numbers."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
