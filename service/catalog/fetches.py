"""How far the fetching of adapters from elsewhere has come, by the id that they are for; in the API process.

Must not know how anything is fetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Fetch:
    """`bytes` is None until some have come, and where nobody counts them."""

    def __init__(self) -> None:
        self.bytes: int | None = None

    def note_progress(self, received: int) -> None:
        """Called from the thread that fetches."""
        self.bytes = received


class Fetches:
    def __init__(self) -> None:
        self._running: dict[str, Fetch] = {}

    @contextmanager
    def track(self, id: str, shown: bool = True) -> Iterator[Fetch]:
        """Of two for one id the later one shows."""
        fetch = Fetch()
        if shown:
            self._running[id] = fetch
        try:
            yield fetch
        finally:
            if self._running.get(id) is fetch:
                del self._running[id]

    def describe(self, id: str) -> dict[str, Any]:
        """What a card has of it; nothing where nothing is fetched."""
        fetch = self._running.get(id)
        return {"fetching": {"bytes": fetch.bytes}} if fetch else {}


def make_card(id: str, fetching: dict[str, Any]) -> dict[str, Any]:
    """The card of an id that is not registered yet."""
    unknown = dict.fromkeys(("digest", "rank", "parameters", "megabytes", "last_used"))
    card = {"id": id, "state": "fetching", "residency": "disk", "pinned": False, "in_flight": 0}
    return card | unknown | fetching
