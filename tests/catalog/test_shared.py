"""Services over one directory follow each other; of two that want one id one gets it; a killed one blocks
nobody.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from service import durable, file_lock
from service.catalog import following, turns
from service.catalog.aliases import AliasTarget
from service.catalog.registry import Registry
from service.catalog.startup import ABANDONED_S
from service.catalog.state_file import STATE_FILE
from service.errors import (
    AdapterNotFound,
    Conflict,
    DirectoryHeld,
    Forbidden,
    NotFound,
    NotReady,
    SourceMissing,
    StorageFull,
)

from .conftest import RegistryFixture
from .test_registry import device, parts, settle

pytestmark = pytest.mark.anyio
FOLLOWED_S = 2.0
ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def two_services(catalog: RegistryFixture, **more: Any) -> AsyncIterator[tuple[Registry, Registry]]:
    twin = RegistryFixture(catalog.root, catalog.base)
    async with catalog.opened(shared="on", **more) as one, twin.opened(shared="on", **more) as two:
        yield one, two


@pytest.fixture
def stocked(catalog: RegistryFixture, plain: Path, other: Path) -> RegistryFixture:
    for name, source in (("plain", plain), ("other", other)):
        shutil.copytree(source, catalog.root / "sources" / "deep" / name)
    return catalog


PLAIN, OTHER = "sources/deep/plain", "sources/deep/other"


def told(registry: Registry) -> dict[str, tuple[str, bool]]:
    return {card["id"]: (card["digest"], card["pinned"]) for card in registry.list_cards()}


async def until_same(one: Registry, two: Registry) -> None:
    end = time.monotonic() + FOLLOWED_S
    while told(one) != told(two):
        assert time.monotonic() < end, (told(one), told(two))
        await asyncio.sleep(0.01)


async def test_what_one_does_the_other_has_within_two_seconds(stocked: RegistryFixture) -> None:
    async with two_services(stocked, keep_versions=0) as (one, two):
        old, _ = await one.register_adapter("a", PLAIN)
        await until_same(one, two)
        with two.lease_adapter("a") as version:
            new, _ = await two.register_adapter("a", OTHER, replace=True)
            await until_same(one, two)
            assert version.digest == old["digest"]
            await one.pin_adapter("a", True)
            await until_same(one, two)
            assert device(two).pinned == {new["digest"]}
            assert device(two).dropped == []
        await settle()
        assert device(two).dropped == [old["digest"]]
        await two.remove_adapter("a")
        await until_same(one, two)
        assert told(one) == {}


async def test_versions_and_aliases_are_those_of_both(stocked: RegistryFixture) -> None:
    async with two_services(stocked) as (one, two):
        old, _ = await one.register_adapter("a", PLAIN)
        new, _ = await one.register_adapter("a", OTHER, replace=True)
        alias, _ = await two.aliases.put_alias("prod", [AliasTarget("a", 1, old["digest"])], "user")
        with pytest.raises(Conflict, match="alias"):
            await one.remove_adapter("a")
        assert one.aliases.list_aliases() == [alias]
        await until_same(one, two)
        assert [version["digest"] for version in two.versions_of("a")] == [new["digest"], old["digest"]]
        assert (await two.roll_back("a"))["digest"] == old["digest"]
        await until_same(one, two)
        with one.lease_adapter(f"a@{new['digest']}") as version:
            assert version.digest == new["digest"]
        await one.aliases.remove_alias("prod")
        await two.remove_adapter("a")
        assert two.aliases.list_aliases() == []


async def test_versions_that_came_and_went_between_two_looks_are_followed(stocked: RegistryFixture) -> None:
    """The current content is the same again: only what is kept beside it tells."""
    async with two_services(stocked) as (one, two):
        old, _ = await one.register_adapter("a", PLAIN)
        await until_same(one, two)
        async with two._changing:  # it does not look
            new, _ = await one.register_adapter("a", OTHER, replace=True)
            await one.roll_back("a")
        await two.follow_state_file()
        assert [version["digest"] for version in two.versions_of("a")] == [old["digest"], new["digest"]]
        with two.lease_adapter(f"a@{new['digest']}") as version:
            assert version.digest == new["digest"]


async def test_a_change_is_made_of_what_the_other_has_just_done(stocked: RegistryFixture) -> None:
    """Nobody waits for what he would follow."""
    async with two_services(stocked) as (one, two):
        await one.register_adapter("a", PLAIN)
        await two.pin_adapter("a", True)
        await one.register_adapter("b", OTHER)
        assert (await two.remove_adapter("b"))["id"] == "b"
        with pytest.raises(AdapterNotFound):
            await one.remove_adapter("b")
        assert told(one) == told(two)
        assert told(one)["a"][1]


async def test_of_two_contents_for_one_id_one_is_registered(stocked: RegistryFixture) -> None:
    async with two_services(stocked) as (one, two):
        for i in range(5):
            tries = (one.register_adapter(f"a{i}", PLAIN), two.register_adapter(f"a{i}", OTHER))
            results: list[Any] = list(await asyncio.gather(*tries, return_exceptions=True))
            assert sorted(isinstance(result, Conflict) for result in results) == [False, True]
            ((card, created),) = [result for result in results if not isinstance(result, Conflict)]
            assert created
            await until_same(one, two)
            assert told(one)[f"a{i}"][0] == card["digest"]


async def test_the_same_content_at_once_is_registered_once(stocked: RegistryFixture, plain: Path) -> None:
    async with two_services(stocked) as (one, two):
        both = await asyncio.gather(one.register_adapter("a", PLAIN), two.register_adapter("a", PLAIN))
        assert sorted(created for _, created in both) == [False, True]
        await asyncio.gather(one.upload_adapter("b", parts(plain)), two.upload_adapter("c", parts(plain)))
        await until_same(one, two)
        assert told(one).keys() == {"a", "b", "c"}


async def test_many_changes_of_both_all_stay(stocked: RegistryFixture) -> None:
    async with two_services(stocked) as (one, two):
        services = (one, two)
        await asyncio.gather(*(services[i % 2].register_adapter(f"a{i}", PLAIN) for i in range(20)))
        await asyncio.gather(*(services[i % 2].remove_adapter(f"a{i}") for i in range(0, 20, 3)))
        await until_same(one, two)
        assert told(one).keys() == {f"a{i}" for i in range(20) if i % 3}
    async with stocked.opened() as alone:
        assert told(alone).keys() == {f"a{i}" for i in range(20) if i % 3}


async def test_what_one_has_found_at_start_is_no_change_of_what_the_other_did_meanwhile(
    stocked: RegistryFixture, plain: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(plain, stocked.root / "found")
    twin = RegistryFixture(stocked.root, stocked.base)
    async with stocked.opened(shared="on") as one:
        await one.register_adapter("gone", PLAIN)
        opened = Registry._write_opened

        async def change_first(registry: Registry, before: Any) -> None:
            await opened(registry, before)

        async def change_meanwhile() -> None:
            await one.register_adapter("new", PLAIN)
            await one.register_adapter("found", OTHER, replace=True)
            await one.remove_adapter("gone")

        in_turn = Registry._in_turn

        async def late(registry: Registry, change: Any) -> Any:
            if registry is not one and getattr(change, "func", None) is not None:
                monkeypatch.setattr(Registry, "_in_turn", in_turn)
                await change_meanwhile()
            return await in_turn(registry, change)

        monkeypatch.setattr(Registry, "_in_turn", late)
        async with twin.opened(shared="on") as two:
            await until_same(one, two)
            assert told(two).keys() == {"found", "new"}


async def test_a_service_alone_has_the_directory_or_those_that_share_it(stocked: RegistryFixture) -> None:
    shared = [Registry(stocked.settings(shared="on"), stocked.device) for _ in range(2)]
    for registry in shared:
        registry.claim_state()
    with pytest.raises(DirectoryHeld, match="ADAPTERD_SHARED"):
        Registry(stocked.settings(), stocked.device).claim_state()
    for registry in shared:
        assert registry._lock is not None
        registry._lock.close()


async def test_one_that_is_killed_amid_a_registration_blocks_nobody(stocked: RegistryFixture) -> None:
    given = (str(stocked.base), str(stocked.root), "a", PLAIN)
    async with stocked.opened(shared="on") as registry:
        killed = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.catalog.registering_service", *given, cwd=ROOT, stdout=PIPE
        )
        try:
            assert killed.stdout is not None
            assert await killed.stdout.readline() == b"writing\n"
            waiting = asyncio.create_task(registry.register_adapter("a", OTHER))
            await asyncio.sleep(0.2)
            assert not waiting.done(), "it is the other's turn"
        finally:
            killed.kill()
            await killed.wait()
        _, created = await asyncio.wait_for(waiting, FOLLOWED_S)
        assert created
        assert told(registry).keys() == {"a"}


async def test_a_turn_that_does_not_end_is_not_waited_for_without_end(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stocked.opened(shared="on") as registry:
        async with turns.take_turn(stocked.root):
            monkeypatch.setattr(turns, "LONGEST_S", 0.1)
            with pytest.raises(NotReady):
                await registry.register_adapter("a", PLAIN)
        await registry.register_adapter("a", PLAIN)


async def test_what_another_service_is_making_is_left_to_it(stocked: RegistryFixture) -> None:
    staged = stocked.root / ".uploads" / ".0123456789abcdef"
    staged.mkdir(parents=True)
    making = stocked.root / f"{durable.UNFINISHED}x"
    making.touch()
    async with stocked.opened(shared="on"):
        assert (staged.exists(), making.exists()) == (True, True)
    old = time.time() - ABANDONED_S - 60
    for path in (staged, making):
        os.utime(path, (old, old))
    async with stocked.opened(shared="on"):
        assert (staged.exists(), making.exists()) == (False, False)


async def test_a_service_that_may_only_read_follows_and_changes_nothing(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = RegistryFixture(stocked.root, stocked.base)
    async with stocked.opened(shared="on") as one:
        await one.register_adapter("a", PLAIN)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "why_unwritable", lambda folder: "Read-only file system")
            async with twin.opened(shared="on") as two:
                assert told(two) == told(one)
                with pytest.raises(Forbidden, match="only read"):
                    await two.register_adapter("b", OTHER)
                patch.undo()
                await one.register_adapter("c", OTHER)
                await until_same(one, two)


async def test_where_nothing_can_be_locked_a_change_is_refused(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stocked.opened(shared="on") as registry:

        def refuse(*given: object) -> bool:
            raise OSError(37, "No locks available")

        monkeypatch.setattr(file_lock, "try_lock", refuse)
        with pytest.raises(StorageFull, match="No locks available"):
            await registry.register_adapter("a", PLAIN)
        assert told(registry) == {}


async def test_a_file_of_a_newer_version_is_told_once_and_not_written_over(
    stocked: RegistryFixture, caplog: pytest.LogCaptureFixture
) -> None:
    async with stocked.opened(shared="on") as registry:
        await registry.register_adapter("a", PLAIN)
        newer = '{"version": 99}'
        (stocked.root / STATE_FILE).write_text(newer)
        with pytest.raises(NotReady, match="newer"):
            await registry.register_adapter("b", PLAIN)
        await asyncio.sleep(1.3)
        assert len([line for line in caplog.messages if "cannot be followed" in line]) == 1
        assert (stocked.root / STATE_FILE).read_text() == newer
        assert told(registry).keys() == {"a"}


async def test_what_a_network_share_shows_late_is_tried_again(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other service's folder is there, and this one's machine does not see it yet."""
    monkeypatch.setattr(following, "AGAIN_S", 0.3)
    async with two_services(stocked) as (one, two):
        find = two._store.find_source
        late = {"until": time.monotonic() + 1}

        async def see_late(source: str, *given: Any, **named: Any) -> Any:
            if time.monotonic() < late["until"]:
                raise SourceMissing([f"source {source!r}: there is no such folder"])
            return await find(source, *given, **named)

        monkeypatch.setattr(two._store, "find_source", see_late)
        card, _ = await one.register_adapter("a", PLAIN)
        while "a" not in told(two):  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
        assert two.card_of("a")["state"] == "failed"
        late["until"] = time.monotonic()
        await until_same(one, two)
        assert two.card_of("a")["digest"] == card["digest"]
        assert not two._follower._again


