"""Says what fits on a device, from a base's config alone, for the command line's `plan`; in its own
process.

The base is measured and the arithmetic of weights, pool and KV is done by the start's own code
(`model/base_shape.py`, `core/capacity.py`). Must not know torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .core import capacity
from .core.base_info import BLOCK_TOKENS
from .core.defaults import GPU_DEFAULTS
from .errors import SettingsError
from .model.base_shape import DTYPE, BaseShape, make_config, measure_shape, read_config

DEMO: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CONTEXTS = (1024, 4096, 16384, 65536)


def read_shape(base: str, quantization: str) -> BaseShape:
    """Of a `config.json`, its folder, or `demo`. Raises SettingsError."""
    try:
        config = make_config(DEMO) if base == "demo" else read_config(Path(base))
        return measure_shape(config, quantization)
    except (ValueError, SettingsError) as error:
        reason = str(error).removeprefix("ADAPTERD_BASE: ")
        raise SettingsError(f"--base: {reason}") from error


def parse_bytes(text: str) -> int:
    """Bytes of a text such as `24GB` (10^9) or `24GiB` (2^30). Raises SettingsError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise SettingsError(f"--memory: {text!r} is no amount of memory, such as 24GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def plan_memory(
    shape: BaseShape, memory: int, pool_rank: int, rows: int | None, context: int | None
) -> dict[str, Any]:
    """What a GPU of so many bytes holds beside this base. Raises SettingsError."""
    if context is not None and context > shape.context:
        raise SettingsError(f"--context: {context} is over the base's own {shape.context}")
    weights = shape.weights_bytes
    pool = capacity.pool_bytes(shape.linears, pool_rank, DTYPE.itemsize)
    at_once = rows or GPU_DEFAULTS.rows
    states = capacity.states_bytes(shape.state_bytes, at_once)
    budget = capacity.kv_budget(memory - weights - pool - states, "cuda")
    blocks = capacity.count_kv_blocks(budget, shape.kv_bytes_per_token, at_once, shape.context)
    tokens = blocks * BLOCK_TOKENS if budget else 0
    longest = min(context or shape.context, tokens)
    lengths = sorted({length for length in CONTEXTS if length < longest} | {longest}) if tokens else []
    return {
        "memory_bytes": memory,
        "weights_bytes": weights,
        "pool_bytes": pool,
        "states_bytes": states,
        "kv_bytes": tokens * shape.kv_bytes_per_token,
        "kv_bytes_per_token": shape.kv_bytes_per_token,
        "kv_tokens": tokens,
        "sequences": [{"context": n, "count": min(at_once, tokens // n)} for n in lengths],
    }


def format_plan(plan: Mapping[str, Any]) -> str:
    """The plan for people: the same numbers."""
    rows = [
        ("memory", "memory_bytes"),
        ("weights", "weights_bytes"),
        ("pool", "pool_bytes"),
        *([("states", "states_bytes")] if plan["states_bytes"] else []),
        ("KV", "kv_bytes"),
    ]
    lines = [f"{name:<10}{plan[key] / 1e9:10.2f} GB" for name, key in rows]
    lines.append(f"KV holds {plan['kv_tokens']:,} tokens of {plan['kv_bytes_per_token']:,} bytes")
    lines += [f"{each['count']:>6} sequences of {each['context']:,} tokens" for each in plan["sequences"]]
    return "\n".join(lines) + ("" if plan["kv_tokens"] else "\nthe base does not fit")
