"""Turns an adapter's config and header into counts, shapes and megabytes per module.

Runs in the API process, the validator process and the command line; must not know files or torch.
Megabytes are 10^6 bytes, rounded to two places.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.base_info import LinearKind
from ..core.defaults import FLOAT_CODES
from ..errors import BadRequest
from .validator.header import ITEMSIZE, Config, Header, TensorInfo

LAYER = re.compile(r"^(.*?)\.(\d+)\.")
FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(A|B|magnitude_vector)(?:\.weight)?$")


@dataclass(frozen=True, slots=True)
class LoraModuleInfo:
    """A module that a LoRA changes: A is [rank, in], B is [out, rank], `magnitude` DoRA's [out].

    Of `experts` experts A is [experts · rank, in], B is [out, rank · experts].
    """

    module: str
    scaling: float
    a: TensorInfo
    b: TensorInfo
    magnitude: TensorInfo | None = None
    experts: int = 1

    @property
    def rank(self) -> int:
        return self.a.shape[0] // self.experts

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        if self.magnitude is None:
            return self.a, self.b
        return self.a, self.b, self.magnitude


def to_megabytes(size: float) -> float:
    """Megabytes of so many bytes."""
    return round(size / 1e6, 2)


def to_percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2)


def span_of(values: Iterable[float]) -> dict[str, float] | None:
    """The least and the largest value; None where there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    return {"min": ordered[0], "max": ordered[-1]}


def last_name(module: str) -> str:
    """What a dotted name ends with: `q_proj`."""
    return module.rsplit(".", 1)[-1]


def count_layers(modules: Iterable[str]) -> int:
    """How many numbered layers these dotted names lie in."""
    matches = (LAYER.match(f"{module}.") for module in modules)
    return len({match.groups() for match in matches if match})


def by_module(modules: Sequence[LoraModuleInfo]) -> list[dict[str, Any]]:
    """One entry per name, shape, rank and scaling.

    `parameters` and `megabytes` are of all its modules together.
    """
    groups: dict[tuple[Any, ...], list[LoraModuleInfo]] = {}
    for info in modules:
        has_magnitude = info.magnitude is not None
        key = (last_name(info.module), info.a.shape, info.b.shape, info.rank, info.scaling, has_magnitude)
        groups.setdefault(key, []).append(info)
    ordered = sorted(groups.items(), key=lambda group: group[0])
    return [_module_row(*group) for group in ordered]


def _module_row(key: tuple[Any, ...], group: Sequence[LoraModuleInfo]) -> dict[str, Any]:
    name, a, b, rank, scaling, has_magnitude = key
    parts = [part for info in group for part in info.parts]
    size = sum(part.size for part in parts)
    row = {"name": name, "count": len(group), "in_features": a[1], "out_features": b[0], "rank": rank}
    row |= {"scaling": scaling, "lora_A": list(a), "lora_B": list(b)}
    if has_magnitude:
        row["magnitude"] = [b[0]]
    row["parameters"] = sum(part.count for part in parts)
    row["megabytes"] = to_megabytes(size)
    return row


def describe_content(
    config: Config,
    header: Header,
    modules: Sequence[LoraModuleInfo],
    ignored: Iterable[str] = (),
    changed: Sequence[str] = (),
) -> dict[str, Any]:
    """The part of a summary that the content alone says.

    `ignored` names tensors that are not the adapter's own.
    `changed` names all layers it acts on, where those are not `modules`.
    """
    names = changed or [info.module for info in modules]
    foreign = set(ignored)
    own = [tensor for key, tensor in header.tensors.items() if key not in foreign]
    last_names = set(map(last_name, names))
    layers = {
        "target_modules": sorted(last_names),
        "layers": count_layers(names),
        "modules": len(names),
        "by_module": by_module(modules),
    }
    parameters = sum(tensor.count for tensor in own)
    size = {"parameters": parameters, "size": describe_size(header)}
    return _describe_config(config, modules) | layers | size


def _describe_config(config: Config, modules: Sequence[LoraModuleInfo]) -> dict[str, Any]:
    return {
        "peft_type": config.get("peft_type"),
        "task_type": config.get("task_type"),
        "peft_version": config.get("peft_version") or "unknown",
        "claimed_base": config.get("base_model_name_or_path"),
        "rank": span_of(info.rank for info in modules),
        "alpha": config.get("lora_alpha"),
        "scaling": span_of(info.scaling for info in modules),
        "dropout": config.get("lora_dropout") or 0.0,
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
    }


