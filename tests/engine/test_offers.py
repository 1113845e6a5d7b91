"""What the worker says of loads reaches whoever watches, and whoever waits."""

from __future__ import annotations

import pytest

from service.engine.offers import Offers
from service.engine.request import Load, Report
from tests.fakes import adapter

pytestmark = pytest.mark.anyio


async def test_a_failed_load_is_told_to_the_watcher_and_to_the_one_who_waits() -> None:
    offers = Offers(lambda order: True)
    heard: list[Load] = []
    offers.watcher = heard.append
    one = adapter("a", 4)
    offers.offer(one, pinned=False, preload=True)
    failed = Load(one.digest, 0.1, 0, "its files have changed on disk")
    offers.hear(Report(loads=(failed,)))
    assert heard == [failed]
    assert await offers.loaded(one.digest) == failed
