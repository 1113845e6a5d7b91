"""Calls as Python writes them, with literals by keyword: NAME(KEY="VALUE", ...); API process."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from .calls import CallReader

NAME = re.compile(r"[A-Za-z_][\w.-]*")
TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<number>-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)"""
    r"""|(?P<word>True|False|None|true|false|null)\b|(?P<key>[A-Za-z_]\w*)\s*=(?!=)|(?P<mark>[\[\]{}:,()]))""",
    re.S,
)
ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|.)", re.S)
LETTERS = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"', "'": "'"}
WORDS = {"True": "true", "False": "false", "None": "null"}


class PythonReader(CallReader):
    """Tells a call once its bracket has closed."""

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = names
        self._body: list[str] = []
        self._depth = 0
        self._quote = ""
        self._escaped = False

    def push_text(self, text: str) -> str | None:
        for at, char in enumerate(text, 1):
            self._body.append(char)
            self._follow_char(char)
            if char == ")" and self._depth == 0 and not self._quote:
                self._end_call()
                return text[at:]
        return None

    def _follow_char(self, char: str) -> None:
        if self._quote:
            is_end = char == self._quote and not self._escaped
            self._escaped = char == "\\" and not self._escaped
            self._quote = "" if is_end else self._quote
        elif char in "\"'":
            self._quote = char
        else:
            self._depth += (char == "(") - (char == ")")

    def _end_call(self) -> None:
        name, _, inner = "".join(self._body).partition("(")
        try:
            arguments = json.dumps(_read_keywords(inner[:-1]), ensure_ascii=False, allow_nan=False)
            arguments.encode()
        except (ValueError, RecursionError):
            self.failed = True
            return
        self.failed = name not in self._names
        if not self.failed:
            self.name = name
            self.arguments.append(arguments)


def may_be_python(text: str, names: Collection[str]) -> bool:
    """Whether the text could become a call of one of these tools."""
    return any(f"{name}(".startswith(text[: len(name) + 1]) for name in names)


def _read_keywords(text: str) -> Any:
    """The arguments, by way of JSON. Raises ValueError."""
    pieces: list[str] = []
    at, depth = 0, 0
    while text[at:].strip():
        token = TOKEN.match(text, at)
        if token is None or (token["key"] and depth):
            raise ValueError("no literal by keyword")
        at = token.end()
        mark = token["mark"] or ""
        depth += (mark in "[{(") - (mark in "]})") if mark else 0
        pieces.append(_write_token(token))
    return json.loads("{" + "".join(pieces) + "}")


def _read_escape(escape: re.Match[str]) -> str:
    text = escape[1]
    if len(text) > 1:
        return chr(int(text[1:], 16))
    return LETTERS.get(text, escape[0])


def _write_token(token: re.Match[str]) -> str:
    if token["text"]:
        return json.dumps(ESCAPE.sub(_read_escape, token["text"][1:-1]))
    if token["key"]:
        return json.dumps(token["key"]) + ":"
    if token["word"]:
        return WORDS.get(token["word"], token["word"])
    if token["mark"]:
        return {"(": "[", ")": "]"}.get(token["mark"], token["mark"])
    return str(token["number"])
