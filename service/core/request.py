"""Defines a request, its tokens and the events about it, for the API process and the worker process.

Integers and frozen values only; an adapter here is its digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from .adapter import Digest
from .error_codes import ErrorCode
from .sampling import Sampling

UNNUMBERED = 0  # the id of a request that the worker's client has not taken yet


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. The worker's client gives each a number of its own: its `id`.

    `eos` ends it (empty: nothing does); `prompt_logprobs` is as `Sampling.logprobs`, for the
    prompt's tokens. Of those that wait the one with the lowest `priority` is next.
    """

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    adapter: Digest | None = None
    sampling: Sampling = Sampling()
    eos: frozenset[int] = frozenset()
    prompt_logprobs: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """A token id; its natural-log probability where asked for; the best runner-ups, best first, as
    (id, logprob).
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Finish(StrEnum):
    LENGTH = "length"
    EOS = "eos_token"
    CANCELLED = "cancelled"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a request: a token, its end, or both.

    The eos token itself is reported. `finish` marks the one terminal event of each request.

    `prompt` holds the prompt's tokens with logprobs, once, with the first token, where asked for (the
    first one has none). `code` and `message` say why, for `FAILED` and for nothing else.
    """

    request: int
    token: Token | None = None
    finish: Finish | None = None
    prompt: tuple[Token, ...] = ()
    code: ErrorCode | None = None
    message: str = ""
