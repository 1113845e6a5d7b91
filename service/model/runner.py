"""Plan → tokens: the one place where a step runs on the device. Must not know names, text, HTTP or why a plan is what it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llguidance.hf
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..engine.request import Adapter, BaseCard, Chunk, Digest, Lane, Plan, Result, Token
from ..errors import SettingsError
from ..settings import Settings
from . import base, kernels, kv
from .adapted import Factors
from .bank import Bank, Run
from .factors import factors
from .graphs import Graphs
from .kernels import decoder
from .memory import trim
from .sampler import Sampler, Unfit, described
from .shadow import own_bytes, planted

log = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.5  # of what is free once the base is loaded, for KV rows
PROBE = 24  # tokens of the proof that the row attention equals the model's own
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # relative, of logits that were computed in another order
ROWS = {"cpu": 16, "cuda": 64}


class Hosted(NamedTuple):
    """An adapter in host memory: factors for the pool, or PEFT's own model. `size` in bytes."""

    size: int
    factors: dict[str, Factors]
    tree: Any = None


class Runner:
    """The base, the bank, the KV rows and the sampler, behind `engine.request.Runner`. `model` is the base's own tree."""

    def __init__(self, model: Any, bank: Bank, attention: Sequence[kv.Sighting], sampler: Sampler, graphs: Graphs | None = None) -> None:
        self.model, self.bank, self.attention, self.sampler, self.graphs = model, bank, attention, sampler, graphs
        self.hosted: dict[Digest, Hosted] = {}

    def load(self, adapter: Adapter) -> int:
        if adapter.lane is Lane.SHADOW:
            tree = planted(self.model, adapter)
            hosted = Hosted(own_bytes(tree, self.model), {}, tree)
        else:
            made = factors(adapter, self.bank)
            size = sum(t.nbytes for part in made.values() for t in part if t is not None)
            pinned = self.bank.device.type == "cuda"  # torch pins memory by powers of two
            hosted = Hosted(1 << (size - 1).bit_length() if pinned else size, made)
        self.hosted[adapter.digest] = hosted
        return hosted.size

    def unload(self, digest: Digest) -> int:
        hosted = self.hosted.pop(digest, None)
        return hosted.size if hosted else 0

    def finish(self, request: int) -> None:
        self.sampler.finish(request)

    @torch.inference_mode()
    def step(self, plan: Plan) -> Sequence[Result]:
        for digest in plan.remove:
            self.bank.remove(digest)
        for placement in plan.place:
            self.bank.place(placement, self.hosted[placement.digest].factors)
        for fork in plan.forks:
            kv.fork(self.attention, fork.source, fork.target, fork.length)
        results: dict[int, Result] = {}
        for tree, chunks in self._batches(plan.chunks):
            run = self._run if tree is self.bank.tree else self._apart
            results.update(zip((chunk.request.id for chunk in chunks), run(tree, chunks), strict=True))
        return [results[chunk.request.id] for chunk in plan.chunks]

    def _apart(self, tree: Any, chunks: Sequence[Chunk]) -> list[Result]:
        """A shadow adapter's batch: where PEFT's own code raises, its requests fail and the step goes on."""
        try:
            return self._run(tree, chunks)
        except Exception as error:
            log.exception("PEFT could not run a shadow adapter; %d requests fail", len(chunks))
            for chunk in chunks:
                kv.clear(self.attention, chunk.row)
            return [Result(error=f"PEFT could not run this adapter on this base ({type(error).__name__})")] * len(chunks)

    def _batches(self, chunks: Sequence[Chunk]) -> list[tuple[Any, list[Chunk]]]:
        """The mixed batch on the bank's tree, and one batch for each shadow adapter on its own."""
        batches: dict[int, tuple[Any, list[Chunk]]] = {}
        for chunk in chunks:
            hosted = self.hosted.get(chunk.request.adapter or "")  # a resident adapter may have left host memory
            tree = self.bank.tree if hosted is None or hosted.tree is None else hosted.tree
            batches.setdefault(id(tree), (tree, []))[1].append(chunk)
        return list(batches.values())

    def _run(self, tree: Any, chunks: Sequence[Chunk]) -> list[Result]:
        wanted = [chunk for chunk in chunks if chunk.sample or chunk.request.prompt_logprobs is not None]
        logits = self._forward(tree, chunks, {id(chunk) for chunk in wanted})
        parts = dict(zip(map(id, wanted), torch.split(logits, [_kept(chunk) for chunk in wanted]), strict=True))
        sampled = [chunk for chunk in chunks if chunk.sample]
        last = [parts[id(chunk)][-1] for chunk in sampled]
        tokens = self.sampler.sample(torch.stack(last), [c.request for c in sampled]) if last else []
        chosen = dict(zip(map(id, sampled), tokens, strict=True))
        return [self._result(chunk, chosen.get(id(chunk)), parts.get(id(chunk))) for chunk in chunks]

    def _result(self, chunk: Chunk, token: Token | Unfit | None, logits: Tensor | None) -> Result:
        if isinstance(token, Unfit):
            kv.clear(self.attention, chunk.row)  # what is masked is still multiplied: not-a-number would reach the row's next tenant
            return Result(error=str(token), code=token.code)
        return Result(token, _prompt(chunk, logits))

    def _forward(self, tree: Any, chunks: Sequence[Chunk], wanted: set[int]) -> Tensor:
        """The logits [kept, vocabulary] of the wanted chunks: their last token's, or all of them where prompt logprobs are asked for."""
        spans: list[kv.Span] = []
        heads: list[Run] = []
        kept: list[int] = []
        at = 0
        for chunk in chunks:
            length = len(chunk.tokens)
            spans.append(kv.Span(at, length, chunk.row, chunk.position))
            if id(chunk) in wanted:
                kept += range(at + length - _kept(chunk), at + length)
                heads.append(Run(_kept(chunk), chunk.adapter))
            at += length
        decode = sum(chunk.generated > 0 for chunk in chunks)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        if tree is self.bank.tree:
            digests = [chunk.adapter for chunk in chunks]
            if self.graphs and self.graphs.able and decode == len(chunks) and not self.bank.gated(digests):
                return self.graphs.step(tokens, spans, digests)
            self.bank.begin([Run(len(c.tokens), c.adapter) for c in chunks], heads, decode, spans)
        return forward(tree, self.bank.device, tokens, spans, decode, kept)


