"""How a request of either dialect gets in: adapter, prompt, room in the context, tickets; and out
again, however it ends.

Knows no wire shapes. Whatever it takes is given back when the HTTP request is over, also when the
client has left.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from ...core.base_info import BaseInfo
from ...core.sampling import Sampling
from ...errors import BadRequest, ContextLengthExceeded
from ...telemetry import metrics
from ...telemetry.traces import TracePart
from ...text.stop_strings import StopStrings
from ...threads import TEXT, run_in
from ..middleware.access_log import logged_headers
from ..services import ReadyServices, Services, get_scope
from .answer import Answer

if TYPE_CHECKING:
    from ...catalog.registry import AdapterVersion
    from ...text.tokenizers import AdapterTokenizer

LONG = 20_000  # bytes of a body; what a longer one holds is tokenized off the event loop
# Characters that an adapter's template may make of a conversation, or so many for each token of the
# context:
RENDERED = 4_000_000
TOKEN = 8

Shown = Mapping[str, Any]
MANY = 2_000  # ids


@dataclass(frozen=True)
class GenerationAsk:
    """What is wanted of the engine, for every prompt of a request.

    The `param`s are the dialect's names for `max_tokens` and the prompt.
    """

    sampling: Sampling
    max_tokens: int | None
    default_tokens: int | None
    stop: Sequence[str] = ()
    count: int = 1
    seed: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    param: str = "max_tokens"
    prompt_param: str = "prompt"


@dataclass
class Admission:
    """What one HTTP request holds: the lease of its adapter and its tickets."""

    request: Request
    rooms: Services
    held: ExitStack
    generation: AdapterVersion | None = None
    answers: list[Answer] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def base(self) -> BaseInfo:
        card = self.rooms.client.base
        if card is None:
            raise self.rooms.not_ready("the base is loading")
        return card

    @property
    def adapter(self) -> dict[str, str] | None:
        """What every answer says of its adapter; None for the base."""
        return {"id": self.generation.id, "digest": self.generation.digest} if self.generation else None

    async def enter_adapter(self, id: str | None) -> AdapterTokenizer:
        """Leases this adapter until the request is over, and gives its voice;

        None is the base. Raises AdapterNotFound, NotReady.
        """
        if id is None:
            return self.rooms.text.base
        get_scope(self.request).require_visible(id)
        self.generation = found = self.held.enter_context(self.rooms.registry.lease_adapter(id))
        text = self.rooms.text
        known = text.find_cached(found.digest)
        return (
            known
            if known is not None
            else await run_in(TEXT, text.tokenizer_of, found.digest, found.folder, found.files)
        )

    def submit_prompt(
        self, voice: AdapterTokenizer, prompt: tuple[int, ...], ask: GenerationAsk
    ) -> list[Answer]:
        """Takes the tickets of one prompt.

        Raises BadRequest, ContextLengthExceeded, Overloaded, NotReady.
        """
        self._check_prompt(voice, prompt, ask)
        room = token_budget(len(prompt), ask, self.base.context)
        seed = ask.seed if ask.seed is not None else random.SystemRandom().getrandbits(52)
        made = [self._start_answer(voice, prompt, ask, room, (seed + i) % 2**64) for i in range(ask.count)]
        self.answers += made
        return made

    def _check_prompt(self, voice: AdapterTokenizer, prompt: tuple[int, ...], ask: GenerationAsk) -> None:
        size = self.base.vocab_size
        if not prompt:
            raise BadRequest(
                f"{ask.prompt_param}: the prompt is empty, it has no tokens", param=ask.prompt_param
            )
        if max(prompt) >= size:
            raise BadRequest(
                f"{ask.prompt_param}: no token has the id {max(prompt)}; the vocabulary has {size}",
                param=ask.prompt_param,
            )
        wrong = [id for id, _ in ask.sampling.logit_bias if id >= size]
        if wrong:
            raise BadRequest(
                f"logit_bias: no token has the id {wrong[0]}; the vocabulary has {size}", param="logit_bias"
            )
        # The worker keeps to it in the base's words
        if ask.sampling.grammar is not None and voice.words.own_vocabulary:
            raise BadRequest(
                "this adapter's tokenizer has another vocabulary than the base's, so no answer of it can be held to a format"
            )

    def _start_answer(
        self, voice: AdapterTokenizer, prompt: tuple[int, ...], ask: GenerationAsk, room: int, seed: int
    ) -> Answer:
        ticket = self.rooms.client.submit_request(
            prompt=prompt,
            max_tokens=room,
            adapter=self.generation.digest if self.generation else None,
            sampling=replace(ask.sampling, seed=seed),
            eos=frozenset() if ask.ignore_eos else self._possible_eos(voice.eos),
            prompt_logprobs=ask.prompt_logprobs,
        )
        self.held.callback(ticket.cancel_request)
        return Answer(ticket, voice, prompt, StopStrings(ask.stop), seed, ask.sampling.min_tokens)

    def _possible_eos(self, eos: frozenset[int]) -> frozenset[int]:
        """Those that the vocabulary has: an adapter's files may name any number, and the sampler
        would fail its whole batch on another.
        """
        return frozenset(id for id in eos if 0 <= id < self.base.vocab_size)

    async def finish_answers(self) -> None:
        """Waits for every answer, for a response that is sent whole.

        Raises Cancelled when the client leaves.
        """
        watcher = asyncio.create_task(self._watch_client())
        try:
            await asyncio.gather(*(answer.read_to_end() for answer in self.answers))
        finally:
            watcher.cancel()

    async def _watch_client(self) -> None:
        """The server tells that the client has left, but stops no handler that has not begun to
        answer.
        """
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        for answer in self.answers:
            answer.ticket.cancel_request()

    @property
    def prompt_tokens(self) -> int:
        """A prompt counts once, however many answers it gets."""
        return sum({id(answer.prompt): len(answer.prompt) for answer in self.answers}.values())

    @property
    def generated_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    def make_headers(self) -> dict[str, str]:
        """What is known once admitted."""
        told = {"x-prompt-tokens": str(self.prompt_tokens)}
        if self.generation is not None:
            told |= {"x-adapter-id": self.generation.id, "x-adapter-digest": self.generation.digest}
        return told

    def make_times(self) -> dict[str, str]:
        """What is known once finished, in milliseconds: of several answers the slowest one's."""
        tickets = [answer.ticket for answer in self.answers]
        queued = max((_milliseconds(t.submitted, t.started) for t in tickets), default=0.0)
        ran = max((_milliseconds(t.started, t.last) for t in tickets), default=0.0)
        each = ran / max(len(answer.tokens) for answer in self.answers) if self.generated_tokens else 0.0
        times = {"queue": queued, "inference": ran, "total": (time.monotonic() - self.began) * 1000}
        named = {f"x-{name}-time": f"{ms:.1f}" for name, ms in times.items()}
        return {"x-generated-tokens": str(self.generated_tokens), "x-time-per-token": f"{each:.1f}", **named}

    def make_outcome(self) -> dict[str, str | float]:
        """What the log line says of the end, once all answers have one, and of the first token."""
        tickets = [answer.ticket for answer in self.answers]
        first = [_milliseconds(t.submitted, t.first) for t in tickets if t.first is not None]
        told: dict[str, str | float] = {"first_token_ms": round(min(first), 1)} if first else {}
        endings = {
            str(answer.pieces[-1].ending)
            for answer in self.answers
            if answer.pieces and answer.pieces[-1].ending
        }
        return told | ({"outcome": ",".join(sorted(endings))} if endings else {})

    def trace_parts(self) -> list[TracePart]:
        """Waiting, prefill and decoding of each answer, as far as it came."""
        times = [
            (t.submitted, t.started, t.first, t.last) for t in (answer.ticket for answer in self.answers)
        ]
        named = [
            (name, found[i], found[i + 1])
            for found in times
            for i, name in enumerate(("queue", "prefill", "decode"))
        ]
        return [
            TracePart(name, start, end) for name, start, end in named if start is not None and end is not None
        ]


