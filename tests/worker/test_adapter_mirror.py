"""The loads that the worker reports reach the watcher and every caller that waits."""

from __future__ import annotations

import pytest

from service.core.error_codes import ErrorCode
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


async def test_a_load_survives_one_worker_and_ends_with_the_second_or_where_memory_ran_out() -> None:
    sent: list[Command] = []

    def send(command: Command) -> bool:
        sent.append(command)
        return True

    mirror = AdapterMirror(send)
    one, other = adapter("a"), adapter("b")
    for each in (one, other):
        mirror.add_adapter(each, pinned=False, preload=True)
    mirror.on_worker_lost("it died", out_of_memory=False)
    assert mirror.waits
    mirror.on_report(Report(loads=(Load(other.digest, 0.1, 9),)))
    mirror.add_adapter(other, pinned=False, preload=True)
    mirror.on_worker_lost("it died", out_of_memory=False)
    lost = Load(one.digest, 0.0, 0, "it died before the adapter was read", ErrorCode.NOT_READY)
    assert await mirror.wait_until_loaded(one.digest) == lost
    assert mirror.waits, "the other load has begun anew"
    mirror.on_worker_lost("memory ran out", out_of_memory=True)
    assert (await mirror.wait_until_loaded(other.digest)).code is ErrorCode.NOT_READY
    sent.clear()
    mirror.repeat_all()
    assert sent == [AddAdapter(one), AddAdapter(other)], "neither is begun by the next worker"


async def test_where_no_worker_comes_any_more_it_is_not_the_adapters_fault() -> None:
    mirror, one = AdapterMirror(lambda command: False), adapter("a")
    mirror.add_adapter(one, pinned=False, preload=True)
    mirror.end_waiting()
    load = await mirror.wait_until_loaded(one.digest)
    assert (load.error, load.code) == ("the engine has stopped", ErrorCode.NOT_READY)


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
