"""Stand-ins for the device: a runner whose tokens betray any stale KV block, pool row or prefix, and
the factories a worker can be given.

No tensors, no files; what a sequence must come to is a pure function (`expected`).
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from zlib import crc32

from service.core.adapter import Adapter, Digest, ExecutionPath, LoraLayerSpec, Placement
from service.core.base_info import BLOCK_TOKENS, BaseInfo, LinearKind
from service.core.request import Request, Token
from service.engine.kv_blocks import count_blocks
from service.engine.plan import UNKNOWN, Chunk, Launched, Plan, Result
from service.errors import AdapterInvalid, DoesNotFit, SettingsError
from service.settings import Settings

VOCAB = 1000


def adapter(
    name: str,
    rank: int = 4,
    size: int = 1000,
    lane: ExecutionPath = ExecutionPath.POOL,
    readable: bool = True,
    experts: int = 1,
) -> Adapter:
    return Adapter(
        f"sha256:{name}",
        "adapter_config.json",
        "weights" if readable else "missing",
        lane,
        0 if lane is ExecutionPath.SHADOW else rank,
        size,
        (LoraLayerSpec("m", rank, 1.0, "a", "b", experts=experts),),
    )


def write(seen: int, digest: Digest | None, token: int) -> int:
    """What a KV position holds: a mark of everything up to it, and of the adapter it was made with."""
    return crc32(f"{digest} {token}".encode(), seen)


def expected(
    digest: Digest | None, prompt: Sequence[int], count: int, vocab: int = VOCAB, wakes: int = 0
) -> list[int]:
    """The `count` tokens that FakeRunner continues this prompt with, if the adapter acts from the
    token `wakes` on.
    """
    seen, tokens = 0, list(prompt)
    for at, token in enumerate(prompt):
        seen = write(seen, digest if at >= wakes else None, token)
    for _ in range(count):
        tokens.append(seen % vocab)
        seen = write(seen, digest if len(tokens) > wakes else None, tokens[-1])
    return tokens[len(prompt) :]


class FakeLaunched:
    """A step that has run, as its writes come before all later ones; `tokens` are those that the next
    one goes on from, whatever the results say.
    """

    def __init__(self, chunks: Sequence[Chunk], results: list[Result], after: FakeLaunched | None) -> None:
        self.chunks, self.results, self.after = chunks, results, after
        self.tokens = [result.token.id if result.token else 0 for result in results]

    def spoil(self, index: int, result: Result) -> None:
        self.tokens[index], self.results[index] = 0, result

    def read(self) -> list[Result]:
        assert self.after is None or not self.after.chunks, "steps are read in their order"
        results = [self._result_of(*pair) for pair in zip(self.chunks, self.results, strict=True)]
        self.chunks = ()
        return results

    def drop(self) -> None:
        assert self.chunks, "a step was dropped that has been read"

    def _result_of(self, chunk: Chunk, result: Result) -> Result:
        if chunk.follows is None or self.after is None:
            return result
        return Result() if self.after.results[chunk.follows].redrawn else result


class FakeRunner:
    """Holds KV blocks and pool rows as a device would, and complains about every plan a device could
    not run.

    A written position holds the mark of everything before it and its own, so that a block that was
    written over is seen. With `has_states` a sequence's slot holds that of its last position, too.
    `outcome_of` may spoil what a chunk has sampled.
    """

    runs_ahead = False

    def __init__(
        self,
        blocks: int = 16,
        context: int = 64,
        pool_rank: int = 16,
        vocab: int = VOCAB,
        pause: float = 0.0,
    ) -> None:
        self.has_states = False
        self.outcome_of: Callable[[Result], Result] = lambda result: result
        self.states: dict[int, int] = {}
        self.context, self.vocab, self.pause = context, vocab, pause
        self.host: dict[Digest, Adapter] = {}
        self.pool: list[Digest | None] = [None] * pool_rank
        self.placed: dict[Digest, Placement] = {}
        self.kv: list[list[tuple[int, int]]] = [[(0, -1)] * BLOCK_TOKENS for _ in range(blocks)]
        self.ended: set[int] = set()
        self.prefilled = 0

    def load_adapter(self, adapter: Adapter) -> int:
        time.sleep(self.pause)
        if adapter.weights == "missing":
            raise AdapterInvalid(["adapter_model.safetensors cannot be read"])
        assert adapter.digest not in self.host, f"{adapter.digest} was loaded twice"
        self.host[adapter.digest] = adapter
        return adapter.size

    def evict_adapter(self, digest: Digest) -> int:
        adapter = self.host.pop(digest, None)
        return adapter.size if adapter else 0

    def run_plan(self, plan: Plan) -> list[Result]:
        """The whole step, as the worker's loop has it done."""
        for digest in plan.remove:
            self.remove_adapter(digest)
        for placement in plan.place:
            self.place_adapter(placement)
        return self.run_chunks(plan.chunks)

    def run_chunks(self, chunks: Sequence[Chunk]) -> list[Result]:
        time.sleep(self.pause)
        self._check_blocks(chunks)
        kinds = [len(chunk.tokens) > 1 for chunk in chunks]
        assert kinds == sorted(kinds), "a chunk of one token after a longer one"
        return [self._run(chunk) for chunk in chunks]

    def launch_chunks(self, chunks: Sequence[Chunk], after: Launched | None = None) -> FakeLaunched:
        assert after is None or isinstance(after, FakeLaunched)
        fed = [chunk if chunk.follows is None else _feed(chunk, after) for chunk in chunks]
        launched = FakeLaunched(chunks, list(self.run_chunks(fed)), after)
        for index, result in enumerate(launched.results):
            if result.token is not None and (spoilt := self.outcome_of(result)) != result:
                launched.spoil(index, spoilt)
        return launched

    def finish_request(self, request: int) -> None:
        assert request not in self.ended, f"request {request} ended twice"
        self.ended.add(request)

    def remove_adapter(self, digest: Digest) -> None:
        self.placed.pop(digest, None)
        self.pool = [None if held == digest else held for held in self.pool]

    def place_adapter(self, placement: Placement) -> None:
        rows = slice(placement.start, placement.start + placement.rank)
        assert self.host[placement.digest].pool_rows == placement.rank
        assert self.pool[rows] == [None] * placement.rank, f"pool rows of {placement} are taken"
        self.pool[rows] = [placement.digest] * placement.rank
        self.placed[placement.digest] = placement

    def _adapted(self, digest: Digest | None) -> Digest | None:
        """The adapter as the device would find it."""
        if digest is None or (digest in self.host and self.host[digest].lane is ExecutionPath.SHADOW):
            return digest
        placement = self.placed[digest]
        (held,) = set(self.pool[placement.start : placement.start + placement.rank])
        return held

    def _check_blocks(self, chunks: Sequence[Chunk]) -> None:
        holders = Counter(block for chunk in chunks for block in set(chunk.blocks))
        for chunk in chunks:
            assert len(chunk.blocks) == len(set(chunk.blocks)), "a block twice in one sequence"
            assert len(chunk.blocks) * BLOCK_TOKENS >= chunk.position + len(chunk.tokens)
            for block in chunk.written_blocks:
                assert holders[block] == 1, "a block that is written has a second owner"

    def _run(self, chunk: Chunk) -> Result:
        request = chunk.request
        assert chunk.position + len(chunk.tokens) <= self.context, "a chunk past the context"
        assert chunk.tokens
        digest = self._adapted(chunk.adapter)
        mark = self._read_mark(chunk.blocks, chunk.position)
        if self.has_states and chunk.position:
            assert self.states.get(chunk.slot) == mark, "the slot does not hold what came before this chunk"
        for position, token in enumerate(chunk.tokens, chunk.position):
            block, offset = divmod(position, BLOCK_TOKENS)
            before, mark = mark, write(mark, digest, token)
            self.kv[chunk.blocks[block]][offset] = before, mark
        self.states[chunk.slot] = mark
        self.prefilled += len(chunk.tokens) if not chunk.generated else 0
        return Result(self._sampled(request, mark) if chunk.sample else None, self._scored(chunk))

    def _read_mark(self, blocks: Sequence[int], end: int) -> int:
        """The mark of the positions before `end`, each of which must follow from the one before it."""
        mark = 0
        for position in range(end):
            block, offset = divmod(position, BLOCK_TOKENS)
            before, own = self.kv[blocks[block]][offset]
            assert before == mark, "a chunk after positions that something else has written"
            mark = own
        return mark

    def _sampled(self, request: Request, mark: int) -> Token:
        return Token(mark % self.vocab, None if request.sampling.logprobs is None else -0.5)

    def _scored(self, chunk: Chunk) -> tuple[Token, ...]:
        if chunk.request.prompt_logprobs is None or chunk.generated:
            return ()
        return tuple(
            Token(token, -1.0 if chunk.position + index else None) for index, token in enumerate(chunk.tokens)
        )


