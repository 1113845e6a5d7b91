"""Proves in the worker process, before serving, that what will run gives the model's own logits.

It stands instead of a list of architectures.

The architecture is proven on a small random model of the base's config in float32, where right and
wrong are a factor of a thousand apart. The base itself runs in too few bits for that: a wrong mask
may change less than rounding does, and a router that rounding tips over more than a wrong mask. So
of the base it is proven that its numbers are finite, and that each faster way of running it agrees
with the plain one.

Knows the probe's tokens. Must not know adapters, requests or settings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..engine.kv_blocks import count_blocks
from . import kv, rope, states
from .compat import attention_name
from .graphs import CudaGraphs
from .loading import iterate_linears
from .lora_pool import LoraPool
from .runner import forward_step
from .small_model import SHORT, small_model, thresholds
from .step_layout import SequenceStep, make_layout
from .stored_quantization import is_quantized

log = logging.getLogger(__name__)

GRAPHS_DIFFER = "graphs: off; the logits of the step that was tried differ from the model's own by %.2g"
ROUGH_ONLY = "proof: rough; no small model of the base could be made to prove it by: %s"

PROBE = 24  # tokens
PROBE_BLOCKS = range(count_blocks(PROBE))  # of the first sequence
# Relative, of float32 logits that were computed in another order: over 93 architectures at most
# 8.5e-7
EXACT = 1e-5
# Relative, of the base's own logits in its own dtype
ROUGH = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# Relative, of the median token in bfloat16: 0.012 is usual; where a router is tipped over, a few
# are far off
KERNELS = 0.05
# The same where bitsandbytes rounds a product's inputs to 8 bits, as the kernels do not: up to 0.1 on random
# weights, and 1.4 where a kernel is wrong
INT8 = 0.25
SEEDS = (0, 1)  # a router of the first model may sit on a tie
RANK = 8  # of the small model's pool

# Sequence, first token, behind the last one; those of one token come first
Step = Sequence[tuple[int, int, int]]
ALONE: Sequence[Step] = [[(0, 0, PROBE // 2)], [(0, PROBE // 2, PROBE - 1)], [(0, PROBE - 1, PROBE)]]
# The first chunk ends before any threshold, and a sequence past them all runs beside one that
# begins.
BESIDE: Sequence[Step] = [
    [(0, 0, SHORT - 3)],
    [(0, SHORT - 3, PROBE - 1), (1, 0, SHORT - 2)],
    [(0, PROBE - 1, PROBE), (1, SHORT - 2, PROBE - 1)],
    [(1, PROBE - 1, PROBE)],
]


def prove_architecture(model: Any, attention: Sequence[kv.AttentionSpec], context: int) -> bool:
    """Whether the block attention and the pool's layers can be said to be right for this kind of
    model in a context of this length.

    Runs on the CPU whatever the device: the code is the same, and float32 is exact enough on it.
    Raises SettingsError where they are wrong. False, with a warning, where no small model with all
    that the base has could be made.
    """
    error = 0.0
    for seed in SEEDS:
        try:
            reference = _make_reference(model, attention, context, seed)
        except Exception as cause:  # whatever the class makes of a config that its author never tried
            log.warning(ROUGH_ONLY, _first_line(cause))
            return False
        error = _served_error(reference, context)
        if error < EXACT:
            return True
    reason = f"its logits through the block attention differ from its own by {error:.2g}, in a small model"
    raise kv.refuse_base(model, reason + _hint_at_context(model, attention, context))


def _hint_at_context(model: Any, attention: Sequence[kv.AttentionSpec], context: int) -> str:
    """The largest context in which the model is right after all, for the end of a sentence."""
    for limit in sorted(thresholds(model.config, context, PROBE), reverse=True):
        with suppress(Exception):  # a hint is worth no trace
            reference = _make_reference(model, attention, limit, SEEDS[0])
            if _served_error(reference, limit) < EXACT:
                return f"; with ADAPTERD_MAX_CONTEXT of at most {limit} it is"
    return ""


class Reference(NamedTuple):
    """A small model, its layers with states, its attention layers, its own logits."""

    model: Any
    stateful: Sequence[states.StateSpec]
    attention: Sequence[kv.AttentionSpec]
    logits: Sequence[Tensor]


def _make_reference(model: Any, attention: Sequence[kv.AttentionSpec], context: int, seed: int) -> Reference:
    """Raises whatever making one raises, and ValueError where it lacks a kind."""
    small = small_model(model, context, PROBE, seed)
    stateful = states.probe_states(small)
    expected = [plain_logits(small, ids, bool(stateful)) for ids in _probes(small)]
    specs = kv.probe_attention(small, has_states=bool(stateful))
    _check_layer_kinds(model, small)
    _check_attention_kinds(attention, specs, context)
    return Reference(small, stateful, specs, expected)


def _check_layer_kinds(model: nn.Module, small: nn.Module) -> None:
    """Raises ValueError where the base has layers that the small model lacks."""
    lacking = _class_names(model) - _class_names(small)
    for _, layer, _, _ in iterate_linears(model):
        if is_quantized(layer):  # the small one has a plain layer there
            lacking.discard(type(layer).__name__)
    if lacking:
        raise ValueError(f"it lacks {min(lacking)}")


def _class_names(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def _check_attention_kinds(
    attention: Sequence[kv.AttentionSpec], small: Sequence[kv.AttentionSpec], context: int
) -> None:
    """Raises ValueError where the base has a way to attend that the small model lacks."""

    def kind_of(spec: kv.AttentionSpec) -> str:
        limits = (0 < limit < context for limit in (spec.window, spec.chunk))
        return str((type(spec.layer).__name__, *limits, spec.softcap > 0, spec.has_sinks))

    if lacking := set(map(kind_of, attention)) - set(map(kind_of, small)):
        raise ValueError(f"it lacks {min(lacking)}")


def _served_error(reference: Reference, context: int) -> float:
    """How far the logits of two sequences that share steps are from their own."""
    small, stateful, attention, expected = reference
    rope.fix_frequencies(small, context)
    kv.allocate_blocks(attention, len(expected) * len(PROBE_BLOCKS), torch.float32, small.device)
    states.install_states(stateful, len(expected), small.device)
    pool = LoraPool(small, RANK, torch.float32, small.device)
    try:
        return max(map(_relative_error, _through_blocks(pool.tree, BESIDE, pool), expected))
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise kv.refuse_base(small, f"a step raises {type(error).__name__}: {_first_line(error)}") from error


def plain_logits(model: Any, ids: Sequence[int] | None = None, has_states: bool = False) -> Tensor:
    """The model's own logits of the probe by transformers' eager attention: [PROBE, vocabulary].

    That attention alone knows all that a model may want: transformers' default leaves Gemma 2's cap
    out in some releases. Layers with states compute a single token otherwise than several, some to
    other numbers: with them the last token comes alone, as it does where text is generated. Raises
    SettingsError where the model has none.
    """
    before = attention_name(model)
    tokens = torch.tensor([ids or _probes(model)[0]], device=model.device)
    try:
        model.set_attn_implementation("eager")
        run = _run_with_states if has_states else _run_plainly
        logits = run(model, tokens)[0].float()
    except (TypeError, ValueError, AttributeError) as error:
        raise kv.refuse_base(model, f"a plain forward raises {type(error).__name__}") from error
    finally:
        model.set_attn_implementation(before)
    return logits


def _run_plainly(model: Any, tokens: Tensor) -> Tensor:
    """Logits [1, n, vocabulary] of tokens [1, n]."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def _run_with_states(model: Any, tokens: Tensor) -> Tensor:
    """The same of all but the last token, and then of that one, by transformers' cache."""
    options = {"cache": DynamicCache(config=model.config), "use_cache": True}
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    logits = [
        model(input_ids=tokens[:, part], position_ids=positions[:, part], **options).logits
        for part in (slice(None, -1), slice(-1, None))
    ]
    return torch.cat(logits, 1)


