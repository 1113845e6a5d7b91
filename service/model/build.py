"""Builds the worker's runner: loads the base, makes the KV rows and the pool, chooses kernels or
graphs, has all of it proven.

Knows settings and devices. Must not know adapters or requests.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import llguidance.hf
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from ..core.base_info import BaseInfo
from ..core.defaults import defaults_of
from ..errors import SettingsError
from ..settings import Settings
from . import kernels, kv, loading, rope, selfcheck
from .graphs import CudaGraphs
from .kernels import decoder
from .linear_calls import LinearCalls, recorded_calls
from .lora_pool import LoraPool
from .memory import trim_heap
from .runner import ModelRunner
from .sampler import Sampler

log = logging.getLogger(__name__)

SHARE_OF_MEMORY = 0.5  # of what is free once the base is loaded, for KV rows
# Compiled ones that are kept: most requests bring one that came before, and a large one takes a
# second
GRAMMARS = 64


def build_runner(settings: Settings, progress: loading.Progress) -> tuple[ModelRunner, BaseInfo]:
    """Loads everything.

    Raises SettingsError with a reason fit for a person when this base or device cannot be served.
    """
    try:
        return _build_parts(settings, progress)
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"ADAPTERD_BASE: it, KV rows and a pool of {settings.pool_rank} do not fit into the GPU's memory"
        ) from error


def _build_parts(settings: Settings, progress: loading.Progress) -> tuple[ModelRunner, BaseInfo]:
    folder = loading.resolve_folder(
        settings.base, loading.dtype_of(settings, loading.device_of(settings)), progress
    )
    model: Any = loading.load_base(folder, settings, progress)
    device = loading.device_of(settings)
    recorded = device.type == "cuda" and settings.compile != "off"
    if device.type == "cuda":
        # Streams and recordings are made on the current one
        torch.cuda.set_device(device.index or 0)
        # Torch's first choice on an H100; it plans anew for each length, for 30 ms and more
        torch.backends.cuda.enable_cudnn_sdp(False)
    with torch.inference_mode():
        progress("measuring the base", 0.0)
        with recorded_calls(model) as recorder:
            attention = kv.probe_attention(model)
        calls = recorder.result()
        rows, context = _compute_capacity(model, attention, settings, device, recorded)
        card = loading.describe_base(
            model, folder, settings, context, rows, rope.fix_frequencies(model, context), calls.limits
        )
        proven = selfcheck.prove_architecture(model, attention, context)
        tables = (
            kernels.make_tables(rows)
            if device.type == "cpu" and _can_use_kernels(model, attention, settings)
            else None
        )
        kv.allocate_rows(
            attention, rows + recorded, context, model.dtype, device, tables.body if tables else None
        )
        logits = selfcheck.logits_of(model)
        if not proven:
            selfcheck.prove_roughly(model, logits)
        progress("making the pool", 0.0)
        fused = _fused(model, attention, settings, tables, calls, logits) if tables else None
        bank = fused or _make_bank(model, settings, calls)
        graphs = _record_graphs(bank, attention, card, logits, settings) if recorded else None
    trim_heap()
    return ModelRunner(model, bank, attention, Sampler(make_matchers(folder, card.vocab_size)), graphs), card


def _make_bank(
    model: Any, settings: Settings, calls: LinearCalls, tables: kernels.StepTables | None = None
) -> LoraPool:
    return LoraPool(model, settings.pool_rank, model.dtype, model.device, tables, calls)


def _can_use_kernels(model: Any, attention: Sequence[kv.AttentionSpec], settings: Settings) -> bool:
    """Whether the CPU kernels can run this base.

    Raises SettingsError where they were demanded and cannot.
    """
    wanted = settings.compile != "off" and model.dtype == torch.bfloat16
    head = model.get_output_embeddings()
    layers = [layer for _, layer, _, _ in loading.iterate_linears(model) if layer is not head]
    able = (
        wanted
        and all(map(kernels.fits_kernel, layers))
        and all(s.dim % 16 == 0 and not s.chunk for s in attention)
        and kernels.load_kernels()
    )
    if settings.compile == "on" and not able:
        raise SettingsError(
            "ADAPTERD_COMPILE: on, but the kernels need a bfloat16 base on a CPU with AVX512-BF16, and a C++ compiler"
        )
    return able


def _fused(
    model: Any,
    attention: Sequence[kv.AttentionSpec],
    settings: Settings,
    tables: kernels.StepTables,
    calls: LinearCalls,
    expected: Tensor,
) -> LoraPool | None:
    """The bank on the CPU kernels, where they say what torch says.

    Raises SettingsError where they were demanded and do not.
    """
    bank = _make_bank(model, settings, calls, tables)
    _place_kernels(bank, attention)
    why = selfcheck.kernels_differ(bank, expected)
    kv.clear_row(attention, 0)
    if not why:
        return bank
    if settings.compile == "on":
        raise SettingsError(f"ADAPTERD_COMPILE: on, but the kernels cannot be used for this base: {why}")
    log.warning("kernels: off; %s", why)
    return None


def _place_kernels(bank: LoraPool, attention: Sequence[kv.AttentionSpec]) -> None:
    """Puts the kernels' attention into the bank's tree, and the kernel for all of a layer where its
    kind is known.
    """
    bank.tree.set_attn_implementation(kernels.NAME)
    lists = (m for m in bank.tree.modules() if isinstance(m, nn.ModuleList) and len(m) == len(attention))
    placed = sum(decoder.install_layers(layers, attention) for layers in lists)
    log.info("kernels: %d of %d layers in one call each", placed, len(attention))


def _record_graphs(
    bank: LoraPool,
    attention: Sequence[kv.AttentionSpec],
    card: BaseInfo,
    expected: Tensor,
    settings: Settings,
) -> CudaGraphs | None:
    """CUDA graphs, where they are proven.

    Raises SettingsError where they were demanded and are not.
    """
    graphs = CudaGraphs(bank, card.rows, card.context, card.vocab_size)
    if selfcheck.check_graphs(bank, attention, graphs, expected):
        return graphs
    if settings.compile == "on":
        raise SettingsError(
            "ADAPTERD_COMPILE: on, but decode steps of this base cannot be CUDA graphs; the log says why"
        )
    return None


def _compute_capacity(
    model: Any, attention: Sequence[kv.AttentionSpec], settings: Settings, device: torch.device, spare: int
) -> tuple[int, int]:
    """KV rows and the positions of each: the base's own context, capped so that all, spare ones
    too, fit into a share of the memory.
    """
    rows = settings.max_rows or defaults_of(device.type).rows
    own = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2048)
    if settings.max_context and settings.max_context > own:
        raise SettingsError(f"ADAPTERD_MAX_CONTEXT: {settings.max_context} is over the base's own {own}")
    fits = int(SHARE_OF_MEMORY * _free_bytes(device)) // (
        (rows + spare) * kv.bytes_per_position(attention, model.dtype)
    )
    context = settings.max_context or min(own, fits)
    if context > fits:
        raise SettingsError(
            f"ADAPTERD_MAX_CONTEXT: {rows} rows of {context} tokens do not fit into memory; {fits} do"
        )
    if context < selfcheck.PROBE:  # a GPU would write past the rows' end
        raise SettingsError(
            f"ADAPTERD_MAX_CONTEXT: {rows} rows of {context} tokens are too short to prove the base by {selfcheck.PROBE}"
        )
    return rows, context


def _free_bytes(device: torch.device) -> int:
    """Bytes of memory that the device has left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left unused with torch counts as taken
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def make_matchers(folder: Path, vocabulary: int) -> Callable[[str], Any]:
    """Makes grammar matchers over the base's tokenizer, which is only read when the first grammar
    comes.
    """

    @cache
    def words() -> Any:
        return llguidance.hf.from_tokenizer(AutoTokenizer.from_pretrained(folder), n_vocab=vocabulary)

    @lru_cache(GRAMMARS)
    def first(grammar: str) -> Any:
        return llguidance.LLMatcher(words(), grammar)

    return lambda grammar: first(grammar).deep_copy()
