"""The client over a real worker process: whatever becomes of the worker, every ticket ends once,
and no process remains.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client import REGISTRY

from service.core.adapter import ExecutionPath, Tier
from service.core.request import UNNUMBERED, Event, Finish, Request
from service.core.sampling import Sampling
from service.errors import NotReady, Overloaded
from service.settings import Faults, Settings
from service.telemetry import metrics
from service.worker import process, supervisor
from service.worker.client import WorkerClient
from service.worker.process import WorkerProcess
from service.worker.ticket import Ticket
from tests.fakes import adapter, expected

pytestmark = pytest.mark.anyio

ENDLESS = 100_000


@asynccontextmanager
async def engine(factory: str = "build", wait: bool = True, **settings: Any) -> AsyncIterator[WorkerClient]:
    client = WorkerClient(
        Settings(**({"max_rows": 2, "max_context": 200_000, "pool_rank": 16, "max_rank": 16} | settings)),
        f"tests.fakes:{factory}",
    )
    await client.start_worker()
    try:
        if wait:
            await client.wait_ready()
        yield client
    finally:
        await client.stop_worker(0)
        assert client.worker_pid is None


async def read(ticket: Ticket) -> tuple[list[int], Event]:
    """The ticket's tokens and its terminal event, which must be the only one."""
    events = [event async for event in ticket]
    assert [event.finish is not None for event in events] == [False] * (len(events) - 1) + [True]
    assert [event async for event in ticket] == []
    return [event.token.id for event in events if event.token], events[-1]


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)


def submit(client: WorkerClient, prompt: tuple[int, ...], length: int, *rest: Any, **fields: Any) -> Ticket:
    """`rest` and `fields` are of `Request`, after its length."""
    return client.submit_request(Request(UNNUMBERED, prompt, length, *rest, **fields))


async def begun(client: WorkerClient, **more: Any) -> Ticket:
    """A request without end that has made a token."""
    ticket = submit(client, (1, 2), ENDLESS, **more)
    await until(lambda: ticket.first is not None)
    return ticket


def worker(client: WorkerClient) -> int:
    assert client.worker_pid is not None
    return client.worker_pid


def score(pid: int) -> int:
    """How much sooner than others Linux ends this process where memory runs out."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text(encoding="utf-8"))


def count(name: str, **labels: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"adapterd_{name}", labels) or 0.0


async def test_mixed_requests_each_get_their_own_tokens() -> None:
    async with engine() as client:
        pool, shadow = adapter("a"), adapter("s", lane=ExecutionPath.SHADOW)
        for each in (pool, shadow):
            client.add_adapter(each)
            assert (await client.wait_until_loaded(each.digest)).error == ""
        digests = [None, pool.digest, shadow.digest] * 5
        tickets = [submit(client, (3, i), 6, digest) for i, digest in enumerate(digests)]
        for i, (ticket, digest) in enumerate(zip(tickets, digests, strict=True)):
            tokens, end = await read(ticket)
            assert tokens == expected(digest, (3, i), 6)
            assert end.finish is Finish.LENGTH
        assert client.tier_of(pool.digest) is Tier.DEVICE
        assert [placement.digest for placement in client.pool] == [pool.digest]


async def test_each_request_gets_a_number_and_is_otherwise_as_it_came() -> None:
    request = Request(UNNUMBERED, (1, 2), 2, None, Sampling(seed=5), frozenset({7}), prompt_logprobs=0)
    async with engine() as client:
        tickets = [client.submit_request(request) for _ in range(2)]
        assert len({ticket.request.id for ticket in tickets} - {UNNUMBERED}) == 2
        assert [replace(ticket.request, id=UNNUMBERED) for ticket in tickets] == [request] * 2
        for ticket in tickets:
            await read(ticket)


async def test_times_are_told_in_order() -> None:
    async with engine() as client:
        ticket = submit(client, (1,), 3, sampling=Sampling(logprobs=0))
        await read(ticket)
        times = [ticket.submitted, ticket.started, ticket.first, ticket.last, ticket.ended]
        assert times == sorted(time for time in times if time is not None)
        assert len(times) == 5


async def test_metrics_count_each_token_once() -> None:
    async with engine() as client:
        before = (
            count("generation_tokens_total"),
            count("prompt_tokens_total"),
            count("request_success_total", finished_reason="length"),
        )
        first = count("time_to_first_token_seconds_count")
        for ticket in [submit(client, (1, 2, i), 7) for i in range(5)]:
            await read(ticket)
        assert count("generation_tokens_total") == before[0] + 35
        assert count("prompt_tokens_total") == before[1] + 15
        assert count("request_success_total", finished_reason="length") == before[2] + 5
        assert count("time_to_first_token_seconds_count") == first + 5
        assert (count("num_requests_running"), count("num_requests_waiting")) == (0, 0)
        assert REGISTRY.get_sample_value("adapterd_generation_tokens_total") is None, (
            "the global registry is left alone"
        )


def moves() -> dict[str, float]:
    """What is counted of adapters' ways, by metric and tier."""
    tiers = itertools.product(("hits", "misses", "evict_bytes"), ("device", "host"))
    found = {f"{name} {tier}": count(f"adapter_{name}_total", tier=tier) for name, tier in tiers}
    return found | {name: count(f"adapter_{name}_total") for name in ("load_bytes", "place_bytes")}