def forward(tree: Any, device: torch.device, tokens: Sequence[int], spans: Sequence[kv.Span], decode: int, kept: Sequence[int]) -> Tensor:
    """Runs a tree on the flat tokens of a step: logits [kept, vocabulary]."""
    table = kv.Table.of(spans, decode, device)
    keep = torch.tensor(kept, dtype=torch.long, device=device)
    ids = torch.tensor([tokens], device=device)
    rows = {} if tree.config._attn_implementation == kernels.NAME else {"table": table}
    out = tree(input_ids=ids, position_ids=table.positions[None], use_cache=False, logits_to_keep=keep, **rows)
    logits: Tensor = out.logits[0]
    return logits


def _kept(chunk: Chunk) -> int:
    """How many of the chunk's tokens need logits."""
    return len(chunk.tokens) if chunk.request.prompt_logprobs is not None and not chunk.generated else 1


def _prompt(chunk: Chunk, logits: Tensor | None) -> tuple[Token, ...]:
    """The prompt's tokens that this chunk's logits speak of: the first of all has no log probability, the next follow from them."""
    wanted, prompt = chunk.request.prompt_logprobs, chunk.request.prompt
    if wanted is None or chunk.generated or logits is None:
        return ()
    first = (Token(prompt[0]),) if chunk.position == 0 else ()
    following = prompt[chunk.position + 1 : chunk.position + 1 + len(chunk.tokens)]
    return first + tuple(described(row, token, wanted) for row, token in zip(logits, following, strict=False))


def build(settings: Settings, progress: base.Progress) -> tuple[Runner, BaseCard]:
    """Loads everything. Raises SettingsError with a reason fit for a person when this base or device cannot be served."""
    folder = base.resolve(settings.base, progress)
    model: Any = base.load(folder, settings, progress)
    device, dtype = base.device_of(settings), model.dtype
    recorded = device.type == "cuda" and settings.compile != "off"
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # streams and recordings are made on the current one
    with torch.inference_mode():
        progress("measuring the base", 0.0)
        expected = _plain(model)
        attention = kv.scout(model)
        rows, context = _capacity(model, attention, settings, device, recorded)
        card = base.card(model, folder, settings, context, rows)
        tables = kernels.tables(rows) if device.type == "cpu" and _fusible(model, attention, settings) else None
        kv.allocate(attention, rows + recorded, context, dtype, device, tables.body if tables else None)
        progress("making the pool", 0.0)
        bank = Bank(model, settings.pool_rank, dtype, device, tables)
        if tables:
            _fuse(bank, attention)
        _prove(bank, expected)
        graphs = _graphs(bank, attention, card, expected, settings) if recorded else None
    trim()
    return Runner(model, bank, attention, Sampler(matchers(folder, card.vocab_size)), graphs), card


def _fusible(model: Any, attention: Sequence[kv.Sighting], settings: Settings) -> bool:
    """Whether the CPU kernels can run this base. Raises SettingsError where they were demanded and cannot."""
    wanted = settings.compile != "off" and model.dtype == torch.bfloat16
    head = model.get_output_embeddings()
    layers = [layer for _, layer, _, _ in base.linears(model) if layer is not head]
    able = wanted and all(map(kernels.fits, layers)) and all(s.dim % 16 == 0 for s in attention) and kernels.load()
    if settings.compile == "on" and not able:
        raise SettingsError("ADAPTERD_COMPILE: on, but the kernels need a bfloat16 base on a CPU with AVX512-BF16, and a C++ compiler")
    return able


