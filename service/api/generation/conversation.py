"""A conversation as chat templates take it, whichever dialect it came in: turns, tools, forced
calls, and the calls read out of its answers. API process; must not know a dialect.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ...core.sampling import Sampling
from ...text.template_options import PLAIN, TemplateOptions
from ...text.tool_calls import (
    AnswerParser,
    CallDelta,
    CallFormat,
    CallParser,
    HarmonyParser,
    ToolCallText,
)
from ..schemas.shared import COLD, TOLD_LEVELS, is_nested_deeper, one_unless
from .admission import Admission, GenerationOptions, chat_prompt
from .answer import Answer
from .call_grammars import bound_or_call
from .grammar import calls_grammar

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

JsonObject = dict[str, Any]
AnswerPart = str | CallDelta  # content, or a piece of a call
PLAIN_ROLE = {"developer": "system"}  # where a template does not know the one
NOTHING: JsonObject = {"type": "object", "properties": {}}  # the parameters of a function that has none
RESULTS = ("tool", "function")  # the roles that give a call's result


# ---- turns and tools


@dataclass(frozen=True)
class PastCall:
    """An earlier turn's call of a function; `arguments` are JSON text or what it says, `place` is
    where it stands in the request.
    """

    id: str | None
    name: str
    arguments: Any
    place: str

    @property
    def template_form(self) -> JsonObject:
        function = {"name": self.name, "arguments": parse_json(self.arguments)}
        return {"id": self.id, "type": "function", "function": function}

    @property
    def text(self) -> str:
        """The call in the form that a forced one has."""
        arguments = self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments)
        return f'{{"name": {json.dumps(self.name)}, "arguments": {arguments}}}'


@dataclass(frozen=True)
class Turn:
    """A message of the conversation; `place` is where it stands in the request.

    `named` are further fields as templates know them, such as `tool_call_id`; those that are None or empty
    are left out.
    """

    role: str
    text: str
    place: str
    calls: Sequence[PastCall] = ()
    named: Mapping[str, str | None] | None = None

    def template_form(self, knows_calls: bool, knows_developer: bool) -> JsonObject:
        """The message as a template expects it: its text in one piece, the arguments of calls as
        objects.

        Where the template knows no calls, they are text.
        """
        role = self.role if knows_developer else PLAIN_ROLE.get(self.role, self.role)
        form: JsonObject = {"role": role, "content": self.text}
        form |= {name: value for name, value in (self.named or {}).items() if value}
        if "reasoning_content" in form and self.text and self.calls:
            form["thinking"] = ""  # gpt-oss' name for it: its template refuses all three together
        if self.calls and knows_calls:
            form["tool_calls"] = [call.template_form for call in self.calls]
        elif self.calls:
            form["content"] = "\n".join(filter(None, [self.text, *(call.text for call in self.calls)]))
        return form

    def list_shown(self) -> Iterator[tuple[str, str]]:
        """The places of its calls and of a result, each with a word that the prompt has unless the
        template drops them.
        """
        for call in self.calls:
            yield call.place, call.name
        if self.role in RESULTS:
            words = re.findall("[A-Za-z0-9]+", self.text)
            yield self.place, max(words, key=len, default="")


def parse_json(text: Any) -> Any:
    """The value of JSON text; the text itself where it is none."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@dataclass(frozen=True)
class OfferedTool:
    """A function that the model may call; `parameters` is the schema of its arguments."""

    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    @property
    def template_form(self) -> JsonObject:
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
    template: TemplateOptions = PLAIN
    param: str = "messages"

    @property
    def schemas(self) -> dict[str, JsonObject]:
        """The schema of each function's arguments."""
        return {tool.name: tool.parameters or NOTHING for tool in self.tools}


async def render_conversation(
    admission: Admission, tokenizer: AdapterTokenizer, conversation: Conversation, special: bool = False
) -> tuple[int, ...]:
    """The ids of the conversation; `special` as in `chat_prompt`.

    Raises BadRequest with the template's own reason or the place that it leaves out, Overloaded,
    NotReady.
    """
    _choose_format(tokenizer, conversation)  # raises where the template takes no tools
    tools = [tool.template_form for tool in conversation.tools]
    known = [tokenizer.names_word(word, tools=bool(tools)) for word in ("tool_calls", "developer")]
    messages = [turn.template_form(*known) for turn in conversation.turns]
    if tools and tokenizer.names_word("message['tools']", tools=True):
        messages = _place_tools(messages, tools)
    shown = [pair for turn in conversation.turns for pair in turn.list_shown()]
    return await chat_prompt(admission, tokenizer, messages, tools, conversation.template, shown, special)


