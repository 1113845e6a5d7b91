"""Reads an adapter's config and the header of its weights file, strictly.

Must not know torch, PEFT, or any base model.

Nothing here costs more than the bytes it looks at: a 100 MB weights file is described by its first
few kilobytes.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.manifest import CONFIG as CONFIG
from ...core.manifest import WEIGHTS as WEIGHTS
from ...errors import AdapterInvalid

CONFIG_LIMIT = 1_000_000  # bytes
HEADER_LIMIT = 16_000_000  # bytes; 100,000 tensors take about that
PATTERNS = 4096  # each is compiled, and PEFT tries each on every layer
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
POINTER = b"version https://git-lfs"
PICKLE = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes
    start: int = 0  # the first one's place behind the header

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself.

    `header_bytes` includes the 8-byte length; file_bytes = header_bytes + tensor_bytes.
    """

    file_bytes: int
    header_bytes: int
    tensors: dict[str, TensorInfo]

    @property
    def tensor_bytes(self) -> int:
        return self.file_bytes - self.header_bytes


# ---- the files


def read_config(folder: Path) -> Config:
    """What the config says. Raises AdapterInvalid."""
    path = folder / CONFIG
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise AdapterInvalid([f"{CONFIG} is {path.stat().st_size} bytes; the limit is {CONFIG_LIMIT}"])
        raw = path.read_bytes()
        config = json.loads(raw)
    except FileNotFoundError:
        raise AdapterInvalid([f"{CONFIG} is missing"]) from None
    except OSError as error:
        raise AdapterInvalid([f"{CONFIG} cannot be read: {error.strerror}"]) from None
    except (ValueError, RecursionError):
        raise AdapterInvalid([f"{CONFIG} {pointer_hint(raw) or 'is not JSON'}"]) from None
    if not isinstance(config, dict):
        raise AdapterInvalid([f"{CONFIG} is not a JSON object"])
    return config


def missing_weights(folder: Path) -> list[str]:
    """Why there is no weights file to read; empty when there is one."""
    if (folder / WEIGHTS).is_file():
        return []
    beside = sorted(path.name for path in folder.iterdir())
    if "adapter_model.bin" in beside or "adapter_model.pt" in beside:
        return [
            f"{WEIGHTS} is missing: adapter_model.bin is a pickle, which could run code; save the adapter as safetensors"
        ]
    if "adapters.safetensors" in beside:
        return [
            f"{WEIGHTS} is missing: adapters.safetensors is MLX's format, with transposed factors; convert it to PEFT's"
        ]
    if f"{WEIGHTS}.index.json" in beside:
        return [f"{WEIGHTS} is missing: the weights are split over several files; save them as one"]
    return [f"{WEIGHTS} is missing"]


def quick_check(folder: Path, max_rank: int) -> None:
    """Refuses what the config alone shows to be wrong, in about a millisecond.

    Raises AdapterInvalid.
    """
    problems = config_problems(read_config(folder), max_rank) + missing_weights(folder)
    if problems:
        raise AdapterInvalid(problems)


