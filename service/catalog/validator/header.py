"""Reads an adapter's config and the header of its weights file, strictly.

Runs in the API process, the validator process and the command line; must not know torch, PEFT, or any
base model.

Nothing here costs more than the bytes it looks at: a 100 MB weights file is described by its first
few kilobytes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
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
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
POINTER = b"version https://git-lfs"
PICKLE = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes
    start: int = 0  # the first byte's offset behind the header

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file, and its size.

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
    """The config's keys and values. Raises AdapterInvalid."""
    raw = _read_config_file(folder / CONFIG)
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError):
        raise AdapterInvalid([f"{CONFIG} {pointer_hint(raw) or 'is not JSON'}"]) from None
    if not isinstance(config, dict):
        raise AdapterInvalid([f"{CONFIG} is not a JSON object"])
    return config


def _read_config_file(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > CONFIG_LIMIT:
            raise AdapterInvalid([f"{CONFIG} is {size} bytes; the limit is {CONFIG_LIMIT}"])
        return path.read_bytes()
    except FileNotFoundError:
        raise AdapterInvalid([f"{CONFIG} is missing"]) from None
    except OSError as error:
        raise AdapterInvalid([f"{CONFIG} cannot be read: {error.strerror}"]) from None


def missing_weights(folder: Path) -> list[str]:
    """Why there is no weights file to read; empty when there is one."""
    if (folder / WEIGHTS).is_file():
        return []
    names = {path.name for path in folder.iterdir()}
    return [f"{WEIGHTS} is missing{_other_format(names)}"]


def _other_format(names: set[str]) -> str:
    """What these files are instead, and what to do; empty where that is not known."""
    if "adapter_model.bin" in names or "adapter_model.pt" in names:
        return ": adapter_model.bin is a pickle, which could run code; save the adapter as safetensors"
    if "adapters.safetensors" in names:
        return ": adapters.safetensors is MLX's format, with transposed factors; convert it to PEFT's"
    if f"{WEIGHTS}.index.json" in names:
        return ": the weights are split over several files; save them as one"
    return ""


def quick_check(folder: Path, max_rank: int) -> None:
    """Refuses what the config alone shows to be wrong, in about a millisecond.

    Raises AdapterInvalid.
    """
    config = read_config(folder)
    problems = config_problems(config, max_rank) + missing_weights(folder)
    if problems:
        raise AdapterInvalid(problems)


def read_header(path: Path) -> Header:
    """The header of a safetensors file; only its bytes are read.

    Raises AdapterInvalid, saying what the file seems to be.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = _header_length(path.name, file.read(24), size)
            file.seek(8)
            entries = json.loads(file.read(length))
    except (ValueError, RecursionError):
        raise AdapterInvalid(
            [f"{path.name} has a header that is not JSON: it is no safetensors file, or a damaged one"]
        ) from None
    except OSError as error:
        raise AdapterInvalid([f"{path.name} cannot be read: {error.strerror}"]) from None
    return _parse_header(path.name, entries, size, length + 8)


def _header_length(name: str, start: bytes, size: int) -> int:
    """The header's bytes behind the length, by the file's first 24. Raises AdapterInvalid."""
    hint = _not_safetensors(start, size)
    if hint:
        raise AdapterInvalid([f"{name} {hint}"])
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise AdapterInvalid([f"{name} is truncated: its header takes {length} bytes, the file has {size}"])
    if length > HEADER_LIMIT:
        raise AdapterInvalid([f"{name} has a header of {length} bytes; the limit is {HEADER_LIMIT}"])
    return length


def pointer_hint(content: bytes) -> str:
    """The advice for a file that git-lfs has not fetched; empty for any other."""
    if not content.startswith(POINTER):
        return ""
    return "is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`"


def _not_safetensors(start: bytes, size: int) -> str:
    """What a file that begins so is instead; empty where it may be safetensors."""
    hint = pointer_hint(start)
    if hint:
        return hint
    if start.startswith(PICKLE) and start[8:9] != b"{":  # else these are a length's own low bytes
        return "is a pickle, not safetensors: it could run code; save the adapter as safetensors"
    if size < 8:
        return f"is truncated: {size} bytes"
    return ""


def _parse_header(name: str, entries: Any, size: int, start: int) -> Header:
    """The header of these entries, behind which the tensors `start`. Raises AdapterInvalid."""
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
    end = _check_spans(name, spans, start)
    if end != size:
        word = "truncated" if end > size else "too long"
        raise AdapterInvalid([f"{name} is {word}: its tensors end at byte {end}, the file has {size}"])
    return Header(size, start, tensors)


def _check_spans(name: str, spans: Iterable[tuple[int, int]], start: int) -> int:
    """The byte of the file where the last tensor ends. Raises AdapterInvalid."""
    end = 0
    for begin, stop in sorted(spans):
        if begin != end:
            gap = start + min(begin, end)
            raise AdapterInvalid([f"{name} has tensors that overlap or leave a gap at byte {gap}"])
        end = stop
    return start + end


def _parse_entry(name: str, key: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        size = end - begin
        if whole and dtype in ITEMSIZE and math.prod(shape) * ITEMSIZE[dtype] == size:
            return TensorInfo(dtype, shape, size, begin), (begin, end)
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


def _is_object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and value >= 1


def _is_token(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _are_names(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(name, str) for name in value)
    return _is_text(value)


def _are_layers(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_whole, value))
    return value is None or _is_whole(value)


def _are_tokens(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_token, value))
    return value is None


def _are_ranks(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_rank, value.values()))
    return value is None


def _are_alphas(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_number, value.values()))
    return value is None


Check = tuple[Callable[[Any], bool], str]
SHARED: dict[str, Check] = {
    "task_type": (_is_text, "a text or null"),
    "base_model_name_or_path": (_is_text, "a text or null"),
    "revision": (_is_text, "a text or null"),
    "peft_version": (_is_text, "a text or null"),
    "target_modules": (_are_names, "a text, a list of texts or null"),
    "exclude_modules": (_are_names, "a text, a list of texts or null"),
    "rank_pattern": (_is_object, "an object or null"),
    "alpha_pattern": (_is_object, "an object or null"),
}
LORA: dict[str, Check] = {
    "r": (_is_rank, "a whole number, 1 or more"),
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
    """The problems of the config as such; each names its key."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        return [f"`peft_type` is missing from {CONFIG}{_foreign_type(config)}"]
    lora = kind == "LORA"
    problems = [f"`{key}` is missing" for key in NEEDED if lora and key not in config]
    checks = SHARED | LORA if lora else SHARED
    for key, (is_right, wanted) in checks.items():
        if key in config and not is_right(config[key]):
            written = json.dumps(config[key])[:80]
            problems.append(f"`{key}` must be {wanted}, not {written}")
    return problems or [*_ranks_over(config, max_rank), *_find_unencodable(config)]


def _foreign_type(config: Config) -> str:
    """What this config is instead; empty where that is not known."""
    if "fine_tune_type" in config or "lora_parameters" in config:
        return ": this is an MLX adapter's config; convert the adapter to PEFT's format"
    if "architectures" in config or "model_type" in config:
        return ": this is a model's config.json, not an adapter's"
    return ""


def _find_unencodable(config: Config) -> list[str]:
    """Values that no answer could repeat: half characters, which an escape can spell, and numbers that
    JSON does not have.
    """
    problems = []
    for key, value in config.items():
        try:
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, RecursionError):
            name = ascii(key)[1:-1]
            problems.append(f"`{name}` holds half a character, or a number that JSON does not have")
    return problems


