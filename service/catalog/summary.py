"""Cards and summaries of registered adapters, as dictionaries. Decides nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..core.adapter import Tier
from ..core.base_info import BaseInfo
from . import facts
from .ids import ServedBase
from .validator.header import ITEMSIZE
from .versions import RegisteredAdapter, format_time


def make_card(one: RegisteredAdapter, tier: Tier) -> dict[str, Any]:
    """The few facts that lists show. Of a failed adapter nothing is known but the reason."""
    known = one.version.validated.facts if one.version.validated else None
    shown = {
        "id": one.version.id,
        "digest": one.digest or None,
        "state": "failed" if one.failure else "ready",
        "residency": tier.value,
        "rank": int((known["rank"] or {"max": 0})["max"]) if known else None,
        "parameters": known["parameters"] if known else None,
        "megabytes": known["size"]["megabytes"] if known else None,
        "pinned": one.pinned,
        "in_flight": one.in_flight,
        "last_used": format_time(one.last_used),
    }
    return shown | ({"reason": one.failure} if one.failure else {})


def make_summary(one: RegisteredAdapter, tier: Tier, base: BaseInfo, served: ServedBase) -> dict[str, Any]:
    """Everything about an adapter; see the contract. A failed one has its card and the reason."""
    shown = make_card(one, tier)
    location = one.version.place
    shown |= {
        "source": location.source,
        "subfolder": location.subfolder,
        "revision": location.revision,
        "registered_at": one.version.registered_at,
    }
    validated = one.version.validated
    if validated is None:
        return shown | {"warnings": []}
    known = {key: value for key, value in validated.facts.items() if key != "claimed_base"}
    claimed = validated.facts["claimed_base"]
    match = served.matches_claim(claimed)
    on_device = known["parameters"] * ITEMSIZE[facts.FLOATS[base.dtype]]
    resident = sum(base.resident_bytes.values())
    warnings = list(validated.warnings)
    if not match:
        warnings.insert(
            0,
            f"trained on the base {claimed!r}, served on {served.id!r}: the shapes fit, the weights may differ",
        )
    return (
        shown
        | known
        | {
            "lane": validated.adapter.lane.value,
            "base_model": {"claimed": claimed, "served": served.id, "match": match},
            "percent_of_base": facts.to_percent(known["parameters"], base.parameters),
            "size": known["size"] | {"device_megabytes": facts.to_megabytes(on_device)},
            "base": {
                "parameters": base.parameters,
                "float32_megabytes": facts.to_megabytes(4 * base.parameters),
                "quantization": base.quantization,
                "resident_megabytes": facts.to_megabytes(resident),
            },
            "footprint": {
                "base_megabytes": facts.to_megabytes(resident),
                "with_adapter_megabytes": facts.to_megabytes(resident + on_device),
            },
            "files": [asdict(file) for file in validated.adapter.files],
            "warnings": warnings,
        }
    )
