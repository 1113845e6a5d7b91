"""Thousands of random schedules: whatever clients, adapters and faults do, every request ends once
and with its own tokens. WALKS says how many; `make soak` takes 10,000.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from service.core.adapter import Adapter, ExecutionPath
from service.core.request import Finish
from service.engine.plan import Result
from tests.engine.driver import EMPTY, SchedulerDriver
from tests.fakes import adapter

STEPS = 250
WALKS = int(os.environ.get("WALKS", "60"))


def random_adapters(rng: random.Random) -> list[Adapter]:
    found = [
        adapter(f"a{i}", rank=rng.choice((1, 2, 4, 8, 16)), size=rng.randrange(500, 4000)) for i in range(8)
    ]
    found += [adapter(f"experts{i}", size=2000, experts=4) for i in range(2)]
    found += [adapter(f"shadow{i}", lane=ExecutionPath.SHADOW, size=1500) for i in range(2)]
    return [*found, adapter("unreadable", readable=False)]


def prompt(rng: random.Random) -> list[int]:
    """Prompts that often share a start, as chats do."""
    start = [rng.randrange(3)] * rng.choice((0, 18, 25))
    return [*start, *(rng.randrange(50) for _ in range(rng.randrange(1, 20)))]


def act(rng: random.Random, driver: SchedulerDriver, adapters: list[Adapter]) -> None:
    chosen = rng.choice(adapters)
    scheduler = driver.scheduler
    match rng.choices(("submit", "cancel", "offer", "pin", "unpin", "drop"), (8, 2, 3, 0.4, 0.6, 0.5))[0]:
        case "submit":
            eos = frozenset(range(0, 1000, 7)) if rng.random() < 0.3 else frozenset[int]()
            scored = 1 if rng.random() < 0.1 else None
            count = rng.choice((0, 1, 5, 12, 30))
            driver.submit(
                prompt(rng),
                count,
                rng.choice((None, chosen)),
                eos=eos,
                prompt_logprobs=scored,
                priority=rng.choice((-1, 0, 0, 0, 2)),
            )
        case "cancel" if driver.stories:
            scheduler.cancel_request(id := rng.randrange(len(driver.stories)))
            left = [
                *scheduler.running.values(),
                *(sequence for queue in scheduler.waiting.values() for sequence in queue),
            ]
            assert id not in {sequence.request.id for sequence in left}, "one that waits or runs ends at once"
        case "offer":
            scheduler.add_adapter(chosen, pinned=rng.random() < 0.05, preload=rng.random() < 0.5)
        case "pin":
            scheduler.pin_adapter(chosen.digest, True)
        case "unpin":
            scheduler.pin_adapter(chosen.digest, False)
        case "drop":
            scheduler.remove_adapter(chosen.digest)


@pytest.mark.parametrize("seed", range(WALKS))
def test_every_request_ends_once_with_its_own_tokens(seed: int) -> None:
    walk_randomly(seed, has_states=seed % 3 == 0)


@pytest.mark.parametrize("seed", range(WALKS))
def test_so_it_does_where_steps_are_launched_before_the_last_tokens_are_known(seed: int) -> None:
    walk_randomly(seed, has_states=False, ahead=0.9)


def test_the_walks_run_ahead() -> None:
    """Else they would prove nothing of it."""
    assert min(walk_randomly(seed, has_states=False, ahead=0.9).ahead for seed in range(4)) > 10
    assert walk_randomly(0, has_states=True, ahead=0.9).ahead == 0


@pytest.mark.parametrize("has_states", [False, True])
def test_the_walks_preempt(has_states: bool) -> None:
    """Else they would prove nothing of it."""
    assert sum(walk_randomly(seed, has_states).scheduler.gauges.preemptions for seed in range(4)) > 0


def spoil(rng: random.Random, result: Result) -> Result:
    """Now and then a token is drawn anew, or cannot be."""
    match rng.choices(("fine", "redrawn", "failed"), (90, 7, 3))[0]:
        case "redrawn":
            return replace(result, redrawn=True)
        case "failed":
            return Result(error="not finite")
    return result


def walk_randomly(seed: int, has_states: bool, ahead: float = 0.0) -> SchedulerDriver:
    """`ahead`: how often a step is launched before the one before it is read."""
    rng = random.Random(seed)
    driver = SchedulerDriver(
        has_states=has_states,
        rows=rng.randrange(1, 6),
        pool_rank=16,
        prefill_tokens=rng.choice((3, 16, 100)),
        host_bytes=rng.choice((1000, 8000)),
        kv_blocks=rng.choice((4, 5, 7, 12)),
    )
    if ahead:
        driver.runner.outcome_of = lambda result: spoil(rng, result)
    adapters = random_adapters(rng)
    for _ in range(STEPS):
        for _ in range(rng.randrange(4) if not ahead or rng.random() < 0.4 else 0):
            act(rng, driver, adapters)
        driver.reading = rng.random() < 0.7
        faults = {"fault": rng.random() < 0.02, "half_placed": rng.random() < 0.05}
        driver.step(**faults, ahead=rng.random() < ahead)
        driver.tell_tiers()
    driver.reading = True
    driver.settle()
    driver.check()
    for chosen in adapters:
        driver.scheduler.pin_adapter(chosen.digest, False)
    driver.settle()
    driver.check_free()
    assert any(story.end and story.end.finish is Finish.LENGTH for story in driver.stories.values())
    return driver


@pytest.mark.parametrize("seed", range(8))
def test_everything_is_free_once_all_adapters_are_dropped(seed: int) -> None:
    rng = random.Random(seed)
    driver = SchedulerDriver()
    adapters = random_adapters(rng)[:-1]
    for chosen in adapters:
        driver.scheduler.add_adapter(chosen, pinned=chosen.rank == 2, preload=True)
    for _ in range(40):
        driver.submit(prompt(rng), 6, rng.choice(adapters))
        driver.step()
    for chosen in adapters:
        driver.scheduler.remove_adapter(chosen.digest)
    driver.settle()
    driver.check()
    assert sorted(driver.dropped) == sorted(chosen.digest for chosen in adapters)
    assert driver.runner.host == {}
    assert set(driver.runner.pool) == {None}
    assert driver.step() == EMPTY
