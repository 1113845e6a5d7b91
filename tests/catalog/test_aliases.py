"""Aliases: who gets which target, that few move when weights do, and what an alias keeps and forbids."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from service.catalog.aliases import Alias, AliasTarget, make_alias, parse_alias
from service.errors import AdapterNotFound, BadRequest, Conflict, DigestMismatch, NotFound, StorageFull

from .conftest import RegistryFixture
from .test_registry import device, fill_disk, settle
from .test_versions import leased, listed, put

NOW = "2026-11-28T00:00:00.000Z"
CALLERS = [f"caller-{i}" for i in range(2000)]
MOVES = [((90, 10), (50, 50)), ((99, 1), (90, 10)), ((50, 50), (0, 100))]


def alias(*weights: float, name: str = "prod") -> Alias:
    targets = [AliasTarget(f"t{i}", weight) for i, weight in enumerate(weights)]
    return make_alias(name, targets, "user", NOW)


def placed(given: Alias) -> dict[str, str]:
    return {caller: given.choose_target(caller).id for caller in CALLERS}


# ---- choosing


def test_requests_are_shared_by_weight() -> None:
    drawn = Counter(alias(9, 1, 0).choose_target(None).id for _ in range(4000))
    assert drawn.keys() == {"t0", "t1"}
    assert 0.85 < drawn["t0"] / 4000 < 0.95


def test_callers_are_shared_by_weight_and_each_stays() -> None:
    first = placed(alias(9, 1, 0))
    assert first == placed(alias(9, 1, 0))
    assert 0.87 < Counter(first.values())["t0"] / len(CALLERS) < 0.93
    assert "t2" not in first.values()


@pytest.mark.parametrize(
    ("before", "after"), [((90, 10), (50, 50)), ((99, 1), (90, 10)), ((50, 50), (0, 100))]
)
def test_where_weights_move_only_those_callers_move_whose_share_has(
    before: tuple[float, float], after: tuple[float, float]
) -> None:
    first, then = placed(alias(*before)), placed(alias(*after))
    assert all(then[caller] == "t1" for caller in CALLERS if first[caller] == "t1"), "nobody goes back"
    moved = sum(first[caller] != then[caller] for caller in CALLERS) / len(CALLERS)
    share = (after[1] - before[1]) / 100
    assert share - 0.04 < moved < share + 0.04


def test_a_target_that_comes_takes_its_share_of_each_and_order_is_nothing() -> None:
    two, three = placed(alias(1, 1)), placed(alias(1, 1, 1))
    assert all(three[caller] in (two[caller], "t2") for caller in CALLERS)
    turned = replace(alias(1, 1), targets=alias(1, 1).targets[::-1])
    assert placed(turned) == two


def test_two_aliases_part_callers_differently() -> None:
    one, two = placed(alias(1, 1)), placed(alias(1, 1, name="other"))
    same = sum(one[caller] == two[caller] for caller in CALLERS) / len(CALLERS)
    assert 0.4 < same < 0.6


@pytest.mark.parametrize(
    "targets",
    [
        [],
        [AliasTarget("a", 0), AliasTarget("b", 0)],
        [AliasTarget("a", -1), AliasTarget("b", 2)],
        [AliasTarget("a", float("nan"))],
        [AliasTarget("a", float("inf"))],
        [AliasTarget("a", 1), AliasTarget("a", 2)],
        [AliasTarget(f"a{i}", 1) for i in range(33)],
    ],
)
def test_targets_that_nothing_can_be_sent_to_are_refused(targets: list[AliasTarget]) -> None:
    with pytest.raises(BadRequest, match="targets"):
        make_alias("prod", targets, None, NOW)


def test_the_lightest_weights_still_choose_and_any_caller_is_one() -> None:
    assert alias(5e-324, 5e-324).choose_target("anna").id in ("t0", "t1")
    assert alias(5e-324).choose_target(None).id == "t0"
    assert alias(1, 1).choose_target("\ud800\0").id in ("t0", "t1")


def test_an_alias_is_read_as_it_was_written() -> None:
    given = make_alias(
        "p", [AliasTarget("a", 1.5, "sha256:" + "0" * 64), AliasTarget("b", 2)], "x-tenant", NOW
    )
    assert parse_alias(given.to_json()) == given


# ---- in the registry


def split(*weights: float, digests: tuple[str | None, ...] = (None, None)) -> list[AliasTarget]:
    named = zip(("a", "b"), weights, digests, strict=False)
    return [AliasTarget(id, weight, digest) for id, weight, digest in named]


@pytest.mark.anyio
async def test_an_alias_is_set_changed_and_removed_and_outlives_a_restart(
    trained: RegistryFixture,
) -> None:
    async with trained.opened() as registry:
        await put(registry, "v0")
        await put(registry, "v1", id="b")
        given, created = await registry.aliases.put_alias("prod", split(1, 1), "user")
        assert (created, registry.aliases.find_alias("prod"), registry.aliases.list_aliases()) == (
            True,
            given,
            [given],
        )
        given, created = await registry.aliases.put_alias("prod", split(9, 1), None)
        assert (created, registry.aliases.find_alias("prod")) == (False, given)
        assert registry.aliases.find_alias("a") is None
    async with trained.opened() as registry:
        assert registry.aliases.list_aliases() == [given]
        assert await registry.aliases.remove_alias("prod") == given
        with pytest.raises(NotFound):
            await registry.aliases.remove_alias("prod")
    async with trained.opened() as registry:
        assert registry.aliases.list_aliases() == []


@pytest.mark.anyio
async def test_aliases_and_adapters_share_their_names(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        await put(registry, "v0")
        for name in ("a", "base", "__base__", "tiny", "check", "x/versions", "x/upload"):
            with pytest.raises(Conflict):
                await registry.aliases.put_alias(name, split(1), None)
        with pytest.raises(BadRequest):
            await registry.aliases.put_alias("no name", split(1), None)
        await registry.aliases.put_alias("prod", split(1), None)
        for change in (registry.register_adapter("prod", "v1"), registry.check_adapter("prod", "v1")):
            with pytest.raises(Conflict, match="alias"):
                await change
        with pytest.raises(Conflict, match="alias"):
            await registry.upload_adapter("prod", {}, replace=True)
        with pytest.raises(AdapterNotFound):
            await registry.aliases.put_alias("other", [AliasTarget("prod", 1)], None)
    (trained.root / "v2").rename(trained.root / "prod")
    async with trained.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["a"], "a folder of an alias's name"


@pytest.mark.anyio
async def test_of_an_alias_and_a_registration_racing_for_a_name_one_wins(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        await put(registry, "v0")
        gate = device(registry).load_gate = asyncio.Event()
        registering = asyncio.create_task(registry.register_adapter("prod", "v1"))
        while len(device(registry).known) < 2:  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.01)
        await registry.aliases.put_alias("prod", split(1), None)
        gate.set()
        with pytest.raises(Conflict, match="alias"):
            await registering
        await settle()
        assert [card["id"] for card in registry.list_cards()] == ["a"]
        assert len(device(registry).known) == 1


@pytest.mark.anyio
async def test_a_target_is_registered_and_stays_so(trained: RegistryFixture) -> None:
    async with trained.opened() as registry:
        digests = await put(registry, "v0", "v1")
        for wrong in ([AliasTarget("none", 1)], [*split(1), AliasTarget("none", 0)]):
            with pytest.raises(AdapterNotFound):
                await registry.aliases.put_alias("prod", wrong, None)
        with pytest.raises(DigestMismatch):
            await registry.aliases.put_alias("prod", split(1, digests=("sha256:" + "0" * 64,)), None)
        assert registry.aliases.list_aliases() == []
        given, _ = await registry.aliases.put_alias("prod", split(1, digests=(digests[0][:20],)), None)
        assert given.targets[0].digest == digests[0], "as a whole"
        with pytest.raises(Conflict, match="prod"):
            await registry.remove_adapter("a")
        await registry.aliases.remove_alias("prod")
        await registry.remove_adapter("a")


@pytest.mark.anyio
async def test_a_version_that_an_alias_names_is_kept_as_long(trained: RegistryFixture) -> None:
    async with trained.opened(keep_versions=1) as registry:
        digests = await put(registry, "v0")
        given, _ = await registry.aliases.put_alias("prod", split(1, digests=(digests[0],)), None)
        digests += await put(registry, "v1", "v2", "v3")
        assert listed(registry) == [digests[3], digests[2], digests[0]]
        assert leased(registry, given.choose_target("anna").name) == digests[0]
    async with trained.opened(keep_versions=1) as registry:
        assert listed(registry) == [digests[3], digests[2], digests[0]]
        await registry.aliases.remove_alias("prod")
        digests += await put(registry, "v4")
        assert listed(registry) == [digests[4], digests[3]]


@pytest.mark.anyio
async def test_an_alias_that_cannot_be_written_is_as_it_was(
    trained: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with trained.opened() as registry:
        await put(registry, "v0")
        given, _ = await registry.aliases.put_alias("prod", split(1), None)
        with monkeypatch.context() as patch:
            fill_disk(patch)
            for change in (
                registry.aliases.put_alias("prod", split(2), None),
                registry.aliases.remove_alias("prod"),
            ):
                with pytest.raises(StorageFull):
                    await change
        assert registry.aliases.list_aliases() == [given]


@pytest.mark.anyio
async def test_another_process_follows_the_aliases_too(trained: RegistryFixture, base: Path) -> None:
    twin = RegistryFixture(trained.root, base)
    async with trained.opened() as leader, twin.opened() as follower:
        await put(leader, "v0")
        given, _ = await leader.aliases.put_alias("prod", split(1), None)
        await follower.follow_state_file()
        assert follower.aliases.find_alias("prod") == given