def describe_size(header: Header) -> dict[str, Any]:
    """The file's own bytes beside what its shapes and types say they must be."""
    dtypes: dict[str, int] = {}
    arithmetic = 0
    for tensor in header.tensors.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
        arithmetic += tensor.count * ITEMSIZE[tensor.dtype]
    return {
        "file_bytes": header.file_bytes,
        "header_bytes": header.header_bytes,
        "tensor_bytes": header.tensor_bytes,
        "megabytes": to_megabytes(header.tensor_bytes),
        "dtypes": dict(sorted(dtypes.items())),
        "arithmetic_bytes": arithmetic,
        "matches_file": arithmetic == header.tensor_bytes,
    }


def guess_modules(config: Config, header: Header) -> list[LoraModuleInfo]:
    """The LoRA modules as the file's own key names tell them, for when there is no base to compare with."""
    modules = []
    for module, factors in _group_factors(header).items():
        a, b = factors.get("A"), factors.get("B")
        if a is None or b is None or not len(a.shape) == len(b.shape) == 2:
            continue
        rank = a.shape[0]
        if rank:
            scaling = _scaling_of(config, module, rank)
            magnitude = factors.get("magnitude_vector")
            modules.append(LoraModuleInfo(module, scaling, a, b, magnitude))
    return modules


def _group_factors(header: Header) -> dict[str, dict[str, TensorInfo]]:
    """Module → A, B and magnitude_vector, as far as the file has them."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    for key, tensor in header.tensors.items():
        match = FACTOR.match(key.replace(".default", ""))
        if match and len(tensor.shape) in (1, 2):
            module, part = match.groups()
            factors.setdefault(module, {})[part] = tensor
    return factors


def _scaling_of(config: Config, module: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank with rsLoRA."""
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(matching, config.get("lora_alpha") or 0)
    divisor = rank**0.5 if config.get("use_rslora") else rank
    return float(alpha / divisor)


def forecast_size(
    linears: Sequence[LinearKind], parameters: int, r: int, modules: Sequence[str], dtype: str = "float32"
) -> dict[str, Any]:
    """The size of a LoRA of this rank on these modules, on a base with these layers.

    Raises BadRequest naming what is wrong.
    """
    known = sorted({linear.name for linear in linears})
    _check_forecast(known, r, modules, dtype)
    kind = FLOAT_CODES[dtype]
    rows = _forecast_rows(linears, kind, r, modules)
    total = sum(row["parameters"] for row in rows)
    shape = {"r": r, "dtype": dtype, "target_modules": sorted(set(modules))}
    return shape | {
        "by_module": rows,
        "parameters": total,
        "megabytes": to_megabytes(total * ITEMSIZE[kind]),
        "percent_of_base": to_percent(total, parameters),
        "base": {"parameters": parameters, "float32_megabytes": to_megabytes(4 * parameters)},
    }


def _check_forecast(known: Sequence[str], r: int, modules: Sequence[str], dtype: str) -> None:
    """Raises BadRequest."""
    if dtype not in FLOAT_CODES:
        dtypes = ", ".join(FLOAT_CODES)
        raise BadRequest(f"dtype {dtype!r} is none of {dtypes}", param="dtype")
    if r < 1:
        raise BadRequest(f"r {r} must be 1 or more", param="r")
    unknown = [name for name in modules if name not in known]
    if unknown or not modules:
        wrong = f"the base has no {', '.join(unknown)}" if unknown else "none is named"
        raise BadRequest(f"target_modules: {wrong}; it has {', '.join(known)}", param="target_modules")


def _forecast_rows(
    linears: Sequence[LinearKind], kind: str, r: int, modules: Sequence[str]
) -> list[dict[str, Any]]:
    chosen = [linear for linear in linears if linear.name in modules]
    chosen.sort(key=lambda linear: (linear.name, linear.in_features, linear.out_features, linear.count))
    return [_forecast_row(kind, r, linear) for linear in chosen]


def _forecast_row(kind: str, r: int, linear: LinearKind) -> dict[str, Any]:
    a = _forecast_tensor(kind, r, linear.in_features)
    b = _forecast_tensor(kind, linear.out_features, r)
    info = LoraModuleInfo(linear.name, 0, a, b)
    row = _module_row((linear.name, a.shape, b.shape, r, None, False), [info] * linear.count)
    del row["scaling"]
    return row


def _forecast_tensor(kind: str, height: int, width: int) -> TensorInfo:
    return TensorInfo(kind, (height, width), height * width * ITEMSIZE[kind])
