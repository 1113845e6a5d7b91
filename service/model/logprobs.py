"""Log probabilities of chosen tokens and of the best ones, of the unchanged logits, in float32.

Runs in the worker process; must not know how tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.request import Token
from .draws import MOST_LOGITS
from .transfers import Fetched, send_rows


def score_tokens(logits: Tensor, tokens: Tensor, wanted: int) -> Tensor:
    """Logits [n, vocabulary], tokens int64 [n] → float64 [n, 1 + 2 * wanted]: a token's log
    probability, the best tokens, theirs.
    """
    size = max(1, MOST_LOGITS // logits.shape[-1])
    parts = zip(torch.split(logits, size), torch.split(tokens, size), strict=True)
    return torch.cat([_score_part(*part, wanted) for part in parts])


def _score_part(logits: Tensor, tokens: Tensor, wanted: int) -> Tensor:
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(-1, tokens[:, None]).double()
    if not wanted:  # topk would look through all of them even then
        return chosen
    best = logprobs.topk(min(wanted, logprobs.shape[-1]))
    return torch.cat([chosen, best.indices.double(), best.values.double()], -1)


def read_token(token: int, numbers: Sequence[float]) -> Token:
    """A token of `score_tokens`' numbers."""
    logprob, *best = numbers
    count = len(best) // 2
    pairs = zip(best[:count], best[count:], strict=True)
    return Token(token, logprob, tuple((int(id), value) for id, value in pairs))


class PromptScores:
    """A prompt's tokens with their log probabilities, by one row of logits each; there may be more rows."""

    def __init__(self, logits: Tensor, tokens: Sequence[int], wanted: int) -> None:
        self._tokens = tokens
        if tokens:
            ids = send_rows(tokens, logits.device)
            self._numbers = Fetched(score_tokens(logits[: len(tokens)], ids, wanted))

    def read(self) -> tuple[Token, ...]:
        """Waits for the device."""
        numbers = self._numbers.read().tolist() if self._tokens else ()
        return tuple(read_token(*pair) for pair in zip(self._tokens, numbers, strict=True))
