"""Steps that are planned before the tokens of the step before them are known: when they may be, what is
in them, and that what ends meanwhile gives up its blocks late and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest

from service.core.adapter import Adapter, ExecutionPath
from service.core.error_codes import ErrorCode
from service.core.request import Finish
from service.core.sampling import Sampling
from service.engine.plan import UNKNOWN, Plan, Result
from tests.engine.driver import SchedulerDriver
from tests.fakes import adapter, expected


def running(*adapters: Adapter | None, count: int = 12, **options: Any) -> SchedulerDriver:
    """A driver of two places, with requests of these adapters that have one token each."""
    driver = SchedulerDriver(rows=2, kv_blocks=8)
    for i, each in enumerate(adapters):
        if each is not None:
            driver.scheduler.add_adapter(each)
        driver.submit((5, i), count, each, **options)
    for _ in range(20):
        driver.step()
        if all(story.tokens for story in driver.stories.values()):
            return driver
    raise AssertionError("the requests do not begin")


def chunks_of(plan: Plan) -> list[tuple[int, int, tuple[int, ...], int, int | None]]:
    return [(c.request.id, c.position, c.tokens, c.generated, c.follows) for c in plan.chunks]


def goes_ahead(driver: SchedulerDriver) -> bool:
    """Whether the step after the next one is launched before that is read."""
    driver.step(ahead=True)
    return driver.under_way is not None


def test_it_goes_on_from_tokens_that_nobody_knows_yet() -> None:
    driver = running(None, adapter("a"))
    plans = [driver.step(ahead=True) for _ in range(6)]
    first = {id: driver.stories[id].tokens[0] for id in (0, 1)}
    assert chunks_of(plans[0]) == [(0, 2, (first[0],), 1, None), (1, 2, (first[1],), 1, None)]
    for i, plan in enumerate(plans[1:], 1):
        assert chunks_of(plan) == [(0, 2 + i, (UNKNOWN,), 1 + i, 0), (1, 2 + i, (UNKNOWN,), 1 + i, 1)]
    driver.settle()
    driver.check()
    driver.check_free()


def test_the_last_part_of_a_prompt_is_gone_on_from_and_one_before_it_is_not() -> None:
    driver = SchedulerDriver(prefill_tokens=8)
    driver.submit(range(20), 3)
    assert [goes_ahead(driver) for _ in range(3)] == [False, False, True]
    assert chunks_of(driver.step()) == [(0, 20, (UNKNOWN,), 1, 0)]


def test_what_is_sure_to_end_is_left_out() -> None:
    driver = SchedulerDriver(rows=2, kv_blocks=8)
    driver.submit((5, 6), 2)
    driver.submit((5, 7), 5)
    plans = [driver.step(ahead=True) for _ in range(5)]
    assert [[chunk.request.id for chunk in plan.chunks] for plan in plans] == [[0, 1], [0, 1], [1], [1], [1]]
    driver.check()
    assert driver.under_way is None
    full = SchedulerDriver(rows=1, context=20, prefill_tokens=32)
    full.submit(range(18), 9)
    assert [goes_ahead(full) for _ in range(2)] == [True, False]
    full.check()


OPTIONS: dict[str, Any] = {
    "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "seed": 7,
    "logit_bias": ((3, 1.0),), "logprobs": 2, "min_tokens": 3,
}  # fmt: skip
READING: dict[str, Any] = {
    "repetition_penalty": 1.1, "frequency_penalty": 0.1, "presence_penalty": 0.1, "grammar": "{}",
    "bad_words": ((3,),),
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in fields(Sampling)])
def test_a_request_whose_rules_read_the_answer_is_waited_for(field: str) -> None:
    """A new option stands in one of the two lists."""
    sampling = replace(Sampling(), **{field: (OPTIONS | READING)[field]})
    driver = running(None, sampling=sampling)
    assert goes_ahead(driver) is (field not in READING)


def test_adapters_that_peft_runs_and_layers_with_states_are_waited_for() -> None:
    assert not goes_ahead(running(None, adapter("own", lane=ExecutionPath.SHADOW)))
    driver = SchedulerDriver(has_states=True)
    driver.submit((5, 6), 9)
    assert [goes_ahead(driver) for _ in range(3)] == [False] * 3


EVENTS: dict[str, Callable[[SchedulerDriver, Adapter], object]] = {
    "a request": lambda driver, each: driver.submit((7, 8)),
    "an adapter": lambda driver, each: driver.scheduler.add_adapter(each, preload=True),
    "a pin": lambda driver, each: driver.scheduler.pin_adapter(each.digest, True),
    "a removal": lambda driver, each: driver.scheduler.remove_adapter(each.digest),
    "a load": lambda driver, each: driver.scheduler.mark_hosted(each.digest, each.size),
    "a failed load": lambda driver, each: driver.scheduler.load_failed(each.digest, ErrorCode.INTERNAL, "no"),
    "a refusal": lambda driver, each: driver.scheduler.refuse(each.digest, "no"),
    "a placement that failed": lambda driver, each: driver.scheduler.unplace(()),
}


@pytest.mark.parametrize("event", EVENTS)
def test_whatever_happens_is_planned_for_first(event: str) -> None:
    driver, each = running(None), adapter("idle")
    driver.scheduler.add_adapter(each)
    if event != "a load":
        driver.scheduler.mark_hosted(each.digest, driver.runner.load_adapter(each))
    driver.step()
    assert [goes_ahead(driver) for _ in range(3)] == [True] * 3
    EVENTS[event](driver, each)
    assert [goes_ahead(driver) for _ in range(2)] == [False, True]


@pytest.mark.parametrize("wish", ["room", "an end"])
def test_what_an_end_lets_happen_is_planned_for(wish: str) -> None:
    """A pinned adapter that found no room in the pool, and one that is removed while it runs."""
    large, other = adapter("large", rank=16), adapter("other", rank=8)
    driver = running(large, None, count=30)
    if wish == "room":
        driver.scheduler.add_adapter(other, pinned=True)
    else:
        driver.scheduler.remove_adapter(large.digest)
    assert [goes_ahead(driver) for _ in range(4)][-1]
    driver.scheduler.cancel_request(0)
    assert [goes_ahead(driver) for _ in range(2)] == [False, True]
    assert (large.digest in driver.dropped) is (wish == "an end")
    assert set(driver.runner.placed) == ({other.digest} if wish == "room" else set())


def test_requests_that_cannot_enter_stop_nobody() -> None:
    driver = running(None, None)
    driver.submit((7, 8))
    assert [goes_ahead(driver) for _ in range(3)] == [True] * 3
    driver.scheduler.cancel_request(0)
    assert [goes_ahead(driver) for _ in range(2)] == [False, True]
    assert driver.stories[2].started


def test_a_request_that_waits_for_its_like_enters_as_soon_as_it_may() -> None:
    driver = SchedulerDriver(prefill_tokens=64)
    driver.submit(range(40), 20)
    driver.submit(range(40), 20)
    assert not goes_ahead(driver)
    driver.step(ahead=True)
    assert driver.stories[1].cached == 32


def test_where_no_block_is_left_it_is_planned_who_gives_up_his() -> None:
    driver = SchedulerDriver(rows=2, kv_blocks=4, context=64)
    for i in range(2):
        driver.submit([i] * 16, 40)
    for _ in range(60):
        driver.step(ahead=True)
    assert driver.scheduler.gauges.preemptions
    assert driver.ahead > 10
    driver.settle()
    driver.check()
    driver.check_free()


def test_one_that_ends_in_between_keeps_its_blocks_until_the_step_ahead_is_over() -> None:
    driver = running(None, None)
    driver.step(ahead=True)
    before = driver.scheduler.gauges.kv_used
    driver.scheduler.cancel_request(0)
    driver.listen()
    assert driver.stories[0].end is not None, "it is told at once"
    assert (driver.scheduler.gauges.running, driver.scheduler.gauges.kv_used) == (1, before)
    told = len(driver.stories[0].tokens)
    plan = driver.step(ahead=True)
    assert [chunk.request.id for chunk in plan.chunks] == [0, 1], "the one step that was under way"
    assert driver.under_way is not None
    assert [chunk.request.id for chunk in driver.under_way.plan.chunks] == [1]
    assert driver.scheduler.gauges.kv_used == before - 1
    assert len(driver.stories[0].tokens) == told
    driver.settle()
    driver.check_free()


def test_a_failed_one_is_not_found_again_though_its_blocks_are_given_up_late() -> None:
    driver = SchedulerDriver(rows=2)
    prompt = range(33)
    driver.runner.outcome_of = lambda result: Result(error="not finite")
    driver.submit(prompt, 9)
    assert [goes_ahead(driver) for _ in range(3)] == [False, False, True]
    assert driver.scheduler.gauges.kv_used == 3
    driver.step()
    assert (driver.scheduler.gauges.kv_used, driver.scheduler.gauges.kv_cached) == (0, 0)


def test_a_token_that_is_redrawn_costs_its_own_sequence_one_step() -> None:
    driver = running(None, None, count=30)
    outcomes = iter([False, True] + [False] * 100)
    driver.runner.outcome_of = lambda result: replace(result, redrawn=next(outcomes))
    plans = [driver.step(ahead=True) for _ in range(4)]
    redrawn = driver.stories[1].tokens[1]
    steps = [[follows for *_, follows in chunks_of(plan)] for plan in plans]
    assert steps == [[None, None], [0, 1], [0, None], [0, 1]]
    assert chunks_of(plans[2])[1] == (1, 3, (redrawn,), 2, None)
    assert [len(driver.stories[id].tokens) for id in (0, 1)] == [5, 4]
    driver.settle()
    driver.check()


def test_an_eos_is_noticed_one_step_late_and_what_follows_it_is_dropped() -> None:
    tokens = expected(None, (5, 0), 12)
    driver = running(None, None, eos=frozenset(tokens[3:4]))
    ahead = [goes_ahead(driver) for _ in range(5)]
    assert ahead == [True] * 5, "nobody waits: nothing is to be planned"
    end = driver.stories[0].end
    assert end is not None
    assert end.finish is Finish.EOS
    assert driver.stories[0].tokens == tokens[:4]
    driver.settle()
    driver.check()
    driver.check_free()


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_dropped_is_as_if_it_had_not_been(late: bool) -> None:
    """Before it is gone on from, or after."""
    driver = running(None, None)
    driver.runner.outcome_of = lambda result: replace(result, redrawn=True)
    driver.step(ahead=True)
    driver.step(fault=True, ahead=late)
    driver.runner.outcome_of = lambda result: result
    plan = driver.step()
    assert [chunk.follows for chunk in plan.chunks] == [None, None]
    assert [len(driver.stories[id].tokens) for id in (0, 1)] == [3, 3]
    driver.settle()
    driver.check()
    driver.check_free()
