"""The Grafana dashboard as code:

`python deploy/grafana/dashboard.py` rewrites dashboards/adapterd.json beside it.

Knows metric names and where panels go; must not know a data source's address, which provisioning
gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "dashboards" / "adapterd.json"
HERE = '{job="adapterd", instance=~"$instance"}'
SOURCE = {"type": "prometheus", "uid": "adapterd"}
LINES = {"fillOpacity": 8, "showPoints": "never"}
OPTIONS = {
    "legend": {"displayMode": "list", "placement": "bottom"},
    "tooltip": {"mode": "multi", "sort": "desc"},
}
COLUMNS, WIDTH, HEIGHT = 3, 8, 8


@dataclass(frozen=True)
class Panel:
    """One graph: `lines` are pairs of expression and legend, `unit` is Grafana's name of it."""

    title: str
    unit: str
    lines: Sequence[tuple[str, str]]
    says: str = ""


def rate(metric: str) -> str:
    return f"rate({metric}{HERE}[$__rate_interval])"


def quantiles(metric: str) -> list[tuple[str, str]]:
    """Three lines over a histogram, named without its `_bucket`."""
    return [
        (f"histogram_quantile({q}, sum by (le) ({rate(metric + '_bucket')}))", f"p{100 * q:g}")
        for q in (0.5, 0.95, 0.99)
    ]


def top(metric: str) -> list[tuple[str, str]]:
    return [(f"topk(10, sum by (adapter) ({rate(metric)}))", "{{adapter}}")]


def slowest() -> list[tuple[str, str]]:
    by_adapter = f"sum by (adapter, le) ({rate('adapterd_adapter_e2e_request_latency_seconds_bucket')})"
    return [(f"topk(10, histogram_quantile(0.95, {by_adapter}))", "{{adapter}}")]


