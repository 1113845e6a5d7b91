"""Chooses keys to evict: least recently used first, by cost, and never a pinned or needed one.

Runs in the worker process, for both adapter tiers (host bytes, pool rank rows). Must not know what a
key or a cost stands for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class LRU(Generic[K]):
    """Keys with costs, least recently used first.

    A pin outlives its key: it may be set before the key comes and stays when it goes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self._costs: OrderedDict[K, int] = OrderedDict()
        self._pins: set[K] = set()

    def __contains__(self, key: object) -> bool:
        return key in self._costs

    def __iter__(self) -> Iterator[K]:
        return iter(self._costs)

    def __len__(self) -> int:
        return len(self._costs)

    def add_key(self, key: K, cost: int) -> None:
        """Adds the key as the most recently used.

        Making room first is the caller's business; more than `capacity` may be in.
        """
        assert key not in self._costs, f"{key!r} is in already"
        self._costs[key] = cost
        self.used += cost

    def remove_key(self, key: K) -> int:
        """Removes the key, pinned or not; its cost."""
        cost = self._costs.pop(key)
        self.used -= cost
        return cost

    def touch_key(self, key: K) -> None:
        """Makes the key the most recently used, if it is in."""
        if key in self._costs:
            self._costs.move_to_end(key)

    def pin_key(self, key: K) -> None:
        self._pins.add(key)

    def unpin_key(self, key: K) -> None:
        self._pins.discard(key)

    def list_idle(self, keep: Collection[K] = ()) -> list[K]:
        """The keys that may go: neither pinned nor in `keep`, least recently used first."""
        return [key for key in self._costs if key not in self._pins and key not in keep]

    def choose_victims(self, need: int, keep: Collection[K] = ()) -> list[K] | None:
        """The fewest least recently used keys to remove so that `need` more fits;

        None where all that may go is not enough.
        """
        excess = self.used + need - self.capacity
        victims: list[K] = []
        for key in self.list_idle(keep) if excess > 0 else ():
            victims.append(key)
            excess -= self._costs[key]
            if excess <= 0:
                break
        return victims if excess <= 0 else None