def logits_of(model: Any) -> Tensor:
    """The probe's logits by the base's own layers and the block attention.

    Raises SettingsError where they are not finite.
    """
    (logits,) = _through_blocks(model, ALONE)
    if not bool(logits.isfinite().all()):
        raise kv.refuse_base(
            model, "its logits are not finite: the weights are damaged, or ADAPTERD_DTYPE cannot hold them"
        )
    return logits


def prove_roughly(model: Any, logits: Tensor, has_states: bool = False) -> None:
    """Compares with the model's own logits in the base's dtype.

    Raises SettingsError where they differ by more than rounding may.
    """
    error = _relative_error(logits, plain_logits(model, has_states=has_states))
    if not error < ROUGH[model.dtype]:
        raise kv.refuse_base(
            model, f"its logits through the block attention differ from its own by {error:.2g}"
        )


def kernels_differ(pool: LoraPool, expected: Tensor, limit: float = KERNELS) -> str:
    """Why the pool's kernels are not to be used, beside the torch path's logits of the probe; empty
    where they agree.
    """
    try:
        (logits,) = _through_blocks(pool.tree, ALONE, pool)
    except RuntimeError as error:
        return f"they raise: {_first_line(error)}"
    distances = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    median = float(distances.median())
    if median < limit:
        return ""
    return f"the logits of the step that was tried differ from torch's by {median:.2g}"


