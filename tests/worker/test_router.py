"""Several real worker processes behind one API process: requests go where their adapter is or where they wait
least, and those that wait for a worker that dies go to another.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.core.adapter import Digest, Tier
from service.core.request import UNNUMBERED, Finish, Request
from service.errors import NotReady, SettingsError
from service.exit_codes import ExitCode
from service.limits import FreeMemory
from service.settings import Settings, read_settings
from service.telemetry import metrics
from service.worker import router
from service.worker.client import WorkerClient
from service.worker.router import DeviceRouter, divide_settings, name_devices
from service.worker.ticket import Ticket
from tests.fakes import adapter, expected

from .test_client import ENDLESS, read, until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def devices(factory: str = "build", **settings: Any) -> AsyncIterator[DeviceRouter]:
    sizes: dict[str, Any] = {
        "max_rows": 2,
        "max_context": 200_000,
        "pool_rank": 16,
        "max_rank": 16,
        "device": "cpu,cpu",
    }
    engine = DeviceRouter(Settings(**(sizes | settings)), f"tests.fakes:{factory}")
    await engine.start_worker()
    try:
        await engine.wait_ready()
        yield engine
    finally:
        await engine.stop_worker(0)
        assert [client.worker_pid for client in engine.clients] == [None, None]


def submit(engine: DeviceRouter, digest: Digest | None = None, length: int = 3, first: int = 3) -> Ticket:
    return engine.submit_request(Request(UNNUMBERED, (first, 4), length, digest))


def holders(engine: DeviceRouter, digest: Digest) -> list[int]:
    """The devices, by number, that have this content."""
    return [i for i, client in enumerate(engine.clients) if client.tier_of(digest) is not Tier.DISK]


def counted(name: str, device: str) -> float:
    return metrics.REGISTRY.get_sample_value(f"adapterd_{name}", {"device": device}) or 0.0


async def test_requests_go_to_the_device_that_has_their_adapter_and_contents_are_spread() -> None:
    async with devices() as engine:
        contents = [adapter(name) for name in "abcd"]
        for content in contents:
            engine.add_adapter(content)
            assert (await engine.wait_until_loaded(content.digest)).error == ""
        homes = {content.digest: holders(engine, content.digest) for content in contents}
        assert sorted(home for (home,) in homes.values()) == [0, 0, 1, 1]
        for content in contents * 3:
            tokens, _ = await read(submit(engine, content.digest))
            assert tokens == expected(content.digest, (3, 4), 3)
        assert {content.digest: holders(engine, content.digest) for content in contents} == homes
        assert all(engine.is_resident(content.digest) for content in contents)
        assert sum(placement.rank for placement in engine.pool) == engine.gauges.pool_used == 16


async def test_the_bases_requests_go_where_fewest_are_and_every_device_counts_its_own() -> None:
    before = [counted("generation_tokens_total", device) for device in ("cpu:0", "cpu:1")]
    async with devices() as engine:
        tickets = [submit(engine, first=i) for i in range(6)]
        assert [client.requests for client in engine.clients] == [3, 3]
        for i, ticket in enumerate(tickets):
            assert (await read(ticket))[0] == expected(None, (i, 4), 3)
        assert len({ticket.request.id for ticket in tickets}) == 6
    after = [counted("generation_tokens_total", device) for device in ("cpu:0", "cpu:1")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [9.0, 9.0]
    assert 'num_requests_running{device="cpu:1"}' in metrics.render_metrics("")[0].decode()


async def test_where_others_wait_for_longer_than_a_load_takes_another_device_loads_it() -> None:
    async with devices() as engine:
        content = adapter("a")
        engine.add_adapter(content)
        await engine.wait_until_loaded(content.digest)
        (home,) = holders(engine, content.digest)
        tickets = [submit(engine, content.digest, ENDLESS) for _ in range(router.LOADING)]
        assert engine.clients[home].requests == router.LOADING
        tickets += [submit(engine, content.digest, ENDLESS) for _ in range(3)]
        assert engine.clients[1 - home].requests > 0
        await until(lambda: holders(engine, content.digest) == [0, 1])
        for ticket in tickets:
            ticket.cancel_request()
            await read(ticket)
        assert await engine.remove_adapter(content.digest) == 2000


async def test_one_dies_and_its_queue_moves() -> None:
    async with devices() as engine:
        content = adapter("a")
        engine.add_adapter(content)
        await engine.wait_until_loaded(content.digest)
        (home,) = holders(engine, content.digest)
        client = engine.clients[home]
        running = [submit(engine, content.digest, ENDLESS) for _ in range(2)]
        await until(lambda: all(ticket.first is not None for ticket in running))
        waiting = [submit(engine, content.digest, first=i) for i in range(3)]
        assert client.requests == 5
        kill(client)
        await until(lambda: client.state == "restarting")
        assert (engine.ready, engine.state, client.requests) == (True, "ready", 0)
        for i, ticket in enumerate(waiting):
            assert (await read(ticket))[0] == expected(content.digest, (i, 4), 3)
        for ticket in running:
            assert (await read(ticket))[1].finish is Finish.FAILED
        await until(lambda: client.ready)
        moved = submit(engine, content.digest, ENDLESS)
        moved.cancel_request()
        assert (await read(moved))[1].finish is Finish.CANCELLED


def kill(client: WorkerClient) -> None:
    assert client.worker_pid is not None
    os.kill(client.worker_pid, signal.SIGKILL)


async def test_a_moved_request_can_be_cancelled_and_keeps_its_deadline() -> None:
    async with devices() as engine:
        running = [submit(engine, None, ENDLESS) for _ in range(4)]
        await until(lambda: all(ticket.first is not None for ticket in running))
        late = submit(engine, None, ENDLESS)
        client = next(client for client in engine.clients if client.requests == 3)
        kill(client)
        await until(lambda: client.requests == 0)
        late.cancel_request()
        assert (await read(late))[1].finish is Finish.CANCELLED
        for ticket in running:
            ticket.cancel_request()
            await read(ticket)


async def test_a_pinned_adapter_lies_on_every_device() -> None:
    async with devices() as engine:
        content = adapter("a")
        engine.add_adapter(content, pinned=True)
        await until(lambda: all(client.is_resident(content.digest) for client in engine.clients))


async def test_a_base_that_no_device_can_serve_is_told_once_as_one_device_tells_it() -> None:
    engine = DeviceRouter(Settings(device="cpu,cpu"), "tests.fakes:build_broken")
    await engine.start_worker()
    with pytest.raises(NotReady):
        await engine.wait_ready()
    await until(lambda: engine.state == "failed")
    assert (engine.reason, engine.exit_code) == ("ADAPTERD_BASE: the fake base is broken", ExitCode.FAILED)
    await engine.stop_worker(0)


@pytest.mark.parametrize(("free_gb", "cache"), [(8, 500), (1, 250)])
def test_memory_and_threads_are_divided(monkeypatch: pytest.MonkeyPatch, free_gb: int, cache: int) -> None:
    """What is free counts once, though each worker sees all of it."""
    monkeypatch.setattr(router, "free_memory", lambda: FreeMemory(free_gb * 10**9, 0, "the test"))
    on_cpu = divide_settings(Settings(device="cpu,cpu", host_cache_mb=1000, threads=4))
    sizes = [(own.device, own.host_cache_mb, own.threads, own.kv_mb) for own in on_cpu]
    assert sizes == [("cpu", cache, 2, 125 * free_gb)] * 2
    on_gpus = divide_settings(Settings(device="cuda:0,cuda:1", host_cache_mb=1000, threads=4))
    assert [(own.host_cache_mb, own.threads, own.kv_mb) for own in on_gpus] == [(cache, 4, None)] * 2


def test_devices_have_names_of_their_own() -> None:
    assert name_devices(("cpu", "cpu")) == ["cpu:0", "cpu:1"]
    assert name_devices(("cuda:1", "cuda:0", "cpu")) == ["cuda:1", "cuda:0", "cpu:0"]


@pytest.mark.parametrize("devices", ["cuda,cuda", "cuda:0,cuda:0", "cuda,cuda:1", "auto,cpu", "cpu,", "tpu"])
def test_devices_that_would_share_a_gpu_or_are_none_are_refused(devices: str) -> None:
    with pytest.raises(SettingsError, match="ADAPTERD_DEVICE"):
        read_settings({"ADAPTERD_DEVICE": devices})
