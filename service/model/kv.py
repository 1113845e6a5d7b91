"""KV blocks, and the attention that writes and reads them in place of the model's own.

Each attention layer keeps two buffers [block, kv head, position in it, dim], of keys and of values,
whose widths may differ. A step's tokens come flat, [1, T], described by the `StepLayout` that runs.
Runs in the worker process; must not know adapters, sampling or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from ..core.base_info import BLOCK_TOKENS
from ..errors import SettingsError
from .attention_rules import Reach, ScoreRules
from .memory import lazy_zeros
from .step_layout import Prefill, StepLayout, running, running_step

NAME = "adapterd"
PROBED_TOKENS = 16  # all but the first get logits


class AttentionSpec(NamedTuple):
    """An attention layer's shapes and reach, as a forward has shown them: `heads` keys of `dim` numbers
    and as many values of `value_dim`.

    `has_sinks`: each query head has a logit that takes its share of the weights and gives nothing.
    """

    layer: Any
    heads: int
    dim: int
    value_dim: int
    scale: float
    window: int  # 0: none
    softcap: float  # 0: none
    chunk: int  # 0: none
    has_sinks: bool


class AttentionProbe:
    """Stands in for a layout once: notes which layers attend through the interface, and their KV
    shapes.
    """

    def __init__(self) -> None:
        self.specs: list[AttentionSpec] = []

    def note_layer(self, layer: Any, key: Tensor, value: Tensor, rules: ScoreRules) -> None:
        scale, window, chunk, softcap, sinks = rules
        shapes = key.shape[1], key.shape[3], value.shape[3]
        self.specs.append(AttentionSpec(layer, *shapes, scale, window, softcap, chunk, sinks is not None))


def probe_attention(model: Any, has_states: bool = False) -> list[AttentionSpec]:
    """The attention layers and their shapes, found by running a few tokens.

    Raises SettingsError for a model that has other attention. Where it has layers with states,
    these or others may go without.
    """
    probe = AttentionProbe()
    try:
        _run_probe(model, probe)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise refuse_base(model, f"{type(error).__name__} when it runs on the block attention") from error
    layers = model.config.get_text_config().num_hidden_layers
    if not has_states and len({id(spec.layer) for spec in probe.specs}) != layers:
        raise refuse_base(model, f"{len(probe.specs)} of its {layers} layers use the attention interface")
    return probe.specs


def _run_probe(model: Any, probe: AttentionProbe) -> None:
    positions = torch.arange(PROBED_TOKENS, device=model.device)
    tokens = positions * 11 % model.config.get_text_config().vocab_size
    model.set_attn_implementation(NAME)
    inputs = {"input_ids": tokens[None], "position_ids": positions[None], "logits_to_keep": positions[1:]}
    with running(probe):
        model(**inputs, use_cache=False)


def refuse_base(model: Any, why: str) -> SettingsError:
    return SettingsError(f"ADAPTERD_BASE: {type(model).__name__} is not supported: {why}")


def allocate_blocks(
    attention: Sequence[AttentionSpec], blocks: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Gives every attention layer its buffers, of zeros (what is masked is still multiplied, by 0);
    a CPU pays for touched pages only.
    """
    for layer, heads, dim, value_dim, *_ in attention:
        for name, width in (("kv_keys", dim), ("kv_values", value_dim)):
            zeros = lazy_zeros(blocks, heads, BLOCK_TOKENS, width, dtype=dtype, device=device, huge=True)
            layer.register_buffer(name, zeros, persistent=False)


