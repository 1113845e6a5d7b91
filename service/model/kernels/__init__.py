"""The CPU kernels: built once with the machine's C++ compiler, kept in a cache, built anew where
they are damaged there, and put in place of the torch path where they apply.

They need a bfloat16 base, quantized or not, and a processor with AVX2, AVX-512 or NEON; without
these, or without a compiler, the torch path serves. Runs in the worker process; must not know
adapters' files, requests or scheduling.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.cpp_extension import include_paths, library_paths
from transformers import AttentionInterface

from ... import durable, user_folders
from ...engine.kv_blocks import count_blocks
from ...errors import SettingsError
from .. import draws
from ..processor import Vectors, find_compiler, has_vectors, list_features, list_vector_flags
from ..transfers import take_rows

NAME = "adapterd_blocks"
SOURCE_NAMES = ("ops.cpp", "attention.h", "draw.h", "linear.h", "weights.h", "vectors.h", "thread_pool.h")
SOURCES = [Path(__file__).with_name(name) for name in SOURCE_NAMES]
FLAGS = [
    "-O3",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fopenmp",
]
FIELDS = 8  # int32 columns of a table, see linear.h

log = logging.getLogger(__name__)


def load_kernels(vectors: Vectors = "auto") -> bool:
    """Whether the kernels can be used here; builds and loads them the first time, for these
    vectors.

    The log has the reason where they cannot. Raises SettingsError where the processor lacks the
    vectors.
    """
    if hasattr(torch.ops.adapterd, "linear"):
        return True
    if not has_vectors():
        log.info("kernels: off, the processor has none of AVX2, AVX-512 and NEON")
        return False
    if not _load_library(vectors):
        return False
    AttentionInterface.register(NAME, attend_blocks)
    return True


def _load_library(vectors: Vectors) -> bool:
    flags = _list_flags(vectors)
    try:
        library = _find_library(flags)
    except (OSError, subprocess.CalledProcessError, SettingsError) as error:
        reason = str(getattr(error, "stderr", None) or error)[-300:]
        log.warning("kernels: off, they cannot be built: %s", reason)
        return False
    operators: Any = torch.ops
    try:
        operators.load_library(library)
    except OSError as error:  # torch names the library alone; the loader has the reason
        log.warning("kernels: off, their library cannot be loaded: %s", error.__cause__ or error)
        return False
    return True


def _find_library(flags: Sequence[str]) -> Path:
    """The shared library for this source, these flags, torch and processor, built where there is no
    whole one.

    Raises OSError, CalledProcessError, or SettingsError where there is no cache.
    """
    folder = _library_folder(flags)
    name = f"{folder.name}.so"
    durable.sweep_unfinished(folder.parent)
    if not durable.is_whole(folder):
        compiler = _require_compiler()
        with durable.making_folder(folder) as made:
            _compile_library([compiler, *flags], made / name)
    return folder / name


def can_load_kernels(vectors: Vectors = "auto") -> bool:
    """Whether this processor can run the kernels and they are built, or can be.

    Raises SettingsError as `load_kernels`.
    """
    flags = _list_flags(vectors)
    if not has_vectors():
        return False
    try:
        return find_compiler() is not None or durable.is_whole(_library_folder(flags))
    except (OSError, SettingsError):
        return False


def _library_folder(flags: Sequence[str]) -> Path:
    return user_folders.cache_folder() / "kernels" / f"ops-{_library_key(flags)}"


def _list_flags(vectors: Vectors) -> list[str]:
    return [*FLAGS, *list_vector_flags(vectors), *(f"-I{path}" for path in include_paths())]


def _require_compiler() -> str:
    compiler = find_compiler()
    if compiler is None:
        raise OSError("no C++ compiler (g++) is installed")
    return compiler


def _library_key(flags: Sequence[str]) -> str:
    text = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    content = f"{text} {flags} {torch.__version__} {sorted(list_features())}"
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _compile_library(compiler: Sequence[str], target: Path) -> None:
    links = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu", "-ltorch"]
    command = [*compiler, str(SOURCES[0]), "-o", str(target), *links]
    subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")


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
    **other: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over the kernel: query [1, heads, T, dim], sinks s_aux
    [heads] → [1, T, heads, value dim].
    """
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    buffers = module.kv_keys, module.kv_values, module.kv_table, module.kv_block_table
    sinks = None if s_aux is None else s_aux.float()
    limits = scale, sliding_window or 0, softcap or 0.0
    return torch.ops.adapterd.attend(query, key, value, *buffers, sinks, *limits), None


def draw_tokens(logits: Tensor, rules: draws.DrawRules, width: int | None) -> Tensor:
    """As torch's, but that no width is too small; typical-p is left to torch."""
    if "typical_p" in rules.filters:
        return draws.draw_tokens(logits, rules, width)
    rows = take_rows(logits, rules.rows)
    known = rows.float() if rows.dtype == torch.float16 else rows
    tokens: Tensor = torch.ops.adapterd.draw(known, rules.table)
    return tokens


class StepTables(NamedTuple):
    """The spans of a step's tokens, of those that get logits, and of the part of the step that a
    layer with states runs now; the KV blocks of each sequence.
    """

    body: Tensor
    head: Tensor
    part: Tensor
    blocks: Tensor


def make_tables(rows: int, context: int) -> StepTables:
    """For steps of at most `rows` sequences of `context` tokens."""
    body, head, part = (torch.zeros(1 + rows, FIELDS, dtype=torch.int32) for _ in range(3))
    return StepTables(body, head, part, torch.zeros(rows, count_blocks(context), dtype=torch.int32))


def register_tables(layers: Iterable[nn.Module], tables: StepTables) -> None:
    """Gives attention layers the tables that their kernel reads."""
    for layer in layers:
        layer.register_buffer("kv_table", tables.body, persistent=False)
        layer.register_buffer("kv_block_table", tables.blocks, persistent=False)


def fill_blocks(table: Tensor, blocks: Sequence[Sequence[int]]) -> None:
    """Writes the KV blocks of a step's sequences."""
    for row, own in zip(table, blocks, strict=False):
        row[: len(own)] = torch.tensor(own, dtype=torch.int32)


def fill_table(table: Tensor, spans: Sequence[Sequence[int]]) -> None:
    """Writes the spans of a step; each is start, length, sequence, position, pool row, rank, gated."""
    table[0, 0] = len(spans)
    if spans:
        table[1 : 1 + len(spans), : len(spans[0])] = torch.tensor(spans, dtype=torch.int32)
