"""Formats summaries and forecasts as tables that a person can read.

Runs in the API process and the command line; knows only their dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "name": "module", "count": "count", "in_features": "in", "out_features": "out", "rank": "rank",
    "scaling": "scaling", "lora_A": "lora_A", "lora_B": "lora_B", "parameters": "parameters",
    "megabytes": "MB",
}  # fmt: skip


def format_summary(summary: Mapping[str, Any]) -> str:
    """A summary, or the facts that `inspect` gives of a folder, as text."""
    facts = [(name, text) for name, text in _fact_rows(summary) if text]
    lines = _align_rows(facts)
    if summary.get("by_module"):
        lines += ["", *_by_module(summary["by_module"])]
    if summary.get("tensors"):
        lines += ["", *_format_tensors(summary["tensors"])]
    notes = [*summary.get("problems", ()), *summary.get("warnings", ())]
    if notes:
        lines += ["", *(f"! {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _format_tensors(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    """A grid of the tensors, under the names of their fields."""
    titles = list(tensors[0])
    cells = [[_format_cell(value) for value in tensor.values()] for tensor in tensors]
    return _format_grid([titles, *cells])


def format_forecast(forecast: Mapping[str, Any]) -> str:
    """A forecast as text."""
    base = forecast["base"]
    megabytes = base["float32_megabytes"]
    of_base = f"{base['parameters']:,} parameters ({megabytes:,.2f} MB)"
    rows = [
        ("rank", str(forecast["r"])),
        ("parameters", f"{forecast['parameters']:,}"),
        ("size", f"{forecast['megabytes']:.2f} MB as {forecast['dtype']}"),
        ("base", f"{forecast['percent_of_base']:.2f} % of {of_base}"),
    ]
    modules = _by_module(forecast["by_module"])
    return "\n".join([*_align_rows(rows), "", *modules]) + "\n"


def _fact_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    names = ("id", "digest", "state", "residency", "reason", "source")
    rows = [(name, _format_cell(summary[name])) for name in names if summary.get(name)]
    if "size" not in summary:
        return rows
    size = summary["size"]
    return [
        *rows,
        ("type", _format_type(summary)),
        ("base model", _format_base(summary)),
        ("rank", _format_span(summary.get("rank"))),
        ("scaling", _format_scaling(summary)),
        ("modules", _format_modules(summary)),
        ("parameters", f"{summary['parameters']:,}{_format_share(summary)}"),
        ("size", f"{size['megabytes']:.2f} MB ({_format_bytes(size)})"),
        *_on_device(summary, size),
    ]


def _on_device(summary: Mapping[str, Any], size: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "footprint" not in summary:
        return []
    footprint = summary["footprint"]
    base, grown = footprint["base_megabytes"], footprint["with_adapter_megabytes"]
    change = f"the base's {base:,.2f} MB become {grown:,.2f} MB"
    return [("on the device", f"{size['device_megabytes']:.2f} MB: {change}")]


def _format_type(summary: Mapping[str, Any]) -> str:
    words = [summary.get("peft_type"), summary.get("task_type")]
    if summary.get("use_rslora"):
        words.append("rsLoRA")
    if summary.get("use_dora"):
        words.append("DoRA")
    kind = " ".join(filter(None, words))
    return f"{kind} (PEFT {summary.get('peft_version')})"


def _format_scaling(summary: Mapping[str, Any]) -> str:
    scaling = summary.get("scaling")
    if not scaling:
        return ""
    span = _format_span(scaling)
    return f"{span} (alpha {summary.get('alpha')}, dropout {summary.get('dropout')})"


def _format_modules(summary: Mapping[str, Any]) -> str:
    if not summary.get("modules"):
        return ""
    names = ", ".join(summary["target_modules"])
    return f"{summary['modules']} in {summary['layers']} layers: {names}"


def _format_bytes(size: Mapping[str, Any]) -> str:
    dtypes = ", ".join(f"{count} x {dtype}" for dtype, count in size["dtypes"].items())
    parts = f"{size['header_bytes']:,} header + {size['tensor_bytes']:,} tensors"
    return f"{size['file_bytes']:,} bytes = {parts}; {dtypes}"


def _format_base(summary: Mapping[str, Any]) -> str:
    base = summary.get("base_model") or {}
    claimed = base.get("claimed") or "not named"
    if base.get("served") and not base.get("match"):
        return f"{claimed}, served on {base['served']}"
    return str(claimed)


def _format_share(summary: Mapping[str, Any]) -> str:
    if "base" not in summary:
        return ""
    percent, whole = summary["percent_of_base"], summary["base"]["parameters"]
    return f" ({percent:.2f} % of the base's {whole:,})"


def _format_span(span: Mapping[str, Any] | None) -> str:
    if not span:
        return ""
    low, high = (f"{span[end]:g}" for end in ("min", "max"))
    return low if low == high else f"{low} to {high}"


def _by_module(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A grid of the modules, with those columns that they have."""
    keys = [key for key in COLUMNS if key in rows[0]]
    titles = [COLUMNS[key] for key in keys]
    cells = [[_format_value(key, row[key]) for key in keys] for row in rows]
    return _format_grid([titles, *cells])


def _format_value(key: str, value: Any) -> str:
    return f"{value:,.2f}" if key == "megabytes" else _format_cell(value)


def _format_cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    if isinstance(value, int | float):
        return f"{round(value, 4):,}"
    return str(value)


def _align_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def _format_grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first one to the left and all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]))
    return lines
