"""Thousands of random schedules in which adapters wait for each other: those of one priority get the same
work while they wait, and none waits for ever.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest

from service.core.adapter import Adapter
from service.engine.scheduler import Queue
from service.engine.token_counters import OUTPUT_WEIGHT
from tests.engine.driver import SchedulerDriver
from tests.fakes import adapter

STEPS = 300
WALKS = int(os.environ.get("WALKS", "40"))
PROMPT, ANSWER, ROWS = 20, 8, 3  # the most of each
# What may be served of an adapter before its next turn is found to be too early: a prompt that has begun,
# and the answers of all rows; of each of two adapters
MOST_APART = 2 * (PROMPT + OUTPUT_WEIGHT * ROWS * ANSWER)
# Requests of others that begin while one waits that is its adapter's only one
LONGEST_WAIT = 18


class FairnessWalk:
    """Random requests of several adapters, and the work that each has had since a pair began to wait."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.driver = SchedulerDriver(rows=self.rng.randrange(1, ROWS + 1), prefill_tokens=16, pool_rank=64)
        self.adapters: list[Adapter | None] = [None, *(adapter(f"a{i}", rank=4) for i in range(4))]
        for each in filter(None, self.adapters):
            self.driver.scheduler.add_adapter(each, preload=True)
        self.driver.settle()
        self.priorities = self.rng.choice(((0,), (0, 1), (-3, 0, 7)))
        self.paired: dict[tuple[Queue, Queue], int] = {}
        self.waited: Counter[int] = Counter()  # requests of its priority that began while one waited

    def submit(self, chosen: Adapter | None) -> None:
        prompt = [self.rng.randrange(900) for _ in range(self.rng.randrange(1, PROMPT + 1))]
        priority = self.rng.choice(self.priorities)
        self.driver.submit(prompt, self.rng.randrange(1, ANSWER + 1), chosen, priority=priority)

    def served(self, queue: Queue) -> int:
        stories = [s for s in self.driver.stories.values() if s.started]
        mine = [s for s in stories if (s.request.priority, s.request.adapter) == queue]
        return sum(len(s.request.prompt) - s.cached + OUTPUT_WEIGHT * len(s.tokens) for s in mine)

    def step(self) -> None:
        before = len(self.driver.order)
        self.driver.step()
        for id in self.driver.order[before:]:
            self.count_turn(self.driver.stories[id].request.priority)
        self.check_pairs()

    def count_turn(self, priority: int) -> None:
        for story in self.driver.stories.values():
            if not story.started and story.request.priority == priority:
                self.waited[story.request.id] += 1

    def check_pairs(self) -> None:
        waiting = sorted(self.driver.scheduler.waiting, key=repr)
        pairs = {(a, b) for a in waiting for b in waiting if a[0] == b[0] and repr(a) < repr(b)}
        ahead = {pair: self.served(pair[0]) - self.served(pair[1]) for pair in pairs}
        self.paired = {pair: self.paired.get(pair, ahead[pair]) for pair in pairs}
        for pair, apart in ahead.items():
            assert abs(apart - self.paired[pair]) <= MOST_APART, (
                f"{pair} are {apart - self.paired[pair]} apart"
            )


@pytest.mark.parametrize("seed", range(WALKS))
def test_adapters_that_wait_get_the_same_work(seed: int) -> None:
    walk = FairnessWalk(seed)
    for _ in range(STEPS):
        for _ in range(walk.rng.choice((0, 0, 1, 2))):
            walk.submit(walk.rng.choice(walk.adapters))
        walk.step()
    walk.driver.settle()
    walk.driver.check()
    walk.driver.check_free()


@pytest.mark.parametrize("seed", range(WALKS))
def test_a_flood_of_one_adapter_starves_no_other(seed: int) -> None:
    """Beside one that always has twenty waiting, others come now and then, one at a time."""
    walk = FairnessWalk(seed)
    walk.priorities = (0,)
    while len(walk.driver.order) < 200:
        while len(walk.driver.scheduler.waiting.get((0, None), ())) < 20:
            walk.driver.submit([walk.rng.randrange(900)], walk.rng.randrange(1, ANSWER + 1))
        waiting = {adapter for _, adapter in walk.driver.scheduler.waiting}
        chosen = walk.rng.choice(walk.adapters[1:])
        if chosen and chosen.digest not in waiting:
            walk.submit(chosen)
        walk.step()
    others = [story for story in walk.driver.stories.values() if story.request.adapter is not None]
    assert len(others) > 20
    assert max(walk.waited[story.request.id] for story in others) <= LONGEST_WAIT
