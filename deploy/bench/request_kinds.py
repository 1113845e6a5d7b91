"""What other kinds of requests cost beside greedy ones: sampled, streamed, with log probabilities, with a
shared start, with several answers; each as a ratio within one run of one server.

Knows our own dialects; must not know how the server is started.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from . import load
from .load import SAMPLED, connect, prompt
from .servers import Server, models

CLIENTS = 16
TOP_K: dict[str, Any] = {"temperature": 1.0, "top_k": 40, "seed": 1}


class Kind(NamedTuple):
    """How a request is made: to which path, and with which fields beside the prompt and the length."""

    path: str
    fields: Mapping[str, Any]


COMPLETIONS = "/v1/completions"
GREEDY = Kind(COMPLETIONS, load.GREEDY)
KINDS = {
    "top_p": Kind(COMPLETIONS, SAMPLED),
    "top_k": Kind(COMPLETIONS, TOP_K),
    "top_logprobs": Kind(COMPLETIONS, {"temperature": 0, "logprobs": 5}),
    "generate_stream": Kind("/generate_stream", {}),
}


def make_body(kind: Kind, model: str, words: str, tokens: int) -> dict[str, Any]:
    """A request of `tokens` new tokens, whatever the model would like."""
    if kind.path == COMPLETIONS:
        length = {"max_tokens": tokens, "min_tokens": tokens, "ignore_eos": True}
        return {"model": model, "prompt": words, **length, **kind.fields}
    parameters = {"adapter_id": model, "max_new_tokens": tokens, "ignore_eos_token": True, **kind.fields}
    return {"inputs": words, "parameters": parameters}


async def send_all(client: httpx.AsyncClient, path: str, bodies: Sequence[Mapping[str, Any]]) -> float:
    """Sends all at once; the seconds until the last answer has ended."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(client.post(path, json=body) for body in bodies))
    for answer in answers:
        answer.raise_for_status()
    return time.perf_counter() - began


async def compare_kinds(server: Server, words: int, tokens: int, repeats: int) -> dict[str, float]:
    """Greedy requests' seconds over each kind's, the median of alternating runs with new prompts."""
    names = [models(server)[0]] * CLIENTS
    ratios: dict[str, list[float]] = {name: [] for name in KINDS}
    async with connect(server.url) as client:

        async def time_kind(kind: Kind, seed: str) -> float:
            prompts = [prompt(words, f"{seed} {i}") for i in range(CLIENTS)]
            bodies = [make_body(kind, name, text, tokens) for name, text in zip(names, prompts, strict=True)]
            return await send_all(client, kind.path, bodies)

        for kind in (GREEDY, *KINDS.values()):
            await time_kind(kind, f"warm {kind}")
        for repeat in range(repeats):
            for name, kind in KINDS.items():
                before = await time_kind(GREEDY, f"{repeat} {name} before")
                own = await time_kind(kind, f"{repeat} {name}")
                after = await time_kind(GREEDY, f"{repeat} {name} after")
                ratios[name].append((before + after) / 2 / own)
    return {name: round(statistics.median(found), 3) for name, found in ratios.items()}


def read_counters(server: Server) -> dict[str, float]:
    """The counters and gauges without labels, by name."""
    text = httpx.get(f"{server.url}/metrics", timeout=60, trust_env=False).text
    lines = [line.split() for line in text.splitlines() if line.startswith("adapterd_") and "{" not in line]
    return {name.removeprefix("adapterd_"): float(value) for name, value in lines}


def count_prefilled(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """The prompt tokens that were computed between two readings."""
    grown = {name: after[name] - before[name] for name in ("prompt_tokens_total", "prefix_cache_hits_total")}
    return grown["prompt_tokens_total"] - grown["prefix_cache_hits_total"]


async def share_start(server: Server, model: str, count: int, words: int, tail: int) -> dict[str, float]:
    """`count` requests at once under one adapter whose prompts begin alike: what is prefilled of them, and
    the most that they hold of the KV blocks.
    """
    start = prompt(words, f"shared by {count}")
    prompts = [f"{start} {prompt(tail, f'tail {i}')}" for i in range(count)]
    bodies = [make_body(GREEDY, model, text, 32) for text in prompts]
    before = read_counters(server)
    async with connect(server.url) as client:
        running = asyncio.create_task(send_all(client, COMPLETIONS, bodies))
        most = 0.0
        while not running.done():
            most = max(most, (await asyncio.to_thread(read_counters, server))["kv_cache_usage_ratio"])
            await asyncio.sleep(0.05)
        await running
    prefilled = count_prefilled(before, read_counters(server))
    return {f"prefilled_of_{count}": prefilled, f"kv_usage_of_{count}": round(most, 5)}


async def answer_all(server: Server, bodies: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of greedy requests that are sent all at once."""
    async with connect(server.url) as client:
        answers = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in bodies))
    return [answer.raise_for_status().json()["choices"][0]["text"] for answer in answers]


def make_crowd(model: str, count: int) -> list[dict[str, Any]]:
    """Requests whose prompts have 100 to 1,500 words, the k-th length with a weight of 1 / k."""
    lengths = range(100, 1600, 100)
    chosen = random.Random(5).choices(lengths, [1 / (k + 1) for k in range(len(lengths))], k=count)
    return [make_body(GREEDY, model, prompt(words, f"crowd {i}"), 64) for i, words in enumerate(chosen)]


async def count_answers(server: Server, model: str, words: int, answers: int) -> dict[str, float]:
    """What is prefilled for several answers to one prompt, and for one answer to another."""
    found = {}
    async with connect(server.url) as client:
        for n in (1, answers):
            body = make_body(Kind(COMPLETIONS, SAMPLED | {"n": n}), model, prompt(words, f"answers {n}"), 8)
            before = read_counters(server)
            await send_all(client, COMPLETIONS, [body])
            found[f"prefilled_n_{n}"] = count_prefilled(before, read_counters(server))
    return found
