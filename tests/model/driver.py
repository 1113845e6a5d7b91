"""Drives the real model runner by hand, without a scheduler: places adapters, prefills in chunks, decodes
all running rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from service.core.adapter import Adapter, ExecutionPath, LoraLayerSpec, Placement
from service.core.manifest import compute_digest, read_manifest
from service.core.request import Request, Token
from service.core.sampling import Sampling
from service.engine.kv_blocks import count_blocks
from service.engine.plan import Chunk
from service.model.runner import ModelRunner
from service.model.sampler import Outcome, Sampler
from tests import making, pretended


def plan_of(folder: Path, base: Path) -> Adapter:
    """The worker's view of a LoRA folder, read off PEFT's own layers."""
    model: Any = making.served(base, folder)
    specs = tuple(
        spec_of(name, module)
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    )
    config, weights = str(folder / making.CONFIG), folder / making.WEIGHTS
    rank = max(spec.rank for spec in specs)
    files, size = read_manifest(folder), weights.stat().st_size
    digest = compute_digest(files)
    return Adapter(digest, config, str(weights), ExecutionPath.POOL, rank, size, specs, files=files)


def spec_of(name: str, module: Any) -> LoraLayerSpec:
    return LoraLayerSpec(
        name.removeprefix("base_model.model."),
        module.r["default"],
        module.scaling["default"],
        f"{name}.lora_A.weight",
        f"{name}.lora_B.weight",
        f"{name}.lora_magnitude_vector" if module.use_dora["default"] else None,
    )


def sample(sampler: Sampler, logits: Tensor, requests: Sequence[Request], index: int = 0) -> list[Outcome]:
    """Tokens of this index in each answer."""
    return sampler.launch_batch(logits, requests, [index] * len(requests)).read()


GREEDY = Sampling()


@dataclass
class Job:
    prompt: Sequence[int]
    n: int
    adapter: str | None = None
    sampling: Sampling = GREEDY
    prompt_logprobs: int | None = None
    tokens: list[Token] = field(default_factory=list)
    prompt_tokens: list[Token] = field(default_factory=list)
    row: int = -1
    done: int = 0  # positions written

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


class RunnerDriver:
    """Runs jobs together; each enters when one of `rows` places is free and its turn has come, and leaves
    when it has its tokens. The blocks of a place lie scattered.
    """

    def __init__(self, runner: ModelRunner, rows: int) -> None:
        self.runner, self.rows, self.at, self.count = runner, rows, 0, 0
        self.requests: dict[int, Request] = {}
        self.waits = 0  # for a pretended GPU, in the middle of a step

    def place(self, adapter: Adapter, start: int | None = None) -> None:
        at = self.at if start is None else start
        self.runner.load_adapter(adapter)
        self.runner.place_adapter(Placement(adapter.digest, at, adapter.pool_rows))
        self.at = at + adapter.pool_rows

    def remove(self, digest: str) -> None:
        self.runner.remove_adapter(digest)

    def run(self, jobs: Sequence[Job], chunk: int = 7) -> None:
        waiting, free = list(jobs), list(range(self.rows))
        running: list[Job] = []
        while waiting or running:
            if waiting and free:  # one enters a step, so that they join at different times
                running.append(self._enter(waiting.pop(0), free.pop(0)))
            running.sort(key=lambda job: self._tokens_left(job, chunk) > 1)
            self._step(running, chunk)
            for job in [job for job in running if len(job.tokens) == job.n]:
                running.remove(job)
                free.append(job.row)
                self.runner.finish_request(self.requests.pop(id(job)).id)

    @staticmethod
    def _tokens_left(job: Job, size: int) -> int:
        """The tokens of its next chunk."""
        return 1 if job.done >= len(job.prompt) else min(size, len(job.prompt) - job.done)

    def _enter(self, job: Job, row: int) -> Job:
        job.row = row
        self.count += 1
        prompt, scored = tuple(job.prompt), job.prompt_logprobs
        request = Request(self.count, prompt, job.n, job.adapter, job.sampling, prompt_logprobs=scored)
        self.requests[id(job)] = request
        return job

    def _step(self, running: Sequence[Job], size: int) -> None:
        chunks = [self._chunk(job, self.requests[id(job)], size) for job in running]
        waits = pretended.GPU.waits
        launched = self.runner.launch_chunks(chunks)
        self.waits += pretended.GPU.waits - waits
        results = launched.read()
        for job, chunk, result in zip(running, chunks, results, strict=True):
            job.done += len(chunk.tokens)
            job.prompt_tokens += result.prompt
            job.tokens += [result.token] if result.token else []

    def _chunk(self, job: Job, request: Request, size: int) -> Chunk:
        if job.done < len(job.prompt):
            part = tuple(job.prompt[job.done : job.done + size])
            end = job.done + len(part)
            is_last, blocks = end == len(job.prompt), self._blocks(job, end)
            return Chunk(request, blocks, job.done, part, is_last, slot=job.row)
        blocks, last = self._blocks(job, job.done + 1), (job.tokens[-1].id,)
        return Chunk(request, blocks, job.done, last, True, len(job.tokens), slot=job.row)

    def _blocks(self, job: Job, positions: int) -> tuple[int, ...]:
        return tuple(range(job.row, self.rows * count_blocks(positions), self.rows))
