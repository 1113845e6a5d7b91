"""The load: streaming completions against any OpenAI-compatible server, by clients in a closed loop
or by arrivals in an open one.

Knows HTTP and a clock; must not know which server it talks to. All times are seconds.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import httpx

# Each is one token, with the space before it, in the tokenizers of SmolLM2, Llama and Qwen.
COMMON = """the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more if
out so up said what its about than into them can only other time new some"""
WORDS = COMMON.split()


@dataclass(frozen=True)
class Job:
    """One request to be made: `tokens` are generated exactly, whatever the model would like."""

    model: str
    prompt: str
    tokens: int


@dataclass(frozen=True)
class Sample:
    """One request made.

    `first` is from when it was due to its first chunk, `gaps` lie between chunks, `whole` ends with
    the stream.
    """

    model: str
    first: float = 0.0
    gaps: tuple[float, ...] = ()
    whole: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None


@dataclass
class Stream:
    """What has come of one stream so far."""

    arrivals: list[float] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)

    def take(self, line: str) -> None:
        """One line of the event stream. Raises RuntimeError when it carries an error."""
        if not line.startswith("data:") or line.endswith("[DONE]"):
            return
        event = json.loads(line[5:])
        if "error" in event:
            raise RuntimeError(json.dumps(event["error"]))
        if event.get("choices"):
            self.arrivals.append(time.perf_counter())
        self.usage = event.get("usage") or self.usage


def prompt(words: int, seed: str) -> str:
    """That many words, about as many tokens; another seed differs from the first word on, so that
    no prefix cache helps.
    """
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def picks(models: Sequence[str], popularity: str, count: int, seed: int) -> list[str]:
    """Which model each of `count` requests asks for.

    `round-robin`, `uniform`, or `zipf:S`, where the k-th model has weight k^-S.
    """
    if popularity == "round-robin":
        return [models[i % len(models)] for i in range(count)]
    exponent = 0.0 if popularity == "uniform" else float(popularity.removeprefix("zipf:"))
    weights = [(k + 1) ** -exponent for k in range(len(models))]
    return random.Random(seed).choices(models, weights, k=count)


def jobs(
    models: Sequence[str], popularity: str, count: int, *, words: int, tokens: int, seed: int
) -> list[Job]:
    return [
        Job(model, prompt(words, f"{seed}/{i}"), tokens)
        for i, model in enumerate(picks(models, popularity, count, seed))
    ]


def connect(url: str, key: str | None = None) -> httpx.AsyncClient:
    """A client without a limit on connections: a queue in here would be taken for the server's."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(
        base_url=url, headers=headers, timeout=600, limits=httpx.Limits(max_connections=None), trust_env=False
    )


async def ask(client: httpx.AsyncClient, job: Job, due: float) -> Sample:
    """Makes one request.

    `due` is the reading of the clock from which its times count. Failures are in the sample.
    """
    body = {
        "model": job.model,
        "prompt": job.prompt,
        "max_tokens": job.tokens,
        "min_tokens": job.tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stream = Stream()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code} {(await response.aread())[:200]!r}")
            async for line in response.aiter_lines():
                stream.take(line)
        if not stream.arrivals:
            raise RuntimeError("the stream ended without a token")
    except (httpx.HTTPError, RuntimeError) as error:
        return Sample(job.model, error=f"{type(error).__name__}: {error}")
    times = stream.arrivals
    return Sample(
        job.model,
        first=times[0] - due,
        gaps=tuple(b - a for a, b in pairwise(times)),
        whole=time.perf_counter() - due,
        tokens=stream.usage.get("completion_tokens", len(times)),
        prompt_tokens=stream.usage.get("prompt_tokens", 0),
    )


async def closed(client: httpx.AsyncClient, work: Sequence[Job], clients: int) -> list[Sample]:
    """`clients` of them, each making its next request when its last one has ended."""
    left: Iterator[Job] = iter(work)

    async def one() -> list[Sample]:
        return [await ask(client, job, time.perf_counter()) for job in left]

    return [
        sample for samples in await asyncio.gather(*(one() for _ in range(clients))) for sample in samples
    ]


async def opened(client: httpx.AsyncClient, work: Sequence[Job], rate: float, seed: int) -> list[Sample]:
    """Poisson arrivals, `rate` a second, whether or not earlier ones are answered.

    One that starts late counts from when it was due.
    """
    clock, due, running = random.Random(seed), time.perf_counter(), []
    for job in work:
        due += clock.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.append(asyncio.create_task(ask(client, job, due)))
    return list(await asyncio.gather(*running))