def _fuse(bank: Bank, attention: Sequence[kv.Sighting]) -> None:
    """Puts the kernels' attention into the bank's tree, and the kernel for all of a layer where its kind is known."""
    bank.tree.set_attn_implementation(kernels.NAME)
    (layers,) = [m for m in bank.tree.modules() if isinstance(m, nn.ModuleList) and len(m) == len(attention)]
    log.info("kernels: %d of %d layers in one call each", decoder.place(layers, attention), len(layers))


def _probe(model: Any) -> Tensor:
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(7, 7 + 11 * PROBE, 11, device=model.device)[None] % vocabulary


def _plain(model: Any) -> Tensor:
    """What the model itself makes of the probe, before its attention is replaced: logits [PROBE, vocabulary].

    By the eager attention, which alone knows all that a model may want: transformers' default leaves Gemma 2's cap out in some releases.
    """
    try:
        model.set_attn_implementation("eager")
        logits: Tensor = model(input_ids=_probe(model), use_cache=False).logits
    except (TypeError, ValueError, AttributeError) as error:
        raise kv.refused(model, f"a plain forward raises {type(error).__name__}") from error
    return logits[0].float()


def _prove(bank: Bank, expected: Tensor) -> None:
    """The same probe in two chunks and one decoded token, through the rows and the adapted layers, must give the same logits."""
    ids, parts = _probe(bank.tree)[0].tolist(), []
    for start, stop in ((0, PROBE // 2), (PROBE // 2, PROBE - 1), (PROBE - 1, PROBE)):
        span, decode = kv.Span(0, stop - start, 0, start), int(stop - start == 1)
        bank.begin([Run(stop - start, None)], [], decode, [span])
        parts.append(forward(bank.tree, bank.device, ids[start:stop], [span], decode, range(stop - start)).float())
    error = _apart(torch.cat(parts), expected)
    if not error < TOLERANCE[bank.dtype]:
        raise kv.refused(bank.tree, f"its logits through the row attention differ from its own by {error:.2g}")


def _graphs(bank: Bank, attention: Sequence[kv.Sighting], card: BaseCard, expected: Tensor, settings: Settings) -> Graphs | None:
    """CUDA graphs, if the probe's last token gets the same logits by them. Raises SettingsError where they were demanded and do not."""
    graphs = Graphs(bank, card.rows, card.context, card.vocab_size)
    for logits in _tries(graphs, attention, _probe(bank.tree)[0].tolist()[-1], card.rows):
        error = _apart(logits, expected[-1:])
        if graphs.able and error < TOLERANCE[bank.dtype]:
            continue
        log.warning("graphs: off; the logits of the step that was tried differ from the model's own by %.2g", error)
        if settings.compile == "on":
            raise SettingsError("ADAPTERD_COMPILE: on, but decode steps of this base cannot be CUDA graphs; the log says why")
        return None
    return graphs


def _tries(graphs: Graphs, attention: Sequence[kv.Sighting], token: int, rows: int) -> Iterator[Tensor]:
    """The probe's last token by a step that is recorded and by one that is replayed: with KV read where it lies, and gathered."""
    for row in dict.fromkeys((0, rows - 1)):
        kv.fork(attention, 0, row, PROBE - 1)
        for _ in ("recorded", "replayed"):
            graphs.logits.zero_()  # a replay that does nothing is not to be taken for a good one
            yield graphs.step([token], [kv.Span(0, 1, row, PROBE - 1)], [None])


def _apart(logits: Tensor, expected: Tensor) -> float:
    """The relative distance."""
    return float((logits.float() - expected).norm() / expected.norm())


def _capacity(model: Any, attention: Sequence[kv.Sighting], settings: Settings, device: torch.device, spare: int) -> tuple[int, int]:
    """KV rows and the positions of each: the base's own context, capped so that all, spare ones too, fit into a share of the memory."""
    rows = settings.max_rows or ROWS[device.type]
    own = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2048)
    if settings.max_context and settings.max_context > own:
        raise SettingsError(f"ADAPTERD_MAX_CONTEXT: {settings.max_context} is over the base's own {own}")
    fits = int(SHARE_OF_MEMORY * _free(device)) // ((rows + spare) * kv.bytes_per_position(attention, model.dtype))
    context = settings.max_context or min(own, fits)
    if context > fits:
        raise SettingsError(f"ADAPTERD_MAX_CONTEXT: {rows} rows of {context} tokens do not fit into memory; {fits} do")
    return rows, context


def _free(device: torch.device) -> int:
    """Bytes of memory that the device has left."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def matchers(folder: Path, vocabulary: int) -> Callable[[str], Any]:
    """Makes grammar matchers over the base's tokenizer, which is only read when the first grammar comes."""

    @cache
    def words() -> Any:
        return llguidance.hf.from_tokenizer(AutoTokenizer.from_pretrained(folder), n_vocab=vocabulary)

    return lambda grammar: llguidance.LLMatcher(words(), grammar)
