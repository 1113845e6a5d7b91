"""Which adapters are known, in host memory, and resident in the pool; who is read, placed and
forgotten next.

Integers and digests only; must not know sequences, tensors or threads: who needs what is told to
it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ..core.adapter import Adapter, Digest, ExecutionPath, Placement, Tier, share_specs
from .lru import LRU
from .plan import Plan
from .rank_allocator import RankAllocator


class AdapterCache:
    """Both tiers. What it changes in the pool is collected until `changes` takes it into a plan."""

    def __init__(self, pool_rank: int, host_bytes: int) -> None:
        self.pool = RankAllocator(pool_rank)
        self.host: LRU[Digest] = LRU(host_bytes)
        self.known: dict[Digest, Adapter] = {}
        self.loading: Digest | None = None
        self._pinned: dict[Digest, None] = {}
        self._preload: dict[Digest, None] = {}  # to be read into host memory
        self._fresh: dict[Digest, None] = {}  # just read, to be placed if there is room
        # Could not be read or placed: tried again only for a request or a new offer
        self._failed: set[Digest] = set()
        # The base cannot run them: not tried again before a new offer
        self._refused: dict[Digest, str] = {}
        self._dropping: set[Digest] = set()
        self._gone: list[tuple[Digest, bool]] = []
        self._removed: list[Digest] = []
        self._placed: list[Placement] = []
        self._moved: set[Digest] = set()

    # ---- what happened

    def add_adapter(self, adapter: Adapter, pinned: bool, preload: bool) -> None:
        """The content may be asked for from now on.

        A pin it already has stays; a drop that is not done yet is called off.
        """
        digest = adapter.digest
        if digest in self._dropping:
            self._dropping.discard(digest)
            self._gone.append((digest, False))
        self.known[digest] = replace(adapter, patches=share_specs(adapter.patches))
        self._failed.discard(digest)
        self._refused.pop(digest, None)
        self._moved.add(digest)  # so that its tier is told again, after a drop or not
        if preload and not self.at_hand(digest):
            self._preload[digest] = None
        if pinned:
            self.pin_adapter(digest, True)

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
        self._fresh.pop(digest, None)
        if digest in self.known:
            self._dropping.add(digest)
        else:
            self._gone.append((digest, False))

    def mark_hosted(self, digest: Digest, size: int) -> None:
        self.loading = None
        self.host.add_key(digest, size)
        self._failed.discard(digest)
        self._moved.add(digest)
        if digest in self._preload:
            del self._preload[digest]
            self._fresh[digest] = None

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
        return digest is None or (digest in self.known and digest not in self._dropping)

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
        return (
            digest is not None and digest not in self.pool and self.known[digest].lane is ExecutionPath.POOL
        )

    def invocation_of(self, digest: Digest | None) -> tuple[int, ...]:
        """The tokens that wake this adapter; empty where it acts on all."""
        return self.known[digest].invocation if digest in self.known else ()

    def tier_of(self, digest: Digest) -> Tier:
        return Tier.DEVICE if digest in self.pool else Tier.HOST if digest in self.host else Tier.DISK

    # ---- what to do

    def next_load(
        self, ahead: Sequence[Digest], in_flight: set[Digest]
    ) -> tuple[Adapter, list[Digest]] | None:
        """The adapter to read now, and those to forget in host memory first.

        `ahead` are the adapters of the requests that come next.

        Those ahead and in flight are kept, so host memory can be exceeded, but by them alone.
        """
        wanted = self._next_wanted(ahead) if self.loading is None else None
        if wanted is None:
            return None
        self.loading, adapter = wanted, self.known[wanted]
        keep = in_flight.union(ahead)
        victims = self.host.choose_victims(adapter.size, keep)
        if victims is None:
            victims = self.host.list_idle(keep)
        for victim in victims:
            self.host.remove_key(victim)
        self._moved.update(victims)
        return adapter, victims

    def place_adapter(self, digest: Digest, in_flight: Collection[Digest], move: bool = False) -> bool:
        """Places the adapter, idle ones leaving for it if they must, and pinned ones if they may
        `move`; whether it could.
        """
        rank = self.known[digest].rank
        # One plan cannot both place and remove it
        just_placed = [placement.digest for placement in self._placed]
        room = self.pool.find_room(rank, {*in_flight, *just_placed}, move)
        if room is None:
            return False
        start, victims = room
        for victim in victims:
            self._unplace_adapter(victim)
        self._placed.append(self.pool.place_adapter(digest, start, rank))
        self._failed.discard(digest)
        self._moved.add(digest)
        return True

    def seat_pinned(self, in_flight: Collection[Digest]) -> None:
        for digest in self._pinned:
            if self.needs_placement(digest) and digest in self.host and digest not in self._failed:
                self.place_adapter(digest, in_flight)

    def seat_fresh(self) -> None:
        """Places what was just preloaded where nothing has to leave for it; each has one chance."""
        for digest in self._fresh:
            if (
                self.needs_placement(digest)
                and digest in self.host
                and self.pool.find_gap(self.known[digest].rank) is not None
            ):
                self.place_adapter(digest, ())
        self._fresh = {}

    def forget_removed(self, needed: Collection[Digest]) -> None:
        """Lets go of the dropped adapters that nobody needs any more."""
        for digest in self._dropping.difference(needed, {self.loading}):
            self._dropping.discard(digest)
            self._failed.discard(digest)
            self._refused.pop(digest, None)
            del self.known[digest]
            if digest in self.pool:
                self._unplace_adapter(digest)
            hosted = digest in self.host
            if hosted:
                self.host.remove_key(digest)
            self._gone.append((digest, hosted))

    def undo_plan(self, plan: Plan) -> None:
        """Nobody knows how much of this was done, so what it placed counts as failed, and all of it
        is removed again.
        """
        for placement in plan.place:
            self.pool.remove_adapter(placement.digest)
            self._moved.add(placement.digest)
            self._failed.add(placement.digest)
        self._removed += [*plan.remove, *(placement.digest for placement in plan.place)]

    # ---- what is handed out

    def take_changes(self) -> tuple[tuple[Digest, ...], tuple[Placement, ...]]:
        """What the next step removes and places.

        After a step that raised, what is removed may not be there.
        """
        removed, placed = tuple(dict.fromkeys(self._removed)), tuple(self._placed)
        self._removed, self._placed = [], []
        return removed, placed

    def take_moves(self) -> tuple[tuple[Digest, Tier], ...]:
        moved, self._moved = self._moved, set()
        return tuple((digest, self.tier_of(digest)) for digest in moved if digest in self.known)

    def take_removed(self) -> list[tuple[Digest, bool]]:
        """The dropped contents that nothing needs any more, and whether each is still to be
        forgotten in host memory.
        """
        gone, self._gone = self._gone, []
        return gone

    def _next_wanted(self, ahead: Sequence[Digest]) -> Digest | None:
        """What should be in host memory and is not: for requests, then the pinned, then what was
        offered with `preload`.
        """
        asked = [digest for digest in (*self._pinned, *self._preload) if digest not in self._failed]
        return next((digest for digest in (*ahead, *asked) if not self.at_hand(digest)), None)

    def _unplace_adapter(self, digest: Digest) -> None:
        self.pool.remove_adapter(digest)
        self._removed.append(digest)
        self._moved.add(digest)
