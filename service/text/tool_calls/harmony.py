"""Answers of gpt-oss, which come in channels: thoughts, calls to a recipient, content; API process.

`<|channel|>analysis<|message|>THOUGHTS<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
<|constrain|>json<|message|>ARGUMENTS<|call|>`, and content in `final`, or in `commentary` to nobody.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from enum import Enum, auto
from typing import Any

from ..stop_strings import StopStrings
from .calls import CallDelta, ToolCallText
from .formats import CHANNEL, ENDS, MESSAGE, START, CallFormat
from .json_calls import NO_ARGUMENTS
from .parser import CallParser

ANALYSIS = re.compile(re.escape(CHANNEL) + r"\s*analysis")
RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")
OPENINGS = (CHANNEL, START, MESSAGE)


class MessageKind(Enum):
    CONTENT = auto()
    THOUGHT = auto()
    CALL = auto()
    STRAY = auto()  # a call that does not count


class HarmonyParser:
    """Parts an answer's channels. `single`: of several calls only the first counts.

    An answer that begins with no channel, as a grammar may bind it, is read as any other. What goes
    to nobody known is content where the answer has no other and no call, else left out.
    """

    def __init__(
        self, names: Collection[str], single: bool = False, schemas: Mapping[str, Any] | None = None
    ) -> None:
        self._names, self._single = names, single
        self._plain = CallParser(CallFormat.HARMONY, names, single=single, schemas=schemas)
        self._is_plain: bool | None = None  # not known before the first characters
        self._held = ""  # a beginning, or a header
        self._in_header = False
        self._kind = MessageKind.CONTENT
        self._body = StopStrings((*ENDS, START, CHANNEL))
        self._calls: list[list[str]] = []  # the name and the pieces of the arguments
        self._deltas: list[CallDelta] = []
        self._thoughts: list[str] = []
        self._stray: list[str] = []
        self._has_content = False

    def push_text(self, text: str) -> str:
        if self._is_plain is None:
            self._held += text
            self._is_plain = _judge_beginning(self._held)
            if self._is_plain is None:
                return ""
            text, self._held = self._held, ""
        if self._is_plain:
            return self._plain.push_text(text)
        content = self._take_text(text)
        self._has_content = self._has_content or bool(content)
        return content

    def take_deltas(self) -> list[CallDelta]:
        deltas, self._deltas = self._deltas, []
        return [*self._plain.take_deltas(), *deltas]

    def take_thoughts(self) -> str:
        thoughts = "".join(self._thoughts)
        self._thoughts.clear()
        return thoughts

    def finish_calls(self) -> tuple[str, list[ToolCallText]]:
        if self._is_plain:
            return self._plain.finish_calls()
        content = self._held if self._is_plain is None else self._add_body(self._body.flush_held())
        self._end_message()
        calls = [ToolCallText(name, "".join(pieces)) for name, *pieces in self._calls]
        if not (calls or content or self._has_content):
            content = "".join(self._stray)
        return content, calls

    def _take_text(self, text: str) -> str:
        content, rest = "", text
        while rest:
            if self._in_header:
                rest = self._read_header(rest)
                continue
            content += self._add_body(self._body.push_text(rest))
            found, rest = self._body.found, self._body.rest
            if found is None:
                break
            self._end_message()
            if found in (START, CHANNEL):
                self._in_header, self._held = True, found
        return content

    def _read_header(self, text: str) -> str:
        """The text behind a header; none while it goes on."""
        header, end, rest = (self._held + text).partition(MESSAGE)
        self._held = header
        if not end:
            return ""
        self._in_header, self._held = False, ""
        self._begin_message(header)
        return rest

    def _begin_message(self, header: str) -> None:
        recipient = RECIPIENT.search(header)
        if recipient is None:
            is_thought = ANALYSIS.search(header) is not None
            self._kind = MessageKind.THOUGHT if is_thought else MessageKind.CONTENT
        elif recipient[1] not in self._names or (self._single and self._calls):
            self._kind = MessageKind.STRAY
        else:
            self._kind = MessageKind.CALL
            self._deltas.append(CallDelta(len(self._calls), recipient[1], ""))
            self._calls.append([recipient[1]])

    def _add_body(self, text: str) -> str:
        """The part of a message's text that is content."""
        if not text:
            return ""
        if self._kind is MessageKind.CALL:
            self._calls[-1].append(text)
            self._deltas.append(CallDelta(len(self._calls) - 1, None, text))
        elif self._kind is MessageKind.THOUGHT:
            self._thoughts.append(text)
        elif self._kind is MessageKind.STRAY:
            self._stray.append(text)
        return text if self._kind is MessageKind.CONTENT else ""

    def _end_message(self) -> None:
        if self._kind is MessageKind.CALL and len(self._calls[-1]) == 1:
            self._add_body(NO_ARGUMENTS)
        self._kind = MessageKind.CONTENT
        self._body = StopStrings((*ENDS, START, CHANNEL))


def _judge_beginning(text: str) -> bool | None:
    """Whether an answer that begins so has no channels; None while it could have them."""
    begun = text.lstrip()
    if any(begun.startswith(opening) for opening in OPENINGS):
        return False
    return None if any(opening.startswith(begun) for opening in OPENINGS) else True
