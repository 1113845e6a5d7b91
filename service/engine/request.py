"""The engine's nouns: requests, plans, events, and the messages between the API process and the worker.

Integers and frozen values only. Must not know tensors, HTTP, text or adapter names: an adapter here is its digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Protocol

from ..manifest import Manifest

Digest = str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one sequence's next token is chosen. The defaults are greedy with nothing changed.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0, `typical_p` 1, penalties 1 / 0 / 0 are off. `logit_bias` pairs are
    (token id, added value). `logprobs` is the number of runner-up tokens wanted beside the chosen one's log probability (0: only the
    chosen one's); None: none. `grammar` is an llguidance grammar as JSON text. No eos is sampled before `min_tokens`.
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


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to continue. `eos` ends it (empty: nothing does); `prompt_logprobs` is as `Sampling.logprobs`, for the prompt's tokens."""

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    adapter: Digest | None = None
    sampling: Sampling = Sampling()
    eos: frozenset[int] = frozenset()
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """A token id; its natural-log probability where asked for; the best runner-ups, best first, as (id, logprob)."""

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
    """What happened to a request. The eos token itself is reported. `finish` marks the one terminal event of each request.

    `prompt` holds the prompt's tokens with logprobs, once, with the first token, where asked for (the first one has none).
    `code` and `message` say why, for `FAILED`: the code is one of errors.py.
    """

    request: int
    token: Token | None = None
    finish: Finish | None = None
    prompt: tuple[Token, ...] = ()
    code: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Patch:
    """One adapted linear layer: y += scaling · (x Aᵀ) Bᵀ with A [rank, in], B [out, rank]; with `magnitude` [out], DoRA's gate on top.

    `module` is the layer's dotted name in the base; `a`, `b`, `magnitude` are tensor names in the weights file.
    """

    module: str
    rank: int
    scaling: float
    a: str
    b: str
    magnitude: str | None = None


@lru_cache(maxsize=64)
def shared(patches: tuple[Patch, ...]) -> tuple[Patch, ...]:
    """The first equal one: a thousand adapters of one recipe keep one list of layers."""
    return patches


class Lane(StrEnum):
    POOL = "pool"  # runs in the mixed batch
    SHADOW = "shadow"  # runs by PEFT itself, on a tree that shares the base's tensors


