"""Chooses one token a row from its logits, each row by its own rules, whatever the company.

Random numbers are a function of (seed, index of the token), so a row's choice depends on nothing
but its own logits. Runs in the worker process; must not know adapters, rows of KV or text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.error_codes import ErrorCode
from ..core.request import Request, Token
from .draws import NO_TOKEN, TOO_WIDE, WIDTHS, Draw, draw_tokens
from .grammar_masks import compute_mask, find_error
from .logit_edits import Row
from .sampling_batch import choose_tokens, fetch_tokens, make_batch, read_tokens
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

    def launch_batch(
        self, logits: Tensor, requests: Sequence[Request], places: Sequence[int]
    ) -> SampledBatch:
        """logits [n, vocabulary] → one token a row, or why it has none, once it is read; `places` are
        theirs in the answers.

        Log probabilities are those of the unchanged logits, in float32.
        """
        errors: dict[int, SamplingError] = {}
        rows: dict[int, Row] = {}
        for i, (request, place) in enumerate(zip(requests, places, strict=True)):
            try:
                rows[i] = self._make_row(request, place, logits.shape[-1])
            except SamplingError as error:
                errors[i] = error
        return SampledBatch(logits, requests, rows, errors, self._draw, self._remember_tokens)

    def _make_row(self, request: Request, place: int, vocabulary: int) -> Row:
        """With what its grammar allows next, which the host finds out while the device computes."""
        state = self._states.get(request.id)
        if state is None:
            state = self._states[request.id] = SamplingState(request)
        grammar = request.sampling.grammar
        if grammar is None:
            return Row(state, place)
        if state.matcher is None:
            state.matcher = self._matcher_of(grammar)
        reason = find_error(state.matcher)
        if reason is not None:
            raise SamplingError(f"the grammar cannot be followed any further: {reason}", ErrorCode.VALIDATION)
        return Row(state, place, compute_mask(state.matcher, request.eos, vocabulary))

    def _remember_tokens(self, requests: Sequence[Request], chosen: Sequence[Outcome]) -> None:
        """Once all are chosen: where that raised, a step that is run again finds no token consumed."""
        for request, token in zip(requests, chosen, strict=True):
            if isinstance(token, Token) and request.sampling.reads_answer:
                state = self._states[request.id]
                state.add_token(token.id)
                if state.matcher is not None and token.id not in request.eos:
                    state.matcher.consume_token(token.id)


class SampledBatch:
    """The tokens of a batch while they are chosen, on the device.

    `tokens` is int64 [n], below 0 where a row has none, or none yet: they are sought among the first of
    WIDTHS alone, and `redrawn` are the rows whose token `read` has sought further.
    """

    def __init__(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        rows: Mapping[int, Row],
        errors: Mapping[int, SamplingError],
        draw: Draw,
        remember: Callable[[Sequence[Request], Sequence[Outcome]], None],
    ) -> None:
        self._logits, self._requests, self._rows, self._errors = logits, requests, rows, errors
        self._draw, self._remember = draw, remember
        self._first = ChosenRows(logits, rows, draw, WIDTHS[0])
        self.tokens = self._spread_tokens()
        self.redrawn: frozenset[int] = frozenset()

    def read(self) -> list[Outcome]:
        """Waits for the device."""
        outcomes: dict[int, Outcome] = {**self._errors, **self._first.read()}
        left = {i: row for i, row in self._rows.items() if i not in outcomes}
        self.redrawn = frozenset(left)
        for width in WIDTHS[1:]:
            outcomes |= ChosenRows(self._logits, left, self._draw, width).read()
            left = {i: row for i, row in left.items() if i not in outcomes}
        chosen = [outcomes[i] for i in range(len(self._requests))]
        self._remember(self._requests, chosen)
        return chosen

    def _spread_tokens(self) -> Tensor:
        """Those of the rows that have rules, among all."""
        if not self._errors:
            return self._first.tokens
        tokens = self._logits.new_full((len(self._requests),), NO_TOKEN, dtype=torch.int64)
        if self._rows:
            tokens[send_rows([*self._rows], tokens.device)] = self._first.tokens
        return tokens


class ChosenRows:
    """A token for each of some rows of the logits, sought among so many of the best."""

    def __init__(self, logits: Tensor, rows: Mapping[int, Row], draw: Draw, width: int | None) -> None:
        self.rows = rows
        if rows:
            logits = take_rows(logits, send_rows([*rows], logits.device))
            self._batch = make_batch([*rows.values()], logits)
            self.tokens = choose_tokens(logits, self._batch, draw, width)
            self._fetched = fetch_tokens(logits, self.tokens, self._batch)

    def read(self) -> dict[int, Outcome]:
        """Of the rows for whose masses the width is enough."""
        if not self.rows:
            return {}
        tokens = read_tokens(self._fetched, self._batch)
        return {
            i: token if token.id >= 0 else sampling_error(row.state.request)
            for (i, row), token in zip(self.rows.items(), tokens, strict=True)
            if token.id != TOO_WIDE
        }
