"""KV rows, and the attention that writes and reads them in place of the model's own.

Each attention layer keeps two buffers [row, kv head, position, head dim]. A step's tokens come
flat, [1, T]: one span of tokens per sequence, described by a `KVTable`. Runs in the worker process;
must not know adapters, sampling or scheduling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from ..errors import SettingsError
from .memory import lazy_zeros

NAME = "adapterd"
PROBED_TOKENS = 16  # all but the first get logits


class KVSpan(NamedTuple):
    """Tokens [start, start + length) of the flat step belong to `row`, at `position` and on."""

    start: int
    length: int
    row: int
    position: int


class Reach(NamedTuple):
    """How far back a layer's tokens see: the last `window` positions, and none before their own
    `chunk`; 0: no limit.
    """

    window: int = 0
    chunk: int = 0


class KVTable:
    """Where the tokens of one step belong, shared by all layers.

    `rows` and `positions` are int64 [T] on the device. The `decode` first tokens are one a sequence
    and look at `longest` positions at most; `dense`: token i of them reads row i. `prompts` are the
    spans of the others.
    """

    def __init__(
        self,
        rows: Tensor,
        positions: Tensor,
        decode: int,
        longest: int,
        dense: bool,
        prompts: Sequence[KVSpan] = (),
    ) -> None:
        self.rows, self.positions, self.prompts = rows, positions, prompts
        self.decode, self.longest, self.dense = decode, longest, dense
        self._visible: dict[Reach, Tensor] = {}

    def visible_mask(self, reach: Reach) -> Tensor:
        """Bool [decode, longest]: which positions each of the decode tokens may see."""
        if reach not in self._visible:
            self._visible[reach] = _visible_mask(self.positions[: self.decode], self.longest, reach)
        return self._visible[reach]

    @classmethod
    def make_table(cls, spans: Sequence[KVSpan], decode: int, device: torch.device) -> KVTable:
        """Of the spans in the order of their tokens, the first `decode` of one token each."""
        rows: list[int] = []
        positions: list[int] = []
        for span in spans:
            rows += [span.row] * span.length
            positions += range(span.position, span.position + span.length)
        decoding = spans[:decode]
        longest = max((span.position for span in decoding), default=-1) + 1
        dense = [span.row for span in decoding] == list(range(decode))
        row_tensor, position_tensor = (torch.tensor(part, device=device) for part in (rows, positions))
        return cls(row_tensor, position_tensor, decode, longest, dense, spans[decode:])


class AttentionSpec(NamedTuple):
    """An attention layer's shapes and reach, as a forward has shown them."""

    layer: Any
    heads: int
    dim: int
    scale: float
    window: int  # 0: none
    softcap: float  # 0: none
    chunk: int = 0  # 0: none


class AttentionProbe:
    """Stands in for a table once: notes which layers attend through the interface, and their KV
    shapes.
    """

    def __init__(self) -> None:
        self.specs: list[AttentionSpec] = []

    def note_layer(self, layer: Any, key: Tensor, scale: float, reach: Reach, softcap: float | None) -> None:
        heads, dim = key.shape[1], key.shape[3]
        self.specs.append(AttentionSpec(layer, heads, dim, scale, reach.window, softcap or 0.0, reach.chunk))


def probe_attention(model: Any) -> list[AttentionSpec]:
    """The attention layers and their shapes, found by running a few tokens.

    Raises SettingsError for a model that has other attention.
    """
    probe = AttentionProbe()
    try:
        _run_probe(model, probe)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise refuse_base(model, f"{type(error).__name__} when it runs on the row attention") from error
    layers = model.config.get_text_config().num_hidden_layers
    if len({id(spec.layer) for spec in probe.specs}) != layers:
        raise refuse_base(model, f"{len(probe.specs)} of its {layers} layers use the attention interface")
    return probe.specs


def _run_probe(model: Any, probe: AttentionProbe) -> None:
    positions = torch.arange(PROBED_TOKENS, device=model.device)
    tokens = positions * 11 % model.config.get_text_config().vocab_size
    model.set_attn_implementation(NAME)
    inputs = {"input_ids": tokens[None], "position_ids": positions[None], "logits_to_keep": positions[1:]}
    model(**inputs, use_cache=False, table=probe)


def refuse_base(model: Any, why: str) -> SettingsError:
    return SettingsError(f"ADAPTERD_BASE: {type(model).__name__} is not supported: {why}")


