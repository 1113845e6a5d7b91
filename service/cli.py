"""What the command line asks of this room: an adapter folder looked at without a base.

Knows no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .catalog import facts
from .catalog.validator import header as inspection
from .catalog.validator import text_files
from .catalog.validator.header import CONFIG, WEIGHTS, Header
from .core.manifest import compute_digest, read_manifest
from .errors import AdapterInvalid

ANY_RANK = 1 << 31


def inspect_folder(folder: Path) -> dict[str, Any]:
    """What config and header alone say of any PEFT adapter;

    `problems` says what is wrong. Raises AdapterInvalid for unreadable ones.
    """
    config = inspection.read_config(folder)
    problems = inspection.config_problems(config, ANY_RANK) or inspection.pattern_problems(config)
    problems += inspection.missing_weights(folder) + text_files.find_problems(folder)
    try:
        header = inspection.read_header(folder / WEIGHTS)
    except AdapterInvalid as error:
        raise AdapterInvalid(problems or error.problems) from None
    if not isinstance(config.get("peft_type"), str):
        raise AdapterInvalid(problems)
    modules = facts.guess_modules(config, header) if not problems else []
    told = facts.describe_content(config, header, modules)
    claimed = told.pop("claimed_base")
    extra = (
        {}
        if sum(len(one.parts) for one in modules) == len(header.tensors)
        else {"tensors": _count_tensors(header)}
    )
    files = read_manifest(folder)
    named = {"id": folder.resolve().name, "digest": compute_digest(files), "base_model": {"claimed": claimed}}
    return (
        named
        | told
        | extra
        | {"config": CONFIG, "files": [asdict(file) for file in files], "problems": problems}
    )


def _count_tensors(header: Header) -> list[dict[str, Any]]:
    """The file's tensors, counted by name without its numbers, and by shape."""
    groups: dict[tuple[str, str, tuple[int, ...]], int] = {}
    for key, tensor in header.tensors.items():
        kind = (re.sub(r"\.\d+(?=\.|$)", ".*", key), tensor.dtype, tensor.shape)
        groups[kind] = groups.get(kind, 0) + 1
    return [
        {
            "tensor": name,
            "count": count,
            "dtype": dtype,
            "shape": list(shape),
            "parameters": count * math.prod(shape),
        }
        for (name, dtype, shape), count in sorted(groups.items())
    ]