async def test_an_adapters_ways_are_counted_hit_or_miss_in_seconds_and_in_bytes() -> None:
    async with engine(pool_rank=4, max_rank=4, host_cache_mb=1) as client:
        # Neither tier has room for both
        first, second = adapter("a", size=600_000), adapter("b", size=600_000)
        for each in (first, second):
            client.add_adapter(each, preload=False)
        before, loads, evictions = (
            moves(),
            count("adapter_load_seconds_count"),
            count("adapter_evict_seconds_count", tier="device"),
        )
        for each in (first, first, second):
            await read(submit(client, (1,), 2, each.digest))
        grown = {name: value - before[name] for name, value in moves().items() if value != before[name]}
        assert grown == {
            "misses device": 2,
            "misses host": 2,
            "hits device": 1,
            "load_bytes": 1_200_000,
            "place_bytes": 1_200_000,
            "evict_bytes host": 600_000,
            "evict_bytes device": 600_000,
        }
        assert count("adapter_load_seconds_count") == loads + 2
        assert count("adapter_evict_seconds_count", tier="device") == evictions + 1
        assert (
            count("adapter_bytes", tier="device"),
            count("adapter_bytes", tier="host"),
            count("base_bytes"),
        ) == (600_000, 600_000, 4000)
        assert (client.is_resident(second.digest), client.is_resident(first.digest), client.awaited) == (
            True,
            False,
            set(),
        )
        before, evictions = moves(), count("adapter_evict_seconds_count", tier="device")
        await client.remove_adapter(second.digest)
        await read(submit(client, (1,), 2))  # by then the pool's rows are free
        assert moves() == before, "what is deleted has made room for nobody"
        assert count("adapter_evict_seconds_count", tier="device") == evictions


async def test_a_shadow_adapter_is_at_home_in_host_memory() -> None:
    async with engine() as client:
        one = adapter("s", lane=ExecutionPath.SHADOW)
        client.add_adapter(one, preload=False)
        before = moves()
        for _ in range(2):
            await read(submit(client, (1,), 2, one.digest))
        grown = {name: value - before[name] for name, value in moves().items() if value != before[name]}
        assert grown == {"misses host": 1, "hits host": 1, "load_bytes": 1000}
        assert client.is_resident(one.digest)


async def test_adapters_that_requests_wait_for_are_known() -> None:
    async with engine(max_rows=1) as client:
        one = adapter("a")
        client.add_adapter(one)
        running = await begun(client)
        waiting = submit(client, (1,), 1, one.digest)
        assert client.awaited == {one.digest}
        running.cancel_request()
        await read(running)
        await read(waiting)
        assert client.awaited == set()


