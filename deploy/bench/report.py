"""Numbers, a table and a plot out of samples and cells. Knows no server and no clock."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .load import Sample

BASE = "base only"


@dataclass(frozen=True)
class Summary:
    """What one run showed, times in milliseconds.

    `exact` says whether every answer had as many tokens as were asked for.
    """

    requests: int
    errors: int
    seconds: float
    tokens_per_s: float
    requests_per_s: float
    prompt_tokens: float
    first_p50: float
    first_p95: float
    first_p99: float
    gap_p50: float
    gap_p95: float
    gap_p99: float
    whole_p50: float
    whole_p95: float
    whole_p99: float


@dataclass(frozen=True)
class Cell:
    """A summary and what it is of."""

    server: str
    mix: str
    clients: int
    summary: Summary


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between neighbours, as numpy's; nan of nothing."""
    if not values:
        return math.nan
    ranked = sorted(values)
    at = (len(ranked) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (at - low)


def summarize(samples: Sequence[Sample], seconds: float) -> Summary:
    good = [sample for sample in samples if sample.error is None]
    times = {
        "first": [sample.first for sample in good],
        "gap": [gap for sample in good for gap in sample.gaps],
        "whole": [sample.whole for sample in good],
    }
    shown = {
        f"{name}_p{p}": round(1000 * percentile(values, p), 2)
        for name, values in times.items()
        for p in (50, 95, 99)
    }
    return Summary(
        requests=len(samples),
        errors=len(samples) - len(good),
        seconds=round(seconds, 3),
        tokens_per_s=round(sum(sample.tokens for sample in good) / seconds, 2),
        requests_per_s=round(len(good) / seconds, 3),
        prompt_tokens=statistics.mean([sample.prompt_tokens for sample in good]) if good else math.nan,
        **shown,
    )


def median(summaries: Sequence[Summary]) -> Summary:
    """Each number's median over the runs; errors are added up, since one is one too many."""
    rows = [asdict(summary) for summary in summaries]
    middle = {key: statistics.median([row[key] for row in rows]) for key in rows[0]}
    return Summary(**middle | {"errors": sum(row["errors"] for row in rows)})


def ratio(over: Cell | None, under: Cell | None) -> str:
    return (
        f"{over.summary.tokens_per_s / under.summary.tokens_per_s:.2f}"
        if over and under and under.summary.tokens_per_s
        else "–"
    )


def row(cell: Cell, found: Mapping[tuple[str, str, int], Cell], first: str) -> str:
    s = cell.summary
    over_base = ratio(cell, found.get((cell.server, BASE, cell.clients)))
    against = ratio(found.get((first, cell.mix, cell.clients)), cell)
    times = (
        f"{s.first_p50:.0f} / {s.first_p95:.0f} | {s.gap_p50:.1f} / {s.gap_p95:.1f} "
        f"| {s.whole_p50:.0f} / {s.whole_p95:.0f}"
    )
    return (
        f"| {cell.clients} | {cell.mix} | {cell.server} | {s.tokens_per_s:.1f} "
        f"| {over_base} | {against} | {times} | {s.errors} |"
    )


def table(cells: Sequence[Cell], first: str) -> str:
    """Markdown: a row a cell, times in ms as p50 / p95, with tokens/s over the same server's base,
    and server `first`'s over its own.
    """
    found = {(cell.server, cell.mix, cell.clients): cell for cell in cells}
    heads = [
        "clients",
        "mix",
        "server",
        "tok/s",
        "× its base",
        f"{first} ÷ it",
        "first token",
        "between tokens",
        "whole",
        "errors",
    ]
    lines = [
        "| " + " | ".join(heads) + " |",
        "|---" * len(heads) + "|",
        *(row(cell, found, first) for cell in cells),
    ]
    return "\n".join(lines) + "\n"


def plot(cells: Sequence[Cell], file: Path) -> None:
    """Two bar charts, tokens a second and time to first token, a group for each mix and number of
    clients.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys((cell.mix, cell.clients) for cell in cells))
    servers = list(dict.fromkeys(cell.server for cell in cells))
    width = 0.8 / len(servers)
    figure = Figure(figsize=(max(6.0, 1.1 * len(groups)), 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for i, server in enumerate(servers):
        mine = [cell for cell in cells if cell.server == server]
        where = [groups.index((cell.mix, cell.clients)) + (i + 0.5) * width - 0.4 for cell in mine]
        above.bar(where, [cell.summary.tokens_per_s for cell in mine], width, label=server)
        below.bar(where, [cell.summary.first_p50 for cell in mine], width, label=server)
    above.set_ylabel("tokens/s")
    below.set_ylabel("time to first token, p50, ms")
    below.set_xticks(range(len(groups)), [f"{mix}\n{clients} at once" for mix, clients in groups], fontsize=8)
    above.legend()
    figure.savefig(file, dpi=120)


def write(folder: Path, cells: Sequence[Cell], facts: Mapping[str, object], first: str) -> str:
    """results.json, results.md and results.png in the folder; the table is the answer, too."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = table(cells, first) + "".join(f"\n- {name}: {fact}" for name, fact in facts.items()) + "\n"
    (folder / "results.json").write_text(
        json.dumps({"facts": dict(facts), "cells": [asdict(cell) for cell in cells]}, indent=1, default=str)
        + "\n",
        encoding="utf-8",
    )
    (folder / "results.md").write_text(shown, encoding="utf-8")
    plot(cells, folder / "results.png")
    return shown
