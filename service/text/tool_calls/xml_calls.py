"""Calls as Qwen3-Coder writes them: tags for the function and each parameter; API process."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from .calls import CallReader

BEGIN, LAST, END = "<function=", "</parameter>", "</function>"
HEAD = re.compile(r"<function=([^>\n]*)>")
PARAMETER = re.compile(r"\s*<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.S)
TEXT_TYPES = ("string", ["string"], ["string", "null"], ["null", "string"])


class XmlReader(CallReader):
    """Tells each parameter once it is whole; a value is what the parameter's schema says it is."""

    def __init__(self, names: Collection[str], schemas: Mapping[str, Any]) -> None:
        super().__init__()
        self._names, self._schemas = names, schemas
        self._rest = ""
        self._in_head = True
        self._count = 0  # of parameters

    def push_text(self, text: str) -> str | None:
        self._rest += text
        if self._in_head and not self._read_head():
            return None
        # Without the end of anything in it, a long value is not looked through again
        if not any(end in self._rest[-len(text) - len(LAST) :] for end in (LAST, END)):
            return None
        while parameter := PARAMETER.match(self._rest):
            self._rest = self._rest[parameter.end() :]
            self._add_parameter(parameter[1], parameter[2])
        inner, end, behind = self._rest.partition(END)
        if not end or "<parameter=" in inner:
            return None
        self.arguments.append("}" if self._count else "{}")
        return behind

    def _read_head(self) -> bool:
        head = HEAD.match(self._rest)
        if head is None:
            return False
        self._in_head, self._rest = False, self._rest[head.end() :]
        self.name = head[1] if head[1] in self._names else None
        self.failed = self.name is None
        return True

    def _add_parameter(self, key: str, text: str) -> None:
        value = _read_value(text, self._schema_of(key))
        written = json.dumps(value, ensure_ascii=False)
        before = ", " if self._count else "{"
        self.arguments.append(f"{before}{json.dumps(key, ensure_ascii=False)}: {written}")
        self._count += 1

    def _schema_of(self, key: str) -> Any:
        schema = self._schemas.get(self.name or "")
        properties = schema.get("properties") if isinstance(schema, dict) else None
        return properties.get(key) if isinstance(properties, dict) else None


def _read_value(text: str, schema: Any) -> Any:
    """The text itself where a text is wanted or nothing else is written, else what its JSON says."""
    if isinstance(schema, dict) and schema.get("type") in TEXT_TYPES:
        return text
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return text
    return value
