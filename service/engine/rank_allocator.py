"""Gives adapters contiguous rank rows of the device pool; runs in the worker process.

It chooses the adapters that leave when another needs room. Ranges of integers only; must not know
requests or tensors.
"""

from __future__ import annotations

from collections.abc import Collection

from ..core.adapter import Digest, Placement
from .lru import LRU


class RankAllocator:
    """Ranges [start, start + rank) that never overlap.

    `lru` holds their order of use and the pins; `layout` is sorted.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.lru: LRU[Digest] = LRU(rank)
        self.layout: tuple[Placement, ...] = ()
        self._placements: dict[Digest, Placement] = {}

    def __contains__(self, digest: object) -> bool:
        return digest in self._placements

    @property
    def used(self) -> int:
        return self.lru.used

    def place_adapter(self, digest: Digest, start: int, rank: int) -> Placement:
        self.lru.add_key(digest, rank)
        self._placements[digest] = Placement(digest, start, rank)
        self._sort_placements()
        return self._placements[digest]

    def remove_adapter(self, digest: Digest) -> None:
        self.lru.remove_key(digest)
        del self._placements[digest]
        self._sort_placements()

    def find_gap(self, rank: int, without: Collection[Digest] = ()) -> int | None:
        """The start of the smallest gap that takes `rank` rows, were the placements in `without`
        gone; None where there is none.
        """
        gaps, end = [], 0
        for placement in self.layout:
            if placement.digest not in without:
                gaps.append((placement.start - end, end))
                end = placement.start + placement.rank
        gaps.append((self.rank - end, end))
        fitting = [(size, start) for size, start in gaps if size >= rank]
        return min(fitting)[1] if fitting else None

    def find_room(
        self, rank: int, keep: Collection[Digest], move: bool = False
    ) -> tuple[int, list[Digest]] | None:
        """Where `rank` rows can go, and the adapters that must leave first: the least recently used,
        never those in `keep`.

        The pinned stay too; but where they lie scattered, `move` lets some of them leave, to be
        placed again beside the newcomer.
        """
        idle = self.lru.list_idle(keep)
        if move and self.can_fit(rank):
            pinned = [placement.digest for placement in self._pinned_placements()]
            idle += [digest for digest in pinned if digest not in keep]
        if self.find_gap(rank, idle) is None:
            return None
        victims: list[Digest] = []
        while (start := self.find_gap(rank, victims)) is None:
            victims.append(idle[len(victims)])
        return start, [digest for digest in victims if self._is_overlapping(digest, start, rank)]

    def can_fit(self, rank: int) -> bool:
        """Whether there are `rank` rows beside those of the pinned."""
        return rank + sum(placement.rank for placement in self._pinned_placements()) <= self.rank

    def _pinned_placements(self) -> list[Placement]:
        free = set(self.lru.list_idle())
        return [placement for placement in self.layout if placement.digest not in free]

    def _sort_placements(self) -> None:
        self.layout = tuple(sorted(self._placements.values(), key=lambda placement: placement.start))

    def _is_overlapping(self, digest: Digest, start: int, rank: int) -> bool:
        placement = self._placements[digest]
        return placement.start < start + rank and start < placement.start + placement.rank
