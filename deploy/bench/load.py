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
from typing import Any, NamedTuple

import httpx

# Each is one token, with the space before it, in the tokenizers of SmolLM2, Llama and Qwen.
COMMON = """the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more if
out so up said what its about than into them can only other time new some"""
WORDS = COMMON.split()
NUMBERED = "lora:"  # what the number of an adapter of llama.cpp follows, for these have no names
GREEDY: dict[str, Any] = {"temperature": 0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": 1}


class Lengths(NamedTuple):
    """Words of a prompt: from `least` to `most`, n of them with a weight of 1 / n."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Raises ValueError unless it reads N or LEAST-MOST."""
        least, _, most = text.partition("-")
        found = cls(int(least), int(most or least))
        if not 0 < found.least <= found.most:
            raise ValueError(f"{text!r} is not N or LEAST-MOST")
        return found

    def draw(self, seed: str) -> int:
        numbers = range(self.least, self.most + 1)
        return random.Random(seed).choices(numbers, [1 / n for n in numbers])[0]


SIXTY_FOUR = Lengths(64, 64)


@dataclass(frozen=True)
class Shape:
    """What requests are like: `words` of their own behind `shared` words that all begin with, `tokens`
    to be generated; greedy unless `sampled`.
    """

    words: Lengths = SIXTY_FOUR
    tokens: int = 64
    shared: int = 0
    sampled: bool = False

    def write_prompt(self, seed: str, number: int) -> str:
        """Prompts of one seed begin alike; another seed's differ from the first word on."""
        start = [prompt(self.shared, f"{seed} shared")] if self.shared else []
        own = f"{seed}/{number}"
        return " ".join([*start, prompt(self.words.draw(own), own)])


@dataclass(frozen=True)
class Job:
    """One request to be made: `tokens` are generated exactly, whatever the model would like."""

    model: str
    prompt: str
    tokens: int
    sampled: bool = False


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


def jobs(models: Sequence[str], popularity: str, count: int, shape: Shape, seed: int) -> list[Job]:
    """Requests that no other seed makes."""
    return [
        Job(model, shape.write_prompt(str(seed), i), shape.tokens, shape.sampled)
        for i, model in enumerate(picks(models, popularity, count, seed))
    ]


def address(model: str) -> dict[str, Any]:
    """The fields of a request that ask for a model, as `servers.models` names it."""
    if model.startswith(NUMBERED):
        return {"lora": [{"id": int(model.removeprefix(NUMBERED)), "scale": 1.0}]}
    return {"model": model}


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
        **address(job.model),
        "prompt": job.prompt,
        "max_tokens": job.tokens,
        "min_tokens": job.tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **(SAMPLED if job.sampled else GREEDY),
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