def _place_tools(messages: list[JsonObject], tools: Sequence[JsonObject]) -> list[JsonObject]:
    """The messages as Phi-4-mini's template takes tools: as JSON in the system's."""
    text = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    is_begun = bool(messages) and messages[0]["role"] == "system"
    system = messages[0] if is_begun else {"role": "system", "content": ""}
    return [{**system, "tools": text}, *messages[is_begun:]]


# ---- the answers


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
    bound_param: str = "",
) -> list[AnswerReader]:
    """Takes the tickets of all answers.

    The options' grammar, of the field `bound_param`, binds an answer that calls nothing. Raises as
    `render_conversation` and `Admission.submit_prompt`.
    """
    format = _choose_format(tokenizer, conversation)
    prompt = await render_conversation(admission, tokenizer, conversation)
    grammar = await _join_grammars(conversation, format, options.sampling.grammar, bound_param)
    options = replace(
        options,
        sampling=replace(options.sampling, grammar=grammar),
        kept_special=options.kept_special | (tokenizer.find_marks(format) if format else frozenset()),
        prompt_param=conversation.param,
    )
    answers = admission.submit_prompt(tokenizer, prompt, options)
    return [AnswerReader(answer, _make_parser(conversation, format)) for answer in answers]


async def _join_grammars(
    conversation: Conversation, format: CallFormat | None, bound: str | None, param: str
) -> str | None:
    """The grammar of a call that the client insists on; else of what the answer must be, or a call
    where tools are offered.
    """
    schemas = conversation.schemas
    if conversation.forced:
        return await calls_grammar({name: schemas[name] for name in conversation.forced}, "tools")
    if bound is None or not schemas:
        return bound
    return await bound_or_call(bound, schemas, format, param)


def _make_parser(conversation: Conversation, format: CallFormat | None) -> AnswerParser:
    schemas = conversation.schemas
    if format is CallFormat.HARMONY and not conversation.forced:
        return HarmonyParser([*schemas], conversation.single, schemas)
    return CallParser(format, [*schemas], bool(conversation.forced), conversation.single, schemas)


def _choose_format(tokenizer: AdapterTokenizer, conversation: Conversation) -> CallFormat | None:
    """The form of calls; a forced one has the grammar's own, and works where no other is known.
    Without tools only harmony is one, for all its answers come in channels.

    Raises BadRequest where the template has none.
    """
    if not conversation.tools:
        found = tokenizer.find_call_format()
        return found if found is CallFormat.HARMONY else None
    return tokenizer.find_call_format() if conversation.forced else tokenizer.tool_format()


class AnswerReader:
    """An answer's text and calls, as they come or, once it was read to its end, whole; no thoughts."""

    def __init__(self, answer: Answer, parser: AnswerParser) -> None:
        self.answer, self.parser = answer, parser

    async def read_parts(self) -> AsyncIterator[list[AnswerPart]]:
        """What each token adds, often nothing; a call's pieces follow each other."""
        async for piece in self.answer.read_pieces():
            text = self.parser.push_text(piece.text)
            rest = self.parser.finish_calls()[0] if piece.ending else ""
            yield _order_parts(text + rest, self.parser.take_deltas())

    def split_text(self) -> tuple[str, list[ToolCallText]]:
        text = self.parser.push_text(self.answer.text)
        rest, calls = self.parser.finish_calls()
        return text + rest, calls


def _order_parts(text: str, deltas: Sequence[CallDelta]) -> list[AnswerPart]:
    """The end of a call that was begun before, then the text, then new calls."""
    begun = next((at for at, delta in enumerate(deltas) if delta.name is not None), len(deltas))
    return [*deltas[:begun], *([text] if text else []), *deltas[begun:]]


def new_call_id() -> str:
    """Nine alphanumerics, for some templates take no other id when the call comes back."""
    return uuid4().hex[:9]


def arguments_object(call: ToolCallText) -> JsonObject:
    """The call's arguments; a text that is no object of JSON, or one too deep to write, is under
    `arguments` in one.
    """
    value = parse_json(call.arguments)
    if not isinstance(value, dict) or is_nested_deeper(value, TOLD_LEVELS) or not _is_writable(value):
        return {"arguments": call.arguments}
    return value


def _is_writable(value: JsonObject) -> bool:
    """Whether JSON has all its numbers."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
