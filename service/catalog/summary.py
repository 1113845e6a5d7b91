"""Makes the cards and summaries of registered adapters, as dictionaries, in the API process.

Decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..core.adapter import Tier
from ..core.base_info import BaseInfo
from ..core.defaults import FLOAT_CODES
from . import facts
from .ids import ServedBase
from .validator.header import ITEMSIZE
from .validator.messages import ValidatedAdapter
from .versions import AdapterVersion, RegisteredAdapter, format_time


def make_card(entry: RegisteredAdapter, tier: Tier) -> dict[str, Any]:
    """The few facts that lists show. Of a failed adapter nothing is known but the reason."""
    card: dict[str, Any] = {
        "id": entry.version.id,
        "digest": entry.digest or None,
        "state": "failed" if entry.failure else "ready",
        "residency": tier.value,
        "rank": None,
        "parameters": None,
        "megabytes": None,
    }
    validated = entry.version.validated
    if validated:
        card |= _card_facts(validated.facts)
    card |= {"pinned": entry.pinned, "in_flight": entry.in_flight}
    card["last_used"] = format_time(entry.last_used)
    if entry.failure:
        card["reason"] = entry.failure
    return card


def _card_facts(known: Mapping[str, Any]) -> dict[str, Any]:
    """What a card has of the content's facts: of several ranks the largest."""
    rank = known["rank"] or {"max": 0}
    return {
        "rank": int(rank["max"]),
        "parameters": known["parameters"],
        "megabytes": known["size"]["megabytes"],
    }


def describe_version(entry: RegisteredAdapter, tier: Tier) -> dict[str, Any]:
    return {
        "digest": entry.digest or None,
        "registered_at": entry.version.registered_at,
        "residency": tier.value,
        "in_flight": entry.in_flight,
    }


def make_summary(entry: RegisteredAdapter, tier: Tier, base: BaseInfo, served: ServedBase) -> dict[str, Any]:
    """Everything about an adapter; see the contract. A failed one has its card and the reason."""
    summary = make_card(entry, tier) | _describe_source(entry.version)
    validated = entry.version.validated
    if validated is None:
        return summary | {"warnings": []}
    summary |= {key: value for key, value in validated.facts.items() if key != "claimed_base"}
    summary["lane"] = validated.adapter.lane.value
    summary |= _compare_with_base(validated, base, served)
    summary["files"] = [asdict(file) for file in validated.adapter.files]
    summary["warnings"] = [*_warn_of_base(validated, served), *validated.warnings]
    return summary


def _describe_source(version: AdapterVersion) -> dict[str, Any]:
    location = version.place
    return {
        "source": location.source,
        "subfolder": location.subfolder,
        "revision": location.revision,
        "registered_at": version.registered_at,
    }


def _compare_with_base(validated: ValidatedAdapter, base: BaseInfo, served: ServedBase) -> dict[str, Any]:
    """The adapter beside the base: its name for it, its share of it, and its bytes on the device."""
    content = validated.facts
    claimed, parameters = content["claimed_base"], content["parameters"]
    kind = FLOAT_CODES[base.dtype]
    on_device = parameters * ITEMSIZE[kind]
    resident = sum(base.resident_bytes.values())
    return {
        "base_model": {"claimed": claimed, "served": served.id, "match": served.matches_claim(claimed)},
        "percent_of_base": facts.to_percent(parameters, base.parameters),
        "size": content["size"] | {"device_megabytes": facts.to_megabytes(on_device)},
        "base": _describe_base(base, resident),
        "footprint": {
            "base_megabytes": facts.to_megabytes(resident),
            "with_adapter_megabytes": facts.to_megabytes(resident + on_device),
        },
    }


def _describe_base(base: BaseInfo, resident: int) -> dict[str, Any]:
    return {
        "parameters": base.parameters,
        "float32_megabytes": facts.to_megabytes(4 * base.parameters),
        "quantization": base.quantization,
        "resident_megabytes": facts.to_megabytes(resident),
    }


def _warn_of_base(validated: ValidatedAdapter, served: ServedBase) -> list[str]:
    claimed = validated.facts["claimed_base"]
    if served.matches_claim(claimed):
        return []
    fit = "the shapes fit, the weights may differ"
    return [f"trained on the base {claimed!r}, served on {served.id!r}: {fit}"]
