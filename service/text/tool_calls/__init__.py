"""Tool calls in the text of an answer: the formats of model families, read as they come; API process.

Must not know HTTP or tokens.
"""

from .calls import CallDelta, ToolCallText
from .formats import CallFormat, declared_format
from .parser import CallParser

__all__ = ["CallDelta", "CallFormat", "CallParser", "ToolCallText", "declared_format"]