async def test_cancelling_ends_the_work_and_frees_the_row() -> None:
    async with engine(max_rows=1) as client:
        ticket = await begun(client)
        waiting = submit(client, (5,), 2)
        ticket.cancel_request()
        ticket.cancel_request()
        _, end = await read(ticket)
        assert end.finish is Finish.CANCELLED
        assert (await read(waiting))[0] == expected(None, (5,), 2)
        assert client.gauges.running == 0


async def test_a_caller_that_has_all_it_wants_succeeded() -> None:
    async with engine() as client:
        before = (
            count("request_success_total", finished_reason="stop_sequence"),
            count("request_failure_total", code="cancelled"),
        )
        ticket = await begun(client)
        ticket.cancel_request(stopped=True)
        await read(ticket)
        after = (
            count("request_success_total", finished_reason="stop_sequence"),
            count("request_failure_total", code="cancelled"),
        )
        assert after == (before[0] + 1, before[1])


async def test_over_the_queues_limit_nothing_is_admitted() -> None:
    async with engine(max_rows=1, queue_limit=2) as client:
        tickets = [submit(client, (1,), ENDLESS) for _ in range(3)]
        with pytest.raises(Overloaded) as refused:
            submit(client, (1,), 1)
        assert refused.value.retry_after == 1
        for ticket in tickets:
            ticket.cancel_request()
            assert (await read(ticket))[1].finish is Finish.CANCELLED


