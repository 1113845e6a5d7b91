"""The versions of an id: which answer under its name and their digests, which can be current again, what ends
with them, and what a restart brings back.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from service.catalog.aliases import AliasTarget
from service.catalog.registry import Registry
from service.errors import (
    AdapterInvalid,
    AdapterNotFound,
    BadRequest,
    DigestMismatch,
    NotFound,
    StorageFull,
    UnexpectedDigest,
)

from .conftest import RegistryFixture
from .test_registry import device, fill_disk, parts, remembered, settle

pytestmark = pytest.mark.anyio
UNKNOWN = "sha256:" + "0" * 64


async def put(registry: Registry, *sources: str, id: str = "a") -> list[str]:
    """The digests of these sources, each of which has replaced the one before."""
    return [(await registry.register_adapter(id, source, replace=True))[0]["digest"] for source in sources]


def listed(registry: Registry, id: str = "a") -> list[str]:
    return [version["digest"] for version in registry.versions_of(id)]


def leased(registry: Registry, name: str) -> str:
    with registry.lease_adapter(name) as version:
        assert version.id == name.partition("@")[0]
        return version.digest


# ---- answering


async def test_the_last_versions_answer_by_their_digest_or_its_beginning(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        digests = await put(registry, "v0", "v1", "v2", "v3")
        assert listed(registry) == [digests[3], digests[2], digests[1]]
        assert leased(registry, "a") == digests[3]
        for digest in digests[1:]:
            assert leased(registry, f"a@{digest}") == leased(registry, f"a@{digest[:15]}") == digest
        with pytest.raises(DigestMismatch, match=digests[3]), registry.lease_adapter(f"a@{digests[0]}"):
            pass
        await settle()
        assert device(registry).dropped == [digests[0]]
        assert registry.versions_of("a")[0].keys() == {"digest", "registered_at", "residency", "in_flight"}


async def test_a_digest_changes_nothing_about_unknown_ids_and_must_be_one(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        await put(registry, "v0")
        with pytest.raises(AdapterNotFound), registry.lease_adapter(f"b@{UNKNOWN}"):
            pass
        for wrong in ("", "1234567", "g" * 8, "A" * 8, "0" * 65, "0" * 8 + "\n"):
            with pytest.raises(BadRequest), registry.lease_adapter(f"a@sha256:{wrong}"):
                pass
        for name in ("a@", "a@x", "a@sha1:00000000"):
            with pytest.raises(AdapterNotFound), registry.lease_adapter(name):
                pass


@pytest.mark.parametrize("most", [0, 1])
async def test_as_many_are_kept_as_the_setting_says(trained: RegistryFixture, most: int) -> None:
    async with trained.opened(keep_versions=most) as registry:
        digests = await put(registry, "v0", "v1", "v2")
        assert listed(registry) == digests[::-1][: most + 1]
        await settle()
        assert device(registry).dropped == digests[: 2 - most]


async def test_a_kept_version_counts_its_requests_and_drains(trained: RegistryFixture) -> None:
    async with trained.opened(keep_versions=1) as registry:
        digests = await put(registry, "v0", "v1")
        with registry.lease_adapter(f"a@{digests[0]}"):
            assert [version["in_flight"] for version in registry.versions_of("a")] == [0, 1]
            digests += await put(registry, "v2")
            assert listed(registry) == [digests[2], digests[1]]
            await settle()
            assert device(registry).dropped == []
        await settle()
        assert device(registry).dropped == [digests[0]]


async def test_content_that_comes_again_is_one_version(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        digests = await put(registry, "v0", "v1", "v0")
        assert listed(registry) == [digests[0], digests[1]]
        await put(registry, "v0")
        assert listed(registry) == [digests[0], digests[1]]
        await settle()
        assert device(registry).dropped == []


async def test_a_folder_that_is_written_over_keeps_nothing(
    trained: RegistryFixture, contents: list[Path]
) -> None:
    async with trained.opened() as registry:
        await put(registry, "v0")
        shutil.copytree(contents[1], trained.root / "v0", dirs_exist_ok=True)
        (digest,) = await put(registry, "v0")
        assert listed(registry) == [digest]


async def test_a_replacement_that_cannot_be_written_leaves_the_versions_as_they_were(
    trained: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trained.opened(keep_versions=1) as registry:
        digests = await put(registry, "v0", "v1")
        with monkeypatch.context() as patch:
            fill_disk(patch)
            with pytest.raises(StorageFull):
                await registry.register_adapter("a", "v2", replace=True)
            with pytest.raises(StorageFull):
                await registry.roll_back("a")
        assert listed(registry) == digests[::-1]
        assert leased(registry, f"a@{digests[0]}") == digests[0]


async def test_replacements_under_load_mix_nothing(trained: RegistryFixture) -> None:
    """Each lease has the content that was current when it began, or the one that it named."""
    async with trained.opened(keep_versions=1) as registry:
        digests = await put(registry, "v0", "v1")
        done = asyncio.Event()

        async def use(name: str | None) -> int:
            count = 0
            while not done.is_set():
                named = f"a@{registry.versions_of('a')[1]['digest']}" if name else "a"
                expected = named.partition("@")[2] or registry.card_of("a")["digest"]
                with registry.lease_adapter(named) as version:
                    await asyncio.sleep(0)
                    assert version.digest == expected
                    assert version.digest in device(registry).known
                count += 1
            return count

        users = [asyncio.create_task(use(name)) for name in (None, "before") * 4]
        for turn in range(12):
            digests += await put(registry, f"v{(turn + 2) % 5}")
        done.set()
        assert min(await asyncio.gather(*users)) > 0
        await settle()
        assert set(device(registry).known) == set(digests[-2:])


# ---- rolling back


async def test_a_rollback_makes_the_version_before_current_and_back(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        digests = await put(registry, "v0", "v1", "v2")
        assert (await registry.roll_back("a"))["digest"] == digests[1] == leased(registry, "a")
        assert listed(registry) == [digests[1], digests[2], digests[0]]
        assert leased(registry, f"a@{digests[2]}") == digests[2]
        assert (await registry.roll_back("a"))["digest"] == digests[2]
        assert (await registry.roll_back("a", digests[0]))["digest"] == digests[0]
        assert (await registry.roll_back("a", digests[0][:16]))["digest"] == digests[0], "it is current"
        digests += await put(registry, "v3")
        assert listed(registry)[:2] == [digests[3], digests[0]], "the one that answered last is kept"
        await settle()
        assert len(device(registry).known) == 3


async def test_what_is_not_kept_is_not_found(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        (digest,) = await put(registry, "v0")
        for id, wanted in (("a", None), ("a", UNKNOWN), ("b", None)):
            with pytest.raises(NotFound):
                await registry.roll_back(id, wanted)
        assert leased(registry, "a") == digest


async def test_a_pin_is_the_ids_whichever_version_is_current(
    trained: RegistryFixture, contents: list[Path]
) -> None:
    async with trained.opened() as registry:
        (old,) = await put(registry, "v0")
        await registry.pin_adapter("a", True)
        new, _ = await registry.upload_adapter("a", parts(contents[1]), replace=True)
        assert (new["pinned"], device(registry).pinned) == (True, {new["digest"]})
        assert (await registry.roll_back("a"))["pinned"]
        assert device(registry).pinned == {old}
        card, _ = await registry.register_adapter("a", "v2", pinned=None, replace=True)
        assert card["pinned"]
        assert device(registry).pinned == {card["digest"]}
        await put(registry, "v3")
        assert device(registry).pinned == set(), "PUT says what the pin is"


async def test_a_pin_that_changes_while_the_next_version_loads_is_the_ids(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        await put(registry, "v0")
        for pinned in (True, False):
            await registry.pin_adapter("a", not pinned)
            gate = device(registry).load_gate = asyncio.Event()
            source = "v1" if pinned else "v2"
            replacing = asyncio.create_task(registry.register_adapter("a", source, pinned=None, replace=True))
            known = len(device(registry).known)
            while len(device(registry).known) == known:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)
            await registry.pin_adapter("a", pinned)
            gate.set()
            card, _ = await replacing
            assert card["pinned"] is pinned
            assert device(registry).pinned == ({card["digest"]} if pinned else set())


async def test_a_rollback_to_what_cannot_be_loaded_changes_nothing(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        digests = await put(registry, "v0", "v1")
        device(registry).tiers.clear()
        device(registry).errors[digests[0]] = "its files have changed"
        with pytest.raises(AdapterInvalid, match="changed"):
            await registry.roll_back("a")
        assert listed(registry) == digests[::-1]
        assert leased(registry, "a") == digests[1]


async def test_a_rollback_does_not_bring_back_what_was_deleted_meanwhile(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        await put(registry, "v0", "v1")
        device(registry).tiers.clear()
        gate = device(registry).load_gate = asyncio.Event()
        rolling_back = asyncio.create_task(registry.roll_back("a"))
        await settle()
        removing = asyncio.create_task(registry.remove_adapter("a"))
        while registry.list_cards():  # noqa: ASYNC110 - a file has no event
            await asyncio.sleep(0.01)
        gate.set()
        with pytest.raises(AdapterNotFound):
            await rolling_back
        await removing
        await settle()
        assert (registry.list_cards(), device(registry).known) == ([], {})


# ---- the end


async def test_a_deletion_takes_every_version_and_waits_for_all(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        digests = await put(registry, "v0", "v1")
        with registry.lease_adapter(f"a@{digests[0]}"), registry.lease_adapter("a"):
            removing = asyncio.create_task(registry.remove_adapter("a"))
            while registry.list_cards():  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.01)
            assert device(registry).dropped == []
        told = await removing
        assert (told["digest"], told["drained_requests"], told["freed_bytes"]) == (digests[1], 2, 2 * 7168)
        with pytest.raises(AdapterNotFound), registry.lease_adapter(f"a@{digests[0]}"):
            pass
    async with trained.opened() as registry:
        assert registry.list_cards() == [], "the folders of its versions are not found again"


async def test_an_upload_goes_once_it_is_no_version_and_nothing_runs_on_it(
    catalog: RegistryFixture, contents: list[Path]
) -> None:
    def stored() -> set[str]:
        return {f"sha256:{path.name}" for path in (catalog.root / ".uploads").iterdir()}

    async with catalog.opened(keep_versions=1) as registry:
        uploads = [await registry.upload_adapter("a", parts(folder), replace=True) for folder in contents[:2]]
        digests = [card["digest"] for card, _ in uploads]
        assert [created for _, created in uploads] == [True, False]
        with registry.lease_adapter(f"a@{digests[0]}"):
            card, _ = await registry.upload_adapter("a", parts(contents[2]), replace=True)
            await settle()
            assert stored() == {*digests, card["digest"]}
        await until(lambda: stored() == {digests[1], card["digest"]})
        await registry.roll_back("a")
        await registry.upload_adapter("a", parts(contents[2]), replace=True)
        await settle()
        assert stored() == {digests[1], card["digest"]}
        await registry.remove_adapter("a", purge=True)
        assert stored() == set()


async def test_an_upload_stays_where_another_id_keeps_it(
    catalog: RegistryFixture, contents: list[Path]
) -> None:
    async with catalog.opened(keep_versions=1) as registry:
        first, _ = await registry.upload_adapter("a", parts(contents[0]))
        await registry.upload_adapter("a", parts(contents[1]), replace=True)
        await registry.upload_adapter("b", parts(contents[0]))
        await registry.remove_adapter("b", purge=True)
        with registry.lease_adapter(f"a@{first['digest']}") as version:
            assert (version.folder / "adapter_model.safetensors").exists()


async def until(reached: Any) -> None:
    async with asyncio.timeout(10):
        while not reached():  # noqa: ASYNC110 - a folder has no event
            await asyncio.sleep(0.01)


# ---- expected digests


async def test_only_the_expected_content_is_registered(
    trained: RegistryFixture, contents: list[Path]
) -> None:
    async with trained.opened() as registry:
        digests = [(await registry.check_adapter("x", f"v{i}"))["summary"]["digest"] for i in range(2)]
        with pytest.raises(UnexpectedDigest, match=digests[0]) as refused:
            await registry.register_adapter("a", "v0", expect=digests[1])
        assert refused.value.details == {"expected": digests[1], "digest": digests[0]}
        assert (registry.list_cards(), device(registry).known) == ([], {})
        await registry.register_adapter("a", "v0", expect=digests[0])
        for replace in (True, False):
            with pytest.raises(UnexpectedDigest):
                await registry.register_adapter("a", "v0", replace=replace, expect=digests[1])
        with pytest.raises(UnexpectedDigest):
            await registry.upload_adapter("up", parts(contents[0]), expect=digests[1])
        assert list((trained.root / ".uploads").iterdir()) == []
        await registry.upload_adapter("up", parts(contents[0]), expect=digests[0])


async def test_a_dry_run_says_where_the_content_is_not_what_is_expected(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        told = await registry.check_adapter("a", "v0", expect=UNKNOWN)
        assert not told["ok"]
        (problem,) = told["problems"]
        assert UNKNOWN in problem
        assert told["summary"]["digest"] in problem
        assert (await registry.check_adapter("a", "v0", expect=told["summary"]["digest"]))["ok"]


# ---- over a restart


async def test_versions_outlive_a_restart_and_their_folders_are_not_found_again(
    trained: RegistryFixture,
) -> None:
    async with trained.opened() as registry:
        digests = await put(registry, "v0", "v1", "v2")
        before = registry.versions_of("a")
    state = remembered(trained.root)
    (trained.root / ".adapterd.json").write_text(json.dumps(state | {"deleted": ["v3", "v4"]}))
    async with trained.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["a"]
        told = registry.versions_of("a")
        assert [(v["digest"], v["registered_at"]) for v in told] == [
            (v["digest"], v["registered_at"]) for v in before
        ]
        assert leased(registry, f"a@{digests[0]}") == digests[0]
        assert (await registry.roll_back("a"))["digest"] == digests[1]
    async with trained.opened() as registry:
        assert listed(registry) == [digests[1], digests[2], digests[0]]


async def test_a_restart_keeps_no_more_than_the_setting_says_then(
    catalog: RegistryFixture, contents: list[Path]
) -> None:
    async with catalog.opened() as registry:
        uploads = [await registry.upload_adapter("a", parts(folder), replace=True) for folder in contents[:3]]
        digests = [card["digest"] for card, _ in uploads]
        await registry.aliases.put_alias("prod", [AliasTarget("a", 1, digests[0])], None)
    async with catalog.opened(keep_versions=0) as registry:
        assert listed(registry) == [digests[2], digests[0]], "and what an alias names"
        stored = {f"sha256:{path.name}" for path in (catalog.root / ".uploads").iterdir()}
        assert stored == {digests[2], digests[0]}
    async with catalog.opened() as registry:
        assert listed(registry) == [digests[2], digests[0]]


async def test_a_version_whose_files_have_changed_or_gone_is_kept_no_more(
    trained: RegistryFixture, contents: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    async with trained.opened() as registry:
        digests = await put(registry, "v0", "v1", "v2")
    shutil.rmtree(trained.root / "v0")
    shutil.copytree(contents[3], trained.root / "v1", dirs_exist_ok=True)
    async with trained.opened() as registry:
        assert listed(registry) == [digests[2]]
    for digest in digests[:2]:
        assert any(digest in message and "kept no more" in message for message in caplog.messages)


async def test_another_process_follows_the_versions_too(trained: RegistryFixture, base: Path) -> None:
    twin = RegistryFixture(trained.root, base)
    async with trained.opened() as leader, twin.opened() as follower:
        digests = await put(leader, "v0", "v1")
        await follower.follow_state_file()
        assert listed(follower) == digests[::-1]
        with follower.lease_adapter(f"a@{digests[0]}"):
            await leader.roll_back("a")
            await follower.follow_state_file()
            assert listed(follower) == digests
        assert leased(follower, "a") == digests[0]
        await settle()
        assert twin.device.dropped == []
        await leader.remove_adapter("a")
        await follower.follow_state_file()
        await settle()
        assert set(twin.device.dropped) == set(digests)
