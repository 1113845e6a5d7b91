"""What others' servers did wrong in operation, on the real program with a tiny base, in the order
of a life.

Each adapter takes a second longer to read than it would.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.bench.servers import Server, started
from tests import making

pytestmark = pytest.mark.anyio

CONTEXT = 2048
LENGTH = 400
SETTINGS = {
    "base_id": "tiny",
    "dtype": "float32",
    "quantization": "none",
    "device": "cpu",
    "compile": "off",
    "max_rows": "2",
    "faults": "slow_load:1",
    "drain_s": "300",  # a stream takes long where others want the processor
}
ENDLESS = {"prompt": "Hi", "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0}


@dataclass(frozen=True)
class OperatedService:
    server: Server
    http: httpx.AsyncClient
    adapter: Path

    async def samples(self) -> dict[tuple[str, ...], float]:
        """Every sample of /metrics, by name and label values."""
        families = text_string_to_metric_families((await self.http.get("/metrics")).text)
        return {
            (s.name.removeprefix("adapterd_"), *s.labels.values()): s.value
            for family in families
            for s in family.samples
        }

    async def value(self, name: str) -> float:
        return (await self.samples())[(name,)]

    async def until_idle(self) -> None:
        async with asyncio.timeout(30):
            while await self.value("num_requests_running"):  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.02)

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": "tiny", **ENDLESS, **more}

    async def complete(self, **more: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json=self.body(**more))

    @asynccontextmanager
    async def streaming(self, **more: Any) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[str]]]:
        """A stream and its `data:` fields."""
        async with self.http.stream(
            "POST", "/v1/completions", json=self.body(stream=True, **more)
        ) as response:
            lines = response.aiter_lines()
            yield response, (line.removeprefix("data: ") async for line in lines if line)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("operations")
    base = making.tiny(folder / "base", max_position_embeddings=CONTEXT)
    adapter = making.noise(folder / "adapters" / "noise", base)
    folders = {"base": str(base), "adapters_dir": str(folder / "adapters")}
    with started(SETTINGS | folders, folder / "log") as server:
        yield server, adapter


@pytest.fixture
async def operated(server: tuple[Server, Path]) -> AsyncIterator[OperatedService]:
    async with httpx.AsyncClient(base_url=server[0].url, timeout=60, trust_env=False) as http:
        yield OperatedService(server[0], http, server[1])


async def test_health_answers_all_through_a_generation_and_a_load(operated: OperatedService) -> None:
    """C2: answers come while both go on; were the event loop or the process held, there would be
    none between start and end.
    """
    work = asyncio.gather(
        operated.complete(),
        operated.http.post("/adapters", json={"id": "slow", "source": "noise"}),
    )
    answers = []
    while not work.done():
        answers += [await operated.http.get(path) for path in ("/health", "/ready", "/adapters", "/metrics")]
    assert [one.status_code for one in await work] == [200, 201]
    assert len(answers) >= 20
    assert {one.status_code for one in answers} == {200}


async def test_an_adapter_registered_over_http_is_there_for_every_connection(
    operated: OperatedService,
) -> None:
    """C1: one registry, whoever asks."""
    for _ in range(20):
        async with httpx.AsyncClient(base_url=operated.server.url, trust_env=False) as fresh:
            assert (await fresh.get("/adapters/slow")).status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/generate_stream"])
async def test_a_stream_comes_token_by_token_and_nothing_on_the_way_may_hold_it(
    operated: OperatedService, path: str
) -> None:
    """C5: the headers, no compression, and the first event while the engine still works."""
    native = {"inputs": "Hi", "parameters": {"max_new_tokens": LENGTH, "ignore_eos_token": True}}
    body = native if path == "/generate_stream" else operated.body(stream=True)
    async with operated.http.stream(
        "POST", path, json=body, headers={"accept-encoding": "gzip, br, zstd"}
    ) as response:
        lines = response.aiter_lines()
        assert (await anext(lines)).startswith("data: {")
        assert await operated.value("num_requests_running") == 1, "it goes on"
        rest = [line async for line in lines if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert (response.headers["cache-control"], response.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert "content-encoding" not in response.headers
    assert (rest[-1] == "data: [DONE]") == (path == "/v1/completions")


async def test_a_parameter_is_refused_before_the_stream_and_the_next_request_is_served(
    operated: OperatedService,
) -> None:
    """B11: JSON with the dialect's status, not a stream that hangs."""
    answer = await operated.complete(stream=True, repetition_penalty=0)
    assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
    assert "repetition_penalty" in answer.json()["error"]["message"]
    assert (await operated.complete(max_tokens=2)).status_code == 200


