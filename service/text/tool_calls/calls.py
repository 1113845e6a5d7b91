"""Calls as an answer tells them, whole and in pieces; API process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ToolCallText:
    """One call of a tool; `arguments` is JSON text, as far as the model wrote it."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallDelta:
    """What a stream adds to the call at `index`; the first piece of a call has the name."""

    index: int
    name: str | None
    arguments: str


class CallReader(ABC):
    """Reads one call from its first character on.

    `name` is set once it is known, `arguments` are pieces that were not taken yet. `failed`: it is no call of
    a known tool.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.failed = False
        self.arguments: list[str] = []

    @abstractmethod
    def push_text(self, text: str) -> str | None:
        """The text behind the call; None while the call goes on."""

    def take_arguments(self) -> str:
        """The part of the arguments that was not taken before."""
        text = "".join(self.arguments)
        self.arguments.clear()
        return text
