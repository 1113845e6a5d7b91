"""Admits a request of any dialect:
leases its adapter, checks its prompt and the context's length, takes its tickets, and releases all
of it however the request ends. API process.

Must not know wire shapes. Whatever it takes is given back when the HTTP request is over, also when
the client has left.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends
from fastapi import Request as HttpRequest

from ...catalog.aliases import USER
from ...catalog.ids import split_digest
from ...core.adapter import Digest
from ...core.base_info import BaseInfo
from ...core.request import UNNUMBERED, Request
from ...core.sampling import Sampling
from ...errors import AdapterdError, BadRequest, ContextLengthExceeded
from ...keys import Key
from ...telemetry import metrics
from ...telemetry.traces import TracePart
from ...telemetry.usage_file import UsageCounts
from ...text.stop_strings import StopStrings
from ...text.template_options import PLAIN, TemplateOptions
from ...threads import TEXT, run_in
from ..middleware.access_log import logged_headers
from ..services import ReadyServices, Services, get_scope
from .answer import Answer
from .key_limits import choose_priority

if TYPE_CHECKING:
    from ...catalog.mixes import Mix
    from ...catalog.registry import AdapterVersion
    from ...text.tokenizers import AdapterTokenizer

LARGE_BODY = 20_000  # bytes of a body; the text of a larger one is tokenized off the event loop
# Characters that an adapter's template may make of a conversation, or so many for each token of the
# context:
MAX_RENDERED = 4_000_000
RENDERED_PER_TOKEN = 8
MANY_IDS = 2_000  # more than these are decoded off the event loop
LONGEST_CALLER = 1_000  # characters that tell callers apart

JsonMapping = Mapping[str, Any]


@dataclass(frozen=True)
class GenerationOptions:
    """The generation options of a request, the same for each of its prompts.

    The `param`s are the dialect's names for `max_tokens` and the prompt. `stop_ids` end the answer as an
    eos does; `keep_stop` and `kept_special` are as in Answer.
    """

    sampling: Sampling
    max_tokens: int | None
    default_tokens: int | None
    stop: Sequence[str] = ()
    stop_ids: tuple[int, ...] = ()
    keep_stop: bool = False
    kept_special: frozenset[int] = frozenset()
    count: int = 1
    seed: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    priority: int | None = None
    param: str = "max_tokens"
    prompt_param: str = "prompt"


@dataclass
class Admission:
    """The resources of one HTTP request: the lease of its adapter and its tickets.

    `user` is the caller as the body names it, `alias` the alias that chose the adapter.
    """

    http_request: HttpRequest
    services: Services
    resources: ExitStack
    user: object = None
    alias: str | None = None
    version: AdapterVersion | None = None
    mix: Mix | None = None
    answers: list[Answer] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def base(self) -> BaseInfo:
        base = self.services.client.base
        if base is None:
            raise self.services.not_ready("the base is loading")
        return base

    @property
    def key(self) -> Key | None:
        """The caller's key; None where none is asked for."""
        return get_scope(self.http_request).key

    @property
    def adapter(self) -> dict[str, Any] | None:
        """The adapter, or the mix of several, as every answer names it; None for the base."""
        if self.mix is not None:
            parts = [asdict(part) for part in self.mix.parts]
            return {"id": None, "digest": self.mix.digest, "parts": parts}
        if self.version is None:
            return None
        return {"id": self.version.id, "digest": self.version.digest}

    @property
    def digest(self) -> Digest | None:
        """The content that the request runs on; None for the base."""
        leased = self.mix or self.version
        return leased.digest if leased else None

    @property
    def adapter_ids(self) -> list[str]:
        """The adapters that the request runs on, each once."""
        named = self.mix.parts if self.mix else [self.version] if self.version else []
        return list(dict.fromkeys(one.id for one in named))

    async def enter_adapter(self, name: str | None) -> AdapterTokenizer:
        """Leases the adapter of this name until the request is over, and returns its tokenizer.

        None is the base. Raises AdapterNotFound, BadRequest, DigestMismatch, NotReady.
        """
        tokenizers = self.services.tokenizers
        if name is None:
            return tokenizers.base
        chosen = await self._choose_adapter(name)
        version = self.resources.enter_context(self.services.registry.lease_adapter(chosen))
        self.version = version
        cached = tokenizers.find_cached(version.digest)
        if cached is not None:
            return cached
        return await run_in(TEXT, tokenizers.tokenizer_of, version.digest, version.folder, version.files)

    async def enter_mix(self, weights: Sequence[tuple[str, float]]) -> AdapterTokenizer:
        """Leases these adapters, by name and weight, until the request is over, and returns the base's
        tokenizer.

        Raises AdapterNotFound, AdapterUnsupported, BadRequest, DigestMismatch, NotReady.
        """
        tokenizer = self.services.tokenizers.base
        chosen = [(await self._choose_adapter(name), weight) for name, weight in weights]
        self.mix = self.resources.enter_context(self.services.registry.lease_mix(chosen))
        return tokenizer

    async def _choose_adapter(self, name: str) -> str:
        """The name as it is, or the one of an alias's target.

        Raises AdapterNotFound for what the key may not know of, BadRequest, and as
        `Registry.resolve_adapter`.
        """
        id, digest = split_digest(name)
        get_scope(self.http_request).require_visible(id)
        alias = self.services.registry.aliases.find_alias(id)
        if alias is None:
            await self.services.registry.resolve_adapter(id)
            return name
        if digest:
            raise BadRequest(f"{id!r} is an alias and has no digest of its own", param="model")
        self.alias = id
        return alias.choose_target(self._name_caller(alias.sticky)).name

    def _name_caller(self, sticky: str | None) -> str | None:
        """The caller that an alias knows again; None where it sticks to none, or the request names none."""
        named = self.user if sticky == USER else self.http_request.headers.get(sticky or "")
        return named[:LONGEST_CALLER] if isinstance(named, str) and named else None

    def submit_prompt(
        self, tokenizer: AdapterTokenizer, prompt: tuple[int, ...], options: GenerationOptions
    ) -> list[Answer]:
        """Takes the tickets of one prompt.

        Raises BadRequest, ContextLengthExceeded, Forbidden, Overloaded, NotReady.
        """
        self._check_prompt(prompt, options)
        self._check_sampling(tokenizer, options.sampling)
        self.check_ids(options.stop_ids, "stop_token_ids")
        request = self._make_request(tokenizer, prompt, options)
        if not self.answers:
            self.services.budgets.require_left(self.key)
        requests = _seed_each(request, options)
        answers = [self._start_answer(each, tokenizer, options) for each in requests]
        self.answers += answers
        self.services.budgets.take_tokens(self.key, len(prompt))
        return answers

    def _make_request(
        self, tokenizer: AdapterTokenizer, prompt: tuple[int, ...], options: GenerationOptions
    ) -> Request:
        """The request that all answers to this prompt share but for their seeds."""
        eos = frozenset() if options.ignore_eos else self._possible_eos(tokenizer.eos)
        return Request(
            UNNUMBERED,
            prompt,
            max_tokens=token_budget(len(prompt), options, self.base.context),
            adapter=self.digest,
            sampling=options.sampling,
            eos=eos | frozenset(options.stop_ids),
            prompt_logprobs=options.prompt_logprobs,
            priority=choose_priority(self.key, options.priority),
        )

    def _check_prompt(self, prompt: tuple[int, ...], options: GenerationOptions) -> None:
        size, param = self.base.vocab_size, options.prompt_param
        if not prompt:
            raise BadRequest(f"{param}: the prompt is empty, it has no tokens", param=param)
        if max(prompt) >= size:
            raise BadRequest(
                f"{param}: no token has the id {max(prompt)}; the vocabulary has {size}", param=param
            )

    def _check_sampling(self, tokenizer: AdapterTokenizer, sampling: Sampling) -> None:
        self.check_ids([id for id, _ in sampling.logit_bias], "logit_bias")
        # The worker applies a grammar to the base's vocabulary
        if sampling.grammar is not None and tokenizer.words.own_vocabulary:
            raise BadRequest(
                "this adapter's tokenizer has another vocabulary than the base's, "
                "so no answer of it can be held to a format"
            )

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """Raises BadRequest naming `param` for an id that the vocabulary has not."""
        size = self.base.vocab_size
        unknown_ids = [id for id in ids if id >= size]
        if unknown_ids:
            raise BadRequest(
                f"{param}: no token has the id {unknown_ids[0]}; the vocabulary has {size}", param=param
            )

    def _start_answer(
        self, request: Request, tokenizer: AdapterTokenizer, options: GenerationOptions
    ) -> Answer:
        ticket = self.services.client.submit_request(request)
        self.resources.callback(ticket.cancel_request)
        stops = StopStrings(options.stop)
        return Answer(ticket, tokenizer, stops, options.keep_stop, options.kept_special)

    def _possible_eos(self, eos: frozenset[int]) -> frozenset[int]:
        """The eos ids that the vocabulary has: an adapter's files may name any number, and the
        sampler would fail its whole batch on another.
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
        """Cancels the tickets when the client leaves.

        The server reports that, but stops no handler that has not begun to answer.
        """
        while (await self.http_request.receive())["type"] != "http.disconnect":
            pass
        for answer in self.answers:
            answer.ticket.cancel_request()

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts; one counts once, however many answers it gets."""
        prompts = {id(answer.prompt): answer.prompt for answer in self.answers}
        return sum(map(len, prompts.values()))

    @property
    def cached_tokens(self) -> int:
        """The prompt tokens that were reused; of several answers to one prompt the first one's."""
        first = {id(answer.prompt): answer for answer in reversed(self.answers)}
        return sum(answer.ticket.cached_tokens for answer in first.values())

    @property
    def generated_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    def make_headers(self) -> dict[str, str]:
        """The headers that are known once the request is admitted."""
        return {"x-prompt-tokens": str(self.prompt_tokens), **self.adapter_headers()}

    def adapter_headers(self) -> dict[str, str]:
        headers = {}
        if self.version is not None:
            headers["x-adapter-id"] = self.version.id
        if self.digest is not None:
            headers["x-adapter-digest"] = self.digest
        return headers

    def make_times(self) -> dict[str, str]:
        """The headers that are known once finished, in milliseconds: of several answers the slowest
        one's.
        """
        tickets = [answer.ticket for answer in self.answers]
        queued = max((_milliseconds(t.submitted, t.started) for t in tickets), default=0.0)
        running = max((_milliseconds(t.started, t.last) for t in tickets), default=0.0)
        longest = max((len(answer.tokens) for answer in self.answers), default=0)
        per_token = running / longest if longest else 0.0
        times = {"queue": queued, "inference": running, "total": (time.monotonic() - self.began) * 1000}
        headers = {"x-generated-tokens": str(self.generated_tokens), "x-time-per-token": f"{per_token:.1f}"}
        return headers | {f"x-{name}-time": f"{ms:.1f}" for name, ms in times.items()}

    def make_outcome(self) -> dict[str, str | float]:
        """The log line's fields of the first token and, once all answers have ended, of the ending."""
        fields: dict[str, str | float] = {}
        tickets = [answer.ticket for answer in self.answers]
        first_tokens = [_milliseconds(t.submitted, t.first) for t in tickets if t.first is not None]
        if first_tokens:
            fields["first_token_ms"] = round(min(first_tokens), 1)
        last_pieces = [answer.pieces[-1] for answer in self.answers if answer.pieces]
        endings = {str(piece.ending) for piece in last_pieces if piece.ending}
        if endings:
            fields["outcome"] = ",".join(sorted(endings))
        return fields

    def trace_parts(self) -> list[TracePart]:
        """Waiting, prefill and decoding of each answer, as far as it came."""
        parts = []
        for ticket in (answer.ticket for answer in self.answers):
            times = (ticket.submitted, ticket.started, ticket.first, ticket.last)
            for name, (start, end) in zip(("queue", "prefill", "decode"), pairwise(times), strict=True):
                if start is not None and end is not None:
                    parts.append(TracePart(name, start, end))
        return parts


