"""Says how a sequence's tokens are chosen, in the API process and in the worker process.

Values only; must not know tensors.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence's next token is chosen. The defaults are greedy with nothing changed.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0, `typical_p` 1, penalties 1 / 0 / 0
    are off. `logit_bias` pairs are (token id, added value). `logprobs` is the number of runner-up
    tokens wanted beside the chosen one's log probability (0: only the chosen one's); None: none.
    `grammar` is an llguidance grammar as JSON text. No eos is sampled before `min_tokens`. `bad_words` are
    sequences of ids that the answer should not hold; only where nothing else is allowed may one come.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    grammar: str | None = None
    min_tokens: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def reads_answer(self) -> bool:
        """Whether a token is chosen by the answer's tokens before it, and not by their number alone."""
        has_penalty = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1, 0, 0)
        return has_penalty or bool(self.bad_words) or self.grammar is not None
