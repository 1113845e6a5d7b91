"""Sixteen clients, forty adapters, two replicas over one directory of them, workers that are killed
again and again, an end in the midst of it: nobody gets a wrong answer or none, and the replicas agree.

CHAOS_SECONDS says how long; `make soak` takes ten minutes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.bench.servers import Server, started
from tests import crowd, markers
from tests.own_memory import own_bytes
from tests.truth import TWO_FACED, Tally, Truth

pytestmark = pytest.mark.anyio

REPLICAS = 2
CLIENTS = 8  # of each
SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))
KILL_EVERY_S = 60.0
ADAPTERS = 40
LAST_WORDS_S = 3.0
LIMIT_S, PATIENCE_S = 120, 60
GROWTH, SLACK = 1.10, 16e6  # of each process' own memory, once warm


@dataclass
class Service:
    """A replica, what it logs, and the clients that ask it: who has changed something asks the same one,
    for the others follow a moment later.
    """

    server: Server
    log: Path
    clients: range
    tally: Tally = field(default_factory=Tally)

    @property
    def url(self) -> str:
        return self.server.url

    def process(self) -> psutil.Process:
        return psutil.Process(self.server.pid)

    def worker(self) -> psutil.Process | None:
        below = self.process().children()
        return next((one for one in below if "service.worker.loop" in one.cmdline()), None)

    def logged(self, word: str = "id") -> Counter[str]:
        """How many lines of the log tell of each request, of those that have this word."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return Counter(line["id"] for line in lines if line["message"] == "request" and word in line)

    def defects(self) -> list[str]:
        return [
            line[:2000]
            for line in self.log.read_text().splitlines()
            if '"exception"' in line or line.startswith("Traceback")
        ]


@dataclass
class Scales:
    """Bytes of its own that each process held, in order; a worker that was killed and its successor
    are one.

    `absence` is how long there was no worker, at most, in seconds.
    """

    absence: float = 0.0
    api: list[int] = field(default_factory=list)
    worker: list[int] = field(default_factory=list)

    def weigh(self, service: Service) -> None:
        self.api.append(own_bytes(service.server.pid))
        worker = service.worker()
        if worker is not None:
            self.worker.append(own_bytes(worker.pid))


SETTINGS = {
    "dtype": "float32",
    "quantization": "none",
    "device": "cpu",
    "compile": "off",
    "log_format": "json",
    "shared": "on",
}
BOUNDS = {
    "max_rows": "6",
    "queue_limit": "8",
    "pool_rank": "64",
    "max_rank": "32",
    "host_cache_mb": "1",
    "request_timeout_s": str(LIMIT_S),
}


@dataclass
class Replicas:
    """Services over one directory of adapters, and the letter that each folder of it says."""

    services: list[Service]
    letters: dict[str, str]


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replicas]:
    """A small pool, a small host cache and few rows, so that adapters move all the time and the
    queue fills.
    """
    folder = tmp_path_factory.mktemp("chaos")
    base = markers.base(folder / "base")
    letters = markers.write_adapters(folder / "adapters", base, ADAPTERS)
    folders = {"base": str(base), "adapters_dir": str(folder / "adapters")}
    with ExitStack() as stack:
        services = []
        for number in range(REPLICAS):
            log = folder / f"log-{number}"
            server = stack.enter_context(started(SETTINGS | BOUNDS | folders, log))
            services.append(Service(server, log, range(CLIENTS * number, CLIENTS * (number + 1))))
        yield Replicas(services, letters)


async def torment(service: Service, http: httpx.AsyncClient, scales: Scales, seconds: float) -> int:
    """Kills the worker in the middle of each minute, and at half-time where that is sooner; how
    many it killed.
    """
    loop = asyncio.get_running_loop()
    began, killed, period, seen = loop.time(), 0, min(KILL_EVERY_S, seconds), loop.time()
    while (now := loop.time() - began) < seconds:
        if (await http.get("/ready")).status_code == 200:
            seen = loop.time()
        scales.absence = max(scales.absence, loop.time() - seen)
        if now > (killed + 0.5) * period and (worker := service.worker()):
            scales.weigh(service)
            worker.send_signal(signal.SIGKILL)
            killed += 1
        await asyncio.sleep(0.5)
    return killed


Samples = dict[tuple[str, str], float]


async def samples(http: httpx.AsyncClient) -> Samples:
    """Every sample of the service, by name and first label."""
    text = (await http.get("/metrics")).text
    all = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (sample.name.removeprefix("adapterd_"), next(iter(sample.labels.values()), "")): sample.value
        for sample in all
    }


def risen(after: Samples, before: Samples, name: str, label: str | None = None) -> int:
    return int(
        sum(
            value - before.get(key, 0)
            for key, value in after.items()
            if key[0] == name and label in (None, key[1])
        )
    )


