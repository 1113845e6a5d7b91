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
    lines = _align_rows([row for row in _fact_rows(summary) if row[1]])
    if summary.get("by_module"):
        lines += ["", *_by_module(summary["by_module"])]
    if tensors := summary.get("tensors"):
        cells = [[_format_cell(value) for value in row.values()] for row in tensors]
        lines += ["", *_format_grid([list(tensors[0]), *cells])]
    if notes := [*summary.get("problems", ()), *summary.get("warnings", ())]:
        lines += ["", *(f"! {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def format_forecast(forecast: Mapping[str, Any]) -> str:
    """A forecast as text."""
    base = forecast["base"]
    of_base = f"{base['parameters']:,} parameters ({base['float32_megabytes']:,.2f} MB)"
    rows = [
        ("rank", str(forecast["r"])),
        ("parameters", f"{forecast['parameters']:,}"),
        ("size", f"{forecast['megabytes']:.2f} MB as {forecast['dtype']}"),
        ("base", f"{forecast['percent_of_base']:.2f} % of {of_base}"),
    ]
    return "\n".join([*_align_rows(rows), "", *_by_module(forecast["by_module"])]) + "\n"


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
    base = summary["footprint"]["base_megabytes"]
    grown = summary["footprint"]["with_adapter_megabytes"]
    change = f"the base's {base:,.2f} MB become {grown:,.2f} MB"
    return [("on the device", f"{size['device_megabytes']:.2f} MB: {change}")]


def _format_type(summary: Mapping[str, Any]) -> str:
    kind = [summary.get("peft_type"), summary.get("task_type")]
    kind += ["rsLoRA"] if summary.get("use_rslora") else []
    kind += ["DoRA"] if summary.get("use_dora") else []
    return f"{' '.join(filter(None, kind))} (PEFT {summary.get('peft_version')})"


def _format_scaling(summary: Mapping[str, Any]) -> str:
    if not summary.get("scaling"):
        return ""
    span = _format_span(summary.get("scaling"))
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
    served = f", served on {base['served']}" if base.get("served") and not base.get("match") else ""
    return f"{base.get('claimed') or 'not named'}{served}"


def _format_share(summary: Mapping[str, Any]) -> str:
    if "base" not in summary:
        return ""
    return f" ({summary['percent_of_base']:.2f} % of the base's {summary['base']['parameters']:,})"


def _format_span(span: Mapping[str, Any] | None) -> str:
    if not span:
        return ""
    low, high = (f"{span[end]:g}" for end in ("min", "max"))
    return low if low == high else f"{low} to {high}"


def _by_module(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = [key for key in COLUMNS if key in rows[0]]
    titles = [COLUMNS[key] for key in keys]
    return _format_grid([titles, *([_format_value(key, row[key]) for key in keys] for row in rows)])


def _format_value(key: str, value: Any) -> str:
    return f"{value:,.2f}" if key == "megabytes" else _format_cell(value)


def _format_cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    return f"{round(value, 4):,}" if isinstance(value, int | float) else str(value)


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
