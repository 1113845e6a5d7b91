"""Decides which sequences run in the next step, and in which KV blocks; runs in the worker process.

It also decides when their adapters must be there. Integers only, one caller at a time. Must not
know tensors, threads or the time of day.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Hashable, Iterable
from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field, replace
from itertools import chain

from ..core.adapter import Adapter, Digest, Placement
from ..core.base_info import BLOCK_TOKENS
from ..core.error_codes import ErrorCode
from ..core.messages import Gauges, Report
from ..core.request import Event, Finish, Request, Token
from .adapter_cache import AdapterCache
from .kv_blocks import BlockTable, KVBlocks, count_blocks
from .plan import UNKNOWN, Chunk, Plan, Result
from .token_counters import OUTPUT_WEIGHT, TokenCounters

Queue = tuple[int, Digest | None]  # of requests of one priority for one adapter

GOOD_PART = 0.25  # of the prefill budget
# Requests that may overtake one that does not fit the pool or the blocks, before these drain for it
PASSES = 16


@dataclass(slots=True, eq=False)
class Sequence:
    """One request that waits or runs.

    `tokens` are the prompt's and the generated ones; the blocks of `table` hold the first `written` of
    them, and `slot` is its number while it runs. `passed` counts the requests that overtook it. `wakes` is
    the first token on which an activated adapter acts; None: it acts on all. `launched` counts its chunks
    in steps that are not committed yet; the next of them is `void` where it went on from a token that
    was redrawn. `failed`: what it has written is not to be found again.
    """

    request: Request
    arrival: int
    tokens: list[int]
    table: BlockTable = field(default_factory=BlockTable)
    written: int = 0
    slot: int = -1
    generated: int = 0
    passed: int = 0
    begun: bool = False
    wakes: int | None = None
    scored: list[Token] = field(default_factory=list)
    launched: int = 0
    void: bool = False
    failed: bool = False

    @property
    def adapter(self) -> Digest | None:
        return self.request.adapter

    @property
    def queue(self) -> Queue:
        """The queue that it waits in."""
        return self.request.priority, self.request.adapter

    @property
    def is_decoding(self) -> bool:
        """Whether only the token that was sampled last is not written yet."""
        return self.generated > 0 and self.written == len(self.tokens) - 1

    @property
    def reusable_prefix(self) -> list[int]:
        """The tokens whose KV may come from the cache: never the last one's, since its logits are
        needed, and none where the prompt is to be scored.
        """
        is_scored = self.request.prompt_logprobs is not None and not self.generated
        return [] if is_scored else self.tokens[:-1]

    def scope_of(self, block: int) -> Hashable:
        """Of the KV in the sequence's i-th block: the base's before an activated adapter wakes,
        else the adapter's.
        """
        wakes = self.wakes or 0
        start = block * BLOCK_TOKENS
        if self.adapter is None or wakes >= start + BLOCK_TOKENS:
            return None
        return self.adapter, max(0, wakes - start)


class Scheduler:
    """The next place goes to the lowest priority that waits, there to the adapter that was served
    the fewest tokens while others waited, and among equals to the oldest request.

    So one adapter alone is served first come, first served, and none takes more than its share of
    the work while others of its priority wait.

    A step is `plan_step`, then `commit_step` or `abort_step`, after which `unplace` and `refuse`
    name the adapters that failed in it; `take_report` has the outcome of all calls since the last.
    Before it is committed `plan_ahead` may plan the one after it, which is committed next, or given up
    by `drop_step`.
    """

    def __init__(
        self,
        *,
        rows: int,
        context: int,
        kv_blocks: int,
        pool_rank: int,
        prefill_tokens: int,
        host_bytes: int,
        reuses_prefixes: bool = True,
    ) -> None:
        """At most `rows` sequences run at once, each of at most `context` tokens, which must fit the
        blocks alone.

        `reuses_prefixes`: KV of another sequence is all that a prompt that begins alike needs of it.
        """
        self.rows = rows
        self.context = context
        self.prefill_tokens = prefill_tokens
        self.blocks = KVBlocks(kv_blocks)
        self.adapters = AdapterCache(pool_rank, host_bytes)
        self.reuses_prefixes = reuses_prefixes
        self.running: dict[int, Sequence] = {}
        self._leaving: dict[int, Sequence] = {}  # have ended, in steps that still write to their blocks
        self._is_settled = False  # whether the last plan would be made again, but for the tokens
        self._free_slots = list(range(rows - 1, -1, -1))
        self.waiting: dict[Queue, deque[Sequence]] = {}
        self.counters = TokenCounters()
        self._arrivals = 0
        self._preemptions = 0
        self._events: list[Event] = []
        self._started: list[tuple[int, int]] = []
        self._layout: tuple[Placement, ...] = ()

    # ---- what happened

    def submit_request(self, request: Request) -> None:
        self._is_settled = False
        sequence = self._make_sequence(request)
        refusal = self._find_refusal(request)
        if refusal is not None:
            self._fail_sequence(sequence, *refusal)
        else:
            self._queue_of(sequence).append(sequence)

    def cancel_request(self, request: int) -> None:
        """Ends the request now; does nothing where it has ended already."""
        if request in self.running:
            self._end_sequence(self.running[request], Finish.CANCELLED)
            return
        for sequence in chain.from_iterable(self.waiting.values()):
            if sequence.request.id == request:
                self._remove_waiting(sequence)
                self._end_sequence(sequence, Finish.CANCELLED)
                return

    def add_adapter(self, adapter: Adapter, pinned: bool = False, preload: bool = False) -> None:
        """Requests may name this content from now on. A pin that it already has stays."""
        self._is_settled = False
        self.adapters.add_adapter(adapter, pinned, preload)

    def pin_adapter(self, digest: Digest, pinned: bool) -> None:
        self._is_settled = False
        self.adapters.pin_adapter(digest, pinned)

    def remove_adapter(self, digest: Digest) -> None:
        """Forgets the content once no admitted request needs it; then `take_removed` has it."""
        self._is_settled = False
        self.adapters.remove_adapter(digest)

    def mark_hosted(self, digest: Digest, size: int) -> None:
        """The adapter that `next_load` named is in host memory, in `size` bytes."""
        self._is_settled = False
        self.adapters.mark_hosted(digest, size)

    def load_failed(self, digest: Digest, code: ErrorCode, message: str) -> None:
        self._is_settled = False
        self.adapters.load_failed(digest)
        self._fail_waiting(digest, code, message)

    # ---- what to do

    def next_load(self) -> tuple[Adapter, list[Digest]] | None:
        """The adapter to read into host memory now, and those to forget there first;

        None while one is being read or none is wanted.
        """
        ahead = [head.adapter for head in self._waiting_heads()[: self.rows]]
        return self.adapters.next_load([digest for digest in ahead if digest is not None], self._in_flight())

    def take_removed(self) -> list[tuple[Digest, bool]]:
        """The removed contents that nothing needs any more, and whether each is still to be
        forgotten in host memory.
        """
        removed = self.adapters.take_removed()
        for digest, _ in removed:
            if digest not in self.adapters.known:
                self.counters.forget_adapter(digest)
        return removed

    def plan_step(self) -> Plan:
        """The next step, empty when there is nothing to do.

        No other may be under way. It must be committed or aborted before anything but a plan ahead
        happens.
        """
        assert not self._leaving, "a step is still under way"
        in_flight = self._in_flight()
        awaited = {digest for _, digest in self.waiting if digest is not None}
        self.adapters.forget_removed(in_flight | awaited)
        self.adapters.follow_host(in_flight)
        self.adapters.place_pinned(in_flight)
        self._make_room()
        chunks = self._continue_running()
        prefilled = sum(len(chunk.tokens) for chunk in chunks if not self._is_decoding(chunk))
        chunks += self._admit_prompts(self.prefill_tokens - prefilled)
        chunks.sort(key=lambda chunk: len(chunk.tokens) > 1)
        self.adapters.place_preloaded()
        self._is_settled = not self.waiting or all(map(self._is_decoding, chunks))
        self._note_launch(chunks)
        return Plan(*self.adapters.take_changes(), tuple(chunks))

    def plan_ahead(self, plan: Plan) -> Plan | None:
        """The step after `plan`, which is under way: one token more of each sequence. None where that
        is not sure to be all that there is to do, or to be possible before the tokens are known.
        """
        if not (self._is_settled and self.reuses_prefixes):
            return None
        under_way = {chunk.request.id: (index, chunk) for index, chunk in enumerate(plan.chunks)}
        chunks = []
        for id, sequence in self.running.items():
            index, before = (-1, None) if sequence.void else under_way.get(id, (-1, None))
            if not self._can_go_on(sequence, before):
                return None
            if before is None:
                chunks.append(self._make_chunk(sequence, 1))
            elif not self._is_last(before):
                chunks.append(self._follow_chunk(sequence, before, index))
        self._note_launch(chunks)
        return Plan(chunks=tuple(chunks)) if chunks else None

    def commit_step(self, plan: Plan, results: Ordered[Result]) -> None:
        for chunk, result in zip(plan.chunks, results, strict=True):
            sequence = self._land_chunk(chunk)
            if sequence is not None and not sequence.void:
                self._commit_chunk(sequence, chunk, result)
            elif sequence is not None:
                sequence.void = False

    def drop_step(self, plan: Plan) -> None:
        """A step planned ahead raised: it is as if it had not been planned."""
        for chunk in plan.chunks:
            sequence = self._land_chunk(chunk)
            if sequence is not None and not sequence.launched:
                sequence.void = False

    def abort_step(self, plan: Plan) -> None:
        """The step raised before its chunks ran: its requests fail, and neither their blocks nor
        the pool's changes are relied on.
        """
        for chunk in plan.chunks:
            sequence = self._land_chunk(chunk)
            assert sequence is not None, "a step was aborted late"
            self._fail_sequence(sequence, ErrorCode.INTERNAL, "the step that ran this request failed")
        self.adapters.undo_plan(plan)

    def unplace(self, placements: Iterable[Placement]) -> None:
        """These of the last plan could not be placed."""
        self._is_settled = False
        self.adapters.undo_plan(Plan(place=tuple(placements)))

    def refuse(self, digest: Digest, reason: str) -> None:
        """The base cannot run this adapter: no request for it begins until it is added again."""
        self._is_settled = False
        self.adapters.refuse(digest, reason)
        self._fail_waiting(digest, ErrorCode.ADAPTER_INVALID, reason)

    def take_report(self) -> Report:
        """Events and changes since the last report."""
        layout = self.adapters.pool.layout
        report = Report(
            events=tuple(self._events),
            started=tuple(self._started),
            tiers=self.adapters.take_moves(),
            pool=layout if layout != self._layout else None,
            gauges=self.gauges,
        )
        self._events, self._started, self._layout = [], [], layout
        return report

    @property
    def gauges(self) -> Gauges:
        return Gauges(
            running=len(self.running),
            waiting=sum(map(len, self.waiting.values())),
            kv_used=self.blocks.used,
            kv_cached=self.blocks.cached,
            kv_total=self.blocks.count,
            preemptions=self._preemptions,
            pool_used=self.adapters.pool.used,
            host_bytes=self.adapters.host.used,
        )

    # ---- entering

    def _make_sequence(self, request: Request) -> Sequence:
        sequence = Sequence(request, self._arrivals, list(request.prompt))
        self._arrivals += 1
        invocation = self.adapters.invocation_of(request.adapter)
        if invocation:
            sequence.wakes = last_invocation(invocation, request.prompt)
        return sequence

    def _find_refusal(self, request: Request) -> tuple[ErrorCode, str] | None:
        """Why the request cannot wait for its turn, as a code and a message; None where it can."""
        if not self.adapters.is_known(request.adapter):
            return ErrorCode.ADAPTER_NOT_FOUND, "the adapter is not registered any more"
        reason = self.adapters.refusal(request.adapter)
        if reason:
            return ErrorCode.ADAPTER_INVALID, reason
        if not request.prompt:
            return ErrorCode.VALIDATION, "the prompt has no tokens"
        if len(request.prompt) > self.context:
            message = f"the prompt has {len(request.prompt)} tokens, a sequence holds {self.context}"
            return ErrorCode.CONTEXT_LENGTH_EXCEEDED, message
        return None

    def _in_flight(self) -> set[Digest]:
        return {sequence.adapter for sequence in self.running.values() if sequence.adapter is not None}

    def _waiting_heads(self) -> list[Sequence]:
        """The oldest request of each queue, in the order in which they may enter."""
        heads = [queue[0] for queue in self.waiting.values()]
        return sorted(heads, key=self._turn_of)

    def _turn_of(self, head: Sequence) -> tuple[int, bool, int, int]:
        return head.request.priority, *self.counters.turn_of(*head.queue), head.arrival

    def _queue_of(self, sequence: Sequence) -> deque[Sequence]:
        """The queue that the sequence is to wait in, which is there from now on."""
        if sequence.queue not in self.waiting:
            priority, adapter = sequence.queue
            beside = [other for level, other in self.waiting if level == priority]
            self.counters.join(priority, adapter, beside)
            self.waiting[sequence.queue] = deque()
        return self.waiting[sequence.queue]

    def _end_queue(self, queue: Queue) -> deque[Sequence]:
        """Takes a queue away; the sequences that were still in it."""
        left, priority = self.waiting.pop(queue), queue[0]
        if not any(level == priority for level, _ in self.waiting):
            self.counters.end_waiting(priority)
        return left

    def _make_room(self) -> None:
        """Gives each decoding sequence a block for its next token; where there is none, others wait
        again.
        """
        for sequence in list(self.running.values()):
            while sequence.request.id in self.running and not self._grow_table(sequence):
                self._preempt_sequence(self._choose_victim())

    def _grow_table(self, sequence: Sequence) -> bool:
        """Whether the sequence has blocks for its tokens and the next one."""
        return self.blocks.grow_table(sequence.table, min(len(sequence.tokens) + 1, self.context))

    def _choose_victim(self) -> Sequence:
        """Of the highest priority the newest sequence of the adapter that holds most blocks."""
        held: Counter[Digest | None] = Counter()
        for sequence in self.running.values():
            held[sequence.adapter] += len(sequence.table.blocks)

        def worth_leaving(sequence: Sequence) -> tuple[int, int, int]:
            return sequence.request.priority, held[sequence.adapter], sequence.arrival

        return max(self.running.values(), key=worth_leaving)

    def _preempt_sequence(self, sequence: Sequence) -> None:
        """It waits again, first of its queue; prompt and answer so far will be prefilled anew."""
        del self.running[sequence.request.id]
        self.blocks.release_table(sequence.table)
        self._free_slots.append(sequence.slot)
        sequence.written, sequence.scored = 0, []
        self._queue_of(sequence).appendleft(sequence)
        self._preemptions += 1

    def _is_decoding(self, chunk: Chunk) -> bool:
        return self.running[chunk.request.id].is_decoding

    def _continue_running(self) -> list[Chunk]:
        """The next chunks of the running sequences: all decodes, then prompts within the budget."""
        running = self.running.values()
        chunks = [self._make_chunk(sequence, 1) for sequence in running if sequence.is_decoding]
        budget = self.prefill_tokens
        for sequence in running:
            if budget > 0 and not sequence.is_decoding:
                chunks.append(self._make_chunk(sequence, budget))
                budget -= len(chunks[-1].tokens)
        return chunks

    def _admit_prompts(self, budget: int) -> list[Chunk]:
        """Prompts join until a good part of the budget is used: more at once would only keep the
        first ones' answers waiting.
        """
        chunks: list[Chunk] = []
        enough = self.prefill_tokens * (1 - GOOD_PART)
        while budget > enough and len(self.running) < self.rows:
            sequence = self._next_sequence()
            if sequence is None:
                break
            self._begin_sequence(sequence)
            chunks.append(self._make_chunk(sequence, budget))
            budget -= len(chunks[-1].tokens)
        return chunks

    def _next_sequence(self) -> Sequence | None:
        """The sequence that enters now, its adapter placed.

        A sequence that does not fit the blocks, or whose adapter the pool, is overtaken `PASSES`
        times at most.
        """
        blocked: Sequence | None = None
        for head in self._waiting_heads():
            if head.queue not in self.waiting:  # its adapter was just found not to fit the pool
                continue
            if not self.adapters.at_hand(head.adapter) or self._has_sibling(head):
                continue
            if self._has_room(head) and self._can_run(head.adapter, place=blocked is None):
                if blocked is not None:
                    blocked.passed += 1
                return head
            if blocked is None and head.queue in self.waiting:
                blocked = head
                if blocked.passed >= PASSES:
                    break
        return None

    def _has_room(self, head: Sequence) -> bool:
        """Whether there are blocks for its tokens and the next one."""
        positions = min(len(head.tokens) + 1, self.context)
        return self.blocks.has_room(head.scope_of, self._reusable_prefix(head), positions)

    def _reusable_prefix(self, sequence: Sequence) -> list[int]:
        """The tokens whose KV may come from the cache."""
        return sequence.reusable_prefix if self.reuses_prefixes else []

    def _can_run(self, digest: Digest | None, place: bool) -> bool:
        """Whether the adapter needs no placement, or could be placed where that is allowed."""
        if digest is None or not self.adapters.needs_placement(digest):
            return True
        return place and self._place_adapter(digest)

    def _place_adapter(self, digest: Digest) -> bool:
        """Whether the adapter could be placed; where the pinned ones leave no room for it, its
        requests fail.
        """
        if self.adapters.place_adapter(digest, self._in_flight(), move=True):
            return True
        pool, rank = self.adapters.pool, self.adapters.known[digest].adapter.pool_rows
        if not pool.can_fit(rank):
            message = (
                f"the adapter needs {rank} rank rows; pinned adapters hold too many of the pool's {pool.rank}"
            )
            self._fail_waiting(digest, ErrorCode.OVERLOADED, message)
        return False

    def _has_sibling(self, head: Sequence) -> bool:
        """Whether the same prefix is being prefilled right now, so that its blocks can be shared in
        a moment instead of computed again.
        """
        prefix = self._reusable_prefix(head)
        for other in self.running.values():
            is_alike = other.adapter == head.adapter and other.wakes == head.wakes
            worth = other.written + BLOCK_TOKENS
            if is_alike and not other.is_decoding and common_prefix(other.tokens, prefix) >= worth:
                return True
        return False

    def _begin_sequence(self, sequence: Sequence) -> None:
        self._remove_waiting(sequence)
        prefix = self._reusable_prefix(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.written = self.blocks.share_prefix(sequence.table, sequence.scope_of, prefix)
        has_grown = self._grow_table(sequence)
        assert has_grown, "a sequence was admitted without room for it"
        self.running[sequence.request.id] = sequence
        if not sequence.begun:
            sequence.begun = True
            self.counters.begin_request(*sequence.queue, len(sequence.tokens) - sequence.written)
            self._started.append((sequence.request.id, sequence.written))

    def _remove_waiting(self, sequence: Sequence) -> None:
        self.waiting[sequence.queue].remove(sequence)
        if not self.waiting[sequence.queue]:
            self._end_queue(sequence.queue)

    def _make_chunk(self, sequence: Sequence, limit: int) -> Chunk:
        start = sequence.written
        end = min(len(sequence.tokens), start + limit)
        wakes = sequence.wakes or 0
        asleep = start < wakes
        end = min(end, wakes) if asleep else end
        sample = end == len(sequence.tokens) and sequence.request.max_tokens > 0
        return Chunk(
            sequence.request,
            tuple(sequence.table.blocks[: count_blocks(end)]),
            start,
            tuple(sequence.tokens[start:end]),
            sample,
            sequence.generated,
            asleep,
            sequence.slot,
        )

    # ---- going on before the last token is known

    def _can_go_on(self, sequence: Sequence, before: Chunk | None) -> bool:
        """Whether the sequence can have its next token in a step ahead; `before` is its chunk in the
        step that is under way.
        """
        has_one_next = sequence.is_decoding if before is None else before.sample
        is_free = not sequence.request.sampling.reads_answer and self.adapters.is_batched(sequence.adapter)
        return has_one_next and is_free and self._grow_table(sequence)

    def _is_last(self, chunk: Chunk) -> bool:
        """Whether the sequence ends by the token that the chunk samples, whatever that is."""
        request, made = chunk.request, chunk.generated + 1
        return made >= request.max_tokens or len(request.prompt) + made >= self.context

    def _follow_chunk(self, sequence: Sequence, before: Chunk, index: int) -> Chunk:
        """The token that `before`, the chunk of this index in its step, samples."""
        start = before.position + len(before.tokens)
        return replace(
            before,
            blocks=tuple(sequence.table.blocks[: count_blocks(start + 1)]),
            position=start,
            tokens=(UNKNOWN,),
            generated=before.generated + 1,
            follows=index,
        )

    def _note_launch(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            self.running[chunk.request.id].launched += 1

    def _land_chunk(self, chunk: Chunk) -> Sequence | None:
        """The chunk's sequence; None where that has ended meanwhile, and its blocks are free then."""
        id = chunk.request.id
        sequence = self.running.get(id) or self._leaving[id]
        sequence.launched -= 1
        if id in self.running:
            return sequence
        if not sequence.launched:
            self._release_sequence(self._leaving.pop(id))
        return None

    def _commit_chunk(self, sequence: Sequence, chunk: Chunk, result: Result) -> None:
        sequence.written += len(chunk.tokens)
        sequence.scored += result.prompt
        sequence.void = result.redrawn and sequence.launched > 0
        if not result.error:
            self._name_blocks(sequence)
        if result.error:
            self._fail_sequence(sequence, result.code, result.error)
        elif chunk.sample:
            assert result.token is not None, "a chunk that asked for a token got none"
            self._append_token(sequence, result.token)
        elif sequence.written == len(sequence.tokens):
            self._end_sequence(sequence, Finish.LENGTH)

    # ---- leaving

    def _name_blocks(self, sequence: Sequence) -> None:
        if self.reuses_prefixes:
            self.blocks.name_blocks(sequence.table, sequence.scope_of, sequence.tokens, sequence.written)

    def _append_token(self, sequence: Sequence, token: Token) -> None:
        request = sequence.request
        sequence.generated += 1
        sequence.tokens.append(token.id)
        self.counters.charge_tokens(*sequence.queue, OUTPUT_WEIGHT)
        if token.id in request.eos:
            self._end_sequence(sequence, Finish.EOS, token)
        elif sequence.generated >= request.max_tokens or len(sequence.tokens) >= self.context:
            self._end_sequence(sequence, Finish.LENGTH, token)
        else:
            self._report_event(sequence, Event(request.id, token))

    def _end_sequence(
        self,
        sequence: Sequence,
        finish: Finish,
        token: Token | None = None,
        code: ErrorCode | None = None,
        message: str = "",
    ) -> None:
        self._is_settled = self._is_settled and not (self.waiting or self.adapters.awaits_room)
        if self.running.pop(sequence.request.id, None) is not None:
            sequence.failed = finish is Finish.FAILED
            self.adapters.touch_adapter(sequence.adapter)
            if sequence.launched:
                self._leaving[sequence.request.id] = sequence
            else:
                self._release_sequence(sequence)
        self._report_event(sequence, Event(sequence.request.id, token, finish, code=code, message=message))

    def _release_sequence(self, sequence: Sequence) -> None:
        self.blocks.release_table(sequence.table, forget=sequence.failed)
        self._free_slots.append(sequence.slot)

    def _report_event(self, sequence: Sequence, event: Event) -> None:
        self._events.append(replace(event, prompt=tuple(sequence.scored)) if sequence.scored else event)
        sequence.scored = []

    def _fail_sequence(self, sequence: Sequence, code: ErrorCode, message: str) -> None:
        self._end_sequence(sequence, Finish.FAILED, code=code, message=message)

    def _fail_waiting(self, digest: Digest, code: ErrorCode, message: str) -> None:
        for queue in [queue for queue in self.waiting if queue[1] == digest]:
            for sequence in self._end_queue(queue):
                self._fail_sequence(sequence, code, message)


def last_invocation(invocation: tuple[int, ...], prompt: tuple[int, ...]) -> int:
    """The position where the invocation begins for the last time; past every prompt where it does
    not occur.
    """
    length = len(invocation)
    for start in range(len(prompt) - length, -1, -1):
        if prompt[start : start + length] == invocation:
            return start
    return sys.maxsize


def common_prefix(left: Ordered[int], right: Ordered[int]) -> int:
    """The length of the longest common start, by halving: slices compare in C."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
