"""A folder is registered when it is first named: once however many name it, and not again for a minute
where that was in vain.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from service.catalog import first_use
from service.catalog.first_use import FirstUse
from service.catalog.registry import Registry
from service.errors import (
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    Forbidden,
    NotReady,
    Overloaded,
    StorageFull,
)

from .conftest import InProcessValidator, RegistryFixture

pytestmark = pytest.mark.anyio


class Folders:
    """What is there, what is registered, and each time that somebody tried."""

    def __init__(self, *there: str) -> None:
        self.there, self.registered = set(there), set[str]()
        self.tries: list[str] = []
        self.error: Exception | None = None
        self.first_use = FirstUse(self.register, self.registered.__contains__)

    async def register(self, name: str) -> bool:
        self.tries.append(name)
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        if name in self.there:
            self.registered.add(name)
        return name in self.there


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


async def test_many_who_name_it_at_once_register_it_once() -> None:
    folders = Folders("a")
    await asyncio.gather(*(folders.first_use.register_folder("a") for _ in range(20)))
    assert folders.tries == ["a"]


async def test_an_unknown_name_is_looked_for_again_after_a_minute(clock: list[float]) -> None:
    folders = Folders()
    for seconds, tries in ((0, 1), (59, 1), (2, 2), (1, 2)):
        clock[0] += seconds
        await folders.first_use.register_folder("a")
        assert len(folders.tries) == tries
    folders.there.add("a")
    clock[0] += 61
    await folders.first_use.register_folder("a")
    assert folders.registered == {"a"}


async def test_a_folder_that_cannot_be_served_says_so_each_time_and_is_read_once_a_minute(
    clock: list[float],
) -> None:
    folders = Folders("a")
    folders.error = AdapterUnsupported(["bone is not served"])
    for _ in range(3):
        with pytest.raises(AdapterUnsupported, match="bone"):
            await folders.first_use.register_folder("a")
    assert len(folders.tries) == 1
    folders.error = None
    clock[0] += 61
    await folders.first_use.register_folder("a")
    assert folders.registered == {"a"}


async def test_what_is_refused_otherwise_is_an_unknown_name(caplog: pytest.LogCaptureFixture) -> None:
    folders = Folders("a")
    folders.error = Forbidden("a link that leaves the adapters directory")
    await folders.first_use.register_folder("a")
    assert caplog.messages == ["the folder a is not registered: a link that leaves the adapters directory"]


async def test_what_only_waits_for_room_is_tried_by_the_next() -> None:
    folders = Folders("a")
    folders.error = Overloaded("no memory", retry_after=2)
    for tries in (1, 2):
        with pytest.raises(Overloaded):
            await folders.first_use.register_folder("a")
        assert len(folders.tries) == tries


async def test_names_without_end_are_not_all_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_use, "MOST", 10)
    folders = Folders()
    for i in range(30):
        await folders.first_use.register_folder(str(i))
    assert len(folders.first_use._vain) == 10


# ---- with a registry


async def resolve(registry: Registry, name: str) -> bool:
    """Whether the name is registered after a request has named it."""
    await registry.resolve_adapter(name)
    try:
        registry.card_of(name)
    except AdapterNotFound:
        return False
    return True


async def test_a_folder_that_came_later_is_registered_as_post_does(
    catalog: RegistryFixture, plain: Path
) -> None:
    async with catalog.opened(resolve="on") as registry:
        shutil.copytree(plain, catalog.root / "org" / "late")
        assert registry.list_cards() == []
        assert all(await asyncio.gather(*(resolve(registry, "org/late") for _ in range(5))))
        assert isinstance(registry._validator, InProcessValidator)
        assert len(registry._validator.reads) == 1
        assert registry.card_of("org/late")["residency"] == "host"
    async with catalog.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["org/late"]


async def test_only_where_it_is_switched_on(catalog: RegistryFixture, plain: Path) -> None:
    async with catalog.opened() as registry:
        shutil.copytree(plain, catalog.root / "late")
        assert not await resolve(registry, "late")


NAMES = ["none", "..", "../outside", "a/b/c", "link", ".hidden", "base", "tiny", "check", "late/upload", ""]


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_that_is_no_folders_stays_unknown(
    catalog: RegistryFixture, plain: Path, tmp_path: Path, name: str
) -> None:
    for folder in ("outside", "adapters/a/b/c", "adapters/.hidden", "adapters/base", "adapters/late/upload"):
        shutil.copytree(plain, tmp_path / folder)
    (catalog.root / ".adapterd.json").write_text('{"version": 2, "adapters": {}, "deleted": ["a/b/c"]}')
    async with catalog.opened(resolve="on") as registry:
        (catalog.root / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
        assert not await resolve(registry, name)
        assert registry.list_cards() == []


async def test_what_was_deleted_stays_deleted(catalog: RegistryFixture, plain: Path) -> None:
    shutil.copytree(plain, catalog.root / "gone")
    async with catalog.opened(resolve="on") as registry:
        await registry.remove_adapter("gone")
        assert not await resolve(registry, "gone")


async def test_a_broken_folder_is_told_and_not_listed(catalog: RegistryFixture, plain: Path) -> None:
    async with catalog.opened(resolve="on") as registry:
        shutil.copytree(plain, catalog.root / "cut")
        weights = catalog.root / "cut" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:3000])
        for _ in range(2):
            with pytest.raises(AdapterInvalid, match="truncated"):
                await registry.resolve_adapter("cut")
        assert registry.list_cards() == []
        known: Any = registry._validator
        assert len(known.reads) <= 1


async def test_a_full_disk_is_no_verdict(clock: list[float]) -> None:
    folders = Folders("a")
    folders.error = StorageFull("the change cannot be kept: No space left on device")
    with pytest.raises(NotReady, match=r"not registered yet: .* No space left"):
        await folders.first_use.register_folder("a")
    folders.error = None
    await folders.first_use.register_folder("a")
    assert folders.registered == {"a"}


async def test_a_folder_that_may_not_be_looked_into_is_unknown(
    catalog: RegistryFixture, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with catalog.opened(resolve="on") as registry:
        shutil.copytree(plain, catalog.root / "shut")
        stat = os.stat

        def refuse(path: Any, **named: Any) -> os.stat_result:
            if "shut" in str(path):
                raise PermissionError(13, "Permission denied")
            return stat(path, **named)

        monkeypatch.setattr(os, "stat", refuse)
        assert not await resolve(registry, "shut")
