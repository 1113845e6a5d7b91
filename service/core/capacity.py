"""The arithmetic of a device's memory: what the rank pool takes, how many KV blocks fit beside it.

Used by the worker's start and by the forecast of it, in every process. Integers only.
"""

from __future__ import annotations

from collections.abc import Iterable

from .base_info import BLOCK_TOKENS, LinearKind

# Of what is free, for KV blocks. A GPU serves nothing else, but for what a step computes in; a CPU's
# memory is shared with the system, the API process and the adapters in host memory
GPU_SHARE = 0.9
CPU_SHARE = 0.25


def pool_bytes(linears: Iterable[LinearKind], rank: int, itemsize: int) -> int:
    """Bytes of `rank` pool rows in all adapted layers; `itemsize`: bytes of one number."""
    return sum(kind.count * (kind.in_features + kind.out_features) for kind in linears) * rank * itemsize


def kv_budget(free_bytes: int, device: str, kv_mb: int | None = None) -> int:
    """Bytes for KV blocks: those that were asked for, else a share of what is free beside base and pool;
    `device` is a torch name.
    """
    if kv_mb is not None:
        return kv_mb * 10**6
    return int(max(0, free_bytes) * (CPU_SHARE if device == "cpu" else GPU_SHARE))


def count_kv_blocks(budget: int, bytes_per_token: int) -> int:
    """The blocks that fit into so many bytes, where a position of all layers takes `bytes_per_token`."""
    return budget // (bytes_per_token * BLOCK_TOKENS)