def _seed_each(request: Request, options: GenerationOptions) -> Iterator[Request]:
    """The request once for each answer that is wanted, with seeds that follow each other."""
    first = options.seed if options.seed is not None else random.SystemRandom().getrandbits(52)
    for i in range(options.count):
        sampling = replace(request.sampling, seed=(first + i) % 2**64)
        yield replace(request, sampling=sampling)


def _milliseconds(start: float | None, end: float | None) -> float:
    return max(0.0, end - start) * 1000 if start is not None and end is not None else 0.0


async def admit_request(request: HttpRequest, services: ReadyServices) -> AsyncIterator[Admission]:
    """The admission of one request.

    A dependency, for its end runs in every case: also when the client leaves before the first byte,
    where no handler's would.
    """
    with ExitStack() as resources:
        admission = Admission(request, services, resources)
        resources.push(partial(_end_admission, admission))
        yield admission


Admitted = Annotated[Admission, Depends(admit_request)]


def _end_admission(admission: Admission, kind: Any, error: BaseException | None, trace: Any) -> None:
    """Counts a request that has begun, however it ended; `error` is what the route raised."""
    if not admission.answers:
        return
    _count_request(admission)
    admission.services.budgets.take_tokens(admission.key, admission.generated_tokens)
    # Of several prompts a later one may have been refused: then the request was, as a whole
    is_refused = isinstance(error, AdapterdError) and not error.counted
    if not is_refused:
        _note_usage(admission, isinstance(error, Exception) and not isinstance(error, AdapterdError))


