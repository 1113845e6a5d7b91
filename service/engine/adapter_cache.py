"""Decides which adapters are in host memory and in the device pool; runs in the worker process.

It chooses the adapter that is read, placed or forgotten next. Integers and digests only. Must not know
sequences, tensors or threads: the scheduler passes in which adapters its sequences need.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from ..core.adapter import Adapter, Digest, ExecutionPath, Placement, Tier, share_specs
from .lru import LRU
from .plan import Plan
from .rank_allocator import RankAllocator


class AdapterState(Enum):
    """What is to be done with an adapter that is known."""

    KNOWN = "known"  # nothing, unless a request or a pin asks for it
    PRELOADING = "preloading"  # to be read into host memory
    PRELOADED = "preloaded"  # just read, to be placed if there is room
    FAILED = "failed"  # it could not be read or placed: tried again for a request, or when it is added again
    REMOVING = "removing"  # to be forgotten once no sequence needs it


@dataclass(slots=True)
class CachedAdapter:
    """The record of an adapter. `refusal`: why the base cannot run it, until it is added again."""

    adapter: Adapter
    state: AdapterState = AdapterState.KNOWN
    refusal: str = ""


class AdapterCache:
    """Both tiers: `host` memory and the device `pool`, and the adapter that is being read.

    Changes of the pool are collected until `take_changes` moves them into a plan.
    """

    def __init__(self, pool_rank: int, host_bytes: int) -> None:
        self.pool = RankAllocator(pool_rank)
        self.host: LRU[Digest] = LRU(host_bytes)
        self.loading: Digest | None = None
        self.known: dict[Digest, CachedAdapter] = {}
        self._in_state: dict[AdapterState, dict[Digest, None]] = {state: {} for state in AdapterState}
        self._pinned: dict[Digest, None] = {}
        self._removed: list[tuple[Digest, bool]] = []
        self._placed: list[Placement] = []
        self._unplaced: list[Digest] = []
        self._moved: set[Digest] = set()
        self._forgotten: set[Digest] = set()  # in host memory, since `follow_host` looked

    # ---- what happened

    def add_adapter(self, adapter: Adapter, pinned: bool, preload: bool) -> None:
        """Requests may name this content from now on.

        A pin that it already has stays; a removal that is not done yet is called off.
        """
        digest = adapter.digest
        before = self._state_of(digest)
        if before is AdapterState.REMOVING:
            self._removed.append((digest, False))
        self.known[digest] = CachedAdapter(replace(adapter, patches=share_specs(adapter.patches)))
        is_on_its_way = before in (AdapterState.PRELOADING, AdapterState.PRELOADED)
        self._set_state(digest, before if before and is_on_its_way else self._state_to_begin(digest, preload))
        self._moved.add(digest)  # so that its tier is reported again
        if pinned:
            self.pin_adapter(digest, True)

    def _state_to_begin(self, digest: Digest, preload: bool) -> AdapterState:
        if preload and not self.at_hand(digest):
            return AdapterState.PRELOADING
        return AdapterState.PRELOADED if preload and self._can_be_placed(digest) else AdapterState.KNOWN

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
        if digest in self.known:
            self._set_state(digest, AdapterState.REMOVING)
        else:
            self._removed.append((digest, False))

    def mark_hosted(self, digest: Digest, size: int) -> None:
        self.loading = None
        self.host.add_key(digest, size)
        self._moved.add(digest)
        self._change_state(digest, AdapterState.PRELOADING, AdapterState.PRELOADED)
        self._change_state(digest, AdapterState.FAILED, AdapterState.KNOWN)

    def load_failed(self, digest: Digest) -> None:
        self.loading = None
        self._mark_failed(digest)

    def refuse(self, digest: Digest, reason: str) -> None:
        if digest in self.known:
            self.known[digest].refusal = reason

    def touch_adapter(self, digest: Digest | None) -> None:
        if digest is not None:
            self.host.touch_key(digest)
            self.pool.lru.touch_key(digest)

    # ---- what is where

    def is_known(self, digest: Digest | None) -> bool:
        return digest is None or self._state_of(digest) not in (None, AdapterState.REMOVING)

    def refusal(self, digest: Digest | None) -> str:
        """Why the base cannot run this adapter; empty when it can."""
        record = self.known.get(digest or "")
        return record.refusal if record else ""

    def at_hand(self, digest: Digest | None) -> bool:
        """Whether a request for this adapter could start without reading it."""
        return digest is None or digest in self.host or digest in self.pool

    def is_hosted(self, digest: Digest) -> bool:
        """Whether it is in host memory, or on its way there."""
        return digest in self.host or digest == self.loading

    def needs_placement(self, digest: Digest | None) -> bool:
        """Whether this adapter must be placed in the pool before its sequences can run."""
        return digest is not None and digest not in self.pool and self.is_batched(digest)

    def is_batched(self, digest: Digest | None) -> bool:
        """Whether sequences of this adapter, which is known, run in the mixed batch."""
        return digest is None or self.known[digest].adapter.lane is ExecutionPath.POOL

    def invocation_of(self, digest: Digest | None) -> tuple[int, ...]:
        """The tokens from which on this adapter acts; empty where it acts on all."""
        record = self.known.get(digest or "")
        return record.adapter.invocation if record else ()

    @property
    def awaits_room(self) -> bool:
        """Whether the end of a sequence may let an adapter be placed or forgotten."""
        is_unplaced = any(map(self._can_be_placed, self._pinned))
        return is_unplaced or bool(self._in_state[AdapterState.REMOVING])

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
        adapter = self.known[wanted].adapter
        return adapter, self._evict_from_host(adapter.size, in_flight.union(ahead))

    def place_adapter(self, digest: Digest, in_flight: Collection[Digest], move: bool = False) -> bool:
        """Places the adapter, idle ones leaving for it if they must, and pinned ones if they may
        `move`; whether it could.
        """
        rank = self.known[digest].adapter.pool_rows
        # One plan cannot both place and remove an adapter
        keep = {*in_flight, *(placement.digest for placement in self._placed)}
        room = self.pool.find_room(rank, keep, move)
        if room is None:
            return False
        start, victims = room
        for victim in victims:
            self._unplace_adapter(victim)
        self._placed.append(self.pool.place_adapter(digest, start, rank))
        self._change_state(digest, AdapterState.FAILED, AdapterState.KNOWN)
        self._moved.add(digest)
        return True

    def place_pinned(self, in_flight: Collection[Digest]) -> None:
        for digest in self._pinned:
            if self._state_of(digest) is not AdapterState.FAILED and self._can_be_placed(digest):
                self.place_adapter(digest, in_flight)

    def place_preloaded(self) -> None:
        """Places the adapters just preloaded where nothing has to leave for them; each has one chance."""
        for digest in list(self._in_state[AdapterState.PRELOADED]):
            rank = self.known[digest].adapter.pool_rows
            if self._can_be_placed(digest) and self.pool.find_gap(rank) is not None:
                self.place_adapter(digest, ())
            self._set_state(digest, AdapterState.KNOWN)

    def forget_removed(self, needed: Collection[Digest]) -> None:
        """Forgets the adapters to be removed that no sequence needs any more."""
        removing = self._in_state[AdapterState.REMOVING]
        for digest in [digest for digest in removing if digest not in needed and digest != self.loading]:
            del self.known[digest], removing[digest]
            if digest in self.pool:
                self._unplace_adapter(digest)
            hosted = digest in self.host
            if hosted:
                self.host.remove_key(digest)
            self._removed.append((digest, hosted))

    def follow_host(self, in_flight: Collection[Digest]) -> None:
        """Adapters on experts leave the pool with host memory: it would go on to hold what is to be freed."""
        for digest in self._forgotten - set(in_flight):
            if digest in self.pool and digest not in self.host and self.known[digest].adapter.is_on_experts:
                self._unplace_adapter(digest)
        self._forgotten.intersection_update(in_flight)

    def undo_plan(self, plan: Plan) -> None:
        """Nobody knows how much of the plan was done: its placements count as failed, and the next plan
        removes all of them again.
        """
        for placement in plan.place:
            self.pool.remove_adapter(placement.digest)
            self._moved.add(placement.digest)
            self._mark_failed(placement.digest)
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
        pinned = (digest for digest in self._pinned if self._state_of(digest) is not AdapterState.FAILED)
        standing = (*pinned, *self._in_state[AdapterState.PRELOADING])
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
        self._forgotten.update(victims)
        return victims

    def _can_be_placed(self, digest: Digest) -> bool:
        return digest in self.host and self.needs_placement(digest)

    def _unplace_adapter(self, digest: Digest) -> None:
        self.pool.remove_adapter(digest)
        self._unplaced.append(digest)
        self._moved.add(digest)

    def _state_of(self, digest: Digest) -> AdapterState | None:
        """None where the adapter is not known."""
        record = self.known.get(digest)
        return record.state if record else None

    def _set_state(self, digest: Digest, state: AdapterState) -> None:
        record = self.known[digest]
        for digests in self._in_state.values():
            digests.pop(digest, None)
        record.state = state
        self._in_state[state][digest] = None

    def _change_state(self, digest: Digest, before: AdapterState, after: AdapterState) -> None:
        """Does nothing in another state than `before`."""
        if self._state_of(digest) is before:
            self._set_state(digest, after)

    def _mark_failed(self, digest: Digest) -> None:
        """A removal goes on all the same."""
        if self.is_known(digest):
            self._set_state(digest, AdapterState.FAILED)
