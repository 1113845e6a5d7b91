"""One step as the scheduler plans it and the runner runs it (worker process).

Integers and frozen values only; must not know tensors, HTTP or text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..core.adapter import Adapter, Digest, Placement
from ..core.base_info import BLOCK_TOKENS
from ..core.error_codes import ErrorCode
from ..core.request import Request, Token

UNKNOWN = -1  # a token that the device alone knows yet


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of one sequence's tokens in a step: `tokens` are written from `position` on.

    `blocks` are the sequence's KV blocks, up to the last token's; `slot` is its number among those that
    run, for what layers keep of it beside KV. `sample`: the token after the last one
    is wanted. `generated` tokens of the answer are there already. `asleep`: its adapter does not act on
    these tokens. `follows`: its one token, UNKNOWN here, is the one that the chunk of this index samples
    in the step before, which still runs.
    """

    request: Request
    blocks: tuple[int, ...]
    position: int
    tokens: tuple[int, ...]
    sample: bool
    generated: int = 0
    asleep: bool = False
    slot: int = 0
    follows: int | None = None

    @property
    def adapter(self) -> Digest | None:
        """The adapter that acts on these tokens."""
        return None if self.asleep else self.request.adapter

    @property
    def written_blocks(self) -> tuple[int, ...]:
        """The blocks that the tokens are written to: no other sequence has them."""
        return self.blocks[self.position // BLOCK_TOKENS :]


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: `remove` frees pool rows, `place` fills some, then the chunks run.

    Chunks of one token come first. All chunks run as one batch, but those of adapters on the PEFT
    path: each such adapter's run as a batch of their own.
    """

    remove: tuple[Digest, ...] = ()
    place: tuple[Placement, ...] = ()
    chunks: tuple[Chunk, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one chunk: the sampled token, if the chunk has `sample`, and the prompt's tokens
    with logprobs.

    `error` says why there is no token where one was wanted: this request fails with `code`, its
    neighbours go on. `redrawn`: the token is not the one that a step launched ahead has gone on from.
    """

    token: Token | None = None
    prompt: tuple[Token, ...] = ()
    error: str = ""
    code: ErrorCode = ErrorCode.INTERNAL
    redrawn: bool = False


class Launched(Protocol):
    """A step that the device may still compute; either is called once."""

    def read(self) -> Sequence[Result]:
        """Waits for the step: one result for each chunk, in order. Raises as `Runner.run_chunks`.

        That of a chunk that follows a redrawn token says nothing.
        """

    def drop(self) -> None:
        """Nobody wants the results: its chunks leave nothing where they write."""


class Runner(Protocol):
    """The model as the worker's loop sees it; `tests/fakes.py` has one without tensors.

    `runs_ahead`: it pays to launch a step before the one before it is read.
    """

    runs_ahead: bool

    def load_adapter(self, adapter: Adapter) -> int:
        """Reads an adapter into host memory (called off the step's thread); its bytes.

        Raises AdapterInvalid.
        """

    def evict_adapter(self, digest: Digest) -> int:
        """Forgets the adapter in host memory, if it is there; the bytes freed."""

    def place_adapter(self, placement: Placement) -> None:
        """Copies an adapter from host memory into free pool rows."""

    def remove_adapter(self, digest: Digest) -> None:
        """Frees the adapter's pool rows, if it has any; host memory keeps it."""

    def run_chunks(self, chunks: Sequence[Chunk]) -> Sequence[Result]:
        """Runs the chunks of a step; one result each, in order.

        Chunks that raise may be run again: no token was chosen, and nothing is left where they write.
        """

    def launch_chunks(self, chunks: Sequence[Chunk], after: Launched | None = None) -> Launched:
        """Begins what `run_chunks` does, without a wait for the device.

        `after`, made by this too, is the step that chunks with `follows` mean; it is not read yet.
        Raises as `run_chunks`.
        """

    def finish_request(self, request: int) -> None:
        """The request has ended: whatever was kept for it (random state, grammar) goes."""