@dataclass(frozen=True, slots=True)
class Adapter:
    """Validated content, as the worker needs it. `rank` is the pool rows it takes (its largest rank; 0 in the shadow lane).

    `config` and `weights` are the paths of the two files that the worker reads, `files` all that the digest covers; `size` is the
    bytes of its tensors in host memory. `invocation`: the tokens that wake an activated LoRA; what comes before their last occurrence
    in a prompt runs as the base, and all of it where they do not occur.
    """

    digest: Digest
    config: str
    weights: str
    lane: Lane
    rank: int
    size: int
    patches: tuple[Patch, ...] = ()
    invocation: tuple[int, ...] = ()
    files: Manifest = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of one sequence's tokens in a step: `tokens` are written to KV row `row` from `position` on.

    `sample`: the token after the last one is wanted. A chunk with `generated` > 0 is a decode chunk: its one token is the one last sampled.
    `asleep`: its adapter does not act on these tokens.
    """

    request: Request
    row: int
    position: int
    tokens: tuple[int, ...]
    sample: bool
    generated: int = 0
    asleep: bool = False

    @property
    def adapter(self) -> Digest | None:
        """Whose weights these tokens meet."""
        return None if self.asleep else self.request.adapter


@dataclass(frozen=True, slots=True)
class Fork:
    """The first `length` positions of KV row `source` are copied to row `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Pool rows [start, start + rank) now hold this adapter."""

    digest: Digest
    start: int
    rank: int


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: `remove` frees pool rows, `place` fills some, `forks` copy KV, then the chunks run.

    Decode chunks come first. All chunks run as one batch, but those of shadow adapters: each shadow adapter's run as a batch of their own.
    """

    remove: tuple[Digest, ...] = ()
    place: tuple[Placement, ...] = ()
    forks: tuple[Fork, ...] = ()
    chunks: tuple[Chunk, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What the runner made of one chunk: the sampled token, if one was asked for, and the prompt's tokens with logprobs.

    `error` says why there is no token where one was asked for: this request fails with `code`, its neighbours go on.
    """

    token: Token | None = None
    prompt: tuple[Token, ...] = ()
    error: str = ""
    code: str = "internal"


class Runner(Protocol):
    """The muscle as the clock sees it. A fake one in the tests is ten lines."""

    def load(self, adapter: Adapter) -> int:
        """Reads an adapter into host memory (called off the step's thread); its bytes. Raises AdapterInvalid."""

    def unload(self, digest: Digest) -> int:
        """Forgets the adapter in host memory, if it is there; the bytes freed."""

    def step(self, plan: Plan) -> Sequence[Result]:
        """Runs the plan; one result per chunk, in order.

        One that raises may be run again: no token was chosen. One chunk alone that raises leaves nothing in its row.
        """

    def finish(self, request: int) -> None:
        """The request has ended: whatever was kept for it (random state, grammar) goes."""


# ---- messages, API process → worker


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    request: int


@dataclass(frozen=True, slots=True)
class Offer:
    """This content exists and may be asked for. `preload`: read it into host memory now, and place it while there is room."""

    adapter: Adapter
    pinned: bool = False
    preload: bool = False


@dataclass(frozen=True, slots=True)
class Pin:
    digest: Digest
    pinned: bool


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget this content everywhere; sequences that still run on it finish first."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Shutdown:
    pass


Order = Submit | Cancel | Offer | Pin | Drop | Shutdown

# ---- messages, worker → API process


class Tier(StrEnum):
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True)
class Progress:
    """Still loading: what is being done, and how much of it (0 to 1)."""

    stage: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Linear:
    """Adapted layers that share a last name and a shape."""

    name: str
    in_features: int
    out_features: int
    count: int


@dataclass(frozen=True, slots=True)
class LayerLimit:
    """Linear layers that no mixed batch can adapt: their name pattern, class, and why. `by_peft`: PEFT can."""

    pattern: str
    kind: str
    reason: str
    by_peft: bool


def name_pattern(module: str) -> str:
    """A layer's dotted name with * for each number: what layers of one kind share."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


@dataclass(frozen=True, slots=True)
class BaseCard:
    """The resident base: exact numbers, made by the worker once it is loaded.

    Bytes are resident bytes, by dtype. `linears` are the layers that can be adapted, `limits` what stands in the way of others.
    `rope` says which rotary factors serve every sequence, where the base has several; else it is None.
    """

    folder: str
    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    context: int
    quantization: str
    dtype: str
    device: str
    resident_bytes: dict[str, int]
    linears: tuple[Linear, ...]
    pool_rank: int
    rows: int
    rope: dict[str, Any] | None = None
    limits: tuple[LayerLimit, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    base: BaseCard


@dataclass(frozen=True, slots=True)
class Broken:
    """The worker cannot start and a restart would not help; `reason` is fit for a person."""

    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """An adapter's way from disk to host memory ended, or the base turned out unable to run it (`error` says so).

    `error` is empty when it went well.
    """

    digest: Digest
    seconds: float
    size: int
    error: str = ""


@dataclass(frozen=True, slots=True)
class Gauges:
    running: int = 0
    waiting: int = 0
    kv_used: int = 0  # positions held by running sequences
    kv_total: int = 0
    pool_used: int = 0
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One message per step. `started` requests have got a row; `tiers` are changes of residency; `dropped` says the bytes freed."""

    events: tuple[Event, ...] = ()
    started: tuple[int, ...] = ()
    tiers: tuple[tuple[Digest, Tier], ...] = ()
    loads: tuple[Load, ...] = ()
    placed: tuple[tuple[Digest, float], ...] = ()  # digest, seconds
    pool: tuple[Placement, ...] | None = None  # the pool's layout, when it changed
    evicted: tuple[tuple[Digest, Tier, float], ...] = ()  # digest, the tier it left, seconds
    dropped: tuple[tuple[Digest, int], ...] = ()
    gauges: Gauges = Gauges()


Notice = Progress | Ready | Broken | Report