async def test_a_service_starts_though_another_keeps_its_turn(
    stocked: RegistryFixture, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(plain, stocked.root / "found")
    monkeypatch.setattr(turns, "LONGEST_S", 0.1)
    async with turns.take_turn(stocked.root), stocked.opened(shared="on") as registry:
        assert told(registry).keys() == {"found"}


async def test_after_any_changes_by_both_the_devices_pin_what_is_pinned(stocked: RegistryFixture) -> None:
    """And at no time two contents of one id, which together might hold more of the pool than there is."""
    chance = random.Random(1)
    async with two_services(stocked) as (one, two):
        await one.register_adapter("a", PLAIN)
        for _ in range(25):
            service = chance.choice((one, two))
            with suppress(NotFound):
                match chance.choice(("replace", "pin", "unpin", "roll back")):
                    case "replace":
                        source = chance.choice((PLAIN, OTHER))
                        await service.register_adapter("a", source, replace=True, pinned=None)
                    case "roll back":
                        await service.roll_back("a")
                    case pin:
                        await service.pin_adapter("a", pin == "pin")
            await until_same(one, two)
            for registry in (one, two):
                pinned = {digest for digest, is_pinned in told(registry).values() if is_pinned}
                assert device(registry).pinned == pinned
                assert device(registry).most_pinned <= 1
