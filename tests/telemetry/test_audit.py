"""The line of the log for each change: its author goes along into the tasks that make it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.telemetry.audit import record_change, set_author

pytestmark = pytest.mark.anyio


async def test_the_author_goes_along_and_is_nobody_elses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "adapterd.audit")

    async def request(name: str) -> None:
        set_author(name)
        await asyncio.sleep(0)
        await asyncio.create_task(change(name))

    async def change(name: str) -> None:
        record_change("replaced", f"of-{name}", "sha256:a", "sha256:b")

    await asyncio.gather(*(asyncio.create_task(request(name)) for name in ("one", "two")))
    record_change("found", "x", None, "sha256:c")
    lines: list[dict[str, Any]] = [record.__dict__["fields"] for record in caplog.records]
    replaced = {"what": "replaced", "before": "sha256:a", "after": "sha256:b"}
    assert lines == [
        {"who": "one", "id": "of-one"} | replaced,
        {"who": "two", "id": "of-two"} | replaced,
        {"who": "service", "what": "found", "id": "x", "before": None, "after": "sha256:c"},
    ]
