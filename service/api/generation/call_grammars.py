"""Grammars of answers that are a call in the template's form, or what else the answer must be.

API process; must not know tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from ...text.tool_calls import CallFormat
from .grammar import calls_grammar, check_grammar, check_text

# What stands around a call's JSON
FRAMES: Mapping[CallFormat, tuple[str, str]] = {
    CallFormat.HERMES: ("<tool_call>\n", "\n</tool_call>"),
    CallFormat.QWEN_XML: ("<tool_call>\n", "\n</tool_call>"),
    CallFormat.MISTRAL: ("[TOOL_CALLS][", "]"),
    CallFormat.PHI: ("<|tool_call|>[", "]<|/tool_call|>"),
}


async def bound_or_call(
    bound: str, functions: Mapping[str, dict[str, Any]], format: CallFormat | None, param: str
) -> str:
    """The grammar of a text that `bound` allows, or of one call of these functions.

    Raises BadRequest naming `param`, or `tools`.
    """
    calls = await calls_grammar(functions, "tools")
    before, after = FRAMES.get(format, ("", "")) if format else ("", "")
    opening, closing = (json.dumps(part) if part else "" for part in (before, after))
    start = f"start: call | @bound\ncall: {opening} @call_json {closing}"
    grammars = [{"lark_grammar": start}, _name_grammar("call_json", calls), _name_grammar("bound", bound)]
    text = json.dumps({"grammars": grammars})
    return await check_text("joined", text, partial(check_grammar, text), param)


def _name_grammar(name: str, text: str) -> dict[str, Any]:
    """A grammar's text as a part of another, by this name."""
    if text.lstrip().startswith("{"):
        (grammar,) = json.loads(text)["grammars"]
        return {**grammar, "name": name}
    return {"lark_grammar": text, "name": name}
