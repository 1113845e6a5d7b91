"""Pool ranges never overlap, the fewest adapters leave for a newcomer, and what is pinned or kept
stays.
"""

from __future__ import annotations

import random

from service.engine.rank_allocator import RankAllocator


def filled(*ranks: int, rank: int = 16) -> RankAllocator:
    pool, start = RankAllocator(rank), 0
    for index, size in enumerate(ranks):
        pool.place_adapter("abcdefgh"[index], start, size)
        start += size
    return pool


def test_the_smallest_gap_that_fits_is_taken() -> None:
    pool = filled(4, 4, 2, 2)
    pool.remove_adapter("a")
    pool.remove_adapter("c")
    assert pool.find_gap(2) == 8
    assert pool.find_gap(3) == 0
    assert pool.find_gap(5) is None


def test_only_those_in_the_way_leave() -> None:
    """The oldest is counted out first, but stays where its rows turn out not to be needed."""
    pool = filled(2, 6, 4, 4)
    assert pool.find_room(6, keep=()) == (0, ["a", "b"])
    pool.lru.touch_key("b")
    assert pool.find_room(8, keep=()) == (8, ["c", "d"])


def test_nobody_leaves_for_what_cannot_fit() -> None:
    pool = filled(4, 4, 4, 4)
    assert pool.find_room(8, keep={"b", "d"}) is None
    pool.lru.pin_key("b")
    pool.lru.pin_key("c")
    assert pool.find_room(8, keep=()) is None
    assert not pool.can_fit(9)


def test_scattered_pinned_ones_may_move_where_there_are_rows_enough() -> None:
    pool = filled(4, 4, 4, 4)
    pool.lru.pin_key("b")
    assert pool.find_room(12, keep=()) is None
    assert pool.find_room(12, keep=(), move=True) == (0, ["a", "c", "b"])
    assert pool.find_room(12, keep={"b"}, move=True) is None
    assert pool.find_room(13, keep=(), move=True) is None
    assert pool.find_room(8, keep=(), move=True) == (8, ["c", "d"]), "nobody moves without need"


def test_ranges_never_overlap_in_a_random_walk() -> None:
    rng = random.Random(3)
    pool = RankAllocator(64)
    for step in range(3000):
        rank = rng.choice((1, 3, 8, 16, 32))
        keep = {p.digest for p in pool.layout if rng.random() < 0.3}
        room = pool.find_room(rank, keep)
        if room is None:
            assert pool.find_gap(rank, pool.lru.list_idle(keep)) is None
            continue
        start, leaving = room
        assert not keep & set(leaving)
        for digest in leaving:
            pool.remove_adapter(digest)
        pool.place_adapter(f"{step}", start, rank)
        held = [row for p in pool.layout for row in range(p.start, p.start + p.rank)]
        assert len(held) == len(set(held)) == pool.used
        assert min(held) >= 0
        assert max(held) < 64
