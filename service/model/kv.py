"""KV rows, and the attention that writes and reads them in place of the model's own.

Each attention layer keeps two buffers [row, kv head, position, head dim]. A step's tokens come
flat, [1, T]: one span of tokens per sequence, described by a `KVTable`. Must not know adapters,
sampling or scheduling.
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
SCOUTED = 16  # tokens; all but the first get logits


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
        rows = torch.tensor([s.row for s in spans for _ in range(s.length)], device=device)
        positions = torch.tensor([s.position + i for s in spans for i in range(s.length)], device=device)
        longest = max((s.position for s in spans[:decode]), default=-1) + 1
        dense = [s.row for s in spans[:decode]] == list(range(decode))
        return cls(rows, positions, decode, longest, dense, spans[decode:])


class AttentionSpec(NamedTuple):
    """An attention layer as it was seen at work."""

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
        self.seen: list[AttentionSpec] = []


def probe_attention(model: Any) -> list[AttentionSpec]:
    """The attention layers and their shapes, found by running a few tokens.

    Raises SettingsError for a model that has other attention.
    """
    found = AttentionProbe()
    places = torch.arange(SCOUTED, device=model.device)
    tokens = places * 11 % model.config.get_text_config().vocab_size
    try:
        model.set_attn_implementation(NAME)
        inputs = {"input_ids": tokens[None], "position_ids": places[None], "logits_to_keep": places[1:]}
        model(**inputs, use_cache=False, table=found)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, NotImplementedError, RuntimeError) as error:
        raise refuse_base(model, f"{type(error).__name__} when it runs on the row attention") from error
    layers = model.config.get_text_config().num_hidden_layers
    if len({id(s.layer) for s in found.seen}) != layers:
        raise refuse_base(model, f"{len(found.seen)} of its {layers} layers use the attention interface")
    return found.seen


def refuse_base(model: Any, why: str) -> SettingsError:
    return SettingsError(f"ADAPTERD_BASE: {type(model).__name__} is not supported: {why}")


def allocate_rows(
    seen: Sequence[AttentionSpec],
    rows: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
    table: Tensor | None = None,
) -> None:
    """Gives every attention layer its buffers, of zeros (what is masked is still multiplied, by 0);
    a CPU pays for touched pages only.
    """
    for layer, heads, dim, *_ in seen:
        layer.register_buffer("kv_table", table, persistent=False)
        for name in ("kv_keys", "kv_values"):
            layer.register_buffer(
                name, lazy_zeros(rows, heads, context, dim, dtype=dtype, device=device), persistent=False
            )


def bytes_per_position(seen: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
    """What one position of one row costs in all layers."""
    return sum(2 * s.heads * s.dim * dtype.itemsize for s in seen)


def fork_row(seen: Sequence[AttentionSpec], source: int, target: int, length: int) -> None:
    """Copies the first `length` positions of one row to another, in all layers."""
    for layer, *_ in seen:
        for buffer in (layer.kv_keys, layer.kv_values):
            buffer[target, :, :length] = buffer[source, :, :length]


def clear_row(seen: Sequence[AttentionSpec], row: int) -> None:
    for layer, *_ in seen:
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
    reach = Reach(sliding_window or 0, _chunk(module))
    if isinstance(table, AttentionProbe):
        table.seen.append(
            AttentionSpec(
                module, key.shape[1], key.shape[3], scale, reach.window, softcap or 0.0, reach.chunk
            )
        )
        return torch.zeros_like(query).transpose(1, 2), None
    keys, values = module.kv_keys, module.kv_values
    keys[table.rows, :, table.positions] = key[0].transpose(0, 1)
    values[table.rows, :, table.positions] = value[0].transpose(0, 1)
    out = torch.empty(query.shape[2], query.shape[1], query.shape[3], dtype=query.dtype, device=query.device)
    if table.decode:
        out[: table.decode] = _attend_decode(
            query[0, :, : table.decode], keys, values, table, scale, reach, softcap
        )
    for span in table.prompts:
        chunk = slice(span.start, span.start + span.length)
        out[chunk] = _attend_prefill(query[0, :, chunk], keys, values, span, scale, reach, softcap)
    return out[None], None


def _attend_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: KVTable,
    scale: float,
    reach: Reach,
    softcap: float | None,
) -> Tensor:
    """One new token a sequence: query [heads, n, dim] → [n, heads, dim].

    GQA by reshaping the query, never by repeating keys.
    """
    heads, n, dim = query.shape
    rows = slice(0, n) if table.dense else table.rows[:n]
    k, v = keys[rows, :, : table.longest], values[rows, :, : table.longest]
    grouped = query.transpose(0, 1).reshape(n, k.shape[1], heads // k.shape[1], dim)
    return _weigh_values(grouped, k, v, table.visible_mask(reach)[:, None, None], scale, softcap).reshape(
        n, heads, dim
    )


def _attend_prefill(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    span: KVSpan,
    scale: float,
    reach: Reach,
    softcap: float | None,
) -> Tensor:
    """A run of one sequence's tokens: query [heads, t, dim] → [t, heads, dim]."""
    heads, t, dim = query.shape
    end = span.position + t
    groups = heads // keys.shape[1]
    k, v = (b[span.row, :, :end].unsqueeze(1).expand(-1, groups, -1, -1) for b in (keys, values))
    grouped = query.reshape(keys.shape[1], groups, t, dim)
    plain = span.position == 0 and softcap is None and all(end <= limit for limit in reach if limit)
    mask = None if plain else _visible_mask(torch.arange(span.position, end, device=query.device), end, reach)
    return _weigh_values(grouped, k, v, mask, scale, softcap).reshape(heads, t, dim).transpose(0, 1)


def _chunk(module: Any) -> int:
    """The size of the chunks that Llama 4's local layers attend in, which transformers says in the
    mask only; 0: none.
    """
    size: int = getattr(getattr(module, "config", None), "attention_chunk_size", None) or 0
    return size if size and module.config.layer_types[module.layer_idx] == "chunked_attention" else 0


def _visible_mask(positions: Tensor, end: int, reach: Reach) -> Tensor:
    """[n] query positions → bool [n, end]: which keys each may see."""
    at, own = torch.arange(end, device=positions.device), positions[:, None]
    seen = at <= own
    if reach.window:
        seen &= at > own - reach.window
    return seen & (at >= own - own % reach.chunk) if reach.chunk else seen


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
    scores = scores.masked_fill(~mask, float("-inf")) if mask is not None else scores
    return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), values)


AttentionInterface.register(NAME, attend_rows)
