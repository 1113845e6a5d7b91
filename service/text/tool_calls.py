"""Finds a chat template's tool-call format and parses the calls in an answer; API process.

Must not know HTTP or tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from .stop_strings import StopStrings

BETWEEN = re.compile(r"(?:\s|[;,]|</?tool_call>)*")


class CallFormat(StrEnum):
    """Known ways to write calls; the value is the marker that begins them."""

    HERMES = "<tool_call>"  # Hermes, Qwen: <tool_call>{"name", "arguments"}</tool_call>, any number
    MISTRAL = "[TOOL_CALLS]"  # [TOOL_CALLS][{"name", "arguments"}, ...]
    LLAMA = "<|python_tag|>"  # Llama 3: {"name", "parameters"}, several parted by ";"


@dataclass(frozen=True, slots=True)
class ToolCallText:
    """One call of a tool; `arguments` is JSON text."""

    name: str
    arguments: str


def declared_format(template: str) -> CallFormat | None:
    """The format of calls that a chat template teaches its model, if it is a known one."""
    return next((format for format in CallFormat if format in template), None)


class CallParser:
    """An answer that may hold calls of the named tools, as it grows: content passes, text that could
    be calls is kept for `finish_calls`.

    The marker may be missing, for tokenizers drop it where it is a special token: text that begins
    like JSON is kept too. `forced`: the whole answer is calls. `single`: of several calls only the
    first counts.
    """

    def __init__(
        self, format: CallFormat | None, names: Collection[str], forced: bool = False, single: bool = False
    ) -> None:
        self._format, self._names, self._most = format, names, 1 if single else None
        self._marker = StopStrings([format] if format else [])
        self._kept: str | None = "" if forced else None
        self._begun = False

    def push_text(self, text: str) -> str:
        """The part of the text so far that is certain to be content."""
        if self._kept is not None:
            self._kept += text
            return ""
        if not self._begun and text.strip():
            self._begun = True
            if self._format and text.lstrip()[0] in "{[":
                self._kept = text
                return ""
        content = self._marker.push_text(text)
        if self._marker.found is not None:
            self._kept = self._marker.found + self._marker.rest
        return content

    def finish_calls(self) -> tuple[str, list[ToolCallText]]:
        """The content that was held back, and the calls.

        Text that is not wholly made of calls is content.
        """
        if self._kept is None:
            return self._marker.flush_held(), []
        text = self._kept.lstrip().removeprefix(self._format or "")
        try:
            calls = [_make_call(value, self._names) for value in _iterate_values(text)]
        except (ValueError, RecursionError):
            calls = []
        return ("", calls[: self._most]) if calls else (self._kept, [])


def _iterate_values(text: str) -> Iterator[Any]:
    """The JSON values in the text, lists of them taken apart.

    Raises ValueError where there is anything else.
    """
    decoder = json.JSONDecoder()
    at = _skip_blanks(text, 0)
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        yield from value if isinstance(value, list) else [value]
        at = _skip_blanks(text, at)


def _skip_blanks(text: str, at: int) -> int:
    between = BETWEEN.match(text, at)
    return between.end() if between else at


def _make_call(value: Any, names: Collection[str]) -> ToolCallText:
    if not isinstance(value, dict) or value.get("name") not in names:
        raise ValueError("not a call of a known tool")
    arguments = value.get("arguments", value.get("parameters", {}))
    text = arguments
    if not isinstance(text, str):
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # an escape in it may be half a character, which no answer could carry
    return ToolCallText(value["name"], text)
