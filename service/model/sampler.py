"""Chooses one token a row from its logits, each row by its own rules, whatever the company.

Random numbers are a function of (seed, index of the token), so a row's choice depends on nothing
but its own logits. Runs in the worker process; must not know adapters, rows of KV or text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.error_codes import ErrorCode
from ..core.request import Request, Token
from .draws import TOO_WIDE, WIDTHS, Draw, draw_tokens
from .grammar_masks import compute_mask, find_error
from .logit_edits import Row
from .sampling_batch import choose_tokens, make_batch, read_tokens
from .sampling_state import SamplingState
from .transfers import send_rows, take_rows


class SamplingError(Exception):
    """No token can be chosen for this row: the message has the reason, `code` the
    party at fault.
    """

    def __init__(self, message: str, code: ErrorCode = ErrorCode.INTERNAL) -> None:
        super().__init__(message)
        self.code = code


NOT_FINITE = (
    "the model's numbers for this request are not finite, or nothing is allowed next: no token can be chosen"
)
Outcome = Token | SamplingError


def sampling_error(request: Request) -> SamplingError:
    """An adapter may overflow what the base never does."""
    return SamplingError(NOT_FINITE, ErrorCode.ADAPTER_INVALID if request.adapter else ErrorCode.INTERNAL)


class Sampler:
    """`matcher_of` makes a grammar matcher from the grammar's text; it is only called for requests
    that have one. `draw` draws the tokens.
    """

    def __init__(self, matcher_of: Callable[[str], Any], draw: Draw = draw_tokens) -> None:
        self._matcher_of = matcher_of
        self._draw = draw
        self._states: dict[int, SamplingState] = {}

    def finish_request(self, request: int) -> None:
        self._states.pop(request, None)

    def sample_batch(self, logits: Tensor, requests: Sequence[Request]) -> list[Outcome]:
        """logits [n, vocabulary] → one token a row, or why it has none.

        Log probabilities are those of the unchanged logits, in float32.
        """
        outcomes: dict[int, Outcome] = {}
        rows: dict[int, Row] = {}
        for i, request in enumerate(requests):
            try:
                rows[i] = self._make_row(request, logits.shape[-1])
            except SamplingError as error:
                outcomes[i] = error
        for width in WIDTHS:
            outcomes |= _choose_outcomes(logits, rows, self._draw, width)
            rows = {i: row for i, row in rows.items() if i not in outcomes}
        chosen = [outcomes[i] for i in range(len(requests))]
        self._remember_tokens(requests, chosen)
        return chosen

    def _make_row(self, request: Request, vocabulary: int) -> Row:
        """With what its grammar allows next, which the host finds out while the device computes."""
        state = self._states.get(request.id)
        if state is None:
            state = self._states[request.id] = SamplingState(request)
        grammar = request.sampling.grammar
        if grammar is None:
            return Row(state)
        if state.matcher is None:
            state.matcher = self._matcher_of(grammar)
        reason = find_error(state.matcher)
        if reason is not None:
            raise SamplingError(f"the grammar cannot be followed any further: {reason}", ErrorCode.VALIDATION)
        return Row(state, compute_mask(state.matcher, request.eos, vocabulary))

    def _remember_tokens(self, requests: Sequence[Request], chosen: Sequence[Outcome]) -> None:
        """Once all are chosen: where that raised, a step that is run again finds no token consumed."""
        for request, token in zip(requests, chosen, strict=True):
            if isinstance(token, Token):
                state = self._states[request.id]
                state.add_token(token.id)
                if state.matcher is not None and token.id not in request.eos:
                    state.matcher.consume_token(token.id)


def _choose_outcomes(
    logits: Tensor, rows: Mapping[int, Row], draw: Draw, width: int | None
) -> dict[int, Outcome]:
    """Of the rows for whose masses `width` tokens are enough."""
    if not rows:
        return {}
    logits = take_rows(logits, send_rows([*rows], logits.device))
    batch = make_batch([*rows.values()], logits)
    tokens = read_tokens(logits, choose_tokens(logits, batch, draw, width), batch)
    return {
        i: token if token.id >= 0 else sampling_error(row.state.request)
        for (i, row), token in zip(rows.items(), tokens, strict=True)
        if token.id != TOO_WIDE
    }
