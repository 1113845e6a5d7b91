"""An answer that may hold calls, as it grows: content passes, calls are told as they come; API process."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..stop_strings import StopStrings
from .calls import CallDelta, CallReader, ToolCallText
from .formats import ARGUMENTS, CALL_ID, MARKERS, SEPARATORS, CallFormat
from .json_calls import KEYS, JsonReader, is_type_open, may_be_json
from .python_calls import PythonReader, may_be_python
from .xml_calls import BEGIN, XmlReader

# A bracket at the end of what has come may be the beginning of Mistral's marker
_OPEN = "|".join(re.escape("TOOL_CALLS]"[:length]) for length in range(11))
_SEPARATORS = "|".join(map(re.escape, SEPARATORS))
BETWEEN = re.compile(rf"(?:{_SEPARATORS}|[\s;,\]]|\[(?!(?:{_OPEN})\Z))*")
PYTHONIC = (CallFormat.LLAMA, CallFormat.PYTHONIC)
NAMED = re.compile(rf"([\w.-]+)\s*(?:{re.escape(CALL_ID)}\w*\s*)?(?:{re.escape(ARGUMENTS)}\s*)?(?=\{{)")
NAMED_PART = re.compile(r"[\w.-]+\s*(?:\[[A-Z_\]]*\w*\s*)?(?:\[[A-Z]*\]?\s*)?")


class CallParser:
    """An answer that may hold calls of the named tools.

    The marker may be missing, for models leave it out: text that begins as a call does is held as
    long as it could still become one. `forced`: the whole answer is calls. `single`: of several
    calls only the first counts. `schemas` are the parameters' schemas by the tool's name.

    Where some text is no call although a marker says so, good calls beside it count and it is left
    out; without any, all of the text is content.
    """

    def __init__(
        self,
        format: CallFormat | None,
        names: Collection[str],
        forced: bool = False,
        single: bool = False,
        schemas: Mapping[str, Any] | None = None,
    ) -> None:
        self._format, self._names, self._schemas = format, names, schemas or {}
        self._most = 1 if single else None
        self._marker = StopStrings(MARKERS[format] if format else ())
        self._calls: list[list[str]] = []  # the name and the pieces of the arguments
        self._deltas: list[CallDelta] = []
        self._reader: CallReader | None = None
        self._index: int | None = None  # of the call that is read
        self._in_calls, self._begun = forced, forced
        self._held = ""  # text of which it is not known yet what it is
        self._raw: list[str] = []  # from the first marker on
        self._after: list[str] = []  # content behind calls of which none was good

    def push_text(self, text: str) -> str:
        """The part of the text so far that is certain to be content."""
        if self._in_calls or self._raw:
            self._raw.append(text)
        return self._take_text(text)

    def take_deltas(self) -> list[CallDelta]:
        """What the calls have grown by since this was asked for."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def take_thoughts(self) -> str:
        """None: only harmony parts them from the content."""
        return ""

    def finish_calls(self) -> tuple[str, list[ToolCallText]]:
        """The content that was held back, and all calls."""
        held = self._held + self._marker.flush_held()
        calls = [ToolCallText(name, "".join(pieces)) for name, *pieces in self._calls]
        if self._raw and not calls:
            return "".join(self._raw), []
        is_markup = self._in_calls and ("<" in held or "[" in held)
        return ("" if is_markup else held), calls

    def _take_text(self, text: str) -> str:
        content = ""
        rest: str | None = text
        while rest is not None:
            if self._reader is not None:
                rest = self._read_call(self._reader, rest)
            elif self._in_calls:
                rest = self._begin_call(rest)
            else:
                passed, rest = self._find_calls(rest)
                content += self._pass_content(passed)
        if self._after and self._calls:
            content, self._after = "".join(self._after) + content, []
        return content

    # ---- content

    def _pass_content(self, text: str) -> str:
        if self._raw and not self._calls:
            self._after.append(text)
            return ""
        return text

    def _find_calls(self, text: str) -> tuple[str, str | None]:
        """The content, and the text behind what begins calls; None where nothing does."""
        text, self._held = self._held + text, ""
        if not self._begun and text.strip():
            blank = text[: len(text) - len(text.lstrip())]
            text = text[len(blank) :]
            verdict = self._judge_bare(text)
            if verdict is None:
                self._held = text
                return blank, None
            self._begun = True
            if verdict:
                self._enter_calls(text)
                return blank, text
            return blank + self._push_marker(text), self._take_rest()
        return self._push_marker(text), self._take_rest()

    def _push_marker(self, text: str) -> str:
        return self._marker.push_text(text)

    def _take_rest(self) -> str | None:
        """The text from a marker on, which is looked for anew behind these calls."""
        if self._marker.found is None:
            return None
        rest = self._marker.found + self._marker.rest
        self._marker = StopStrings(MARKERS[self._format] if self._format else ())
        self._enter_calls(rest)
        return rest

    def _enter_calls(self, text: str) -> None:
        self._in_calls = True
        if not self._raw:
            self._raw.append(text)

    def _judge_bare(self, text: str) -> bool | None:
        """Whether text without a marker is a call: None while it could become one."""
        if self._format is None or text[0] not in "{[":
            return False
        inner = text[1:].lstrip() if text[0] == "[" else text
        if not inner:
            return None
        if inner[0] == "{":
            return self._judge_json(inner)
        if self._format in PYTHONIC and text[0] == "[" and may_be_python(inner, self._names):
            return True if "(" in inner else None
        return False

    def _judge_json(self, text: str) -> bool | None:
        if not may_be_json(text, self._names):
            return False
        # Known by its name; and one in another order once it is whole
        key = text[1:].lstrip()
        if any(f'"{name}"' in key for name in self._names):
            return True
        return True if key.startswith(KEYS[1:]) and not is_type_open(key) else None

    # ---- calls

    def _begin_call(self, text: str) -> str | None:
        text, self._held = self._held + text, ""
        between = BETWEEN.match(text)
        rest = text[between.end() :] if between else text
        if not rest or any(word.startswith(rest) for word in (*SEPARATORS, BEGIN)):
            self._held = rest
            return None
        begun = self._make_reader(rest)
        if begun is not None:
            self._reader, self._index = begun[0], None
            return rest[begun[1] :]
        if self._may_begin(rest):
            self._held = rest
            return None
        self._in_calls = False
        return rest

    def _make_reader(self, text: str) -> tuple[CallReader, int] | None:
        """The reader of the call that the text begins with, and the text's part that it needs no more."""
        if text[0] == "{":
            return JsonReader(self._names), 0
        if text.startswith(BEGIN):
            return XmlReader(self._names, self._schemas), 0
        if self._format in PYTHONIC and "(" in text and may_be_python(text, self._names):
            return PythonReader(self._names), 0
        named = NAMED.match(text) if self._format is CallFormat.MISTRAL else None
        return (JsonReader(self._names, named[1]), named.end()) if named else None

    def _may_begin(self, text: str) -> bool:
        """Whether more text could make a call of this one."""
        if self._format in PYTHONIC and "(" not in text and may_be_python(text, self._names):
            return True
        return self._format is CallFormat.MISTRAL and NAMED_PART.fullmatch(text) is not None

    def _read_call(self, reader: CallReader, text: str) -> str | None:
        rest = reader.push_text(text)
        self._tell(reader)
        if rest is not None:
            self._reader = None
        return rest

    def _tell(self, reader: CallReader) -> None:
        arguments = reader.take_arguments()
        if reader.name is None or reader.failed:
            return
        if self._index is None:
            if self._most is not None and len(self._calls) >= self._most:
                return
            self._index = len(self._calls)
            self._calls.append([reader.name])
            self._deltas.append(CallDelta(self._index, reader.name, ""))
        if arguments:
            self._calls[self._index].append(arguments)
            self._deltas.append(CallDelta(self._index, None, arguments))
