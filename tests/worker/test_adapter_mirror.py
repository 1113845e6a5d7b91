"""What the worker says of loads reaches whoever watches, and whoever waits."""

from __future__ import annotations

import pytest

from service.core.messages import Load, Offer, Order, Pin, Report
from service.worker.adapter_mirror import Offers
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


async def test_a_new_worker_is_told_what_holds_now_and_reads_only_what_is_waited_for() -> None:
    sent: list[Order] = []

    def send(order: Order) -> bool:
        sent.append(order)
        return True

    offers, one = Offers(send), adapter("a", 4)

    def told_again() -> list[Order]:
        sent.clear()
        offers.repeat()
        return list(sent)

    offers.offer(one, pinned=False, preload=False)
    assert told_again() == [Offer(one)]
    offers.pin(one.digest, True)
    assert sent[-1] == Pin(one.digest, True)
    offers.offer(one, pinned=False, preload=False)
    assert told_again() == [Offer(one, pinned=True)]
    offers.offer(one, pinned=False, preload=True)
    offers.offer(one, pinned=False, preload=False)
    assert told_again() == [Offer(one, pinned=True, preload=True)], "somebody waits for it"
    offers.hear(Report(loads=(Load(one.digest, 0.1, 1000),)))
    offers.pin(one.digest, False)
    offers.offer(one, pinned=False, preload=False)
    assert told_again() == [Offer(one)]
