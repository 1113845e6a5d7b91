"""Builds the runner of the worker process:
loads the base, makes the KV blocks and the pool, chooses kernels or graphs, has all of it proven.

Knows settings and devices. Must not know adapters or requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import llguidance.hf
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from .. import limits
from ..core import capacity
from ..core.base_info import BLOCK_TOKENS, BaseInfo
from ..core.defaults import defaults_of
from ..errors import DoesNotFit, SettingsError
from ..settings import Settings
from . import base_size, gpu_kernels, kernels, kv, loading, processor, rope, selfcheck, states
from .draws import Draw, draw_tokens
from .graphs import CudaGraphs
from .kernels import decoder
from .kernels.weights import fits_kernel
from .linear_calls import LinearCalls
from .lora_pool import LoraPool
from .memory import trim_heap
from .mixture_check import prove_mixtures
from .probe import probe_layers
from .runner import ModelRunner
from .sampler import Sampler

log = logging.getLogger(__name__)

# Compiled grammars that are kept: most requests bring one that came before, and a large one takes a
# second
GRAMMARS = 64


class ProbedBase(NamedTuple):
    """The loaded base and what forwards through it and a small one have shown; `parameters`
    are BaseInfo's `adapted_parameters`.
    """

    model: Any
    attention: Sequence[kv.AttentionSpec]
    stateful: Sequence[states.StateSpec]
    calls: LinearCalls
    settings: Settings
    parameters: tuple[str, ...] = ()

    def uses_graphs(self) -> bool:
        """Whether decode steps are to be recorded as CUDA graphs."""
        return self.model.device.type == "cuda" and self.settings.compile != "off"


def build_runner(settings: Settings, progress: loading.Progress) -> tuple[ModelRunner, BaseInfo]:
    """Loads everything.

    Raises SettingsError with a reason fit for a person when this base or device cannot be served,
    DoesNotFit where memory is too small for it.
    """
    _limit_threads(settings.threads)
    try:
        return _build_parts(settings, progress)
    except torch.OutOfMemoryError as error:
        raise DoesNotFit(
            f"ADAPTERD_BASE: it, KV and a pool of {settings.pool_rank} do not fit into the GPU's memory"
        ) from error
    except (SettingsError, OSError, EOFError):
        raise
    except Exception as error:  # whatever a model's own code raises: a restart would change nothing
        log.debug("the base cannot be served", exc_info=True)
        reason = loading.describe_error(error)
        raise SettingsError(f"ADAPTERD_BASE: {settings.base!r} cannot be served: {reason}") from error


def _build_parts(settings: Settings, progress: loading.Progress) -> tuple[ModelRunner, BaseInfo]:
    device = loading.device_of(settings)
    dtype = loading.dtype_of(settings, device)
    folder = loading.resolve_folder(settings.base, dtype, progress)
    progress("measuring the memory", 0.0)
    base_size.check_base(folder, settings.base, device, dtype, loading.quantization_of(settings, device))
    model = loading.load_base(folder, settings, progress)
    if device.type == "cuda":
        _prepare_gpu(device)
    with torch.inference_mode():
        progress("measuring the base", 0.0)
        base = _probe_base(model, settings)
        card = _describe_base(base, folder)
        pool, graphs = _build_pool(base, card, progress)
    trim_heap()
    sampler = Sampler(make_matchers(folder, card.vocab_size), _find_draw(settings, device))
    return ModelRunner(model, pool, base.attention, sampler, graphs), card


def _limit_threads(wanted: int | None) -> None:
    """Lets torch and the kernels, which ask it, have no more threads than the quota keeps busy,
    unless a setting says how many: the rest would wait for the next period, and all others for
    them.
    """
    torch.set_num_threads(wanted or min(torch.get_num_threads(), limits.usable_processors()))


def _prepare_gpu(device: torch.device) -> None:
    """Makes it the current device, for streams and recordings are made on that one.

    cuDNN's attention is torch's first choice on an H100; it plans anew for each length, for 30 ms
    and more.
    """
    torch.cuda.set_device(device.index or 0)
    torch.backends.cuda.enable_cudnn_sdp(False)


def _probe_base(model: Any, settings: Settings) -> ProbedBase:
    layers = probe_layers(model)
    # On a GPU the factors of experts would take memory that KV has
    is_able = model.device.type == "cpu"
    parameters = prove_mixtures(model, loading.own_context(model)) if is_able else ()
    return ProbedBase(model, *layers, settings, parameters)


def _describe_base(base: ProbedBase, folder: Path) -> BaseInfo:
    capacity = _compute_capacity(base)
    factors = rope.fix_frequencies(base.model, capacity.context)
    layers = base.calls.limits, base.parameters
    card = loading.describe_base(base.model, folder, base.settings, capacity, factors, *layers)
    log.info(*_capacity_line(card, kv.bytes_per_position(base.attention, base.model.dtype)))
    if card.state_bytes:
        facts = len(base.stateful), card.state_bytes / 1e6, card.rows
        log.info("states: %d layers keep %.2f MB of each of %d sequences; no prefix is reused", *facts)
    return card


def _capacity_line(card: BaseInfo, position_bytes: int) -> tuple[object, ...]:
    """What the operator is told of the KV memory: a format and its values."""
    tokens = card.kv_blocks * BLOCK_TOKENS
    text = "kv: %d blocks of %d tokens in %.0f MB: %d tokens in all, %d sequences of the full context of %d"
    megabytes = tokens * position_bytes / 1e6
    return text, card.kv_blocks, BLOCK_TOKENS, megabytes, tokens, tokens // card.context, card.context


def _build_pool(
    base: ProbedBase, card: BaseInfo, progress: loading.Progress
) -> tuple[LoraPool, CudaGraphs | None]:
    """Makes the KV blocks and the pool, and proves the base on them."""
    model, attention = base.model, base.attention
    progress("proving the base", 0.0)
    is_proven = selfcheck.prove_architecture(model, attention, card.context)
    progress("loading the kernels", 0.0)
    tables = kernels.make_tables(card.rows, card.context) if _can_use_kernels(base) else None
    blocks = card.kv_blocks + base.uses_graphs()
    kv.allocate_blocks(attention, blocks, model.dtype, model.device)
    states.install_states(base.stateful, card.rows, model.device)
    if tables:
        kernels.register_tables([spec.layer for spec in attention], tables)
    logits = selfcheck.logits_of(model)
    if not is_proven:
        selfcheck.prove_roughly(model, logits, bool(base.stateful))
    progress("making the pool", 0.0)
    if tables:
        pool = _build_fused_pool(base, tables, logits)
    else:
        pool = _build_gpu_pool(base, logits) if base.uses_graphs() else None
    pool = pool or _make_pool(base)
    graphs = _record_graphs(base, pool, card, logits, progress) if base.uses_graphs() else None
    return pool, graphs


def _make_pool(base: ProbedBase, tables: kernels.StepTables | None = None) -> LoraPool:
    model = base.model
    layers = base.calls, base.parameters
    return LoraPool(model, base.settings.pool_rank, model.dtype, model.device, tables, *layers)


def _can_use_kernels(base: ProbedBase) -> bool:
    """Whether the base is on a CPU whose kernels can run it.

    Raises SettingsError where they were demanded and cannot.
    """
    if base.model.device.type != "cpu":
        return False
    is_able = base.settings.compile != "off" and _fits_kernels(base)
    is_able = is_able and kernels.load_kernels(base.settings.kernels)
    if base.settings.compile == "on" and not is_able:
        raise SettingsError(
            "ADAPTERD_COMPILE: on, but the kernels need a bfloat16 base on a CPU with AVX2, AVX-512 or NEON, "
            "and a C++ compiler"
        )
    return is_able


def _fits_kernels(base: ProbedBase) -> bool:
    """Whether dtype, linear layers and attention are those that the kernels are written for."""
    head = base.model.get_output_embeddings()
    layers = [layer for _, layer, _, _ in loading.iterate_linears(base.model) if layer is not head]
    is_attention_fit = all(
        spec.dim % 16 == 0 and spec.value_dim % 16 == 0 and not spec.chunk for spec in base.attention
    )
    return base.model.dtype == torch.bfloat16 and is_attention_fit and all(map(fits_kernel, layers))


def _build_fused_pool(base: ProbedBase, tables: kernels.StepTables, expected: Tensor) -> LoraPool | None:
    """The pool on the CPU kernels, where they say what torch says.

    Raises SettingsError where they were demanded and do not.
    """
    pool = _make_pool(base, tables)
    _install_kernels(pool, base)
    limit = selfcheck.INT8 if _quantization_of(base) == "int8" else selfcheck.KERNELS
    difference = selfcheck.kernels_differ(pool, expected, limit)
    kv.clear_blocks(base.attention, selfcheck.PROBE_BLOCKS)
    if not difference:
        return pool
    if base.settings.compile == "on":
        raise SettingsError(
            f"ADAPTERD_COMPILE: on, but the kernels cannot be used for this base: {difference}"
        )
    log.warning("kernels: off; %s", difference)
    return None


def _build_gpu_pool(base: ProbedBase, expected: Tensor) -> LoraPool | None:
    """The pool on the Triton kernels, where they say what torch and bitsandbytes say."""
    if reason := gpu_kernels.explain_absence(base.model.device):
        log.info("kernels: off; %s", reason)
        return None
    pool = _make_pool(base)
    try:
        gpu_kernels.install_kernels(pool)
        difference = selfcheck.kernels_differ(pool, expected, selfcheck.ROUGH[pool.dtype])
    except ValueError as error:
        difference = str(error)
    if difference:
        log.warning("kernels: off; %s", difference)
        return None
    return pool


def _install_kernels(pool: LoraPool, base: ProbedBase) -> None:
    """Puts the kernels' attention into the pool's tree, and the kernel for all of a layer where its
    kind is known.
    """
    pool.tree.set_attn_implementation(kernels.NAME)
    attention, layers = base.attention, len(base.attention)
    lists = (m for m in pool.tree.modules() if isinstance(m, nn.ModuleList) and len(m) == layers)
    installed = sum(decoder.install_layers(each, attention) for each in lists)
    quantization = _quantization_of(base)
    weights = "bfloat16" if quantization == "none" else quantization
    facts = processor.name_vectors(base.settings.kernels), weights, installed, layers
    log.info("kernels: %s, %s, %d of %d layers in one call each, %d threads", *facts, torch.get_num_threads())


def _quantization_of(base: ProbedBase) -> str:
    return loading.held_quantization(base.model)


def _record_graphs(
    base: ProbedBase, pool: LoraPool, card: BaseInfo, expected: Tensor, progress: loading.Progress
) -> CudaGraphs | None:
    """CUDA graphs, where they are proven.

    Raises SettingsError where they were demanded and are not.
    """
    if base.stateful:
        log.warning("graphs: off; layers of this base keep states, which no recording carries on")
    elif pool.step.add_tiles is None:
        log.warning("graphs: off; steps are recorded only with the kernels of attention and adapters")
    else:
        graphs = CudaGraphs(pool, card.rows, card.context, card.vocab_size, spare=card.kv_blocks)
        is_made = graphs.record_all(partial(progress, "recording decode steps"))
        if is_made and selfcheck.check_graphs(pool, base.attention, graphs, expected):
            return graphs
    if base.settings.compile == "on":
        raise SettingsError(
            "ADAPTERD_COMPILE: on, but decode steps of this base cannot be CUDA graphs; the log says why"
        )
    return None


def _compute_capacity(base: ProbedBase) -> loading.Capacity:
    """Sequences at once, the context of each (the base's own, or what all blocks hold), and the blocks."""
    rows = _count_rows(base)
    blocks = _count_blocks(base)
    own, wanted = loading.own_context(base.model), base.settings.max_context
    fitting = blocks * BLOCK_TOKENS
    if wanted and wanted > own:
        raise SettingsError(f"ADAPTERD_MAX_CONTEXT: {wanted} is over the base's own {own}")
    if wanted and wanted > fitting:
        raise DoesNotFit(f"ADAPTERD_MAX_CONTEXT: {wanted} tokens do not fit into memory; {fitting} do")
    context = wanted or min(own, fitting)
    if context < selfcheck.PROBE:
        reason = f"{context} tokens are too few to prove the base by {selfcheck.PROBE}"
        error = SettingsError if wanted or own < selfcheck.PROBE else DoesNotFit
        raise error(f"{'ADAPTERD_MAX_CONTEXT' if wanted else 'ADAPTERD_KV_MB'}: {reason}")
    return loading.Capacity(rows, context, blocks, states.bytes_per_sequence(base.stateful))


def _count_rows(base: ProbedBase) -> int:
    """The sequences at once."""
    return base.settings.max_rows or defaults_of(base.model.device.type).rows


def _count_blocks(base: ProbedBase) -> int:
    """The KV blocks beside base and pool; on a GPU one is kept for the recordings' unused slots."""
    model, settings = base.model, base.settings
    linears = loading.list_linear_kinds(model, base.calls.limits)
    taken = capacity.pool_bytes(linears, settings.pool_rank, model.dtype.itemsize)
    taken += capacity.states_bytes(states.bytes_per_sequence(base.stateful), _count_rows(base))
    budget = capacity.kv_budget(_free_bytes(model.device) - taken, model.device.type, settings.kv_mb)
    position = kv.bytes_per_position(base.attention, model.dtype)
    blocks = capacity.count_kv_blocks(budget, position, _count_rows(base), loading.own_context(model))
    return blocks - base.uses_graphs()


def _free_bytes(device: torch.device) -> int:
    """Bytes of memory that the device has left."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what loading left unused with torch counts as taken
        return torch.cuda.mem_get_info(device)[0]
    left = limits.free_memory()
    return limits.UNLIMITED if left is None else left.memory


def _find_draw(settings: Settings, device: torch.device) -> Draw:
    """What draws tokens: on a CPU the kernel, where it can be had."""
    is_able = device.type == "cpu" and settings.compile != "off" and kernels.load_kernels(settings.kernels)
    return kernels.draw_tokens if is_able else draw_tokens


def make_matchers(folder: Path, vocabulary: int) -> Callable[[str], Any]:
    """Makes grammar matchers over the base's tokenizer, which is only read when the first grammar
    comes.
    """

    @cache
    def read_tokenizer() -> Any:
        return llguidance.hf.from_tokenizer(AutoTokenizer.from_pretrained(folder), n_vocab=vocabulary)

    @lru_cache(GRAMMARS)
    def compile_grammar(grammar: str) -> Any:
        return llguidance.LLMatcher(read_tokenizer(), grammar)

    return lambda grammar: compile_grammar(grammar).deep_copy()
