"""Calls as JSON: an object with name and arguments, or the arguments alone behind a name; API process."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from .calls import CallReader

KEYS = ('"name"', '"arguments"', '"parameters"', '"type"')
TYPE = '"type":"function"'  # as some write before the name
HEAD = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
END = "</tool_call>"
NO_ARGUMENTS = "{}"


class JsonReader(CallReader):
    """Follows brackets and strings, so that arguments are told as they come where the name stands before
    them; in another order once the object is whole.
    """

    def __init__(self, names: Collection[str], name: str | None = None) -> None:
        super().__init__()
        self._names = names
        self._body: list[str] = []
        self._depth = 0
        self._in_string = self._escaped = False
        self._level = 1 if name is None else 0  # the depth around the arguments
        self._tells = False
        if name is not None:
            self._begin_arguments(name)

    def push_text(self, text: str) -> str | None:
        for at, char in enumerate(text, 1):
            self._take_char(char)
            if self._depth == 0:
                self._end_object()
                return text[at:]
            if char == ">" and not self._in_string and "".join(self._body[-len(END) :]) == END:
                self.failed = self.failed or self.name is None
                return text[at:]
        return None

    def _take_char(self, char: str) -> None:
        if not self._in_string and char in "{[":
            if char == "{" and self._depth == self._level and self.name is None:
                self._read_head()
            self._depth += 1
        self._body.append(char)
        if self._tells:
            self.arguments.append(char)
        self._follow_string(char)
        if not self._in_string and char in "}]":
            self._depth -= 1
            self._tells = self._tells and self._depth > self._level

    def _follow_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string and char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = not self._in_string

    def _read_head(self) -> None:
        head = HEAD.fullmatch("".join(self._body))
        if head and not self.failed:
            self._begin_arguments(head[1])

    def _begin_arguments(self, name: str) -> None:
        if name in self._names:
            self.name, self._tells = name, True
        else:
            self.failed = True

    def _end_object(self) -> None:
        """Reads an object whose arguments were not told yet."""
        if self.name is not None or self.failed:
            return
        try:
            value = json.loads("".join(self._body))
            arguments = _write_arguments(value)
        except (ValueError, RecursionError, AttributeError):
            self.failed = True
            return
        name = value.get("name")
        if isinstance(name, str) and name in self._names:
            self.name = name
            self.arguments.append(arguments)
        else:
            self.failed = True


def _write_arguments(call: dict[str, Any]) -> str:
    """Raises ValueError for what no answer could carry."""
    arguments = call.get("arguments", call.get("parameters"))
    if arguments is None:
        return NO_ARGUMENTS
    text = arguments
    if not isinstance(text, str):
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # an escape in it may be half a character
    return text


def may_be_json(text: str, names: Collection[str]) -> bool:
    """Whether a text that begins with a brace could become a call of one of these tools."""
    inner = text[1:].lstrip()
    if any(key.startswith(inner) for key in KEYS):
        return True
    if inner.startswith('"type"'):
        return "".join(inner.split()).startswith(TYPE) or is_type_open(inner)
    if not inner.startswith('"name"'):
        return inner.startswith(KEYS)
    value = inner.removeprefix('"name"').lstrip()
    if not value.startswith(":"):
        return not value
    value = value[1:].lstrip()
    return any(f'"{name}"'.startswith(value[: len(name) + 2]) for name in names)


def is_type_open(text: str) -> bool:
    """Whether a text that begins with the key "type" could still go on to say that it is a function."""
    return text.startswith('"type"') and TYPE.startswith("".join(text.split())) and len(text) < len(TYPE) + 20
