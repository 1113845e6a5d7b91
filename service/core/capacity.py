"""The arithmetic of a device's memory: what weights, rank pool and states take, how many KV blocks
fit beside them.

Used by the worker's start and by the forecast of it, in every process. Must not know a tensor.
"""

from __future__ import annotations

from collections.abc import Iterable

from .base_info import BLOCK_TOKENS, LinearKind

# Of what is free, for KV blocks. A GPU serves nothing else, but for what a step computes in; a CPU's
# memory is shared with the system, the API process and the adapters in host memory
GPU_SHARE = 0.9
CPU_SHARE = 0.25
# Bytes of a quantized weight: 4 bits, a byte for each 64 weights, a float32 for each 256 of those; a byte
QUANTIZED_BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}


def weights_bytes(in_linears: int, others: int, quantization: str, itemsize: int) -> int:
    """Bytes of a base's weights: of its linear layers but the head, which are quantized, and of all
    others, which are not.
    """
    return int(in_linears * QUANTIZED_BYTES.get(quantization, itemsize)) + others * itemsize


def pool_bytes(linears: Iterable[LinearKind], rank: int, itemsize: int) -> int:
    """Bytes of `rank` pool rows in all adapted layers; `itemsize`: bytes of one number."""
    return sum(kind.count * (kind.in_features + kind.out_features) for kind in linears) * rank * itemsize


def states_bytes(sequence_bytes: int, rows: int) -> int:
    """Bytes of the states that layers keep of `rows` sequences, and of those that a step makes of them."""
    return 2 * sequence_bytes * rows


def kv_budget(free_bytes: int, device: str, kv_mb: int | None = None) -> int:
    """Bytes for KV blocks: those that were asked for, else a share of what is free beside base,
    pool and states; `device` is a torch name.
    """
    if kv_mb is not None:
        return kv_mb * 10**6
    return int(max(0, free_bytes) * (CPU_SHARE if device == "cpu" else GPU_SHARE))


def count_kv_blocks(budget: int, bytes_per_token: int, rows: int, context: int) -> int:
    """The blocks that fit into so many bytes, where a position of all layers takes `bytes_per_token`; of
    a base without keys and values, whose blocks take no memory, those of `rows` sequences of `context`.
    """
    if not bytes_per_token:
        return rows * -(-context // BLOCK_TOKENS)
    return budget // (bytes_per_token * BLOCK_TOKENS)