async def ready(http: httpx.AsyncClient) -> None:
    async with asyncio.timeout(LIMIT_S):
        while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.1)


async def test_whatever_happens_every_request_ends_with_a_right_answer_or_a_documented_error(
    replicas: Replicas,
) -> None:
    truth = Truth(replicas.letters)
    async with httpx.AsyncClient(base_url=replicas.services[0].url, timeout=30, trust_env=False) as http:
        await truth.learn(http)
        (await http.put(f"/adapters/{TWO_FACED}", json={"source": "m0"})).raise_for_status()
    await agree(replicas.services)
    await asyncio.gather(*(check_service(service, truth) for service in replicas.services))
    await agree(replicas.services)
    asked = set().union(*(service.tally.letters for service in replicas.services))
    assert asked == {"", *replicas.letters.values()}, "each was asked, the base too"
    for service in replicas.services:
        await check_end(service, truth)


async def agree(services: Sequence[Service]) -> None:
    """Waits until all have the same adapters and aliases."""
    async with httpx.AsyncClient(timeout=30, trust_env=False) as http, asyncio.timeout(PATIENCE_S):
        seen: set[str] = set()
        while len(seen) != 1:
            seen = {await read_catalog(http, service.url) for service in services}
            await asyncio.sleep(0.2)


async def read_catalog(http: httpx.AsyncClient, url: str) -> str:
    adapters = (await http.get(f"{url}/adapters")).raise_for_status().json()["adapters"]
    aliases = (await http.get(f"{url}/aliases")).raise_for_status().json()["aliases"]
    targets = [(alias["name"], alias["targets"], alias["sticky"]) for alias in aliases]
    return json.dumps([sorted((card["id"], card["digest"]) for card in adapters), sorted(targets)])


async def check_service(service: Service, truth: Truth) -> None:
    """Its clients act while it is tormented."""
    tally, scales, stop = service.tally, Scales(), asyncio.Event()
    async with httpx.AsyncClient(base_url=service.url, timeout=30, trust_env=False) as http:
        before = await samples(http)
        acting = asyncio.create_task(crowd.run(service.url, truth, tally, stop, service.clients))
        killed = await torment(service, http, scales, SECONDS)
        stop.set()
        began = asyncio.get_running_loop().time()
        await ready(http)
        scales.absence = max(scales.absence, asyncio.get_running_loop().time() - began)
        await acting
        scales.weigh(service)
        after = await samples(http)
    print(
        f"{len(tally.outcomes)} requests in {SECONDS:.0f} s: {dict(tally.counted())}; {killed} kills; "
        f"bytes {scales}"
    )
    assert tally.wrong == []
    assert service.defects() == []
    assert killed >= 1
    assert not tally.counted()["late"] or scales.absence > PATIENCE_S, (
        "nobody waits as long as that for a worker that is there"
    )
    assert risen(after, before, "worker_restarts_total") == killed
    check_counts(service, tally, lambda name, label=None: risen(after, before, name, label))
    for weights in (scales.api, scales.worker):
        assert weights[-1] < weights[0] * GROWTH + SLACK


def check_counts(service: Service, tally: Tally, risen: Callable[..., int]) -> None:
    """Sent, ended, logged and counted are the same."""
    said, seen = tally.counted(), service.logged()
    assert "open" not in said
    unlogged = {id: outcome for id, outcome in tally.outcomes.items() if seen[id] != 1}
    assert set(unlogged.values()) <= {"unheard"}, (
        f"but one that left before it was read has one line each: {unlogged}"
    )
    tickets, success = risen("e2e_request_latency_seconds_count"), risen("request_success_total")
    assert tickets == len(service.logged("prompt_tokens").keys() & tally.outcomes.keys())
    assert said["answered"] <= success <= said["answered"] + said["left"] + said["unheard"], (
        "one that left may have had all before"
    )
    assert success + risen("request_failure_total") == len(tally.outcomes) - len(unlogged) - said["done"]


async def check_end(service: Service, truth: Truth) -> None:
    """SIGTERM in the middle: what was begun ends, what comes then is told so or finds nobody, and
    the exit code is 0.
    """
    tally, stop = Tally(), asyncio.Event()
    others = range(100 + service.clients.start, 100 + service.clients.stop)
    truth.ending = False
    acting = asyncio.create_task(crowd.run(service.url, truth, tally, stop, others))
    await asyncio.sleep(LAST_WORDS_S)
    truth.ending = True
    process = service.process()
    process.terminate()
    code = await asyncio.to_thread(process.wait, 60)
    stop.set()
    await acting
    said, seen = tally.counted(), service.logged()
    print(f"at the end: {dict(said)}")
    assert code == 0
    assert tally.wrong == []
    assert service.defects() == []
    assert said["answered"]
    assert {
        id: outcome
        for id, outcome in tally.outcomes.items()
        if seen[id] != (outcome != "cut") and outcome != "unheard"
    } == {}
