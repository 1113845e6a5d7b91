"""Rows of a runner that decode together, one step at a time, without a scheduler.

Knows no figures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from service.core.adapter import Adapter
from service.core.request import Request, Token
from service.core.sampling import Sampling
from service.engine.kv_blocks import count_blocks
from service.engine.plan import Chunk, Plan, Result
from service.model.runner import ModelRunner

CONTEXT = 1024  # of every row, in tokens
Mix = Mapping[int, Adapter | None]  # who speaks, by row
Said = Mapping[str, Mapping[int, Token]]  # by what was timed, and row


class Decoding:
    """Some rows of a runner after their prompts;

    `step` decodes one token more of each. Raises RuntimeError where a row has none.

    `after`: of these rows, which have read the prompts already. Whose they were changes what they
    say, and not how long it takes.
    """

    def __init__(
        self,
        runner: ModelRunner,
        prompts: list[list[int]],
        mix: Mix,
        logprobs: int | None = None,
        after: Decoding | None = None,
    ) -> None:
        self.runner, self.sampling, self.length = runner, Sampling(logprobs=logprobs), len(prompts[0])
        self.requests = {row: self._request(row, prompts[row], adapter) for row, adapter in mix.items()}
        self.tokens: dict[int, list[Token]] = {row: [] for row in mix}
        if after is not None:
            self.tokens = {row: after.tokens[row][:1] for row in mix}
            return
        for row, request in self.requests.items():
            chunk = Chunk(request, blocks_of(row, self.length), 0, request.prompt, True)
            self._take([row], runner.run_step(Plan(chunks=(chunk,))))

    def _request(self, row: int, prompt: Sequence[int], adapter: Adapter | None) -> Request:
        return Request(row, tuple(prompt), CONTEXT, adapter.digest if adapter else None, self.sampling)

    def _take(self, rows: Sequence[int], results: Sequence[Result]) -> None:
        for row, result in zip(rows, results, strict=True):
            if result.token is None:
                raise RuntimeError(f"row {row}: {result.error}")
            self.tokens[row].append(result.token)

    def step(self, fed: Mapping[int, int] | None = None) -> float:
        """Seconds until its tokens are on the host.

        `fed`: go on from these tokens, by row, instead of from the last ones.
        """
        made = len(next(iter(self.tokens.values())))
        last = fed or {row: tokens[-1].id for row, tokens in self.tokens.items()}
        at = self.length + made - 1
        chunks = [
            Chunk(request, blocks_of(row, at + 1), at, (last[row],), True, made)
            for row, request in self.requests.items()
        ]
        plan = Plan(chunks=tuple(chunks))
        began = time.perf_counter()
        results = self.runner.run_step(plan)
        seconds = time.perf_counter() - began
        self._take(list(self.requests), results)
        return seconds

    def end(self) -> None:
        for request in self.requests.values():
            self.runner.finish_request(request.id)


def blocks_of(row: int, positions: int) -> tuple[int, ...]:
    """The KV blocks of a row: each has its own, enough for CONTEXT positions."""
    first = row * count_blocks(CONTEXT)
    return tuple(range(first, first + count_blocks(positions)))


def apart(one: Token, other: Token) -> float:
    """The largest difference of log probabilities, over the tokens that both name."""
    theirs = dict(other.top)
    return max((abs(value - theirs[id]) for id, value in one.top if id in theirs), default=float("inf"))
