"""Decides which adapters are in host memory and in the device pool; runs in the worker process.

It chooses the adapter that is read, placed or forgotten next. Integers and digests only. Must not know
sequences, tensors or threads: the scheduler passes in which adapters its sequences need.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ..core.adapter import Adapter, Digest, ExecutionPath, Placement, Tier, share_specs
from .lru import LRU
from .plan import Plan
from .rank_allocator import RankAllocator


class AdapterCache:
    """Both tiers. Changes of the pool are collected until `take_changes` moves them into a plan.

    `_failed` adapters could not be read or placed: they are tried again only for a request or when they
    are added again. `_refused` adapters, which the base cannot run, only when they are added again.
    """

    def __init__(self, pool_rank: int, host_bytes: int) -> None:
        self.pool = RankAllocator(pool_rank)
        self.host: LRU[Digest] = LRU(host_bytes)
        self.known: dict[Digest, Adapter] = {}
        self.loading: Digest | None = None
        self._pinned: dict[Digest, None] = {}
        self._preload: dict[Digest, None] = {}  # to be read into host memory
        self._preloaded: dict[Digest, None] = {}  # just read, to be placed if there is room
        self._failed: set[Digest] = set()
        self._refused: dict[Digest, str] = {}
        self._removing: set[Digest] = set()
        self._removed: list[tuple[Digest, bool]] = []
        self._placed: list[Placement] = []
        self._unplaced: list[Digest] = []
        self._moved: set[Digest] = set()

    # ---- what happened

    def add_adapter(self, adapter: Adapter, pinned: bool, preload: bool) -> None:
        """Requests may name this content from now on.

        A pin that it already has stays; a removal that is not done yet is called off.
        """
        digest = adapter.digest
        self._call_off_removal(digest)
        self.known[digest] = replace(adapter, patches=share_specs(adapter.patches))
        self._failed.discard(digest)
        self._refused.pop(digest, None)
        self._moved.add(digest)  # so that its tier is reported again
        if preload and not self.at_hand(digest):
            self._preload[digest] = None
        if pinned:
            self.pin_adapter(digest, True)

    def _call_off_removal(self, digest: Digest) -> None:
        if digest in self._removing:
            self._removing.discard(digest)
            self._removed.append((digest, False))

    def pin_adapter(self, digest: Digest, pinned: bool) -> None:
        if not pinned:
            self._pinned.pop(digest, None)
            self.host.unpin_key(digest)
            self.pool.lru.unpin_key(digest)
        elif self.is_known(digest):
            self._pinned[digest] = None
            self.host.pin_key(digest)
            self.pool.lru.pin_key(digest)

    def remove_adapter(self, digest: Digest) -> None:
        self.pin_adapter(digest, False)
        self._preload.pop(digest, None)
        self._preloaded.pop(digest, None)
        if digest in self.known:
            self._removing.add(digest)
        else:
            self._removed.append((digest, False))

    def mark_hosted(self, digest: Digest, size: int) -> None:
        self.loading = None
        self.host.add_key(digest, size)
        self._failed.discard(digest)
        self._moved.add(digest)
        if digest in self._preload:
            del self._preload[digest]
            self._preloaded[digest] = None

    def load_failed(self, digest: Digest) -> None:
        self.loading = None
        self._failed.add(digest)
        self._preload.pop(digest, None)

    def refuse(self, digest: Digest, reason: str) -> None:
        if digest in self.known:
            self._refused[digest] = reason

    def touch_adapter(self, digest: Digest | None) -> None:
        if digest is not None:
            self.host.touch_key(digest)
            self.pool.lru.touch_key(digest)

    # ---- what is where

    def is_known(self, digest: Digest | None) -> bool:
        return digest is None or (digest in self.known and digest not in self._removing)

    def refusal(self, digest: Digest | None) -> str:
        """Why the base cannot run this adapter; empty when it can."""
        return self._refused.get(digest, "") if digest else ""

    def at_hand(self, digest: Digest | None) -> bool:
        """Whether a request for this adapter could start without reading it."""
        return digest is None or digest in self.host or digest in self.pool

    def is_hosted(self, digest: Digest) -> bool:
        """Whether it is in host memory, or on its way there."""
        return digest in self.host or digest == self.loading

    def needs_placement(self, digest: Digest | None) -> bool:
        """Whether this adapter must be placed in the pool before its sequences can run."""
        if digest is None or digest in self.pool:
            return False
        return self.known[digest].lane is ExecutionPath.POOL

    def invocation_of(self, digest: Digest | None) -> tuple[int, ...]:
        """The tokens from which on this adapter acts; empty where it acts on all."""
        return self.known[digest].invocation if digest in self.known else ()

    def tier_of(self, digest: Digest) -> Tier:
        if digest in self.pool:
            return Tier.DEVICE
        return Tier.HOST if digest in self.host else Tier.DISK

    # ---- what to do

    def next_load(
        self, ahead: Sequence[Digest], in_flight: set[Digest]
    ) -> tuple[Adapter, list[Digest]] | None:
        """The adapter to read now, and those to forget in host memory first.

        `ahead` are the adapters of the requests that come next.
        """
        wanted = self._next_wanted(ahead) if self.loading is None else None
        if wanted is None:
            return None
        self.loading = wanted
        adapter = self.known[wanted]
        return adapter, self._evict_from_host(adapter.size, in_flight.union(ahead))

    def place_adapter(self, digest: Digest, in_flight: Collection[Digest], move: bool = False) -> bool:
        """Places the adapter, idle ones leaving for it if they must, and pinned ones if they may
        `move`; whether it could.
        """
        rank = self.known[digest].rank
        # One plan cannot both place and remove an adapter
        keep = {*in_flight, *(placement.digest for placement in self._placed)}
        room = self.pool.find_room(rank, keep, move)
        if room is None:
            return False
        start, victims = room
        for victim in victims:
            self._unplace_adapter(victim)
        self._placed.append(self.pool.place_adapter(digest, start, rank))
        self._failed.discard(digest)
        self._moved.add(digest)
        return True

    def place_pinned(self, in_flight: Collection[Digest]) -> None:
        for digest in self._pinned:
            if digest not in self._failed and self._can_be_placed(digest):
                self.place_adapter(digest, in_flight)

    def place_preloaded(self) -> None:
        """Places the adapters just preloaded where nothing has to leave for them; each has one chance."""
        for digest in self._preloaded:
            if self._can_be_placed(digest) and self.pool.find_gap(self.known[digest].rank) is not None:
                self.place_adapter(digest, ())
        self._preloaded = {}

    def forget_removed(self, needed: Collection[Digest]) -> None:
        """Forgets the adapters to be removed that no sequence needs any more."""
        for digest in self._removing.difference(needed, {self.loading}):
            self._removing.discard(digest)
            self._failed.discard(digest)
            self._refused.pop(digest, None)
            del self.known[digest]
            if digest in self.pool:
                self._unplace_adapter(digest)
            hosted = digest in self.host
            if hosted:
                self.host.remove_key(digest)
            self._removed.append((digest, hosted))

    def undo_plan(self, plan: Plan) -> None:
        """Nobody knows how much of the plan was done: its placements count as failed, and the next plan
        removes all of them again.
        """
        for placement in plan.place:
            self.pool.remove_adapter(placement.digest)
            self._moved.add(placement.digest)
            self._failed.add(placement.digest)
        self._unplaced += [*plan.remove, *(placement.digest for placement in plan.place)]

    # ---- what is handed out

    def take_changes(self) -> tuple[tuple[Digest, ...], tuple[Placement, ...]]:
        """The digests that the next step removes from the pool, and its placements.

        After a step that raised, a removed digest may not be there.
        """
        unplaced, placed = tuple(dict.fromkeys(self._unplaced)), tuple(self._placed)
        self._unplaced, self._placed = [], []
        return unplaced, placed

    def take_moves(self) -> tuple[tuple[Digest, Tier], ...]:
        moved, self._moved = self._moved, set()
        return tuple((digest, self.tier_of(digest)) for digest in moved if digest in self.known)

    def take_removed(self) -> list[tuple[Digest, bool]]:
        """The removed contents that nothing needs any more, and whether each is still to be
        forgotten in host memory.
        """
        removed, self._removed = self._removed, []
        return removed

    def _next_wanted(self, ahead: Sequence[Digest]) -> Digest | None:
        """The first adapter that should be in host memory and is not: for requests, then the pinned
        ones, then those added with `preload`.
        """
        standing = [digest for digest in (*self._pinned, *self._preload) if digest not in self._failed]
        return next((digest for digest in (*ahead, *standing) if not self.at_hand(digest)), None)

    def _evict_from_host(self, need: int, keep: Collection[Digest]) -> list[Digest]:
        """Makes room for `need` bytes in host memory; the adapters to forget there.

        Those in `keep` stay, so host memory can be exceeded, but by them alone.
        """
        victims = self.host.choose_victims(need, keep)
        if victims is None:
            victims = self.host.list_idle(keep)
        for victim in victims:
            self.host.remove_key(victim)
        self._moved.update(victims)
        return victims

    def _can_be_placed(self, digest: Digest) -> bool:
        return digest in self.host and self.needs_placement(digest)

    def _unplace_adapter(self, digest: Digest) -> None:
        self.pool.remove_adapter(digest)
        self._unplaced.append(digest)
        self._moved.add(digest)