def _note_usage(admission: Admission, is_defect: bool) -> None:
    """Counts it once: under its adapter, or all of them joined, and its key."""
    failed = is_defect or any(answer.ticket.failed for answer in admission.answers)
    tokens = (admission.prompt_tokens, admission.cached_tokens, admission.generated_tokens)
    counts = UsageCounts(1, *tokens, failures=int(failed))
    key = admission.key.label if admission.key else ""
    admission.services.usage.count_request("+".join(sorted(admission.adapter_ids)), key, counts)


def _count_request(admission: Admission) -> None:
    state = admission.http_request.state
    headers = admission.make_headers() | admission.make_times()
    # Last what the routes noted; a stream's own headers said less
    state.log = admission.make_outcome() | logged_headers(headers) | state.log
    state.parts = admission.trace_parts()
    seconds = time.monotonic() - admission.began
    for id in admission.adapter_ids:
        metrics.adapter_served(id, admission.prompt_tokens, admission.generated_tokens, seconds)
    if admission.alias and admission.version:
        target = (admission.alias, admission.version.id, admission.version.digest)
        metrics.alias_served(target, admission.generated_tokens, seconds)


def token_budget(prompt: int, options: GenerationOptions, context: int) -> int:
    """The most tokens that may be generated.

    Raises ContextLengthExceeded, with the numbers, when the wanted ones do not fit.
    """
    left = context - prompt
    if options.max_tokens is not None and options.max_tokens <= left:
        return options.max_tokens
    if options.max_tokens is None and left > 0:
        return min(options.default_tokens or left, left)
    wanted = options.max_tokens if options.max_tokens is not None else 1
    raise _context_exceeded(prompt, wanted, context, options.param)


