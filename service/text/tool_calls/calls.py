"""Calls as an answer tells them, whole and in pieces; API process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol


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


class AnswerParser(Protocol):
    """What reads an answer as it grows: content, thoughts, and calls."""

    def push_text(self, text: str) -> str:
        """The part of the text so far that is certain to be content."""

    def take_deltas(self) -> list[CallDelta]:
        """What the calls have grown by since this was asked for."""

    def take_thoughts(self) -> str:
        """What was thought since this was asked for."""

    def finish_calls(self) -> tuple[str, list[ToolCallText]]:
        """The content that was held back, and all calls."""


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
