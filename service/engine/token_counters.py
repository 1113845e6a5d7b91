"""Counts the tokens that adapters were served while others waited; runs in the worker process.

It is the virtual token counter of "Fairness in Serving Large Language Models" (Sheng et al., 2024), one for
each priority. Integers and digests only; must not know sequences, nor what follows from a count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..core.adapter import Digest

OUTPUT_WEIGHT = 2  # of a generated token, where a prompt's counts 1; as in the paper
# Requests of others that begin, at most, before an adapter that waits has its turn whatever its count: there
# is no end of new adapters, since each mix of some is one, and each of them begins with the lowest count
MOST_TURNS = 1000


@dataclass
class _Level:
    """One priority: `turns` is the number of requests that began, `since` what it was when an adapter came
    or last had its turn.
    """

    counts: dict[Digest | None, int] = field(default_factory=dict)
    since: dict[Digest | None, int] = field(default_factory=dict)
    turns: int = 0


class TokenCounters:
    """Of the adapters that wait, the one with the lowest count is next.

    The counts of a priority last as long as a request of it waits: once none does, nobody was denied
    anything, and all begin anew.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def join(self, priority: int, adapter: Digest | None, waiting: Iterable[Digest | None]) -> None:
        """The adapter begins to wait beside those that do: its count is lifted to the lowest of theirs,
        for it has no claim on what others got before it came.
        """
        level = self._levels.setdefault(priority, _Level())
        lowest = min((level.counts[other] for other in waiting), default=0)
        level.counts[adapter] = max(level.counts.get(adapter, 0), lowest)
        level.since[adapter] = level.turns

    def turn_of(self, priority: int, adapter: Digest | None) -> tuple[bool, int]:
        """The place in order of an adapter that waits."""
        level = self._levels[priority]
        is_early = level.turns - level.since[adapter] < MOST_TURNS
        return is_early, level.counts[adapter]

    def begin_request(self, priority: int, adapter: Digest | None, tokens: int) -> None:
        """A request of the adapter begins, with so many tokens to compute."""
        if level := self._levels.get(priority):
            level.turns += 1
            level.since[adapter] = level.turns
        self.charge_tokens(priority, adapter, tokens)

    def charge_tokens(self, priority: int, adapter: Digest | None, tokens: int) -> None:
        """The adapter was served; that counts where others of this priority wait."""
        if level := self._levels.get(priority):
            level.counts[adapter] = level.counts.get(adapter, 0) + tokens

    def end_waiting(self, priority: int) -> None:
        """No request of this priority waits any more."""
        self._levels.pop(priority, None)

    def forget_adapter(self, adapter: Digest) -> None:
        for level in self._levels.values():
            level.counts.pop(adapter, None)
            level.since.pop(adapter, None)
