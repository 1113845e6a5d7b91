"""The LRU keeps its order, its costs and its pins, whatever happens."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from service.engine.lru import LRU


def test_the_least_recently_used_goes_first() -> None:
    lru: LRU[str] = LRU(10)
    for key in "abc":
        lru.add_key(key, 3)
    lru.touch_key("a")
    assert list(lru) == ["b", "c", "a"]
    assert lru.choose_victims(4) == ["b"]
    assert lru.choose_victims(7) == ["b", "c"]


def test_nothing_goes_while_there_is_room() -> None:
    lru: LRU[str] = LRU(10)
    lru.add_key("a", 5)
    assert lru.choose_victims(5) == []


def test_what_is_pinned_or_kept_never_goes() -> None:
    lru: LRU[str] = LRU(6)
    lru.pin_key("b")
    for key in "abc":
        lru.add_key(key, 2)
    assert lru.list_idle({"a"}) == ["c"]
    assert lru.choose_victims(2, keep={"a"}) == ["c"]
    assert lru.choose_victims(4, keep={"a"}) is None
    lru.unpin_key("b")
    assert lru.choose_victims(4, keep={"a"}) == ["b", "c"]


def test_more_than_everything_cannot_be_made_room_for() -> None:
    lru: LRU[str] = LRU(6)
    lru.add_key("a", 6)
    assert lru.choose_victims(6) == ["a"]
    assert lru.choose_victims(7) is None


@dataclass
class ListedLRU:
    """What an LRU of capacity 50 must do, by a list of its keys, the least recently used first."""

    order: list[int] = field(default_factory=list)
    costs: dict[int, int] = field(default_factory=dict)
    pins: set[int] = field(default_factory=set)

    def choose_victims(self, need: int, keep: set[int]) -> list[int] | None:
        idle = [key for key in self.order if key not in self.pins | keep]
        used = sum(self.costs.values())
        for count in range(len(idle) + 1):
            if used - sum(self.costs[key] for key in idle[:count]) + need <= 50:
                return idle[:count]
        return None


def walk_once(rng: random.Random, lru: LRU[int], listed: ListedLRU, key: int) -> None:
    """Does one thing, drawn by lot, to both."""
    match rng.choice(("add", "touch", "remove", "pin", "unpin", "victims")):
        case "add" if key not in listed.costs:
            listed.costs[key] = rng.randrange(1, 12)
            listed.order.append(key)
            lru.add_key(key, listed.costs[key])
        case "touch":
            lru.touch_key(key)
            if key in listed.costs:
                listed.order.remove(key)
                listed.order.append(key)
        case "remove" if key in listed.costs:
            listed.order.remove(key)
            assert lru.remove_key(key) == listed.costs.pop(key)
        case "pin":
            listed.pins.add(key)
            lru.pin_key(key)
        case "unpin":
            listed.pins.discard(key)
            lru.unpin_key(key)
        case "victims":
            need, keep = rng.randrange(30), set(rng.sample(range(20), 3))
            assert lru.choose_victims(need, keep) == listed.choose_victims(need, keep)


def test_a_random_walk_agrees_with_a_list() -> None:
    rng = random.Random(7)
    lru: LRU[int] = LRU(50)
    listed = ListedLRU()
    for _ in range(5000):
        key = rng.randrange(20)
        walk_once(rng, lru, listed, key)
        assert list(lru) == listed.order
        assert (key in lru) is (key in listed.costs)
        assert lru.used == sum(listed.costs.values())
        assert len(lru) == len(listed.costs)