def allocate_rows(
    attention: Sequence[AttentionSpec],
    rows: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    table: Tensor | None = None,
) -> None:
    """Gives every attention layer its buffers, of zeros (what is masked is still multiplied, by 0);
    a CPU pays for touched pages only.
    """
    for layer, heads, dim, *_ in attention:
        layer.register_buffer("kv_table", table, persistent=False)
        for name in ("kv_keys", "kv_values"):
            zeros = lazy_zeros(rows, heads, context, dim, dtype=dtype, device=device)
            layer.register_buffer(name, zeros, persistent=False)


def bytes_per_position(attention: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
    """The memory of one position of one row in all layers."""
    return sum(2 * s.heads * s.dim * dtype.itemsize for s in attention)


def fork_row(attention: Sequence[AttentionSpec], source: int, target: int, length: int) -> None:
    """Copies the first `length` positions of one row to another, in all layers."""
    for layer, *_ in attention:
        for buffer in (layer.kv_keys, layer.kv_values):
            buffer[target, :, :length] = buffer[source, :, :length]


def clear_row(attention: Sequence[AttentionSpec], row: int) -> None:
    for layer, *_ in attention:
        layer.kv_keys[row].zero_()
        layer.kv_values[row].zero_()


def attend_rows(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    table: KVTable | AttentionProbe | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, dim], key and value [1, kv heads, T,
    dim] → [1, T, heads, dim].
    """
    if table is None:
        raise TypeError("forward arguments do not reach the attention")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    reach = Reach(sliding_window or 0, _chunk_of(module))
    if isinstance(table, AttentionProbe):
        table.note_layer(module, key, scale, reach, softcap)
        return torch.zeros_like(query).transpose(1, 2), None
    keys, values = module.kv_keys, module.kv_values
    keys[table.rows, :, table.positions] = key[0].transpose(0, 1)
    values[table.rows, :, table.positions] = value[0].transpose(0, 1)
    return RowAttention(keys, values, scale, reach, softcap).attend_tokens(query[0], table)[None], None


class RowAttention(NamedTuple):
    """One layer's attention over its KV rows."""

    keys: Tensor
    values: Tensor
    scale: float
    reach: Reach
    softcap: float | None

    def attend_tokens(self, query: Tensor, table: KVTable) -> Tensor:
        """All tokens of a step: query [heads, T, dim] → [T, heads, dim]."""
        heads, tokens, dim = query.shape
        out = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
        if table.decode:
            out[: table.decode] = self._attend_decode(query[:, : table.decode], table)
        for span in table.prompts:
            chunk = slice(span.start, span.start + span.length)
            out[chunk] = self._attend_prefill(query[:, chunk], span)
        return out

    def _attend_decode(self, query: Tensor, table: KVTable) -> Tensor:
        """One new token a sequence: query [heads, n, dim] → [n, heads, dim].

        GQA by reshaping the query, never by repeating keys.
        """
        heads, n, dim = query.shape
        rows = slice(0, n) if table.dense else table.rows[:n]
        keys, values = (part[rows, :, : table.longest] for part in (self.keys, self.values))
        kv_heads = keys.shape[1]
        grouped = query.transpose(0, 1).reshape(n, kv_heads, heads // kv_heads, dim)
        mask = table.visible_mask(self.reach)[:, None, None]
        return _weigh_values(grouped, keys, values, mask, self.scale, self.softcap).reshape(n, heads, dim)

    def _attend_prefill(self, query: Tensor, span: KVSpan) -> Tensor:
        """Consecutive tokens of one sequence: query [heads, t, dim] → [t, heads, dim]."""
        heads, t, dim = query.shape
        end, kv_heads = span.position + t, self.keys.shape[1]
        groups = heads // kv_heads
        parts = (part[span.row, :, :end].unsqueeze(1) for part in (self.keys, self.values))
        keys, values = (part.expand(-1, groups, -1, -1) for part in parts)
        grouped = query.reshape(kv_heads, groups, t, dim)
        mask = None if self._is_causal(span, end) else self._prefill_mask(span, end)
        mixed = _weigh_values(grouped, keys, values, mask, self.scale, self.softcap)
        return mixed.reshape(heads, t, dim).transpose(0, 1)

    def _is_causal(self, span: KVSpan, end: int) -> bool:
        """Whether torch's own causal mask does: it begins at 0, and nothing limits the reach."""
        is_unlimited = all(end <= limit for limit in self.reach if limit)
        return span.position == 0 and self.softcap is None and is_unlimited

    def _prefill_mask(self, span: KVSpan, end: int) -> Tensor:
        return _visible_mask(torch.arange(span.position, end, device=self.keys.device), end, self.reach)


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
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """softmax(softcap(q kᵀ · scale) + mask) v over the last two axes; without a mask it is causal."""
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale
        )
    scores = torch.matmul(query, keys.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), values)


AttentionInterface.register(NAME, attend_rows)
