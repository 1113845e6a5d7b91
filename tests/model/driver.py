"""Drives the real runner by hand, without a scheduler: places adapters, prefills in chunks, decodes
all running rows together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.core.adapter import Adapter, ExecutionPath, LoraLayerSpec, Placement
from service.core.manifest import compute_digest, read_manifest
from service.core.request import Request, Token
from service.core.sampling import Sampling
from service.engine.plan import Chunk, Plan
from service.model.runner import ModelRunner
from tests import making


def plan_of(folder: Path, base: Path) -> Adapter:
    """The worker's view of a LoRA folder, read off PEFT's own layers."""
    model: Any = making.served(base, folder)
    patches = tuple(
        LoraLayerSpec(
            name.removeprefix("base_model.model."),
            module.r["default"],
            module.scaling["default"],
            f"{name}.lora_A.weight",
            f"{name}.lora_B.weight",
            f"{name}.lora_magnitude_vector" if module.use_dora["default"] else None,
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and module.lora_A
    )
    config, weights = folder / making.CONFIG, folder / making.WEIGHTS
    rank = max(p.rank for p in patches)
    files, size = read_manifest(folder), weights.stat().st_size
    return Adapter(
        compute_digest(files), str(config), str(weights), ExecutionPath.POOL, rank, size, patches, files=files
    )


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


class Driver:
    """Runs jobs together; each enters when a row is free and its turn has come, and leaves when it
    has its tokens.
    """

    def __init__(self, runner: ModelRunner, rows: int) -> None:
        self.runner, self.rows, self.at, self.count = runner, rows, 0, 0

    def place(self, adapter: Adapter, start: int | None = None) -> None:
        at = self.at if start is None else start
        self.runner.load_adapter(adapter)
        self.runner.run_step(Plan(place=(Placement(adapter.digest, at, adapter.rank),)))
        self.at = at + adapter.rank

    def remove(self, digest: str) -> None:
        self.runner.run_step(Plan(remove=(digest,)))

    def run(self, jobs: Sequence[Job], chunk: int = 7) -> None:
        waiting, free = list(jobs), list(range(self.rows))
        running: list[Job] = []
        requests: dict[int, Request] = {}
        while waiting or running:
            if waiting and free:  # one enters a step, so that they join at different times
                job = waiting.pop(0)
                job.row = free.pop(0)
                self.count += 1
                requests[id(job)] = Request(
                    self.count,
                    tuple(job.prompt),
                    job.n,
                    job.adapter,
                    job.sampling,
                    prompt_logprobs=job.prompt_logprobs,
                )
                running.append(job)
            running.sort(key=lambda j: j.done < len(j.prompt))
            chunks = [self._chunk(job, requests[id(job)], chunk) for job in running]
            for job, made, result in zip(
                running, chunks, self.runner.run_step(Plan(chunks=tuple(chunks))), strict=True
            ):
                job.done += len(made.tokens)
                job.prompt_tokens += result.prompt
                job.tokens += [result.token] if result.token else []
            for job in [j for j in running if len(j.tokens) == j.n]:
                running.remove(job)
                free.append(job.row)
                self.runner.finish_request(requests[id(job)].id)

    @staticmethod
    def _chunk(job: Job, request: Request, size: int) -> Chunk:
        if job.done < len(job.prompt):
            part = tuple(job.prompt[job.done : job.done + size])
            return Chunk(request, job.row, job.done, part, job.done + len(part) == len(job.prompt))
        return Chunk(request, job.row, job.done, (job.tokens[-1].id,), True, len(job.tokens))