def _ranks_over(config: Config, max_rank: int) -> list[str]:
    ranks = {"`r`": config.get("r", 0)}
    rank_pattern = config.get("rank_pattern") or {}
    for pattern, rank in rank_pattern.items():
        ranks[f"`rank_pattern` {pattern!r}"] = rank
    over = {key: rank for key, rank in ranks.items() if _is_whole(rank) and rank > max_rank}
    return [f"{key}: rank {rank} is over the limit of {max_rank}" for key, rank in over.items()]


def _list_patterns(config: Config) -> list[tuple[str, str]]:
    """Key → pattern, for every pattern of the config."""
    patterns = [("rank_pattern", pattern) for pattern in config.get("rank_pattern") or ()]
    patterns += [("alpha_pattern", pattern) for pattern in config.get("alpha_pattern") or ()]
    for key in ("target_modules", "exclude_modules"):
        pattern = config.get(key)
        if isinstance(pattern, str):
            patterns.append((key, pattern))
    return patterns


def pattern_problems(config: Config) -> list[str]:
    """Patterns that PEFT would hand to `re`, and that it would choke on.

    Some take minutes to compile: not for the API process.
    """
    patterns = _list_patterns(config)
    if len(patterns) > PATTERNS:
        return [f"`rank_pattern` and `alpha_pattern` have {len(patterns)} entries; the limit is {PATTERNS}"]
    problems = []
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"`{key}` is not a valid regex: {error} in {pattern[:80]!r}")
    return problems
