"""A worker without a process: a scheduler and a fake runner, driven step by step, with everything
that must always hold checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from service.core.adapter import Adapter, Digest, Tier
from service.core.error_codes import ErrorCode
from service.core.request import Event, Finish, Request
from service.engine.kv_blocks import count_blocks
from service.engine.plan import Plan, Result
from service.engine.scheduler import Scheduler
from tests.fakes import FakeLaunched, FakeRunner, expected

EMPTY = Plan()


@dataclass
class Story:
    """What became of one request."""

    request: Request
    started: bool = False
    cached: int = 0
    tokens: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    end: Event | None = None


class Flight(NamedTuple):
    """A step that is launched, and neither read nor committed."""

    plan: Plan
    launched: FakeLaunched


class SchedulerDriver:
    def __init__(
        self,
        rows: int = 4,
        context: int = 64,
        pool_rank: int = 16,
        prefill_tokens: int = 16,
        host_bytes: int = 10_000,
        reading: bool = True,
        kv_blocks: int | None = None,
        has_states: bool = False,
    ) -> None:
        blocks = rows * count_blocks(context) if kv_blocks is None else kv_blocks
        self.scheduler = Scheduler(
            rows=rows,
            context=context,
            kv_blocks=blocks,
            pool_rank=pool_rank,
            prefill_tokens=prefill_tokens,
            host_bytes=host_bytes,
            reuses_prefixes=not has_states,
        )
        self.runner = FakeRunner(blocks, context, pool_rank)
        self.runner.has_states = has_states
        self.reading = True
        self.unsure = False
        self.pending: Adapter | None = None
        self.stories: dict[int, Story] = {}
        self.tiers: dict[Digest, Tier] = {}
        self.dropped: list[Digest] = []
        self.order: list[int] = []
        self.plans: list[Plan] = []
        self.under_way: Flight | None = None
        self.ahead = 0

    def submit(
        self, prompt: Sequence[int], max_tokens: int = 4, adapter: Adapter | None = None, **more: Any
    ) -> int:
        id = len(self.stories)
        request = Request(id, tuple(prompt), max_tokens, adapter.digest if adapter else None, **more)
        self.stories[id] = Story(request)
        self.scheduler.submit_request(request)
        return id

    def _take_load(self) -> bool:
        """Whether there is an adapter to be read next, which then is `pending`."""
        if self.pending is None and (wanted := self.scheduler.next_load()) is not None:
            self.pending, victims = wanted
            flying = {s.adapter for s in self.scheduler.running.values()}
            assert not flying & set(victims), "an adapter in flight was forgotten in host memory"
            for digest in victims:
                self.runner.evict_adapter(digest)
        return self.pending is not None

    def read(self) -> None:
        """What the loader does: one adapter at a time."""
        self._take_load()
        if self.reading and self.pending is not None:
            adapter, self.pending = self.pending, None
            if adapter.weights == "missing":
                self.scheduler.load_failed(adapter.digest, ErrorCode.ADAPTER_INVALID, "cannot be read")
            else:
                self.scheduler.mark_hosted(adapter.digest, self.runner.load_adapter(adapter))

    def step(self, fault: bool = False, half_placed: bool = False, ahead: bool = False) -> Plan:
        """One step to its end. `ahead`: the next one is launched before, if it may be."""
        self.read()
        if self.under_way is not None:
            return self._finish_step(*self.under_way, ahead, fault)
        flying = {s.adapter for s in self.scheduler.running.values()}
        plan = self.scheduler.plan_step()
        self.plans.append(plan)
        self._check_launch(plan)
        self._check_experts()
        flying &= {s.adapter for s in self.scheduler.running.values()}  # but for those preempted
        assert not flying & set(plan.remove), "an adapter in flight lost its pool rows"
        self.unsure = half_placed and bool(plan.place)
        if self.unsure:
            self.runner.run_plan(Plan(plan.remove, plan.place[: (len(plan.place) + 1) // 2]))
            self.scheduler.abort_step(plan)
        elif fault and plan.chunks:
            self.runner.run_plan(Plan(plan.remove, plan.place))
            self.scheduler.commit_step(
                plan, [Result(error="the step that ran this request failed")] * len(plan.chunks)
            )
        else:
            self.runner.run_plan(Plan(plan.remove, plan.place))
            return self._finish_step(plan, self.runner.launch_chunks(plan.chunks), ahead)
        self.forget()
        self.listen()
        return plan

    def _finish_step(self, plan: Plan, launched: FakeLaunched, ahead: bool, is_lost: bool = False) -> Plan:
        """`is_lost`: it raises when it is read."""
        following = self.scheduler.plan_ahead(plan) if ahead else None
        self.under_way = None
        if following is not None:
            self._check_launch(following)
            self.ahead += 1
            self.under_way = Flight(following, self.runner.launch_chunks(following.chunks, launched))
        if is_lost:
            for lost in (following, plan):
                if lost is not None:
                    self.scheduler.drop_step(lost)
            self.under_way = None
        else:
            self.scheduler.commit_step(plan, launched.read())
        self.forget()
        self.listen()
        return plan

    def _check_launch(self, plan: Plan) -> None:
        """A request that has ended is in no step that is launched from then on."""
        assert {chunk.request.id for chunk in plan.chunks} <= self.scheduler.running.keys()
        slots = [chunk.slot for chunk in plan.chunks]
        assert set(slots) <= set(range(self.scheduler.rows))
        assert len(set(slots)) == len(slots), "two sequences in one slot"

    def forget(self) -> None:
        for digest, hosted in self.scheduler.take_removed():
            if hosted:
                self.runner.evict_adapter(digest)
            self.dropped.append(digest)
            self.tiers.pop(digest, None)

    def listen(self) -> None:
        report = self.scheduler.take_report()
        for id, cached in report.started:
            self.stories[id].started, self.stories[id].cached = True, cached
            self.order.append(id)
        for event in report.events:
            story = self.stories[event.request]
            assert story.end is None, f"request {event.request} had an event after its last"
            story.tokens += [event.token.id] if event.token else []
            story.scored += [token.id for token in event.prompt]
            story.end = event if event.finish else None
        self.tiers |= dict(report.tiers)

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def settle(self, limit: int = 5000) -> None:
        for _ in range(limit):
            if self.step() == EMPTY and not self.busy and not self._take_load():
                return
        raise AssertionError("the scheduler does not come to rest")

    def check(self) -> None:
        """Every request has ended once, with the tokens it would have had alone."""
        for story in self.stories.values():
            assert story.end is not None, f"{story.request} never ended"
            request = story.request
            tokens = expected(request.adapter, request.prompt, request.max_tokens)
            assert story.tokens == tokens[: len(story.tokens)], f"{request} got the tokens of something else"
            if request.prompt_logprobs is not None and story.end.finish in (Finish.LENGTH, Finish.EOS):
                assert story.scored == list(request.prompt)
            if story.end.finish is Finish.LENGTH:
                assert len(story.tokens) == min(
                    request.max_tokens, self.scheduler.context - len(request.prompt)
                )
            if story.end.finish is Finish.EOS:
                assert story.tokens[-1] in request.eos

    def check_free(self) -> None:
        """Nothing is held once everything has ended."""
        gauges = self.scheduler.gauges
        assert (gauges.running, gauges.waiting, gauges.kv_used) == (0, 0, 0)
        assert gauges.kv_total == len(self.runner.kv) == self.scheduler.blocks.free
        pool = {digest for digest in self.runner.pool if digest is not None}
        assert pool == {
            digest for digest in self.scheduler.adapters.known if digest in self.scheduler.adapters.pool
        }
        assert set(self.runner.host) == set(self.scheduler.adapters.host)
        assert set(self.runner.host) <= set(self.scheduler.adapters.known)
        assert gauges.host_bytes == sum(adapter.size for adapter in self.runner.host.values())
        assert gauges.pool_used == sum(placement.rank for placement in self.runner.placed.values())

    def _check_experts(self) -> None:
        """After a plan, the pool holds nothing that host memory should count and does not."""
        adapters = self.scheduler.adapters
        resident = (placement.digest for placement in adapters.pool.layout)
        on_experts = [digest for digest in resident if adapters.known[digest].adapter.is_on_experts]
        assert all(digest in adapters.host for digest in on_experts)

    def tell_tiers(self) -> None:
        """The tiers that were told are the true ones; after half a placement only the next step
        makes them so.
        """
        if self.unsure:
            return
        for digest in self.scheduler.adapters.known:
            true = (
                Tier.DEVICE
                if digest in self.runner.placed
                else Tier.HOST
                if digest in self.runner.host
                else Tier.DISK
            )
            assert self.tiers.get(digest, Tier.DISK) is true, (
                f"{digest} was said to be {self.tiers.get(digest)} and is {true}"
            )
