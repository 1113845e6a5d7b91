"""The one stand-in for the engine: what `service.api.protocols.EngineClient` asks for, without a worker.

Imports neither torch nor a tokenizer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from service.core.adapter import Adapter, Digest, Placement, Tier
from service.core.base_info import BaseInfo, LinearKind
from service.core.error_codes import ErrorCode
from service.core.messages import Gauges, Load
from service.core.request import Event, Finish, Request, Token
from service.errors import Overloaded
from service.exit_codes import ExitCode
from service.worker.ticket import Ticket

Script = Callable[[Request], Sequence[int]]

EOS = 2
BASE = BaseInfo(
    folder="/secret/place/tiny",
    architecture="LlamaForCausalLM",
    layers=2,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=300,
    parameters=123_456,
    context=2048,
    quantization="none",
    dtype="float32",
    device="cpu",
    resident_bytes={"float32": 493_824},
    linears=(LinearKind("q_proj", 64, 64, 2),),
    pool_rank=512,
    rows=16,
)


def opened_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate


class FakeEngine:
    """An engine whose state is what the test sets, which answers by a script and loads every adapter at once.

    A request gets the tokens of `script`, then eos for ever; `requests` are all that came, `cancelled` the
    ids of those whose caller left before the end. `limit` requests are admitted. Of each, `early` events come
    before `gate` is open, the others after; `fails` is (code, message) instead of the third one.

    `errors` are the loads that fail, by digest, and `codes` their codes; none ends before `load_gate` is
    open. `dropped` are the contents that were removed, `preloads` those that were to be loaded. `stops` are
    open once the base is there.
    """

    def __init__(self, base: BaseInfo = BASE) -> None:
        self.base: BaseInfo | None = base
        self.state, self.stage, self.fraction, self.reason = "ready", "", 1.0, ""
        self.ready, self.exit_code = True, ExitCode.FAILED
        self.loaded = opened_gate()
        self.stops: list[float] = []
        self.gauges = Gauges(pool_used=12, host_bytes=4096)
        self.pool: tuple[Placement, ...] = (Placement("sha256:a", 4, 12),)
        self.awaited: set[Digest] = set()

        self.script: Script = lambda request: ()
        self.requests: list[Request] = []
        self.tickets: list[Ticket] = []
        self.cancelled: list[int] = []
        self.limit, self.early = 100, 0
        self.gate = opened_gate()
        self.fails: tuple[str, str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

        self.known: dict[Digest, Adapter] = {}
        self.preloads: list[Digest] = []
        self.tiers: dict[Digest, Tier] = {}
        self.pinned: set[Digest] = set()
        self.most_pinned = 0  # at any time
        self.dropped: list[Digest] = []
        self.errors: dict[Digest, str] = {}
        self.codes: dict[Digest, ErrorCode] = {}
        self.load_gate = opened_gate()

    @classmethod
    def loading(cls) -> FakeEngine:
        """An engine whose base is not there before `loaded` is open."""
        engine = cls()
        engine.state, engine.ready, engine.base = "loading", False, None
        engine.loaded.clear()
        return engine

    # ---- the worker's life

    async def start_worker(self) -> None:
        return None

    async def wait_ready(self) -> None:
        await self.loaded.wait()

    async def stop_worker(self, grace_s: float) -> None:
        self.stops.append(grace_s)

    # ---- requests

    def submit_request(self, request: Request) -> Ticket:
        if len(self.requests) >= self.limit:
            raise Overloaded("the queue is full", retry_after=1)
        request = replace(request, id=len(self.requests))
        ticket = Ticket(request, self._cancel_request)
        self.requests.append(request)
        self.tickets.append(ticket)
        task = asyncio.get_running_loop().create_task(self._run_script(ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ticket

    def _cancel_request(self, ticket: Ticket) -> None:
        if not ticket.stopped:
            self.cancelled.append(ticket.request.id)
        ticket.deliver_event(Event(ticket.request.id, finish=Finish.CANCELLED), 2.0)

    async def _run_script(self, ticket: Ticket) -> None:
        ticket.started = ticket.submitted
        for i, event in enumerate(make_events(ticket.request, self.script(ticket.request))):
            if i >= self.early:
                await self.gate.wait()
            await asyncio.sleep(0)
            if i == 2 and self.fails:
                code, message = ErrorCode(self.fails[0]), self.fails[1]
                event = Event(ticket.request.id, finish=Finish.FAILED, code=code, message=message)
            if ticket.ended is None:
                ticket.deliver_event(event, ticket.submitted + i)

    # ---- adapters

    def add_adapter(self, adapter: Adapter, pinned: bool = False, preload: bool = True) -> None:
        self.known[adapter.digest] = adapter
        self.preloads += [adapter.digest] if preload else []
        if pinned:
            self.pin_adapter(adapter.digest, True)

    async def wait_until_loaded(self, digest: Digest) -> Load:
        await self.load_gate.wait()
        await asyncio.sleep(0)
        error = self.errors.get(digest, "")
        if not error:
            self.tiers[digest] = Tier.HOST
        code = self.codes.get(digest, ErrorCode.ADAPTER_INVALID)
        return Load(digest, 0.01, self.known[digest].size, error, code)

    def watch_loads(self, watcher: Callable[[Load], None]) -> None:
        return None

    def pin_adapter(self, digest: Digest, pinned: bool) -> None:
        (self.pinned.add if pinned else self.pinned.discard)(digest)
        self.most_pinned = max(self.most_pinned, len(self.pinned))

    async def remove_adapter(self, digest: Digest) -> int:
        await asyncio.sleep(0)
        self.dropped.append(digest)
        self.pinned.discard(digest)
        was_hosted = self.tiers.pop(digest, Tier.DISK) is Tier.HOST
        size = self.known.pop(digest).size
        return size if was_hosted else 0

    def tier_of(self, digest: Digest) -> Tier:
        return self.tiers.get(digest, Tier.DISK)

    def is_resident(self, digest: Digest) -> bool:
        return any(placement.digest == digest for placement in self.pool)


def make_events(request: Request, script: Sequence[int]) -> Iterator[Event]:
    scored = score_prompt(request)
    if request.max_tokens == 0:
        yield Event(request.id, finish=Finish.LENGTH, prompt=scored)
    for i in range(request.max_tokens):
        id = script[i] if i < len(script) else EOS
        finish = Finish.LENGTH if i + 1 == request.max_tokens else None
        if id in request.eos:
            finish = Finish.EOS
        wanted = request.sampling.logprobs
        token = Token(id) if wanted is None else make_token(id, wanted, -0.5 - i)
        yield Event(request.id, token, finish, scored if i == 0 else ())
        if finish:
            return


def score_prompt(request: Request) -> tuple[Token, ...]:
    """The prompt's tokens with log probabilities, where the request wants them."""
    wanted = request.prompt_logprobs
    if wanted is None:
        return ()
    return tuple(make_token(id, wanted, -1.0 if i else None) for i, id in enumerate(request.prompt))


def make_token(id: int, wanted: int | None, logprob: float | None) -> Token:
    """A token that is the second likeliest."""
    others = ((70, -0.1), (id, logprob or 0.0), (71, -20.0), (72, float("-inf")))
    return Token(id, logprob, () if logprob is None else others[:wanted])