async def test_work_stops_when_its_client_leaves(operated: OperatedService) -> None:
    """B12: of a stream and of a whole answer; the rows are free for who waits."""
    before = await operated.value("generation_tokens_total")
    async with operated.streaming() as (_, events):
        for _ in range(3):
            await anext(events)
    with pytest.raises(httpx.ReadTimeout):
        await operated.http.post("/v1/completions", json=operated.body(), timeout=0.05)
    await operated.until_idle()
    assert await operated.value("generation_tokens_total") - before < 2 * LENGTH
    assert (await operated.samples())["request_failure_total", "cancelled"] >= 2


async def test_prompts_up_to_the_context_are_answered_and_beyond_it_refused_with_numbers(
    operated: OperatedService,
) -> None:
    """B14: the prompt that just fits is counted right; one token more is refused; so are an empty
    prompt and a body over its limit.
    """
    fits = await operated.complete(prompt=[5] * (CONTEXT - 1), max_tokens=1)
    assert fits.json()["usage"] == making.usage(CONTEXT - 1, 1)
    for prompt, tokens in (([5] * CONTEXT, 1), ([5] * (CONTEXT - 12), 50), ([5] * 9001, 1)):
        over = await operated.complete(prompt=prompt, max_tokens=tokens)
        assert (over.status_code, over.json()["error"]["code"]) == (400, "context_length_exceeded")
        assert all(
            str(number) in over.json()["error"]["message"] for number in (CONTEXT, len(prompt), tokens)
        )
    assert (await operated.complete(prompt="")).status_code == 400
    large = await operated.complete(prompt="a" * 5_000_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "payload_too_large")


async def test_adapters_that_came_and_went_leave_no_series_behind(operated: OperatedService) -> None:
    """C4: as many series after as before, no list in a label, no counter that falls."""
    await operated.complete(model="slow", max_tokens=1)
    before = await operated.samples()
    for i in range(30):
        (await operated.http.post("/adapters", json={"id": f"c4-{i}", "source": "noise"})).raise_for_status()
        (await operated.complete(model=f"c4-{i}", max_tokens=1)).raise_for_status()
        assert ("adapter_requests_total", f"c4-{i}") in await operated.samples()
        (await operated.http.delete(f"/adapters/c4-{i}")).raise_for_status()
    after = await operated.samples()
    assert set(after) - set(before) == set()
    assert not [key for key in after for value in key[1:] if "," in value]
    assert not [
        key for key in before if key[0].endswith(("_total", "_count", "_bucket")) and after[key] < before[key]
    ]


@pytest.mark.parametrize("id", ["..", "%2e%2e", "a/../../x", "..%2f..%2fx", "%00x", "a%00b"])
async def test_no_id_reaches_outside(operated: OperatedService, id: str) -> None:
    """C6: raw on the wire, where no client has tidied the path."""
    for method in ("GET", "DELETE"):
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(operated.server.url).port)
        writer.write(f"{method} /adapters/{id} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
        status = int((await reader.readline()).split()[1])
        writer.close()
        assert status in (404, 422)
    assert (operated.adapter / making.WEIGHTS).exists()


async def test_sigterm_lets_a_stream_end_whole_refuses_new_requests_and_ends_well(
    operated: OperatedService,
) -> None:
    """C3, and so the last one here: every token and [DONE] come, others are told 503, and no
    process stays.
    """
    process = psutil.Process(operated.server.pid)
    tree = [process, *process.children(recursive=True)]
    async with operated.streaming(max_tokens=4 * LENGTH) as (_, events):
        got = [await anext(events) for _ in range(3)]
        tree[0].send_signal(signal.SIGTERM)
        async with asyncio.timeout(20):
            while (await operated.http.get("/health")).json()["state"] != "draining":  # noqa: ASYNC110 - as above
                await asyncio.sleep(0)
        late = await operated.complete(max_tokens=1)
        got += [event async for event in events]
    assert (late.status_code, late.json()["error"]["code"]) == (503, "not_ready")
    assert got[-1] == "[DONE]"
    last = json.loads(got[-2])["choices"][0]
    assert last["finish_reason"] == "length"
    assert len(got) >= 4 * LENGTH
    _, alive = await asyncio.to_thread(psutil.wait_procs, tree, 30)
    assert alive == []