def bytes_per_position(attention: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
    """The memory of one position in all layers."""
    return sum(spec.heads * (spec.dim + spec.value_dim) * dtype.itemsize for spec in attention)


def copy_blocks(attention: Sequence[AttentionSpec], source: Sequence[int], target: Sequence[int]) -> None:
    """Copies blocks to others, in all layers."""
    for layer, *_ in attention:
        for buffer in (layer.kv_keys, layer.kv_values):
            buffer[list(target)] = buffer[list(source)]


def clear_blocks(attention: Sequence[AttentionSpec], blocks: Sequence[int]) -> None:
    """Zeros what was written there."""
    for layer, *_ in attention:
        layer.kv_keys[list(blocks)] = 0
        layer.kv_values[list(blocks)] = 0


def clear_positions(
    attention: Sequence[AttentionSpec], blocks: Sequence[int], offsets: Sequence[int]
) -> None:
    """Zeros single positions, given by a block and an offset in it each."""
    for layer, *_ in attention:
        layer.kv_keys[list(blocks), :, list(offsets)] = 0
        layer.kv_values[list(blocks), :, list(offsets)] = 0


# Query [heads, n, dim] of one token a sequence → [n, heads, dim]
AttendSingles = Callable[["BlockAttention", Tensor, StepLayout], Tensor]


def attend_blocks(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    attend_singles: AttendSingles | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, dim], key [1, kv heads, T, dim], value [1,
    kv heads, T, value dim], s_aux (its name for sinks) [heads] → [1, T, heads, value dim].

    `attend_singles` stands in for torch where one token a sequence is attended.
    """
    step = running_step()
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    rules = ScoreRules(scale, sliding_window or 0, _chunk_of(module), softcap or 0.0, s_aux)
    if isinstance(step, AttentionProbe):
        step.note_layer(module, key, value, rules)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    assert isinstance(step, StepLayout), "the block attention was called outside of a step"
    attention = BlockAttention(module.kv_keys, module.kv_values, rules)
    attention.write_tokens(key[0], value[0], step)
    return attention.attend_tokens(query[0], step, attend_singles)[None], None


class BlockAttention(NamedTuple):
    """One layer's attention over its KV blocks."""

    keys: Tensor
    values: Tensor
    rules: ScoreRules

    def write_tokens(self, key: Tensor, value: Tensor, layout: StepLayout) -> None:
        """Keeps the step's keys [kv heads, T, dim] and values [kv heads, T, value dim]."""
        self.keys[layout.write_block, :, layout.write_offset] = key.transpose(0, 1)
        self.values[layout.write_block, :, layout.write_offset] = value.transpose(0, 1)

    def attend_tokens(
        self, query: Tensor, layout: StepLayout, attend_singles: AttendSingles | None = None
    ) -> Tensor:
        """All tokens of a step: query [heads, T, dim] → [T, heads, value dim]."""
        attend = attend_singles or BlockAttention._attend_singles
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, self.values.shape[3])
        if layout.singles:
            out[: layout.singles] = attend(self, query[:, : layout.singles], layout)
        for prefill in layout.prefills:
            part = slice(prefill.start, prefill.start + prefill.length)
            out[part] = self._attend_prefill(query[:, part], prefill)
        return out

    def _attend_singles(self, query: Tensor, layout: StepLayout) -> Tensor:
        """One token a sequence: query [heads, n, dim] → [n, heads, value dim].

        GQA by reshaping the query, never by repeating keys.
        """
        heads, n, dim = query.shape
        keys, values = (gather_blocks(part, layout.block_table) for part in (self.keys, self.values))
        kv_heads, longest = keys.shape[1], keys.shape[2]
        grouped = query.transpose(0, 1).reshape(n, kv_heads, heads // kv_heads, dim)
        mask = self._singles_mask(layout, longest)[:, None, None]
        sinks = self._shape_sinks(kv_heads, heads // kv_heads)
        return _weigh_values(grouped, keys, values, mask, self.rules, sinks).reshape(n, heads, -1)

    def _shape_sinks(self, *shape: int) -> Tensor | None:
        sinks = self.rules.sinks
        return None if sinks is None else sinks.view(shape)

    def _singles_mask(self, layout: StepLayout, longest: int) -> Tensor:
        """Bool [singles, longest]: which positions each of the single tokens may see."""
        reach = self.rules.reach
        if reach not in layout.masks:
            positions = layout.positions[: layout.singles]
            layout.masks[reach] = _visible_mask(positions, longest, reach)
        return layout.masks[reach]

    def _attend_prefill(self, query: Tensor, prefill: Prefill) -> Tensor:
        """Consecutive tokens of one sequence: query [heads, t, dim] → [t, heads, value dim]."""
        heads, t, dim = query.shape
        end, kv_heads = prefill.position + t, self.keys.shape[1]
        groups = heads // kv_heads
        gathered = (gather_blocks(part, prefill.blocks[None])[0] for part in (self.keys, self.values))
        keys, values = (part[:, None, :end].expand(-1, groups, -1, -1) for part in gathered)
        grouped = query.reshape(kv_heads, groups, t, dim)
        mask = None if self._is_causal(prefill, end) else self._prefill_mask(prefill, end)
        sinks = self._shape_sinks(kv_heads, groups, 1)
        mixed = _weigh_values(grouped, keys, values, mask, self.rules, sinks)
        return mixed.reshape(heads, t, -1).transpose(0, 1)

    def _is_causal(self, prefill: Prefill, end: int) -> bool:
        """Whether torch's own causal mask does: it begins at 0, and nothing limits the reach."""
        rules = self.rules
        is_unlimited = all(end <= limit for limit in rules.reach if limit)
        is_plain = not rules.softcap and rules.sinks is None
        return prefill.position == 0 and is_plain and is_unlimited

    def _prefill_mask(self, prefill: Prefill, end: int) -> Tensor:
        positions = torch.arange(prefill.position, end, device=self.keys.device)
        return _visible_mask(positions, end, self.rules.reach)


def gather_blocks(buffer: Tensor, table: Tensor) -> Tensor:
    """[blocks, kv heads, BLOCK_TOKENS, dim] by a table [n, b] → [n, kv heads, b · BLOCK_TOKENS, dim]."""
    n, count = table.shape
    heads, dim = buffer.shape[1], buffer.shape[3]
    index = table[:, None] * heads + torch.arange(heads, device=table.device)[:, None]
    return buffer.flatten(0, 1)[index].view(n, heads, count * BLOCK_TOKENS, dim)


def _chunk_of(module: Any) -> int:
    """The size of the chunks that Llama 4's local layers attend in, which transformers says in the
    mask only; 0: none.
    """
    size: int = getattr(getattr(module, "config", None), "attention_chunk_size", None) or 0
    return size if size and module.config.layer_types[module.layer_idx] == "chunked_attention" else 0


def _visible_mask(positions: Tensor, end: int, reach: Reach) -> Tensor:
    """[n] query positions → bool [n, end]: which keys each may see."""
    key, own = torch.arange(end, device=positions.device), positions[:, None]
    visible = key <= own
    if reach.window:
        visible &= key > own - reach.window
    if reach.chunk:
        visible &= key >= own - own % reach.chunk
    return visible


def _weigh_values(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    rules: ScoreRules,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(softcap(q kᵀ · scale) + mask) v over the last two axes; without a mask it is causal.

    `sinks` are those of each query: its shape without the last axis, 1 where they are the same.
    """
    scale, softcap = rules.scale, rules.softcap
    if sinks is not None and mask is not None:
        query, keys, values, mask = _add_sinks(query, keys, values, mask, sinks / scale)
    if not softcap:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    scores = torch.matmul(query, keys.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), values)


def _add_sinks(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, sinks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with one more position that all see: its product with a query is that query's sink,
    and its value is 0.

    Queries and keys become wider for it, by as many numbers as torch's kernels like.
    """
    dim = query.shape[-1]
    query, keys = F.pad(query, (0, 8)), F.pad(keys, (0, 8, 0, 1))
    query[..., dim], keys[..., -1, dim] = sinks, 1
    return query, keys, F.pad(values, (0, 0, 0, 1)), F.pad(mask, (0, 1), value=True)


AttentionInterface.register(NAME, attend_blocks)
