"""Describes an adapter folder without a base, for the command line's `inspect`; runs in its own process.

Must not know torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .catalog import facts
from .catalog.validator import header as header_reader
from .catalog.validator import text_files
from .catalog.validator.header import CONFIG, WEIGHTS, Config, Header
from .core.manifest import compute_digest, read_manifest
from .errors import AdapterInvalid

ANY_RANK = 1 << 31


def inspect_folder(folder: Path) -> dict[str, Any]:
    """The facts that config and header alone give of any PEFT adapter; `problems` says what is wrong.

    Raises AdapterInvalid for unreadable ones.
    """
    config = header_reader.read_config(folder)
    problems = _find_problems(folder, config)
    header = _read_header(folder, config, problems)
    modules = facts.guess_modules(config, header) if not problems else []
    content = facts.describe_content(config, header, modules)
    claimed = content.pop("claimed_base")
    if sum(len(module.parts) for module in modules) != len(header.tensors):
        content["tensors"] = _count_tensors(header)
    files = read_manifest(folder)
    named = {"id": folder.resolve().name, "digest": compute_digest(files), "base_model": {"claimed": claimed}}
    listed = {"config": CONFIG, "files": [asdict(file) for file in files], "problems": problems}
    return named | content | listed


def _find_problems(folder: Path, config: Config) -> list[str]:
    problems = header_reader.config_problems(config, ANY_RANK) or header_reader.pattern_problems(config)
    return problems + header_reader.missing_weights(folder) + text_files.find_problems(folder)


def _read_header(folder: Path, config: Config, problems: list[str]) -> Header:
    """Raises AdapterInvalid with these problems where nothing can be said of the content."""
    try:
        header = header_reader.read_header(folder / WEIGHTS)
    except AdapterInvalid as error:
        raise AdapterInvalid(problems or error.problems) from None
    if not isinstance(config.get("peft_type"), str):
        raise AdapterInvalid(problems)
    return header


def _count_tensors(header: Header) -> list[dict[str, Any]]:
    """The file's tensors, counted by name without its numbers, and by shape."""
    groups: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for key, tensor in header.tensors.items():
        kind = (re.sub(r"\.\d+(?=\.|$)", ".*", key), tensor.dtype, tensor.shape)
        groups[kind] = groups.get(kind, 0) + 1
    return [_describe_group(*kind, count) for kind, count in sorted(groups.items())]


def _describe_group(name: str, dtype: str, shape: tuple[int, ...], count: int) -> dict[str, Any]:
    return {
        "tensor": name,
        "count": count,
        "dtype": dtype,
        "shape": list(shape),
        "parameters": count * math.prod(shape),
    }
