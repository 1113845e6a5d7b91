"""A step that is launched: its tokens, which the device may still choose, and what comes of them once they
are read.

Nothing before `read` waits for the device. Runs in the worker process; must not know how a forward is
run, or why a step is what it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.base_info import BLOCK_TOKENS
from ..core.request import Token
from ..engine.plan import Chunk, Result
from . import kv
from .logprobs import PromptScores
from .sampler import NOT_FINITE, Outcome, Sampler, SamplingError
from .step_layout import FedTokens, StepLayout
from .transfers import Fetched, send_rows


class LaunchedStep:
    """Behind `engine.plan.Launched`.

    `logits` [kept, vocabulary] are those of each chunk; they may change as soon as this is made. `layouts`
    are those that ran, `after` is the step before, where a chunk follows one of it.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        logits: Sequence[Tensor],
        sampler: Sampler,
        attention: Sequence[kv.AttentionSpec],
        layouts: Sequence[StepLayout],
        after: LaunchedStep | None,
    ) -> None:
        self._chunks, self._attention, self._layouts, self._after = chunks, attention, layouts, after
        self.redrawn: frozenset[int] = frozenset()
        sampled = [i for i, chunk in enumerate(chunks) if chunk.sample]
        self._row_of = {index: row for row, index in enumerate(sampled)}
        if sampled:
            last = torch.stack([logits[i][-1] for i in sampled])
            asked = [chunks[i] for i in sampled]
            places = [chunk.generated for chunk in asked]
            self._sampled = sampler.launch_batch(last, [chunk.request for chunk in asked], places)
        self._unsampled = [i for i, chunk in enumerate(chunks) if not chunk.sample]
        if self._unsampled:
            greatest = torch.stack([logits[i].max() for i in self._unsampled])
            self._is_finite = Fetched(greatest.isfinite())
        self._scores = [_score_prompt(*pair) for pair in zip(chunks, logits, strict=True)]

    def feed_tokens(self, chunks: Sequence[Chunk]) -> FedTokens | None:
        """The tokens of those of the next step's chunks that follow one of this; any token where this
        step has none for them.
        """
        rows = [i for i, chunk in enumerate(chunks) if chunk.follows is not None]
        if not rows:
            return None
        tokens = self._sampled.tokens
        sources = [self._row_of[chunk.follows] for chunk in chunks if chunk.follows is not None]
        chosen = tokens[send_rows(sources, tokens.device)].clamp(min=0)
        return FedTokens(send_rows(rows, tokens.device), chosen)

    @torch.inference_mode()
    def read(self) -> list[Result]:
        try:
            results = self._read_results()
        except Exception:
            self.drop()
            raise
        for layout in self._layouts:
            layout.keep_states()
        self._after = None
        return results

    @torch.inference_mode()
    def drop(self) -> None:
        clear_written(self._attention, self._chunks)

    def _read_results(self) -> list[Result]:
        outcomes = self._read_outcomes()
        void = self._after.redrawn if self._after is not None else frozenset[int]()
        return [
            Result() if chunk.follows in void else self._make_result(index, outcomes.get(index))
            for index, chunk in enumerate(self._chunks)
        ]

    def _read_outcomes(self) -> dict[int, Outcome]:
        """The tokens of the chunks that sample, or why they have none; why others failed."""
        outcomes: dict[int, Outcome] = {}
        if self._row_of:
            outcomes |= zip(self._row_of, self._sampled.read(), strict=True)
            self.redrawn = frozenset(i for i, row in self._row_of.items() if row in self._sampled.redrawn)
        if self._unsampled:
            for index, is_finite in zip(self._unsampled, self._is_finite.read().tolist(), strict=True):
                if not is_finite:  # a request that ends now would leave its blocks so
                    outcomes[index] = SamplingError(NOT_FINITE)
        return outcomes

    def _make_result(self, index: int, outcome: Outcome | None) -> Result:
        if isinstance(outcome, SamplingError):
            clear_written(self._attention, [self._chunks[index]])
            return Result(error=str(outcome), code=outcome.code)
        scores = self._scores[index]
        first, following = scores if scores is not None else ((), None)
        prompt = first + following.read() if following is not None else ()
        return Result(outcome, prompt, redrawn=index in self.redrawn)


def clear_written(attention: Sequence[kv.AttentionSpec], chunks: Sequence[Chunk]) -> None:
    """Zeros what the chunks write: not-a-number would reach the blocks' next sequence."""
    places = [
        (chunk.blocks[position // BLOCK_TOKENS], position % BLOCK_TOKENS)
        for chunk in chunks
        for position in range(chunk.position, chunk.position + len(chunk.tokens))
    ]
    if places:
        kv.clear_positions(attention, *zip(*places, strict=True))


def _score_prompt(chunk: Chunk, logits: Tensor) -> tuple[tuple[Token, ...], PromptScores] | None:
    """The prompt's tokens that follow from this chunk's logits, behind the first of all, which has no
    log probability; None where they are not asked for.
    """
    wanted, prompt = chunk.request.prompt_logprobs, chunk.request.prompt
    if wanted is None or chunk.generated:
        return None
    first = (Token(prompt[0]),) if chunk.position == 0 else ()
    following = prompt[chunk.position + 1 : chunk.position + 1 + len(chunk.tokens)]
    return first, PromptScores(logits, following, wanted)