def _milliseconds(start: float | None, end: float | None) -> float:
    return max(0.0, end - start) * 1000 if start is not None and end is not None else 0.0


async def admit_request(request: Request, rooms: ReadyServices) -> AsyncIterator[Admission]:
    """A dependency, for its end runs in every case: also when the client leaves before the first
    byte, where no handler's would.
    """
    with ExitStack() as held:
        entered = Admission(request, rooms, held)
        held.callback(_count_request, entered)
        yield entered


Admitted = Annotated[Admission, Depends(admit_request)]


def _count_request(entered: Admission) -> None:
    if not entered.answers:
        return
    state = entered.request.state
    state.log = (
        entered.make_outcome() | logged_headers(entered.make_headers() | entered.make_times()) | state.log
    )  # a stream's own headers said less
    state.parts = entered.trace_parts()
    if entered.generation is not None:
        seconds = time.monotonic() - entered.began
        metrics.adapter_served(
            entered.generation.id, entered.prompt_tokens, entered.generated_tokens, seconds
        )


def token_budget(prompt: int, ask: GenerationAsk, context: int) -> int:
    """How many tokens may be made.

    Raises ContextLengthExceeded, with the numbers, when what was asked for does not fit.
    """
    left = context - prompt
    if ask.max_tokens is not None and ask.max_tokens <= left:
        return ask.max_tokens
    if ask.max_tokens is None and left > 0:
        return min(ask.default_tokens or left, left)
    wanted = ask.max_tokens if ask.max_tokens is not None else 1
    raise ContextLengthExceeded(
        f"the maximum context length is {context} tokens; the prompt has {prompt} and {ask.param} {wanted} makes {prompt + wanted}: "
        "shorten one of them",
        details={"context": context, "prompt_tokens": prompt, "max_tokens": wanted},
        param=ask.param,
    )


async def tokenize_text(
    request: Request, voice: AdapterTokenizer, text: str, special: bool = True
) -> tuple[int, ...]:
    """The text's ids, off the event loop where there is much, or where an adapter's own tokenizer
    may take any time.

    Tools and the number of messages count too.
    """
    large = voice.words.own or max(len(text), len(await request.body())) > LONG
    return await run_in(TEXT, voice.encode, text, special) if large else voice.encode(text, special)


async def chat_prompt(
    admitted: Admission, voice: AdapterTokenizer, messages: Sequence[Shown], tools: Sequence[Shown]
) -> tuple[int, ...]:
    """The ids of the conversation, up to where the assistant answers.

    Raises BadRequest with the template's own reason or the limit that it broke; Overloaded,
    NotReady.
    """
    wanted = voice.render_request(messages, tools, max(RENDERED, TOKEN * admitted.base.context))
    if voice.own_template:
        text = await admitted.rooms.text.renderer.render(wanted)
    elif len(await admitted.request.body()) > LONG:
        text = await run_in(TEXT, voice.render_here, wanted)
    else:
        text = voice.render_here(wanted)
    # The template has written the special tokens itself
    return await tokenize_text(admitted.request, voice, text, special=False)


async def decoded(voice: AdapterTokenizer, ids: Sequence[int]) -> str:
    """The text of the ids, made off the event loop where there are many."""
    return voice.decode(ids) if len(ids) < MANY else await run_in(TEXT, voice.decode, ids)
