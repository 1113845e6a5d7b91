"""The loads that the worker reports reach the watcher and every caller that waits."""

from __future__ import annotations

import pytest

from service.core.messages import AddAdapter, Command, Load, Pin, Report
from service.worker.adapter_mirror import AdapterMirror
from tests.fakes import adapter

pytestmark = pytest.mark.anyio


async def test_a_failed_load_is_told_to_the_watcher_and_to_the_one_who_waits() -> None:
    offers = AdapterMirror(lambda order: True)
    heard: list[Load] = []
    offers.watcher = heard.append
    one = adapter("a", 4)
    offers.add_adapter(one, pinned=False, preload=True)
    failed = Load(one.digest, 0.1, 0, "its files have changed on disk")
    offers.on_report(Report(loads=(failed,)))
    assert heard == [failed]
    assert await offers.wait_until_loaded(one.digest) == failed


async def test_a_new_worker_is_told_what_holds_now_and_reads_only_what_is_waited_for() -> None:
    sent: list[Command] = []

    def send(order: Command) -> bool:
        sent.append(order)
        return True

    offers, one = AdapterMirror(send), adapter("a", 4)

    def told_again() -> list[Command]:
        sent.clear()
        offers.repeat_all()
        return list(sent)

    offers.add_adapter(one, pinned=False, preload=False)
    assert told_again() == [AddAdapter(one)]
    offers.pin_adapter(one.digest, True)
    assert sent[-1] == Pin(one.digest, True)
    offers.add_adapter(one, pinned=False, preload=False)
    assert told_again() == [AddAdapter(one, pinned=True)]
    offers.add_adapter(one, pinned=False, preload=True)
    offers.add_adapter(one, pinned=False, preload=False)
    assert told_again() == [AddAdapter(one, pinned=True, preload=True)], "somebody waits for it"
    offers.on_report(Report(loads=(Load(one.digest, 0.1, 1000),)))
    offers.pin_adapter(one.digest, False)
    offers.add_adapter(one, pinned=False, preload=False)
    assert told_again() == [AddAdapter(one)]
