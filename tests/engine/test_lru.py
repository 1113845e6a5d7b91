"""The LRU keeps its order, its costs and its pins, whatever happens."""

from __future__ import annotations

import random

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


def test_a_random_walk_agrees_with_a_list() -> None:
    rng = random.Random(7)
    lru: LRU[int] = LRU(50)
    order: list[int] = []
    costs: dict[int, int] = {}
    pins: set[int] = set()
    for _ in range(5000):
        key = rng.randrange(20)
        match rng.choice(("add", "touch", "remove", "pin", "unpin", "victims")):
            case "add" if key not in costs:
                costs[key] = rng.randrange(1, 12)
                order.append(key)
                lru.add_key(key, costs[key])
            case "touch":
                lru.touch_key(key)
                if key in costs:
                    order.append(order.pop(order.index(key)))
            case "remove" if key in costs:
                order.remove(key)
                assert lru.remove_key(key) == costs.pop(key)
            case "pin":
                pins.add(key)
                lru.pin_key(key)
            case "unpin":
                pins.discard(key)
                lru.unpin_key(key)
            case "victims":
                need, keep = rng.randrange(30), set(rng.sample(range(20), 3))
                victims = lru.choose_victims(need, keep)
                idle = [k for k in order if k not in pins | keep]
                fits = [
                    n
                    for n in range(len(idle) + 1)
                    if sum(costs.values()) - sum(costs[k] for k in idle[:n]) + need <= 50
                ]
                assert victims == (idle[: fits[0]] if fits else None)
        assert list(lru) == order
        assert (key in lru) is (key in costs)
        assert lru.used == sum(costs.values())
        assert len(lru) == len(costs)
