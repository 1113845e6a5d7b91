"""Plan → tokens: the one place where a step runs on the device. Must not know names, text, HTTP or why a plan is what it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import llguidance.hf
import torch
from torch import Tensor
from transformers import AutoTokenizer

from ..engine.request import Adapter, BaseCard, Chunk, Digest, Plan, Result, Token
from ..errors import SettingsError
from ..settings import Settings
from . import base, kv
from .bank import Arrangement, Bank, Run
from .factors import Hosted, host
from .sampler import Sampler, described

SHARE_OF_MEMORY = 0.5  # of what is free once the base is loaded, for KV rows
PROBE = 24  # tokens of the proof that the row attention equals the model's own
ROWS = {"cpu": 16, "cuda": 64}


class Runner:
    """The base, the bank, the KV rows and the sampler, behind `engine.request.Runner`."""

    def __init__(self, bank: Bank, attention: Sequence[kv.Sighting], sampler: Sampler) -> None:
        self.bank, self.attention, self.sampler = bank, attention, sampler
        self.hosted: dict[Digest, Hosted] = {}

    def load(self, adapter: Adapter) -> int:
        self.hosted[adapter.digest] = host(adapter, self.bank)
        return self.hosted[adapter.digest].size

    def unload(self, digest: Digest) -> int:
        return self.hosted.pop(digest).size

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
        return self._run(plan.chunks) if plan.chunks else ()

    def _run(self, chunks: Sequence[Chunk]) -> list[Result]:
        wanted = [chunk for chunk in chunks if chunk.sample or chunk.request.prompt_logprobs is not None]
        logits = self._forward(chunks, {id(chunk) for chunk in wanted}) if wanted else self._forward(chunks, set())
        parts = dict(zip(map(id, wanted), torch.split(logits, [_kept(chunk) for chunk in wanted]), strict=True))
        sampled = [chunk for chunk in chunks if chunk.sample]
        last = [parts[id(chunk)][-1] for chunk in sampled]
        tokens = self.sampler.sample(torch.stack(last), [c.request for c in sampled]) if last else []
        chosen = dict(zip(map(id, sampled), tokens, strict=True))
        return [Result(chosen.get(id(chunk)), _prompt(chunk, parts.get(id(chunk)))) for chunk in chunks]

    def _forward(self, chunks: Sequence[Chunk], wanted: set[int]) -> Tensor:
        """The logits [kept, vocabulary] of the wanted chunks: their last token's, or all of them where prompt logprobs are asked for."""
        spans: list[kv.Span] = []
        runs: list[Run] = []
        heads: list[Run] = []
        kept: list[int] = []
        at = 0
        decode = sum(chunk.generated > 0 for chunk in chunks)
        for chunk in chunks:
            length = len(chunk.tokens)
            spans.append(kv.Span(at, length, chunk.row, chunk.position))
            runs.append(Run(length, chunk.request.adapter))
            if id(chunk) in wanted:
                kept += range(at + length - _kept(chunk), at + length)
                heads.append(Run(_kept(chunk), chunk.request.adapter))
            at += length
        table = kv.Table(spans, decode, self.bank.device)
        self.bank.body, self.bank.head = self.bank.arrange(runs, decode), self.bank.arrange(heads, decode)
        ids = torch.tensor([[token for chunk in chunks for token in chunk.tokens]], device=self.bank.device)
        keep = torch.tensor(kept, dtype=torch.long, device=self.bank.device)
        try:
            out = self.bank.tree(input_ids=ids, position_ids=table.positions[None], use_cache=False, logits_to_keep=keep, table=table)
        finally:
            self.bank.body = self.bank.head = Arrangement()
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
    progress("proving the attention", 0.0)
    with torch.inference_mode():
        expected = _plain(model)
        attention = kv.scout(model)
        rows, context = _capacity(model, attention, settings, device)
        kv.allocate(attention, rows, context, dtype, device)
        bank = Bank(model, settings.pool_rank, dtype, device)
        _prove(bank, expected)
    runner = Runner(bank, attention, Sampler(matchers(folder, model.config.get_text_config().vocab_size)))
    return runner, base.card(model, folder, settings, context, rows)


def _probe(model: Any) -> Tensor:
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(7, 7 + 11 * PROBE, 11, device=model.device)[None] % vocabulary


def _plain(model: Any) -> Tensor:
    """What the model itself makes of the probe, before its attention is replaced: logits [PROBE, vocabulary]."""
    try:
        logits: Tensor = model(input_ids=_probe(model), use_cache=False).logits
    except (TypeError, ValueError, AttributeError) as error:
        raise kv.refused(model, f"a plain forward raises {type(error).__name__}") from error
    return logits[0].float()


def _prove(bank: Bank, expected: Tensor) -> None:
    """The same probe in two chunks and one decoded token, through the rows and the adapted layers, must give the same logits."""
    parts = []
    for start, stop in ((0, PROBE // 2), (PROBE // 2, PROBE - 1), (PROBE - 1, PROBE)):
        table = kv.Table([kv.Span(0, stop - start, 0, start)], int(stop - start == 1), bank.device)
        ids = _probe(bank.tree)[:, start:stop]
        parts.append(bank.tree(input_ids=ids, position_ids=table.positions[None], use_cache=False, table=table).logits[0].float())
    error = (torch.cat(parts) - expected).norm() / expected.norm()
    if not error < (1e-3 if bank.dtype == torch.float32 else 0.1):
        raise kv.refused(bank.tree, f"its logits through the row attention differ from its own by {float(error):.2g}")


def _capacity(model: Any, attention: Sequence[kv.Sighting], settings: Settings, device: torch.device) -> tuple[int, int]:
    """KV rows and the positions of each: the base's own context, capped so that all rows fit into a share of the free memory."""
    rows = settings.max_rows or ROWS[device.type]
    own = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2048)
    if settings.max_context and settings.max_context > own:
        raise SettingsError(f"ADAPTERD_MAX_CONTEXT: {settings.max_context} is over the base's own {own}")
    fits = int(SHARE_OF_MEMORY * _free(device)) // (rows * kv.bytes_per_position(attention, model.dtype))
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
