"""One registered adapter: its unchanging content, what changes about it, and how both are told. Decides nothing."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..engine.request import Adapter, BaseCard, Digest, Tier
from ..manifest import Manifest
from . import facts
from .ids import Served
from .inspection import ITEMSIZE
from .ledger import Record
from .questions import Reading
from .store import Place


@dataclass(frozen=True, slots=True)
class Generation:
    """A version of a name. `reading` is None for a folder that could not be validated at start; `reason` says why."""

    id: str
    place: Place
    fingerprint: str
    registered_at: str
    reading: Reading | None
    reason: str = ""

    @property
    def digest(self) -> Digest:
        return self.reading.adapter.digest if self.reading else ""

    @property
    def files(self) -> Manifest:
        return self.reading.adapter.files if self.reading else ()

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def adapter(self) -> Adapter | None:
        return self.reading.adapter if self.reading else None


@dataclass(eq=False)
class Shelved:
    """A generation and its use. `idle` is set while no request runs on it."""

    generation: Generation
    pinned: bool = False
    failure: str = ""
    in_flight: int = 0
    last_used: datetime | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.failure = self.failure or self.generation.reason
        self.idle.set()

    def take(self) -> None:
        self.in_flight += 1
        self.last_used = datetime.now(UTC)
        self.idle.clear()

    def give_back(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()

    @property
    def digest(self) -> Digest:
        return self.generation.digest

    def record(self) -> Record:
        one = self.generation
        place = (one.place.source, one.place.subfolder, one.place.revision)
        return Record(*place, one.digest, one.fingerprint, self.pinned, one.registered_at, one.files)


def now() -> str:
    return told(datetime.now(UTC)) or ""


def told(when: datetime | None) -> str | None:
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z") if when else None


def card(one: Shelved, tier: Tier) -> dict[str, Any]:
    """The few facts that lists show. Of a failed adapter nothing is known but the reason."""
    known = one.generation.reading.facts if one.generation.reading else None
    shown = {
        "id": one.generation.id,
        "digest": one.digest or None,
        "state": "failed" if one.failure else "ready",
        "residency": tier.value,
        "rank": int((known["rank"] or {"max": 0})["max"]) if known else None,
        "parameters": known["parameters"] if known else None,
        "megabytes": known["size"]["megabytes"] if known else None,
        "pinned": one.pinned,
        "in_flight": one.in_flight,
        "last_used": told(one.last_used),
    }
    return shown | ({"reason": one.failure} if one.failure else {})


def summary(one: Shelved, tier: Tier, base: BaseCard, served: Served) -> dict[str, Any]:
    """Everything about an adapter; see the contract. A failed one has its card and the reason."""
    shown = card(one, tier)
    place = one.generation.place
    shown |= {
        "source": place.source,
        "subfolder": place.subfolder,
        "revision": place.revision,
        "registered_at": one.generation.registered_at,
    }
    reading = one.generation.reading
    if reading is None:
        return shown | {"warnings": []}
    known = {key: value for key, value in reading.facts.items() if key != "claimed_base"}
    claimed = reading.facts["claimed_base"]
    match = served.matches(claimed)
    on_device = known["parameters"] * ITEMSIZE[facts.FLOATS[base.dtype]]
    resident = sum(base.resident_bytes.values())
    warnings = list(reading.warnings)
    if not match:
        warnings.insert(0, f"trained on the base {claimed!r}, served on {served.id!r}: the shapes fit, the weights may differ")
    return (
        shown
        | known
        | {
            "lane": reading.adapter.lane.value,
            "base_model": {"claimed": claimed, "served": served.id, "match": match},
            "percent_of_base": facts.percent(known["parameters"], base.parameters),
            "size": known["size"] | {"device_megabytes": facts.megabytes(on_device)},
            "base": {
                "parameters": base.parameters,
                "float32_megabytes": facts.megabytes(4 * base.parameters),
                "quantization": base.quantization,
                "resident_megabytes": facts.megabytes(resident),
            },
            "footprint": {"base_megabytes": facts.megabytes(resident), "with_adapter_megabytes": facts.megabytes(resident + on_device)},
            "files": [asdict(file) for file in reading.adapter.files],
            "warnings": warnings,
        }
    )
