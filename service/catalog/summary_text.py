"""Summaries and forecasts as tables that a person can read. Knows only their dictionaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = {
    "name": "module", "count": "count", "in_features": "in", "out_features": "out", "rank": "rank", "scaling": "scaling",
    "lora_A": "lora_A", "lora_B": "lora_B", "parameters": "parameters", "megabytes": "MB",
}  # fmt: skip


def format_summary(told: Mapping[str, Any]) -> str:
    """A summary, or what `inspect` says of a folder, as text."""
    lines = _align_rows([row for row in _fact_rows(told) if row[1]])
    if told.get("by_module"):
        lines += ["", *_by_module(told["by_module"])]
    if told.get("tensors"):
        lines += [
            "",
            *_format_grid(
                [
                    list(told["tensors"][0]),
                    *([_format_cell(value) for value in row.values()] for row in told["tensors"]),
                ]
            ),
        ]
    notes = [*told.get("problems", ()), *told.get("warnings", ())]
    return "\n".join([*lines, *([""] if notes else []), *(f"! {note}" for note in notes)]) + "\n"


def format_forecast(told: Mapping[str, Any]) -> str:
    """A forecast as text."""
    rows = [
        ("rank", str(told["r"])),
        ("parameters", f"{told['parameters']:,}"),
        ("size", f"{told['megabytes']:.2f} MB as {told['dtype']}"),
        (
            "base",
            f"{told['percent_of_base']:.2f} % of {told['base']['parameters']:,} parameters ({told['base']['float32_megabytes']:,.2f} MB)",
        ),
    ]
    return "\n".join([*_align_rows(rows), "", *_by_module(told["by_module"])]) + "\n"


def _fact_rows(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        (name, _format_cell(told[name]))
        for name in ("id", "digest", "state", "residency", "reason", "source")
        if told.get(name)
    ]
    if "size" not in told:
        return rows
    size = told["size"]
    kind = [
        told.get("peft_type"),
        told.get("task_type"),
        "rsLoRA" if told.get("use_rslora") else "",
        "DoRA" if told.get("use_dora") else "",
    ]
    dtypes = ", ".join(f"{count} x {dtype}" for dtype, count in size["dtypes"].items())
    bytes_ = (
        f"{size['file_bytes']:,} bytes = {size['header_bytes']:,} header + {size['tensor_bytes']:,} tensors"
    )
    rows += [
        ("type", f"{' '.join(filter(None, kind))} (PEFT {told.get('peft_version')})"),
        ("base model", _format_base(told)),
        ("rank", _format_span(told.get("rank"))),
        (
            "scaling",
            f"{_format_span(told.get('scaling'))} (alpha {told.get('alpha')}, dropout {told.get('dropout')})"
            if told.get("scaling")
            else "",
        ),
        (
            "modules",
            f"{told['modules']} in {told['layers']} layers: {', '.join(told['target_modules'])}"
            if told.get("modules")
            else "",
        ),
        ("parameters", f"{told['parameters']:,}{_format_share(told)}"),
        ("size", f"{size['megabytes']:.2f} MB ({bytes_}; {dtypes})"),
    ]
    return [*rows, *_on_device(told, size)]


def _on_device(told: Mapping[str, Any], size: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "footprint" not in told:
        return []
    footprint = told["footprint"]
    grown = f"the base's {footprint['base_megabytes']:,.2f} MB become {footprint['with_adapter_megabytes']:,.2f} MB"
    return [("on the device", f"{size['device_megabytes']:.2f} MB: {grown}")]


def _format_base(told: Mapping[str, Any]) -> str:
    base = told.get("base_model") or {}
    served = f", served on {base['served']}" if base.get("served") and not base.get("match") else ""
    return f"{base.get('claimed') or 'not named'}{served}"


def _format_share(told: Mapping[str, Any]) -> str:
    return (
        f" ({told['percent_of_base']:.2f} % of the base's {told['base']['parameters']:,})"
        if "base" in told
        else ""
    )


def _format_span(span: Mapping[str, Any] | None) -> str:
    if not span:
        return ""
    low, high = (f"{span[end]:g}" for end in ("min", "max"))
    return low if low == high else f"{low} to {high}"


def _by_module(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = [key for key in COLUMNS if key in rows[0]]
    return _format_grid(
        [
            [COLUMNS[key] for key in keys],
            *(
                [f"{row[key]:,.2f}" if key == "megabytes" else _format_cell(row[key]) for key in keys]
                for row in rows
            ),
        ]
    )


def _format_cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " x ".join(map(str, value))
    return f"{round(value, 4):,}" if isinstance(value, int | float) else str(value)


def _align_rows(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def _format_grid(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