ROWS: dict[str, list[Panel]] = {
    "Now": [
        Panel(
            "Requests",
            "short",
            [(f"sum(adapterd_num_requests_{s}{HERE})", s) for s in ("running", "waiting")],
            "Running and waiting requests.",
        ),
        Panel(
            "Tokens",
            "short",
            [(f"sum({rate(f'adapterd_{s}_tokens_total')})", s) for s in ("prompt", "generation")],
            "Tokens a second.",
        ),
        Panel("KV blocks in use", "percentunit", [(f"adapterd_kv_cache_usage_ratio{HERE}", "{{instance}}")]),
    ],
    "Outcomes": [
        Panel(
            "Answered",
            "reqps",
            [(f"sum by (finished_reason) ({rate('adapterd_request_success_total')})", "{{finished_reason}}")],
        ),
        Panel(
            "Failed",
            "reqps",
            [(f"sum by (code) ({rate('adapterd_request_failure_total')})", "{{code}}")],
            "`internal` is a defect.",
        ),
        Panel(
            "Worker restarts",
            "short",
            [(f"sum by (instance) (increase(adapterd_worker_restarts_total{HERE}[1h]))", "{{instance}}")],
            "In the last hour.",
        ),
    ],
    "Latency": [
        Panel("Time to first token", "s", quantiles("adapterd_time_to_first_token_seconds")),
        Panel("Between tokens", "s", quantiles("adapterd_inter_token_latency_seconds")),
        Panel("Whole request", "s", quantiles("adapterd_e2e_request_latency_seconds")),
        Panel("In the queue", "s", quantiles("adapterd_request_queue_time_seconds")),
    ],
    "Adapters": [
        Panel(
            "Where they are",
            "short",
            [(f"sum by (tier) (adapterd_adapters{HERE})", "{{tier}}")],
            "Registered adapters by tier.",
        ),
        Panel(
            "Rank rows",
            "short",
            [(f"sum(adapterd_pool_rank_{s}{HERE})", s) for s in ("used", "total")],
            "A full pool and many placed: the pool is too small.",
        ),
        Panel(
            "Coming in",
            "ops",
            [(f"sum({rate(f'adapterd_adapter_{way}_seconds_count')})", way) for way in ("load", "place")],
            "Adapters a second: loaded from disk to host memory, placed from there on the device.",
        ),
        Panel("Time to load", "s", quantiles("adapterd_adapter_load_seconds")),
        Panel("Time to place", "s", quantiles("adapterd_adapter_place_seconds")),
        Panel(
            "Found where needed",
            "reqps",
            [
                (f"sum by (tier) ({rate(f'adapterd_adapter_{s}_total')})", f"{{{{tier}}}} {s}")
                for s in ("hits", "misses")
            ],
            "A miss on the device waits for a copy from host memory, a miss there for the disk.",
        ),
        Panel(
            "Making room",
            "ops",
            [(f"sum by (tier) ({rate('adapterd_adapter_evict_seconds_count')})", "from {{tier}}")],
            "Adapters a second that left for others.",
        ),
        Panel(
            "Adapters' bytes on the move",
            "Bps",
            [
                (f"sum({rate(f'adapterd_adapter_{way}_bytes_total')})", way)
                for way in ("load", "place", "evict")
            ],
        ),
        Panel(
            "Memory held",
            "bytes",
            [
                (f"sum(adapterd_base_bytes{HERE})", "base"),
                (f"sum by (tier) (adapterd_adapter_bytes{HERE})", "adapters on {{tier}}"),
            ],
        ),
    ],
    "By adapter": [
        Panel("Busiest by requests", "reqps", top("adapterd_adapter_requests_total")),
        Panel(
            "Busiest by tokens",
            "short",
            top("adapterd_adapter_generation_tokens_total"),
            "Generated tokens a second.",
        ),
        Panel(
            "Longest prompts", "short", top("adapterd_adapter_prompt_tokens_total"), "Prompt tokens a second."
        ),
        Panel(
            "Slowest",
            "s",
            slowest(),
            "Whole requests, 95 of 100 are faster. _other is all that have no series of their own.",
        ),
    ],
    "GPU": [
        Panel(
            "GPU memory",
            "bytes",
            [
                (f"adapterd_gpu_memory_{s}_bytes{HERE}", f"{{{{instance}}}} {{{{gpu}}}} {s}")
                for s in ("used", "total")
            ],
        ),
        Panel(
            "GPU utilization",
            "percentunit",
            [(f"adapterd_gpu_utilization_ratio{HERE}", "{{instance}} {{gpu}}")],
        ),
        Panel(
            "GPU temperature",
            "celsius",
            [(f"adapterd_gpu_temperature_celsius{HERE}", "{{instance}} {{gpu}}")],
        ),
    ],
}


def graph(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.says,
        "datasource": SOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": LINES}, "overrides": []},
        "options": OPTIONS,
        "targets": [target(i, *line) for i, line in enumerate(panel.lines)],
    }


def target(number: int, expression: str, legend: str) -> dict[str, Any]:
    name = chr(ord("A") + number)
    return {"refId": name, "datasource": SOURCE, "expr": expression, "legendFormat": legend}


def row_header(title: str, number: int, y: int) -> dict[str, Any]:
    return {
        "id": number,
        "type": "row",
        "title": title,
        "collapsed": False,
        "panels": [],
        "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
    }


def panels() -> Iterator[dict[str, Any]]:
    number = y = 0
    for title, row in ROWS.items():
        number += 1
        yield row_header(title, number, y)
        y += 1
        for i, panel in enumerate(row):
            number += 1
            yield graph(panel, number, i % COLUMNS * WIDTH, y + i // COLUMNS * HEIGHT)
        y += -(-len(row) // COLUMNS) * HEIGHT


def instances() -> dict[str, Any]:
    """The drop-down that narrows every graph to some replicas."""
    query = 'label_values(up{job="adapterd"}, instance)'
    return {
        "name": "instance",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "instances"},
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard() -> dict[str, Any]:
    return {
        "uid": "adapterd",
        "title": "adapterd",
        "tags": ["adapterd"],
        "schemaVersion": 39,
        "timezone": "browser",
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [instances()]},
        "panels": list(panels()),
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