def read_header(path: Path) -> Header:
    """The header of a safetensors file; only its bytes are read.

    Raises AdapterInvalid, saying what the file seems to be.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(24)
            if hint := _not_safetensors(start, size):
                raise AdapterInvalid([f"{path.name} {hint}"])
            (length,) = struct.unpack("<Q", start[:8])
            if length > size - 8:
                raise AdapterInvalid(
                    [f"{path.name} is truncated: its header takes {length} bytes, the file has {size}"]
                )
            if length > HEADER_LIMIT:
                raise AdapterInvalid(
                    [f"{path.name} has a header of {length} bytes; the limit is {HEADER_LIMIT}"]
                )
            file.seek(8)
            entries = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise AdapterInvalid(
            [f"{path.name} has a header that is not JSON: it is no safetensors file, or a damaged one"]
        ) from None
    except OSError as error:
        raise AdapterInvalid([f"{path.name} cannot be read: {error.strerror}"]) from None
    return _parse_header(path.name, entries, size, length + 8)


def pointer_hint(content: bytes) -> str:
    """What to do about a file that git-lfs has not fetched; empty for any other."""
    return (
        "is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`"
        if content.startswith(POINTER)
        else ""
    )


def _not_safetensors(start: bytes, size: int) -> str:
    if hint := pointer_hint(start):
        return hint
    if start.startswith(PICKLE) and start[8:9] != b"{":  # else these are a length's own low bytes
        return "is a pickle, not safetensors: it could run code; save the adapter as safetensors"
    return "" if size >= 8 else f"is truncated: {size} bytes"


def _parse_header(name: str, entries: Any, size: int, start: int) -> Header:
    if not isinstance(entries, dict):
        raise AdapterInvalid([f"{name} has a header that is not an object"])
    spans: list[tuple[int, int]] = []
    tensors: dict[str, TensorInfo] = {}
    for key, entry in entries.items():
        if key != "__metadata__":
            tensors[key], span = _parse_entry(name, key, entry)
            spans.append(span)
    if not tensors:
        raise AdapterInvalid([f"{name} is empty: 0 tensors (was it saved without gathering the weights?)"])
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            raise AdapterInvalid(
                [f"{name} has tensors that overlap or leave a gap at byte {start + min(begin, end)}"]
            )
        end = stop
    if start + end != size:
        word = "truncated" if start + end > size else "too long"
        raise AdapterInvalid(
            [f"{name} is {word}: its tensors end at byte {start + end}, the file has {size}"]
        )
    return Header(size, start, tensors)


def _parse_entry(name: str, key: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        if whole and dtype in ITEMSIZE and math.prod(shape) * ITEMSIZE[dtype] == end - begin:
            return TensorInfo(dtype, shape, end - begin, begin), (begin, end)
    except (KeyError, TypeError, ValueError):
        pass
    raise AdapterInvalid([f"{name} has a damaged entry for {key[:200]!r}: {str(entry)[:120]}"])


# ---- the config's meaning


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_flag(value: Any) -> bool:
    return value is None or type(value) is bool


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _are_names(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_layers(value: Any) -> bool:
    return value is None or _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value)))


def _are_tokens(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(_is_whole(token) and token >= 0 for token in value)
    )


def _are_ranks(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(_is_whole(rank) and rank >= 1 for rank in value.values())
    )


def _are_alphas(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_is_number, value.values())))


Check = tuple[Callable[[Any], bool], str]
SHARED: dict[str, Check] = {
    "task_type": (_is_text, "a text or null"),
    "base_model_name_or_path": (_is_text, "a text or null"),
    "revision": (_is_text, "a text or null"),
    "peft_version": (_is_text, "a text or null"),
    "target_modules": (_are_names, "a text, a list of texts or null"),
    "exclude_modules": (_are_names, "a text, a list of texts or null"),
    "rank_pattern": (_object, "an object or null"),
    "alpha_pattern": (_object, "an object or null"),
}
LORA: dict[str, Check] = {
    "r": (lambda value: _is_whole(value) and value >= 1, "a whole number, 1 or more"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "use_rslora": (_is_flag, "true, false or null"),
    "use_dora": (_is_flag, "true, false or null"),
    "fan_in_fan_out": (_is_flag, "true, false or null"),
    "rank_pattern": (_are_ranks, "an object of whole numbers, 1 or more"),
    "alpha_pattern": (_are_alphas, "an object of finite numbers"),
    "layers_to_transform": (_are_layers, "a whole number, a list of them, or null"),
    "layers_pattern": (_are_names, "a text, a list of texts or null"),
    "alora_invocation_tokens": (_are_tokens, "a list of token ids or null"),
}
NEEDED = ("r", "lora_alpha")


def config_problems(config: Config, max_rank: int) -> list[str]:
    """What is wrong with the config as such; each problem names its key."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        return [f"`peft_type` is missing from {CONFIG}{_foreign_type(config)}"]
    lora = kind == "LORA"
    problems = [f"`{key}` is missing" for key in NEEDED if lora and key not in config]
    for key, (right, wanted) in (SHARED | LORA if lora else SHARED).items():
        if key in config and not right(config[key]):
            problems.append(f"`{key}` must be {wanted}, not {json.dumps(config[key])[:80]}")
    return problems or [*_ranks_over(config, max_rank), *_find_untellable(config)]


def _foreign_type(config: Config) -> str:
    if "fine_tune_type" in config or "lora_parameters" in config:
        return ": this is an MLX adapter's config; convert the adapter to PEFT's format"
    if "architectures" in config or "model_type" in config:
        return ": this is a model's config.json, not an adapter's"
    return ""


def _find_untellable(config: Config) -> list[str]:
    """What no answer could repeat: half characters, which an escape can spell, and numbers that
    JSON does not have.
    """
    problems = []
    for key, value in config.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            problems.append(
                f"`{ascii(key)[1:-1]}` holds half a character, or a number that JSON does not have"
            )
    return problems


def _ranks_over(config: Config, max_rank: int) -> list[str]:
    ranks = {"`r`": config.get("r", 0)} | {
        f"`rank_pattern` {key!r}": rank for key, rank in (config.get("rank_pattern") or {}).items()
    }
    return [
        f"{where}: rank {rank} is over the limit of {max_rank}"
        for where, rank in ranks.items()
        if _is_whole(rank) and rank > max_rank
    ]


def pattern_problems(config: Config) -> list[str]:
    """Patterns that PEFT would hand to `re`, and that it would choke on.

    Some take minutes to compile: not for the API process.
    """
    patterns = [("rank_pattern", key) for key in config.get("rank_pattern") or ()]
    patterns += [("alpha_pattern", key) for key in config.get("alpha_pattern") or ()]
    patterns += [
        (key, config[key])
        for key in ("target_modules", "exclude_modules")
        if isinstance(config.get(key), str)
    ]
    if len(patterns) > PATTERNS:
        return [f"`rank_pattern` and `alpha_pattern` have {len(patterns)} entries; the limit is {PATTERNS}"]
    problems = []
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"`{key}` is not a valid regex: {error} in {pattern[:80]!r}")
    return problems