def check_graphs(
    pool: LoraPool, attention: Sequence[kv.AttentionSpec], graphs: CudaGraphs, expected: Tensor
) -> bool:
    """Whether the probe's last token gets the same logits by every recording and in each of its
    slots; the log says why not.
    """
    for logits in _try_graphs(graphs, attention, _probes(pool.tree)[0][-1]):
        error = max(_relative_error(row, expected[-1]) for row in logits)
        if not error < ROUGH[pool.dtype]:
            log.warning(GRAPHS_DIFFER, error)
            return False
    return True


def _try_graphs(graphs: CudaGraphs, attention: Sequence[kv.AttentionSpec], token: int) -> Iterator[Tensor]:
    """The probe's last token in all slots of each recording, by turns in the blocks that hold it and
    in a copy of them.
    """
    copy = range(graphs.spare - len(PROBE_BLOCKS), graphs.spare)
    kv.copy_blocks(attention, PROBE_BLOCKS, copy)
    for i, recording in enumerate(graphs.recorded):
        graphs.logits.zero_()  # a replay that does nothing is not to be taken for a good one
        sequence = SequenceStep([token], PROBE - 1, (PROBE_BLOCKS, copy)[i % 2])
        yield graphs.replay(recording, [sequence] * recording.slots)


def _through_blocks(tree: Any, steps: Sequence[Step], pool: LoraPool | None = None) -> list[Tensor]:
    """The probes' logits by the block attention; of a pool's tree, through its layers, with no
    adapter.
    """
    probes = _probes(tree)
    parts: dict[int, list[Tensor]] = {}
    for step in steps:
        sequences = [_sequence_step(probes[index], index, start, stop) for index, start, stop in step]
        if pool is not None:
            pool.begin_step(sequences)
        layout = make_layout(sequences, tree.device)
        logits = forward_step(tree, layout).float()
        layout.keep_states()
        lengths = [stop - start for _, start, stop in step]
        for (index, _, _), part in zip(step, torch.split(logits, lengths), strict=True):
            parts.setdefault(index, []).append(part)
    return [torch.cat(parts[index]) for index in sorted(parts)]


def _sequence_step(probe: Sequence[int], index: int, start: int, stop: int) -> SequenceStep:
    """Part of a probe, all of whose tokens get logits, in blocks and slot of the sequence of this index."""
    first = index * len(PROBE_BLOCKS)
    blocks = range(first, first + count_blocks(stop))
    return SequenceStep(probe[start:stop], start, blocks, kept=stop - start, slot=index)


def _probes(model: Any) -> list[list[int]]:
    """The tokens of two sequences."""
    vocabulary: int = model.config.get_text_config().vocab_size
    strides = (7, 11), (5, 13)
    return [[(first + stride * i) % vocabulary for i in range(PROBE)] for first, stride in strides]


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    return float((logits.float() - expected).norm() / expected.norm())


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