def _feed(chunk: Chunk, after: FakeLaunched | None) -> Chunk:
    assert after is not None, "a chunk follows no step"
    assert chunk.follows is not None
    assert chunk.tokens == (UNKNOWN,)
    assert after.chunks, "a token that was read is known"
    before = after.chunks[chunk.follows]
    assert before.request == chunk.request
    assert before.sample
    assert chunk.position == before.position + len(before.tokens)
    return replace(chunk, tokens=(after.tokens[chunk.follows],))


def card(settings: Settings) -> BaseInfo:
    return BaseInfo(
        folder="fake",
        architecture="FakeForCausalLM",
        layers=1,
        hidden_size=8,
        intermediate_size=16,
        vocab_size=VOCAB,
        parameters=1000,
        context=settings.max_context or 64,
        quantization="none",
        dtype="float32",
        device="cpu",
        resident_bytes={"float32": 4000},
        linears=(LinearKind("q_proj", 8, 8, 1),),
        pool_rank=settings.pool_rank,
        rows=settings.max_rows or 4,
        kv_blocks=(settings.max_rows or 4) * count_blocks(settings.max_context or 64),
    )


def build(
    settings: Settings, progress: Callable[[str, float], None], pause: float = 0.002
) -> tuple[FakeRunner, BaseInfo]:
    """A worker's factory; every step takes a moment, so that a test can act in the middle of a
    request.
    """
    progress("loading the base", 0.5)
    fake = card(settings)
    return FakeRunner(fake.kv_blocks, fake.context, fake.pool_rank, pause=pause), fake


