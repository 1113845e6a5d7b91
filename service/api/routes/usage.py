"""The route of operators that tells what adapters and keys have used. API process; must not know how that is
kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from ...errors import BadRequest, NotReady
from ...telemetry.usage import HOUR_S
from ...telemetry.usage_file import Owner, UsageCounts, UsageNotKept
from ..errors import document_errors
from ..scopes import ADMIN_SCOPE
from ..services import AnyServices

router = APIRouter(tags=["operations"], dependencies=[ADMIN_SCOPE])

ALWAYS = 2**62  # hours
Grouping = Literal["adapter", "key", "adapter,key", "key,adapter"]
Moment = Annotated[
    str | None, Field(description="A time in ISO 8601, of UTC unless it says; its whole hour counts.")
]
JsonDict = dict[str, Any]


class Span(BaseModel):
    model_config = ConfigDict(extra="forbid")

    by: Grouping = "adapter,key"
    since: Moment = None
    until: Moment = None


@router.get("/usage", responses=document_errors(403, 422, 503))
async def show_usage(services: AnyServices, span: Annotated[Span, Query()]) -> JsonDict:
    """Requests and tokens of each adapter, each key, or both, from `since` to before `until`.

    A request counts once, in the hour in which it ends. The base is the adapter null; so is the key where
    none is asked for.
    """
    first = -ALWAYS if span.since is None else math.floor(_parse_hours("since", span.since))
    end = ALWAYS if span.until is None else math.ceil(_parse_hours("until", span.until))
    if end < first:
        raise BadRequest("until: is before since", param="until")
    try:
        found = await services.usage.read_counts(first, end)
    except UsageNotKept as error:
        raise NotReady(f"the usage cannot be read now: {error}", retry_after=2) from error
    return {"usage": _group_counts(found, span.by.split(","))}


def _parse_hours(name: str, text: str) -> float:
    """The hours since 1970; a query's plus reads as a space."""
    try:
        moment = datetime.fromisoformat(text.replace(" ", "+") if "T" in text else text)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return aware.timestamp() / HOUR_S
    except (ValueError, OverflowError):
        refusal = f"{name}: {text[:40]!r} is no time in ISO 8601, such as 2026-11-28T10:00:00Z"
        raise BadRequest(refusal, param=name) from None


def _group_counts(found: Mapping[Owner, UsageCounts], by: list[str]) -> list[JsonDict]:
    groups: dict[tuple[str, ...], UsageCounts] = {}
    for (adapter, key), counts in found.items():
        names = {"adapter": adapter, "key": key}
        group = tuple(names[name] for name in by)
        groups[group] = groups.get(group, UsageCounts()) + counts
    return [_make_row(by, group, groups[group]) for group in sorted(groups)]


def _make_row(by: list[str], group: tuple[str, ...], counts: UsageCounts) -> JsonDict:
    named = {name: value or None for name, value in zip(by, group, strict=True)}
    return named | asdict(counts)
