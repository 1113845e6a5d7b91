"""Tool calls in the text of an answer: the formats of model families, read as they come; API
process.

Must not know HTTP or tokens.
"""

from .calls import AnswerParser, CallDelta, ToolCallText
from .formats import CallFormat, declared_format
from .harmony import HarmonyParser
from .parser import CallParser

__all__ = [
    "AnswerParser",
    "CallDelta",
    "CallFormat",
    "CallParser",
    "HarmonyParser",
    "ToolCallText",
    "declared_format",
]