def build_broken(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    raise SettingsError("ADAPTERD_BASE: the fake base is broken")


def build_large(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    raise DoesNotFit("ADAPTERD_BASE: the fake base needs 9 MB of memory; 8 MB are free")


def build_raising(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    """Raises, and then takes for ever to end, as the libraries of a device may."""
    atexit.register(time.sleep, 3600)
    raise RuntimeError("the device at /dev/fake0 said no\nand more")


def build_dying(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    os._exit(9)


def build_waiting(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    """As one whose disk hangs."""
    progress("loading weights", 0.0)
    time.sleep(3600)
    raise AssertionError("nobody ended it")


def build_working(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    """Says nothing for three seconds, in which it computes."""
    began = time.monotonic()
    while time.monotonic() - began < 3:
        sum(range(1000))
    return build(settings, progress)


def build_compiling(
    settings: Settings, progress: Callable[[str, float], None]
) -> tuple[FakeRunner, BaseInfo]:
    """Says and computes nothing for three seconds, in which a process under the one that it waits
    for computes.
    """
    work = "import time; ends = time.monotonic() + 3\nwhile time.monotonic() < ends: sum(range(1000))"
    compiler = (
        "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    )
    subprocess.run([sys.executable, "-c", compiler, work], check=True)
    return build(settings, progress)


def build_deaf(settings: Settings, progress: Callable[[str, float], None]) -> tuple[FakeRunner, BaseInfo]:
    """Closes its connection and stays."""
    os.close(int(sys.argv[1]))
    time.sleep(3600)
    raise AssertionError("nobody ended it")