async def test_nothing_is_admitted_while_it_loads(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with engine(wait=False) as client:
        assert client.state == "loading"
        with pytest.raises(NotReady) as refused:
            submit(client, (1,), 1)
        assert refused.value.retry_after
        await client.wait_ready()
        assert (client.stage, client.fraction) == ("", 1.0)
        told: Any = [record for record in caplog.records if record.message == "loading"]
        assert [record.fields["stage"] for record in told] == ["loading the base"], "a line for each"
        assert client.base
        assert client.base.rows == 2
        await read(submit(client, (1,), 1))


async def test_a_deadline_ends_the_ticket_and_its_work() -> None:
    async with engine(request_timeout_s=0.5) as client:
        ticket = submit(client, (1,), ENDLESS)
        _, end = await read(ticket)
        assert (end.finish, end.code) == (Finish.FAILED, "deadline_exceeded")
        await until(lambda: client.gauges.running == 0)
        assert client.ready


async def test_a_killed_worker_fails_what_ran_and_serves_what_waited() -> None:
    async with engine(max_rows=2) as client:
        pinned, plain = adapter("pinned"), adapter("plain")
        client.add_adapter(pinned, pinned=True)
        client.add_adapter(plain)
        await client.wait_until_loaded(plain.digest)
        restarts = count("worker_restarts_total")
        running = [await begun(client), await begun(client, adapter=plain.digest)]
        waiting = [
            submit(client, (4, i), 3, digest) for i, digest in enumerate((None, plain.digest, pinned.digest))
        ]
        gone = submit(client, (9,), 3)
        os.kill(worker(client), signal.SIGKILL)
        await until(lambda: client.state == "restarting")
        assert "SIGKILL" in client.reason
        gone.cancel_request()
        with pytest.raises(NotReady):
            submit(client, (1,), 1)
        for ticket in running:
            _, end = await read(ticket)
            assert (end.finish, end.code) == (Finish.FAILED, "not_ready")
            assert "the worker died" in end.message
        for i, ticket in enumerate(waiting):
            assert (await read(ticket))[0] == expected(ticket.request.adapter, (4, i), 3)
        assert (await read(gone))[1].finish is Finish.CANCELLED
        assert client.ready
        await until(lambda: client.tier_of(pinned.digest) is Tier.DEVICE)
        assert count("worker_restarts_total") == restarts + 1


@pytest.fixture
def oom_kills(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The system's counter: its last number."""
    kills = [7]
    monkeypatch.setattr(process, "count_oom_kills", lambda: kills[-1])
    return kills


async def test_a_worker_that_the_system_killed_for_want_of_memory_is_told_as_such(
    oom_kills: list[int],
) -> None:
    async with engine(faults=Faults(slow_load=3600)) as client:
        one, other = adapter("a"), adapter("b")
        for each in (one, other):
            client.add_adapter(each, preload=each is one)
        loading = asyncio.create_task(client.wait_until_loaded(one.digest))
        waiting, plain = submit(client, (1,), 3, other.digest), submit(client, (2,), ENDLESS)
        await until(lambda: plain.first is not None)
        oom_kills.append(8)
        os.kill(worker(client), signal.SIGKILL)
        load = await loading
        why = "the worker died (memory ran out and the system killed it"
        assert (load.code, load.error.startswith(why)) == ("not_ready", True), load.error
        for ticket in (waiting, plain):
            _, end = await read(ticket)
            assert (end.code, end.message.startswith(why)) == ("not_ready", True), end.message
        assert client.reason.startswith(why)
        await client.wait_ready()
        assert not client._adapters.waits, "the next worker begins nothing that the last one died of"


async def test_one_that_was_killed_after_the_system_killed_another_process_long_ago_is_not_told_so(
    oom_kills: list[int],
) -> None:
    async with engine() as client:
        oom_kills.append(8)
        os.kill(worker(client), signal.SIGKILL)
        await until(lambda: not client.ready)
        await client.wait_ready()
        os.kill(worker(client), signal.SIGKILL)
        await until(lambda: client.state == "restarting")
        assert client.reason == "the worker died (SIGKILL)"


async def test_a_load_that_has_lost_two_workers_is_given_up() -> None:
    async with engine(faults=Faults(slow_load=3600)) as client:
        one = adapter("a")
        client.add_adapter(one)
        loading = asyncio.create_task(client.wait_until_loaded(one.digest))
        for _ in range(2):
            os.kill(worker(client), signal.SIGKILL)
            await until(lambda: not client.ready)
            await client.wait_ready()
        load = await loading
        assert load.code == "not_ready"
        assert load.error == "the worker died (SIGKILL) before the adapter was read"


async def test_an_injected_death_comes_once() -> None:
    async with engine(faults=Faults(kill=3)) as client:
        _, end = await read(submit(client, (1,), 5))
        assert (end.finish, end.code) == (Finish.FAILED, "not_ready")
        await client.wait_ready()
        assert len((await read(submit(client, (1,), 5)))[0]) == 5


async def test_where_memory_runs_out_the_worker_goes_first() -> None:
    async with engine() as client:
        assert score(worker(client)) >= max(500, score(os.getpid()))


async def test_a_stuck_worker_is_killed_and_replaced() -> None:
    async with engine(faults=Faults(stuck=2), request_timeout_s=1) as client:
        pid = worker(client)
        _, end = await read(submit(client, (1,), 5))
        assert end.finish is Finish.FAILED
        assert end.code in ("not_ready", "deadline_exceeded")
        await until(lambda: client.worker_pid not in (pid, None) and client.ready)
        assert len((await read(submit(client, (1,), 5)))[0]) == 5


async def test_one_that_hangs_is_replaced_also_for_who_only_registers_or_removes() -> None:
    async with engine(request_timeout_s=1) as client:
        new, old = adapter("new"), adapter("old")
        client.add_adapter(old)
        await client.wait_until_loaded(old.digest)
        os.kill(worker(client), signal.SIGSTOP)
        client.add_adapter(new)
        assert not (await client.wait_until_loaded(new.digest)).error
        os.kill(worker(client), signal.SIGSTOP)
        assert await client.remove_adapter(old.digest) == 0


async def test_one_that_had_nothing_to_say_has_its_time_when_it_is_asked() -> None:
    async with engine(request_timeout_s=3) as client:
        pid = worker(client)
        await asyncio.sleep(3.5)
        os.kill(pid, signal.SIGSTOP)
        asked = submit(client, (1,), 5)
        await asyncio.sleep(0.4)
        os.kill(pid, signal.SIGCONT)
        assert (await read(asked))[1].finish is Finish.LENGTH
        assert client.worker_pid == pid


async def test_one_that_reads_a_long_prompt_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps give no token for longer than a worker may be silent."""
    monkeypatch.setattr(supervisor, "SILENCE_S", 0.4)
    async with engine(prefill_tokens=1) as client:
        pid = worker(client)
        tokens, end = await read(submit(client, (1,) * 600, 2))
        assert (len(tokens), end.finish) == (2, Finish.LENGTH)
        assert client.worker_pid == pid


async def test_a_cancel_that_a_dying_worker_never_read_is_kept() -> None:
    async with engine(faults=Faults(stuck=2), request_timeout_s=1, max_rows=1) as client:
        stuck, waiting = submit(client, (1,), 5), submit(client, (2,), 5)
        await until(lambda: stuck.first is not None)
        waiting.cancel_request()
        os.kill(worker(client), signal.SIGKILL)
        assert (await read(waiting)) == ([], Event(waiting.request.id, finish=Finish.CANCELLED))
        await read(stuck)


async def test_a_worker_that_waits_for_a_slow_disk_is_not_stuck() -> None:
    async with engine(faults=Faults(slow_load=1.5), request_timeout_s=1) as client:
        pid, slow = worker(client), adapter("slow")
        client.add_adapter(slow, preload=False)
        _, end = await read(submit(client, (1,), 2, slow.digest))
        assert end.code == "deadline_exceeded"
        assert (await client.wait_until_loaded(slow.digest)).seconds > 1.5
        assert (await read(submit(client, (1,), 2, slow.digest)))[0] == expected(slow.digest, (1,), 2)
        assert worker(client) == pid


async def test_a_raising_step_fails_its_requests_only() -> None:
    async with engine(faults=Faults(step=3)) as client:
        pid = worker(client)
        for _ in range(3):
            tokens, end = await read(submit(client, (1,), 5))
            assert tokens == expected(None, (1,), 2)
            assert (end.finish, end.code) == (Finish.FAILED, "internal")
            assert len((await read(submit(client, (1,), 2)))[0]) == 2
        assert worker(client) == pid


async def test_two_raising_steps_in_a_row_replace_the_worker() -> None:
    async with engine(faults=Faults(step=1), max_rows=1) as client:
        pid = worker(client)
        tickets = [submit(client, (1,), 5) for _ in range(2)]
        for ticket in tickets:
            _, end = await read(ticket)
            assert end.code == "internal"
        await until(lambda: client.worker_pid not in (pid, None))


async def test_draining_lets_the_admitted_finish_and_takes_no_more() -> None:
    async with engine(max_rows=1) as client:
        tickets = [submit(client, (1, i), 40) for i in range(3)]
        stopping = asyncio.create_task(client.stop_worker(30))
        await until(lambda: client.state == "draining")
        with pytest.raises(NotReady):
            submit(client, (1,), 1)
        for i, ticket in enumerate(tickets):
            assert (await read(ticket))[0] == expected(None, (1, i), 40)
        await stopping


async def test_the_grace_ends_what_does_not() -> None:
    async with engine(max_rows=1) as client:
        pid = worker(client)
        tickets = [await begun(client), submit(client, (1,), 5)]
        await client.stop_worker(0.1)
        for ticket in tickets:
            _, end = await read(ticket)
            assert (end.finish, end.code) == (Finish.FAILED, "not_ready")
        assert not psutil.pid_exists(pid)
        assert client.state == "draining"
        await client.stop_worker(0)


async def test_a_stuck_worker_does_not_hold_the_end() -> None:
    async with engine(faults=Faults(stuck=2)) as client:
        pid, ticket = worker(client), submit(client, (1,), 5)
        await until(lambda: ticket.first is not None)
        await client.stop_worker(0)
        assert (await read(ticket))[1].code == "not_ready"
        assert not psutil.pid_exists(pid)


async def test_one_that_still_loads_or_never_started_can_be_stopped() -> None:
    async with engine(wait=False) as client:
        pid = worker(client)
    assert not psutil.pid_exists(pid)
    with pytest.raises(NotReady):
        await client.wait_ready()
    await WorkerClient(Settings()).stop_worker(0)


async def test_one_that_is_stopped_between_two_workers_starts_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.3, 0.3))
    async with engine(max_rows=1) as client:
        running, waiting = await begun(client), submit(client, (2,), 3)
        os.kill(worker(client), signal.SIGKILL)
        await until(lambda: client.state == "restarting")
        stopping = asyncio.create_task(client.stop_worker(20))
        await until(lambda: waiting.ended is not None)
        assert [(await read(ticket))[1].code for ticket in (running, waiting)] == ["not_ready"] * 2
        await stopping
        await asyncio.sleep(0.5)
        assert client.worker_pid is None


async def test_a_base_that_cannot_be_served_is_told_and_not_tried_again() -> None:
    async with engine("build_broken", wait=False) as client:
        with pytest.raises(NotReady, match="the fake base is broken"):
            await client.wait_ready()
        await until(lambda: client.worker_pid is None)
        assert client.state == "failed"
        assert client.reason == "ADAPTERD_BASE: the fake base is broken"
        assert (await client.wait_until_loaded("sha256:any")).error


async def test_a_base_that_does_not_fit_gives_the_service_the_exit_code_of_a_wrong_setting() -> None:
    for factory, code in (("build_large", 2), ("build_broken", 1)):
        async with engine(factory, wait=False) as client:
            with pytest.raises(NotReady):
                await client.wait_ready()
            assert (client.exit_code, client.state) == (code, "failed")


async def test_one_that_raises_while_it_loads_is_told_by_the_exception_and_not_by_its_end() -> None:
    async with engine("build_raising", wait=False) as client:
        with pytest.raises(NotReady) as told:
            await client.wait_ready()
        words = "RuntimeError: the device at fake0 said no"
        assert told.value.message == f"the worker died ({words}) 3 times in a row while loading"


async def test_a_factory_that_is_not_there_is_told() -> None:
    async with engine("build_nothing", wait=False) as client:
        with pytest.raises(NotReady, match=r"AttributeError: .*build_nothing"):
            await client.wait_ready()


async def test_three_deaths_while_loading_are_the_end() -> None:
    async with engine("build_dying", wait=False) as client:
        client.add_adapter(adapter("a"))
        with pytest.raises(NotReady, match=r"exit code 9.* 3 times in a row"):
            await client.wait_ready()
        assert client.state == "failed"
        assert (await client.wait_until_loaded("sha256:a")).error
        client.add_adapter(adapter("b"))
        async with asyncio.timeout(5):
            assert (await client.wait_until_loaded("sha256:b")).error == "the engine has stopped"


async def test_the_thousandth_death_is_one_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.1, 0.2))
    async with engine() as client:
        client._worker._shortlived = 2000
        pid = worker(client)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: client.worker_pid not in (pid, None) and client.ready)
        assert client._worker._shortlived == 2001


async def test_where_no_worker_can_be_started_it_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "BACKOFF_S", (0.1, 0.2))
    tries = []

    def scarce(*arguments: Any) -> WorkerProcess:
        tries.append(arguments)
        if len(tries) < 3:
            raise OSError(24, "Too many open files")
        return WorkerProcess(*arguments)

    async with engine(max_rows=1) as client:
        await begun(client)
        waiting, pid = submit(client, (2,), 3), worker(client)
        monkeypatch.setattr(supervisor, "WorkerProcess", scarce)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: waiting.ended is not None)
        assert (await read(waiting))[0] == expected(None, (2,), 3)
        assert len(tries) == 3


async def test_one_that_stands_still_while_it_loads_is_killed_and_in_the_end_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "STANDSTILL_S", 1.5)
    async with engine("build_waiting", wait=False) as client:
        with pytest.raises(NotReady, match=r"stood still for \d+ s and was killed\) 3 times in a row"):
            await client.wait_ready()


@pytest.mark.parametrize("factory", ["build_working", "build_compiling"])
async def test_one_that_says_nothing_but_computes_while_it_loads_is_let_be(
    factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "STANDSTILL_S", 1.5)
    restarts = count("worker_restarts_total")
    async with engine(factory) as client:
        assert client.ready
    assert count("worker_restarts_total") == restarts


async def test_one_that_hangs_up_and_stays_is_ended() -> None:
    async with engine("build_deaf", wait=False) as client:
        pid = worker(client)
        await until(lambda: client.state == "restarting")
        assert "closed its connection, did not end within 2 s and was killed" in client.reason
        assert not psutil.pid_exists(pid)


async def test_an_adapter_that_cannot_be_read_says_why() -> None:
    async with engine() as client:
        client.add_adapter(adapter("broken", readable=False))
        assert "cannot be read" in (await client.wait_until_loaded("sha256:broken")).error
        _, end = await read(submit(client, (1,), 2, "sha256:broken"))
        assert end.code == "adapter_invalid"


async def test_dropping_waits_for_those_in_flight_and_frees() -> None:
    async with engine() as client:
        dying = adapter("dying", size=777)
        client.add_adapter(dying)
        running = await begun(client, adapter=dying.digest)
        dropping = asyncio.create_task(client.remove_adapter(dying.digest))
        await asyncio.sleep(0)
        _, end = await read(submit(client, (1,), 2, dying.digest))
        assert end.code == "adapter_not_found"
        assert not dropping.done()
        running.cancel_request()
        assert await dropping == 777
        assert client.tier_of(dying.digest) is Tier.DISK
        assert client.pool == ()
        assert await client.remove_adapter(dying.digest) == 0


async def test_an_adapter_is_dropped_with_the_worker_that_held_it() -> None:
    async with engine() as client:
        dying = adapter("dying")
        client.add_adapter(dying)
        await begun(client, adapter=dying.digest)
        dropping = asyncio.create_task(client.remove_adapter(dying.digest))
        await asyncio.sleep(0)
        os.kill(worker(client), signal.SIGKILL)
        assert await dropping == 0
        await client.wait_ready()
        _, end = await read(submit(client, (1,), 2, dying.digest))
        assert end.code == "adapter_not_found"


async def test_loaded_sets_out_for_what_nobody_asked_to_read() -> None:
    async with engine() as client:
        lazy = adapter("lazy")
        client.add_adapter(lazy, preload=False)
        assert client.tier_of(lazy.digest) is Tier.DISK
        load = await client.wait_until_loaded(lazy.digest)
        assert (load.error, load.size) == ("", 1000)
        client.add_adapter(lazy)
        assert (await client.wait_until_loaded(lazy.digest)).error == ""


async def test_pins_move_over_the_wire() -> None:
    async with engine(pool_rank=16) as client:
        wide = [adapter(f"w{i}", rank=16) for i in range(2)]
        for each in wide:
            client.add_adapter(each, preload=False)
        await read(submit(client, (1,), 1, wide[0].digest))
        client.pin_adapter(wide[0].digest, True)
        _, end = await read(submit(client, (1,), 1, wide[1].digest))
        assert end.code == "overloaded"
        client.pin_adapter(wide[0].digest, False)
        assert (await read(submit(client, (1,), 1, wide[1].digest)))[1].finish is Finish.LENGTH
        assert [client.tier_of(each.digest) for each in wide] == [Tier.HOST, Tier.DEVICE]
        assert count("adapters", tier="device") == 1


async def test_adapters_offered_while_it_loads_are_told_later() -> None:
    async with engine(wait=False) as client:
        early = adapter("early")
        client.add_adapter(early)
        assert (await client.wait_until_loaded(early.digest)).error == ""
        assert await client.remove_adapter(early.digest) == 1000
