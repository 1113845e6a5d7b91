"""What /health and /ready say of the real program while its worker hangs and dies: the one answers,
the other refuses, both come back.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.bench.servers import Server, started
from tests import making

pytestmark = pytest.mark.anyio

STUCK = 20  # the token of a request at which the first worker hangs
LIMIT_S = 2.0  # of a request, and of a silent worker


@dataclass
class Seen:
    """What the probes answered, without repetitions:

    (status, state) of /health and the status of /ready.
    """

    health: list[tuple[int, str]] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)

    async def look(self, http: httpx.AsyncClient) -> None:
        health, ready = await http.get("/health"), await http.get("/ready")
        now = health.status_code, health.json()["state"]
        self.health += [now] if [now] != self.health[-1:] else []
        self.ready += [ready.status_code] if [ready.status_code] != self.ready[-1:] else []
        if ready.status_code != 200:
            assert int(ready.headers["retry-after"]) >= 1
            assert ready.json()["error_type"] == "not_ready"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("health")
    base = making.tiny(folder / "base")
    settings = {
        "base": str(base),
        "dtype": "float32",
        "quantization": "none",
        "device": "cpu",
        "compile": "off",
    }
    faults = {"faults": f"stuck:{STUCK}", "request_timeout_s": str(LIMIT_S)}
    with started(settings | faults | {"adapters_dir": str(folder / "adapters")}, folder / "log") as server:
        yield server


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
        yield http


def body(tokens: int) -> dict[str, object]:
    return {"inputs": "Hi", "parameters": {"max_new_tokens": tokens, "ignore_eos_token": True}}


async def until_ready(seen: Seen, http: httpx.AsyncClient) -> None:
    """Looks until it has seen it gone and back."""
    async with asyncio.timeout(60):
        # It may return between the two probes
        while seen.ready[-2:] != [503, 200] or seen.health[-1:] != [(200, "ready")]:
            await seen.look(http)
            await asyncio.sleep(0.02)


async def test_a_worker_that_hangs_is_replaced_while_health_answers(http: httpx.AsyncClient) -> None:
    seen = Seen()
    hanging = asyncio.create_task(http.post("/generate", json=body(STUCK + 10)))
    await until_ready(seen, http)
    assert (await hanging).json()["error_type"] in ("not_ready", "deadline_exceeded")
    assert seen.health == [(200, "ready"), (200, "restarting"), (200, "ready")]
    assert (await http.post("/generate", json=body(STUCK + 10))).status_code == 200


async def test_a_worker_that_is_killed_is_replaced_while_health_answers(
    http: httpx.AsyncClient, server: Server
) -> None:
    below = psutil.Process(server.pid).children()
    (worker,) = (one.pid for one in below if "service.worker.loop" in one.cmdline())
    seen = Seen()
    await seen.look(http)
    os.kill(worker, signal.SIGKILL)
    await until_ready(seen, http)
    assert seen.health == [(200, "ready"), (200, "restarting"), (200, "ready")]
    assert seen.ready == [200, 503, 200]
    assert (await http.post("/generate", json=body(3))).status_code == 200


async def test_a_service_that_dies_takes_its_processes_along(tmp_path: Path) -> None:
    base = making.tiny(tmp_path / "base")
    settings = {
        "base": str(base),
        "dtype": "float32",
        "quantization": "none",
        "device": "cpu",
        "compile": "off",
    }
    with started(settings | {"adapters_dir": str(tmp_path / "adapters")}, tmp_path / "log") as server:
        below = psutil.Process(server.pid).children(recursive=True)
        assert len(below) >= 2
        os.kill(server.pid, signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, below, timeout=20)
    assert alive == []