def _context_exceeded(prompt: int, wanted: int, context: int, param: str) -> ContextLengthExceeded:
    return ContextLengthExceeded(
        f"This model's maximum context length is {context} tokens; the prompt has {prompt} "
        f"and {param} {wanted} makes {prompt + wanted}: shorten one of them",
        details={"context": context, "prompt_tokens": prompt, "max_tokens": wanted},
        param=param,
    )


async def tokenize_text(
    request: HttpRequest, tokenizer: AdapterTokenizer, text: str, special: bool = True
) -> tuple[int, ...]:
    """The text's ids, off the event loop where the text is long, or where an adapter's own tokenizer
    may take any time.

    The whole body's size counts, so tools and the number of messages do too.
    """
    large = max(len(text), len(await request.body())) > LARGE_BODY
    if large or tokenizer.words.own:
        return await run_in(TEXT, tokenizer.encode, text, special)
    return tokenizer.encode(text, special)


async def chat_prompt(
    admission: Admission,
    tokenizer: AdapterTokenizer,
    messages: Sequence[JsonMapping],
    tools: Sequence[JsonMapping],
    template: TemplateOptions = PLAIN,
    shown: Sequence[tuple[str, str]] = (),
    special: bool = False,
) -> tuple[int, ...]:
    """The ids of the conversation, up to where the assistant answers.

    `shown` are places in the request, each with a word of it that the text must have. `special`: as if the
    text were plain; the template has written the special tokens itself. Raises as `_render_chat`, and
    BadRequest naming the place that the template leaves out.
    """
    text = await _render_chat(admission, tokenizer, messages, tools, template)
    for place, word in shown:
        if word not in text:
            raise BadRequest(f"{place}: this model's chat template leaves it out", param=place)
    return await tokenize_text(admission.http_request, tokenizer, text, special)


async def _render_chat(
    admission: Admission,
    tokenizer: AdapterTokenizer,
    messages: Sequence[JsonMapping],
    tools: Sequence[JsonMapping],
    template: TemplateOptions,
) -> str:
    """The conversation as the template writes it.

    Raises BadRequest with the template's own reason or the limit that it broke; Overloaded,
    NotReady.
    """
    limit = max(MAX_RENDERED, RENDERED_PER_TOKEN * admission.base.context)
    render_request = tokenizer.render_request(messages, tools, limit, template)
    if tokenizer.own_template:
        return await admission.services.tokenizers.renderer.render(render_request)
    if len(await admission.http_request.body()) > LARGE_BODY:
        return await run_in(TEXT, tokenizer.render_here, render_request)
    return tokenizer.render_here(render_request)


async def decode_ids(tokenizer: AdapterTokenizer, ids: Sequence[int], special: bool = False) -> str:
    """The text of the ids, decoded off the event loop where there are many; `special`: special tokens
    are text.
    """
    if len(ids) < MANY_IDS:
        return tokenizer.decode(ids, special)
    return await run_in(TEXT, tokenizer.decode, ids, special)
