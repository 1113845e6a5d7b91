"""The scheduler's order of requests, their chunks, and how each request ends."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from service.core.adapter import Adapter, ExecutionPath, LoraLayerSpec, Tier
from service.core.error_codes import ErrorCode
from service.core.request import Finish
from service.engine.plan import Result
from service.engine.scheduler import PASSES
from service.engine.token_counters import OUTPUT_WEIGHT
from tests.engine.driver import SchedulerDriver
from tests.fakes import adapter, expected

LONG = list(range(40))


def test_first_come_first_served() -> None:
    driver = SchedulerDriver(rows=2)
    ids = [driver.submit([1, i], 3) for i in range(7)]
    driver.settle()
    assert driver.order == ids
    driver.check()


def test_of_adapters_that_were_served_as_much_the_oldest_request_is_next() -> None:
    driver = SchedulerDriver(rows=1)
    first, second = adapter("first"), adapter("second")
    for each in (first, second):
        driver.scheduler.add_adapter(each)
    ids = [driver.submit([1], 2, each) for each in (first, second, first, second, second, first)]
    driver.settle()
    assert driver.order == ids


def test_a_sequence_enters_at_the_step_after_one_leaves() -> None:
    driver = SchedulerDriver(rows=2)
    short, _ = driver.submit([1], 2), driver.submit([2], 9)
    next_one = driver.submit([3], 2)
    driver.step()
    driver.step()
    assert driver.stories[short].end
    assert next_one in {chunk.request.id for chunk in driver.step().chunks}


def test_prefill_is_chunked_and_every_running_sequence_decodes_in_every_step() -> None:
    driver = SchedulerDriver(prefill_tokens=16)
    talker = driver.submit([1], 30)
    driver.step()
    driver.submit(LONG, 2)
    driver.submit(LONG[:5][::-1], 2)
    for step in range(5):
        chunks = driver.step().chunks
        assert chunks[0].request.id == talker
        assert all(len(chunk.tokens) == 1 for chunk in chunks if chunk.generated)
        prefill = [len(chunk.tokens) for chunk in chunks if not chunk.generated]
        assert prefill == [[16], [16], [8], [5], []][step]
    driver.settle()
    driver.check()


def served(driver: SchedulerDriver, each: Adapter) -> int:
    """The tokens that an adapter was served: those of prompts, and those of answers twice."""
    mine = [story for story in driver.stories.values() if story.request.adapter == each.digest]
    prompts = sum(len(story.request.prompt) - story.cached for story in mine if story.started)
    return prompts + OUTPUT_WEIGHT * sum(len(story.tokens) for story in mine)


def test_adapters_that_wait_are_served_as_many_tokens_each_however_many_requests_they_have() -> None:
    """A hundred requests of one adapter came first, with long prompts; the other still gets as much."""
    driver = SchedulerDriver(rows=2, context=64)
    greedy, modest = adapter("greedy"), adapter("modest")
    driver.scheduler.add_adapter(greedy)
    driver.scheduler.add_adapter(modest)
    for i in range(100):
        driver.submit([i] * 40, 4, greedy)
    for _ in range(20):
        driver.step()
    for i in range(100):
        driver.submit([i], 4, modest)
    before = served(driver, greedy)
    while any(digest == modest.digest for _, digest in driver.scheduler.waiting):
        driver.step()
        assert abs(served(driver, greedy) - before - served(driver, modest)) <= 2 * 48
    assert served(driver, modest) > 800, "they waited beside each other"
    driver.settle()
    driver.check()


def test_a_newcomer_has_no_claim_on_what_others_got_before() -> None:
    driver = SchedulerDriver(rows=1)
    first, second, late = (adapter(name) for name in ("first", "second", "late"))
    for each in (first, second, late):
        driver.scheduler.add_adapter(each)
    for i in range(20):
        driver.submit([i], 3, first)
        driver.submit([i], 3, second)
    while len(driver.order) < 20:
        driver.step()
    for i in range(10):
        driver.submit([i], 3, late)
    while len(driver.order) < 29:
        driver.step()
    begun = Counter(driver.stories[id].request.adapter for id in driver.order[20:])
    assert begun == {first.digest: 3, second.digest: 3, late.digest: 3}
    driver.settle()


def test_of_those_that_wait_the_lowest_priority_is_next_before_any_fairness() -> None:
    driver = SchedulerDriver(rows=1)
    busy, idle = adapter("busy"), adapter("idle")
    for each in (busy, idle):
        driver.scheduler.add_adapter(each)
    driver.submit([1], 3, idle)
    driver.step()
    wanted = [(busy, 7), (idle, 7), (busy, 0), (idle, 0), (busy, -1), (busy, -5), (busy, -5)]
    ids = [driver.submit([2, i], 3, each, priority=level) for i, (each, level) in enumerate(wanted)]
    driver.settle()
    assert driver.order[1:] == [ids[i] for i in (5, 6, 4, 2, 3, 0, 1)]
    driver.check_free()


def test_for_want_of_blocks_the_highest_priority_waits_again() -> None:
    driver = SchedulerDriver(rows=2, kv_blocks=5)
    urgent, later = driver.submit([1] * 30, 20, priority=-1), driver.submit([2] * 14, 30, priority=1)
    while not driver.scheduler.gauges.preemptions:
        driver.step()
    assert [sequence.request.id for sequence in driver.scheduler.running.values()] == [urgent]
    assert [sequence.request.id for queue in driver.scheduler.waiting.values() for sequence in queue] == [
        later
    ]
    driver.settle()
    driver.check()


def test_an_adapter_that_cannot_be_placed_fails_its_requests_of_every_priority() -> None:
    driver = SchedulerDriver(pool_rank=8)
    pinned, big = adapter("pinned", rank=4), adapter("big", rank=8)
    driver.scheduler.add_adapter(pinned, pinned=True)
    driver.scheduler.add_adapter(big)
    driver.settle()
    ids = [driver.submit([1], 2, big, priority=level) for level in (2, 0, -2)]
    driver.settle()
    ends = [driver.stories[id].end for id in ids]
    assert [end.code for end in ends if end] == ["overloaded"] * 3
    driver.check_free()


def test_an_adapter_that_does_not_fit_is_overtaken_a_bounded_number_of_times() -> None:
    """A stream of base requests that never ends cannot starve an adapter that needs the whole pool."""
    driver = SchedulerDriver(rows=4, pool_rank=16, prefill_tokens=100)
    small, big = adapter("small", rank=4), adapter("big", rank=16)
    driver.scheduler.add_adapter(small)
    driver.scheduler.add_adapter(big)
    driver.submit([1], 5, small)
    driver.step()
    waiting = driver.submit([2], 2, big)
    passed = 0
    for step in range(200):
        if step % 2 == 0:
            driver.submit([3, step], 5, small)
        driver.submit([4, step], 2)
        before = len(driver.order)
        driver.step()
        if driver.stories[waiting].started:
            break
        passed += len(driver.order) - before
    assert driver.stories[waiting].started
    assert passed == PASSES
    driver.settle()
    driver.check()


def test_nobody_takes_the_pool_rows_that_an_older_request_waits_for() -> None:
    driver = SchedulerDriver(rows=4, pool_rank=16)
    small, big, late = adapter("small", rank=4), adapter("big", rank=16), adapter("late", rank=4)
    for each in (small, big, late):
        driver.scheduler.add_adapter(each)
    ids = [driver.submit([1], 9, small)]
    driver.step()
    ids += [driver.submit([2], 2, big), driver.submit([3], 2, late)]
    driver.settle()
    assert driver.order == ids


def test_prompts_join_until_a_quarter_of_the_budget_is_used() -> None:
    driver = SchedulerDriver(rows=4, prefill_tokens=16)
    ids = [driver.submit([n] * n, 1) for n in (2, 2, 3, 9)]
    assert [[chunk.request.id for chunk in driver.step().chunks] for _ in range(3)] == [ids[:2], ids[2:], []]


def test_others_pass_while_an_adapter_is_read() -> None:
    driver = SchedulerDriver(rows=2)
    slow = adapter("slow")
    driver.scheduler.add_adapter(slow)
    driver.reading = False
    waits = driver.submit([1], 2, slow)
    passes = [driver.submit([2, i], 2) for i in range(PASSES + 5)]
    for _ in range(60):
        driver.step()
    assert all(driver.stories[id].end for id in passes)
    driver.reading = True
    driver.settle()
    assert driver.stories[waits].tokens == expected(slow.digest, [1], 2)


def test_a_pinned_adapter_in_the_middle_of_the_pool_moves_for_a_large_one() -> None:
    driver = SchedulerDriver(pool_rank=16)
    first, pinned, big = adapter("first", rank=6), adapter("pinned", rank=4), adapter("big", rank=12)
    for each in (first, pinned):
        driver.scheduler.add_adapter(each, preload=True)
    driver.settle()
    driver.scheduler.pin_adapter(pinned.digest, True)
    driver.scheduler.add_adapter(big)
    driver.submit([1], 3, big)
    driver.settle()
    driver.submit([2], 3, pinned)
    driver.settle()
    assert [story.end.finish for story in driver.stories.values() if story.end] == [Finish.LENGTH] * 2
    assert [driver.tiers[each.digest] for each in (first, pinned, big)] == [
        Tier.HOST,
        Tier.DEVICE,
        Tier.DEVICE,
    ]
    driver.check()


def test_a_pinned_adapter_that_was_placed_at_the_second_try_comes_back_when_it_had_to_move() -> None:
    driver = SchedulerDriver(pool_rank=16)
    first, pinned, big = adapter("first", rank=6), adapter("pinned", rank=4), adapter("big", rank=12)
    driver.scheduler.add_adapter(first, preload=True)
    driver.settle()
    driver.scheduler.add_adapter(pinned, pinned=True)
    while not driver.step(half_placed=True).place:
        pass
    driver.settle()
    assert driver.tiers[pinned.digest] is Tier.HOST, "a device that raised is not asked again and again"
    driver.scheduler.add_adapter(big)
    for each in (pinned, big):
        driver.submit([1], 3, each)
        driver.settle()
    assert [driver.tiers[each.digest] for each in (first, pinned, big)] == [
        Tier.HOST,
        Tier.DEVICE,
        Tier.DEVICE,
    ]
    driver.check()


def test_a_request_that_pinned_adapters_leave_no_room_for_is_refused() -> None:
    driver = SchedulerDriver(pool_rank=8)
    pinned, big = adapter("pinned", rank=4), adapter("big", rank=8)
    driver.scheduler.add_adapter(pinned, pinned=True)
    driver.scheduler.add_adapter(big)
    driver.settle()
    id = driver.submit([1], 2, big)
    driver.settle()
    end = driver.stories[id].end
    assert end
    assert (end.finish, end.code) == (Finish.FAILED, "overloaded")
    assert "8 rank rows" in end.message
    assert "pinned" in end.message


def test_a_dora_adapter_takes_a_row_more_than_its_rank_and_others_lie_behind_it() -> None:
    driver = SchedulerDriver(pool_rank=12)
    gated = replace(adapter("gated", rank=4), patches=(LoraLayerSpec("q", 4, 1.0, "a", "b", "gate"),))
    for each in (gated, adapter("plain", rank=4)):
        driver.scheduler.add_adapter(each, preload=True)
        driver.settle()
    assert [(at.start, at.rank) for at in driver.scheduler.adapters.pool.layout] == [(0, 5), (5, 4)]
    assert driver.scheduler.adapters.pool.used == 9


def test_adapters_that_cannot_be_together_take_turns() -> None:
    driver = SchedulerDriver(rows=4, pool_rank=8)
    several = [adapter(f"a{i}", rank=8) for i in range(4)]
    for each in several:
        driver.scheduler.add_adapter(each)
    for i in range(20):
        driver.submit([i], 3, several[i % 4])
    driver.settle()
    driver.check()
    assert all(story.end and story.end.finish is Finish.LENGTH for story in driver.stories.values())


def test_the_least_recently_used_adapter_leaves_the_pool() -> None:
    driver = SchedulerDriver(pool_rank=8)
    first, second, third = (adapter(name, rank=4) for name in ("first", "second", "third"))
    for each in (first, second, third):
        driver.scheduler.add_adapter(each)
    for each in (first, second, first, third):
        driver.submit([1], 1, each)
        driver.settle()
    assert driver.tiers[first.digest] is Tier.DEVICE
    assert driver.tiers[second.digest] is Tier.HOST
    assert driver.tiers[third.digest] is Tier.DEVICE


def test_shadow_adapters_need_no_pool_rows() -> None:
    driver = SchedulerDriver(pool_rank=4)
    shadow = adapter("shadow", lane=ExecutionPath.SHADOW)
    driver.scheduler.add_adapter(shadow)
    mixed = [driver.submit([1], 3, shadow), driver.submit([1], 3)]
    driver.settle()
    assert [driver.stories[id].tokens for id in mixed] == [
        expected(shadow.digest, [1], 3),
        expected(None, [1], 3),
    ]
    assert driver.scheduler.gauges.pool_used == 0
    assert driver.tiers[shadow.digest] is Tier.HOST


def test_pinned_adapters_are_placed_when_they_are_read_and_stay() -> None:
    driver = SchedulerDriver(pool_rank=8)
    pinned = adapter("pinned", rank=4)
    driver.scheduler.add_adapter(pinned, pinned=True)
    driver.settle()
    assert driver.tiers[pinned.digest] is Tier.DEVICE
    for i in range(6):
        other = adapter(f"o{i}", rank=4)
        driver.scheduler.add_adapter(other)
        driver.submit([1], 2, other)
        driver.settle()
    assert driver.tiers[pinned.digest] is Tier.DEVICE
    driver.scheduler.pin_adapter(pinned.digest, False)
    driver.submit([1], 1, adapter("o0", rank=4))
    driver.settle()
    assert driver.tiers[pinned.digest] is Tier.HOST


def test_preloading_fills_free_rows_and_drives_nobody_out() -> None:
    driver = SchedulerDriver(pool_rank=8)
    for name in ("a", "b", "c"):
        driver.scheduler.add_adapter(adapter(name, rank=4), preload=True)
    driver.settle()
    assert [driver.tiers[f"sha256:{name}"] for name in "abc"] == [Tier.DEVICE, Tier.DEVICE, Tier.HOST]
    driver.scheduler.remove_adapter("sha256:a")
    driver.settle()
    assert driver.tiers["sha256:c"] is Tier.HOST, "each has one chance"


def test_what_is_in_host_memory_is_placed_when_it_is_preloaded_again_and_there_is_room() -> None:
    driver = SchedulerDriver(pool_rank=8)
    three = [adapter(name, rank=4) for name in ("a", "b", "c")]
    for each in three:
        driver.scheduler.add_adapter(each, preload=True)
    driver.settle()
    driver.scheduler.add_adapter(three[2], preload=True)
    driver.settle()
    assert [driver.tiers[each.digest] for each in three] == [Tier.DEVICE, Tier.DEVICE, Tier.HOST], "no room"
    driver.scheduler.remove_adapter(three[0].digest)
    driver.settle()
    driver.scheduler.add_adapter(three[2], preload=True)
    driver.settle()
    assert driver.tiers[three[2].digest] is Tier.DEVICE


def test_what_nobody_asks_for_is_not_read_and_what_is_there_not_a_second_time() -> None:
    driver = SchedulerDriver(host_bytes=1000)
    asked, offered, large = adapter("asked"), adapter("offered"), adapter("large", rank=16)
    driver.scheduler.add_adapter(offered)
    for _ in range(2):
        driver.scheduler.add_adapter(asked, preload=True)
        driver.settle()
    driver.scheduler.add_adapter(large)
    driver.submit([1], 2, large)  # drives the other out of both tiers
    driver.settle()
    assert [driver.tiers[each.digest] for each in (asked, offered, large)] == [
        Tier.DISK,
        Tier.DISK,
        Tier.DEVICE,
    ]
    assert driver.scheduler.next_load() is None


def test_host_memory_forgets_the_least_recently_used() -> None:
    driver = SchedulerDriver(pool_rank=4, host_bytes=2500)
    for name in ("a", "b", "a", "c"):
        each = adapter(name, rank=4, size=1000)
        driver.scheduler.add_adapter(each)
        driver.submit([1], 1, each)
        driver.settle()
    assert [driver.tiers[f"sha256:{name}"] for name in "abc"] == [Tier.HOST, Tier.DISK, Tier.DEVICE]
    assert driver.scheduler.gauges.host_bytes == 2000


def test_what_is_resident_is_not_read_again_when_host_memory_has_forgotten_it() -> None:
    driver = SchedulerDriver(pool_rank=16, host_bytes=1000)
    first, second = adapter("first"), adapter("second")
    for each in (first, second):
        driver.scheduler.add_adapter(each)
        driver.submit([1], 1, each)
        driver.settle()
    assert list(driver.runner.host) == [second.digest]
    driver.submit([1], 1, first)
    assert driver.scheduler.next_load() is None
    driver.settle()
    driver.check()


def test_an_adapter_on_experts_leaves_the_pool_with_host_memory_whose_tensors_its_steps_read() -> None:
    driver = SchedulerDriver(pool_rank=16, host_bytes=1000)
    first, second = adapter("first", experts=4), adapter("second", experts=4)
    for each in (first, second):
        driver.scheduler.add_adapter(each)
        driver.submit([1], 1, each)
        driver.settle()
    assert driver.tiers == {first.digest: Tier.DISK, second.digest: Tier.DEVICE}
    assert driver.scheduler.gauges.pool_used == second.rank
    driver.submit([1], 1, first)
    driver.settle()
    assert driver.tiers == {first.digest: Tier.DEVICE, second.digest: Tier.DISK}
    driver.check()


def test_host_memory_keeps_what_is_pinned_as_long_as_it_is() -> None:
    driver = SchedulerDriver(pool_rank=4, host_bytes=1000)
    pinned, other = adapter("pinned", lane=ExecutionPath.SHADOW), adapter("other", lane=ExecutionPath.SHADOW)
    driver.scheduler.add_adapter(pinned, pinned=True)
    driver.scheduler.add_adapter(other)
    driver.settle()
    for expected_tier, leaving in ((Tier.HOST, []), (Tier.DISK, [pinned.digest])):
        driver.submit([1], 1, other)
        assert driver.scheduler.next_load() == (other, leaving)
        driver.pending = other
        for digest in leaving:
            driver.runner.evict_adapter(digest)
        driver.settle()
        assert driver.tiers[pinned.digest] is expected_tier
        driver.scheduler.pin_adapter(pinned.digest, False)
        driver.scheduler.remove_adapter(other.digest)
        driver.settle()
        driver.scheduler.add_adapter(other)


def test_what_waits_is_kept_in_host_memory() -> None:
    """Two adapters wait where one fits: both are kept until they had their turn, so that neither is
    read again and again.
    """
    driver = SchedulerDriver(rows=4, pool_rank=4, host_bytes=1100)
    first, *others = [adapter("x", size=100), adapter("a"), adapter("b")]
    for each in (first, *others):
        driver.scheduler.add_adapter(each)
    driver.submit([1], 9, first)
    driver.step()
    for each in others:
        driver.submit([2], 2, each)
        driver.step()
    driver.step()
    assert set(driver.runner.host) == {each.digest for each in (first, *others)}
    driver.settle()
    driver.check()


def test_an_adapter_dropped_while_it_is_read_leaves_nothing() -> None:
    driver = SchedulerDriver()
    dying = adapter("dying")
    driver.scheduler.add_adapter(dying, preload=True)
    driver.reading = False
    driver.step()
    driver.scheduler.remove_adapter(dying.digest)
    driver.step()
    assert driver.dropped == []
    driver.reading = True
    driver.settle()
    assert driver.dropped == [dying.digest]
    assert driver.runner.host == {}
    driver.check_free()


def test_an_adapter_dropped_when_it_was_just_read_leaves_nothing() -> None:
    driver = SchedulerDriver()
    dying = adapter("dying")
    driver.scheduler.add_adapter(dying, preload=True)
    driver.read()
    driver.scheduler.remove_adapter(dying.digest)
    driver.settle()
    assert driver.dropped == [dying.digest]
    driver.check_free()


def test_what_host_memory_forgot_before_it_could_be_placed_is_not_placed() -> None:
    driver = SchedulerDriver(host_bytes=1000)
    first, second = adapter("first"), adapter("second")
    for each in (first, second):
        driver.scheduler.add_adapter(each, preload=True)
    driver.read()
    driver.read()  # both before a step is planned
    driver.settle()
    assert (driver.tiers[first.digest], driver.tiers[second.digest]) == (Tier.DISK, Tier.DEVICE)


def test_a_pinned_adapter_that_was_read_at_the_second_try_is_placed() -> None:
    driver = SchedulerDriver()
    pinned = adapter("pinned")
    driver.scheduler.add_adapter(pinned, pinned=True)
    driver.scheduler.next_load()
    driver.scheduler.load_failed(pinned.digest, ErrorCode.ADAPTER_INVALID, "it broke off")
    assert driver.scheduler.next_load() is None, "nobody asks for it now"
    driver.scheduler.add_adapter(pinned)
    assert driver.scheduler.next_load() == (pinned, [])
    driver.scheduler.load_failed(pinned.digest, ErrorCode.ADAPTER_INVALID, "it broke off again")
    asked = driver.submit([1], 2, pinned)
    driver.reading = False
    driver.step()
    driver.scheduler.cancel_request(asked)
    driver.reading = True
    driver.settle()
    assert driver.tiers[pinned.digest] is Tier.DEVICE


def test_who_cannot_use_what_another_computes_does_not_wait_for_it() -> None:
    driver = SchedulerDriver(prefill_tokens=1000)
    other = adapter("other")
    driver.scheduler.add_adapter(other, preload=True)
    driver.settle()
    ids = [driver.submit(LONG, 2), driver.submit(LONG, 0, prompt_logprobs=0), driver.submit(LONG, 2, other)]
    assert {chunk.request.id for chunk in driver.step().chunks} == set(ids)
    driver.settle()


def test_a_prompt_to_be_scored_reuses_nothing() -> None:
    driver = SchedulerDriver()
    driver.submit(LONG, 2)
    driver.settle()
    scored = driver.submit(LONG, 0, prompt_logprobs=0)
    driver.settle()
    assert driver.stories[scored].scored == LONG


def test_an_adapter_that_cannot_be_read_fails_its_requests_only() -> None:
    driver = SchedulerDriver()
    broken = adapter("broken", readable=False)
    driver.scheduler.add_adapter(broken, preload=True)
    bad, good = driver.submit([1], 2, broken), driver.submit([1], 2)
    driver.settle()
    end = driver.stories[bad].end
    assert end
    assert (end.finish, end.code, end.message) == (Finish.FAILED, "adapter_invalid", "cannot be read")
    assert driver.stories[good].tokens == expected(None, [1], 2)
    driver.scheduler.add_adapter(broken)
    assert driver.scheduler.next_load() is None, "nobody asks for it any more"
    driver.scheduler.load_failed(broken.digest, ErrorCode.ADAPTER_INVALID, "cannot be read")
    driver.scheduler.remove_adapter(broken.digest)
    driver.settle()
    assert broken.digest not in driver.scheduler.adapters.known, "what is forgotten is forgotten"


def test_a_dropped_adapter_serves_those_it_has_and_takes_no_more() -> None:
    driver = SchedulerDriver(rows=1)
    dying = adapter("dying")
    driver.scheduler.add_adapter(dying)
    running, waiting = driver.submit([1], 4, dying), driver.submit([2], 4, dying)
    driver.step()
    driver.scheduler.remove_adapter(dying.digest)
    late = driver.submit([3], 4, dying)
    driver.step()
    assert driver.dropped == []
    driver.settle()
    assert [driver.stories[id].tokens for id in (running, waiting)] == [
        expected(dying.digest, [n], 4) for n in (1, 2)
    ]
    end = driver.stories[late].end
    assert end
    assert end.code == "adapter_not_found"
    assert driver.dropped == [dying.digest]
    driver.check_free()
    later = driver.submit([4], 1, dying)
    driver.settle()
    end = driver.stories[later].end
    assert end
    assert end.code == "adapter_not_found"


def test_an_adapter_offered_again_while_it_drains_stays() -> None:
    driver = SchedulerDriver()
    back = adapter("back")
    driver.scheduler.add_adapter(back)
    driver.submit([1], 4, back)
    driver.step()
    driver.scheduler.remove_adapter(back.digest)
    driver.scheduler.add_adapter(back)
    driver.settle()
    assert driver.dropped == [back.digest]
    assert driver.tiers[back.digest] is Tier.DEVICE


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "count", "finish"), [(60, 10, 4, Finish.LENGTH), (64, 10, 1, Finish.LENGTH)]
)
def test_a_full_context_ends_the_sequence(prompt: int, max_tokens: int, count: int, finish: Finish) -> None:
    driver = SchedulerDriver(context=64)
    id = driver.submit(range(prompt), max_tokens)
    driver.settle()
    story = driver.stories[id]
    assert story.end
    assert (len(story.tokens), story.end.finish) == (count, finish)


@pytest.mark.parametrize(("prompt", "code"), [([], "validation"), (range(65), "context_length_exceeded")])
def test_a_prompt_that_no_context_holds_is_refused(prompt: list[int], code: str) -> None:
    driver = SchedulerDriver(context=64)
    id = driver.submit(prompt, 1)
    driver.settle()
    end = driver.stories[id].end
    assert end
    assert (end.finish, end.code) == (Finish.FAILED, code)


def test_an_eos_token_ends_the_sequence_and_is_told() -> None:
    tokens = expected(None, [5], 6)
    driver = SchedulerDriver()
    id = driver.submit([5], 6, eos=frozenset({tokens[3], 10_000}))
    driver.settle()
    story = driver.stories[id]
    assert story.tokens == tokens[:4]
    assert story.end
    assert story.end.finish is Finish.EOS


def test_scoring_a_prompt_prefills_only_and_tells_every_token() -> None:
    driver = SchedulerDriver(prefill_tokens=16)
    id = driver.submit(LONG, 0, prompt_logprobs=0)
    driver.settle()
    end = driver.stories[id].end
    assert end
    assert (end.finish, end.token) == (Finish.LENGTH, None)
    assert [token.id for token in end.prompt] == LONG
    assert [token.logprob for token in end.prompt[:2]] == [None, -1.0]


def test_the_prompts_scores_come_once_with_the_first_token() -> None:
    driver = SchedulerDriver(prefill_tokens=16)
    driver.submit(LONG, 3, prompt_logprobs=0)
    told = []
    while driver.busy:
        driver.scheduler.commit_step(plan := driver.scheduler.plan_step(), driver.runner.run_plan(plan))
        told += [len(event.prompt) for event in driver.scheduler.take_report().events]
    assert told == [40, 0, 0]


def test_cancelling_frees_the_row_at_once_and_twice_is_once() -> None:
    driver = SchedulerDriver(rows=1)
    running, waiting = driver.submit([1], 50), driver.submit([2], 2)
    driver.step()
    driver.scheduler.cancel_request(running)
    driver.scheduler.cancel_request(running)
    plan = driver.step()
    assert [chunk.request.id for chunk in plan.chunks] == [waiting]
    driver.scheduler.cancel_request(99)
    driver.settle()
    end = driver.stories[running].end
    assert end
    assert end.finish is Finish.CANCELLED


def test_a_result_without_a_token_fails_its_request_only_and_nothing_of_its_blocks_is_used_again() -> None:
    driver = SchedulerDriver()
    bad, good = driver.submit(LONG[:33], 5), driver.submit([*LONG[:12], 7], 3)
    plan = driver.scheduler.plan_step()
    fine = driver.runner.run_plan(plan)
    failed = Result(error="no token can be chosen", code=ErrorCode.VALIDATION)
    driver.scheduler.commit_step(plan, [failed, *fine[1:]])
    driver.settle()
    end = driver.stories[bad].end
    assert end
    assert (end.finish, end.code, end.message) == (Finish.FAILED, "validation", "no token can be chosen")
    assert driver.stories[good].tokens == expected(None, [*LONG[:12], 7], 3)
    driver.runner.prefilled = 0
    driver.submit(LONG[:33], 2)
    driver.settle()
    assert driver.runner.prefilled == 33


def test_a_raised_step_fails_its_requests_and_nobody_else() -> None:
    driver = SchedulerDriver(rows=1)
    hit, spared = driver.submit([1], 5), driver.submit([2], 5)
    driver.step(fault=True)
    driver.settle()
    end = driver.stories[hit].end
    assert end
    assert (end.finish, end.code) == (Finish.FAILED, "internal")
    assert driver.stories[spared].tokens == expected(None, [2], 5)


def test_a_conversation_goes_on_from_its_full_blocks() -> None:
    driver = SchedulerDriver()
    driver.submit(LONG[:20], 14)
    driver.settle()
    said = [*LONG[:20], *driver.stories[0].tokens, 7, 8]
    driver.runner.prefilled = 0
    second = driver.submit(said, 4)
    driver.settle()
    driver.check()
    assert driver.stories[second].cached == 32
    assert driver.runner.prefilled == len(said) - 32


@pytest.mark.parametrize("budget", [100, 1000], ids=["one a step", "all at once"])
def test_choices_of_one_prompt_share_its_prefill(budget: int) -> None:
    driver = SchedulerDriver(rows=4, prefill_tokens=budget)
    for _ in range(4):
        driver.submit(LONG, 3)
    driver.settle()
    driver.check()
    assert driver.runner.prefilled == 40 + 3 * 8, "two full blocks are shared"
    assert sorted(story.cached for story in driver.stories.values()) == [0, 32, 32, 32]


def test_the_same_prompt_under_another_adapter_starts_anew() -> None:
    driver = SchedulerDriver()
    several = [adapter("a"), adapter("b"), None]
    for each in several[:2]:
        assert each
        driver.scheduler.add_adapter(each)
    for each in (*several, *several):
        driver.submit(LONG, 3, each)
        driver.settle()
    driver.check()
    assert driver.runner.prefilled == 3 * 40 + 3 * 8


def test_a_prompt_that_the_budget_leaves_nothing_for_waits_a_step() -> None:
    """One that wakes after two tokens lets another in beside it, and takes the whole budget in the
    next step.
    """
    driver = SchedulerDriver(rows=2, prefill_tokens=16)
    one = replace(adapter("activated"), invocation=(70, 71))
    driver.scheduler.add_adapter(one)
    first, second = driver.submit([1, 2, 70, 71, *LONG], 2, one), driver.submit(LONG, 2)
    steps = [{chunk.request.id: len(chunk.tokens) for chunk in driver.step().chunks} for _ in range(2)]
    assert steps == [{first: 2, second: 14}, {first: 16}]
    driver.settle()


def test_what_an_activated_adapter_made_is_no_start_for_a_prompt_that_wakes_it_later() -> None:
    driver = SchedulerDriver()
    one = replace(adapter("activated"), invocation=(70, 71))
    driver.scheduler.add_adapter(one)
    early, late = [70, 71, *LONG[:20]], [70, 71, *LONG[:20], 70, 71, 5]
    for prompt, wakes in ((early, 0), (late, 22)):
        id = driver.submit(prompt, 3, one)
        driver.settle()
        assert driver.stories[id].tokens == expected(one.digest, prompt, 3, wakes=wakes)


@pytest.mark.parametrize(
    ("prompt", "wakes"),
    [
        ([*LONG, 70, 71, 5], 40),
        ([70, 71, *LONG, 70, 71], 42),  # the last time counts
        ([70, 71, 70, 71], 2),
        ([70, 71], 0),
        ([*LONG, 70], 64),  # half of it, so it never acts
        ([71, 70, *LONG], 64),
    ],
)
def test_an_activated_adapter_acts_from_its_invocation_on_and_shares_what_lies_before_it(
    prompt: list[int], wakes: int
) -> None:
    """What comes before runs as the base in chunks of its own, and is shared with the base; the rest
    with the very same prompt alone.
    """
    driver = SchedulerDriver(rows=4)
    one = replace(adapter("activated"), invocation=(70, 71))
    driver.scheduler.add_adapter(one)
    stories = [driver.submit(prompt, 4, one), driver.submit(prompt, 4, one), driver.submit(prompt, 4)]
    driver.settle()
    stories.append(driver.submit([*prompt, 9], 4, one))
    driver.settle()
    right = [expected(one.digest, prompt, 4, wakes=wakes)] * 2 + [
        expected(None, prompt, 4),
        expected(one.digest, [*prompt, 9], 4, wakes=wakes),
    ]
    assert [driver.stories[id].tokens for id in stories] == right
    for plan in driver.plans:
        for chunk in plan.chunks:
            end = chunk.position + len(chunk.tokens)
            assert chunk.request.adapter is None or (
                end <= wakes if chunk.asleep else chunk.position >= wakes
            )


def test_a_sequence_without_a_block_for_its_next_token_lets_the_newest_wait_again() -> None:
    """Four prompts fill eight blocks but for the answers; none is lost and each gets its own tokens."""
    driver = SchedulerDriver(rows=4, context=128, kv_blocks=8, prefill_tokens=1000)
    ids = [driver.submit([i, *LONG[:20]], 40) for i in range(4)]
    driver.settle()
    driver.check()
    assert all(len(driver.stories[id].tokens) == 40 for id in ids)
    assert driver.scheduler.gauges.preemptions > 0
    assert driver.order == ids, "a preempted request starts once"
    driver.check_free()


def test_the_adapter_that_holds_most_blocks_gives_some_up() -> None:
    driver = SchedulerDriver(rows=4, context=128, kv_blocks=8, prefill_tokens=1000)
    many, few = adapter("many"), adapter("few")
    for each in (many, few):
        driver.scheduler.add_adapter(each)
    modest = driver.submit(LONG[:20], 40, few)
    for i in range(3):
        driver.submit([i, *LONG[:20]], 40, many)
    while not driver.scheduler.gauges.preemptions:
        driver.step()
    assert modest in driver.scheduler.running
    assert set(driver.scheduler.waiting) == {(0, many.digest)}
    driver.settle()
    driver.check()


def test_one_long_request_runs_beside_short_ones_in_the_memory_of_equal_rows() -> None:
    driver = SchedulerDriver(rows=16, context=8192, kv_blocks=16 * 32, prefill_tokens=512)
    driver.submit([i % 997 for i in range(8000)], 5)
    for i in range(15):
        driver.submit([i] * 100, 5)
    driver.settle()
    driver.check()
    assert all(len(story.tokens) == 5 for story in driver.stories.values())


def test_a_prompt_that_finds_no_blocks_is_overtaken_a_bounded_number_of_times() -> None:
    driver = SchedulerDriver(rows=4, context=64, kv_blocks=4, prefill_tokens=1000)
    other, big = adapter("other"), adapter("big")
    for each in (other, big):
        driver.scheduler.add_adapter(each, preload=True)
    driver.settle()
    driver.submit(LONG[:17], 30)
    driver.step()
    waiting = driver.submit(LONG, 2, big)
    while not driver.stories[waiting].started:
        driver.submit([7], 1, other)
        driver.step()
    assert driver.order.index(waiting) == 1 + PASSES
    driver.settle()
    driver.check()


def test_the_scores_of_a_preempted_prompt_come_once_and_whole() -> None:
    driver = SchedulerDriver(rows=3, context=112, kv_blocks=7, prefill_tokens=4)
    first = driver.submit(LONG[:20], 60)
    for _ in range(8):
        driver.step()
    scored = driver.submit([*LONG, *LONG[:30]], 3, prompt_logprobs=0)
    driver.settle()
    driver.check()
    assert driver.scheduler.gauges.preemptions > 0
    assert driver.stories[scored].scored == [*LONG, *LONG[:30]]
    assert len(driver.stories[first].tokens) == 60


def test_a_preempted_request_can_be_cancelled_and_ends_once() -> None:
    driver = SchedulerDriver(rows=4, context=128, kv_blocks=8, prefill_tokens=1000)
    ids = [driver.submit([i, *LONG[:20]], 40) for i in range(4)]
    while not driver.scheduler.gauges.preemptions:
        driver.step()
    preempted = next(id for id in ids if id not in driver.scheduler.running)
    driver.scheduler.cancel_request(preempted)
    driver.settle()
    end = driver.stories[preempted].end
    assert end
    assert end.finish is Finish.CANCELLED


def test_where_layers_keep_states_no_prompt_goes_on_from_another_and_none_waits_to() -> None:
    driver = SchedulerDriver(prefill_tokens=1000, has_states=True)
    ids = [driver.submit(LONG, 3) for _ in range(4)]
    assert len(driver.step().chunks) == 4
    driver.settle()
    driver.check()
    assert driver.order == ids
    assert driver.runner.prefilled == 4 * 40
    assert not any(story.cached for story in driver.stories.values())
    assert driver.scheduler.gauges.kv_cached == 0


def test_what_lies_before_the_invocation_is_shared_with_the_base_and_what_follows_is_not() -> None:
    driver = SchedulerDriver(rows=2, context=128)
    one = replace(adapter("activated"), invocation=(70, 71))
    driver.scheduler.add_adapter(one)
    prompt = [*LONG[:32], 70, 71, *LONG[:20]]
    driver.submit(prompt, 3)
    driver.settle()
    woken, again = driver.submit(prompt, 3, one), driver.submit(prompt, 3)
    driver.settle()
    assert driver.stories[woken].cached == 32
    assert driver.stories[again].cached == 48
    later = [*prompt, 70, 71]
    moved = driver.submit(later, 3, one)
    driver.settle()
    assert driver.stories[moved].tokens == expected(one.digest, later, 3, wakes=len(prompt))
    assert driver.stories[woken].tokens == expected(one.digest, prompt, 3, wakes=32)
