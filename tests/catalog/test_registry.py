"""Names and what they stand for: who wins a race, what is replaced when, what is freed, and what a
restart brings back.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Awaitable, Callable
from concurrent.futures import wait
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from service import durable
from service.catalog.aliases import AliasTarget
from service.catalog.registry import Registry
from service.catalog.sources.base import SourceLocation
from service.catalog.validator.messages import ValidatedAdapter
from service.core.adapter import ExecutionPath, Tier
from service.core.base_info import LayerLimit
from service.core.error_codes import ErrorCode
from service.core.manifest import Manifest
from service.core.messages import Load
from service.errors import (
    AdapterdError,
    AdapterInvalid,
    AdapterNotFound,
    AdapterUnsupported,
    BadRequest,
    Conflict,
    Forbidden,
    NotReady,
    Overloaded,
    SettingsError,
    StorageFull,
)
from service.settings import Settings
from service.telemetry import metrics

from .. import kinds, making
from ..doubles.engine import FakeEngine
from .conftest import InProcessValidator, RegistryFixture

pytestmark = pytest.mark.anyio
CARD = {
    "id",
    "digest",
    "state",
    "residency",
    "rank",
    "parameters",
    "megabytes",
    "pinned",
    "in_flight",
    "last_used",
}
RECORD: dict[str, Any] = {
    "source": "a",
    "subfolder": None,
    "revision": None,
    "digest": "sha256:a",
    "fingerprint": "a",
    "pinned": False,
}
RECORD |= {"registered_at": "2026-01-01T00:00:00Z", "files": []}
FILES: list[Any] = [
    5,
    [5],
    [["README.md", 1, "a"]],
    [["adapter_config.json", "1", "a"]],
    [["adapter_config.json", 1]],
]
WRONG: list[dict[str, Any]] = [{"registered_at": "once"}, *({"files": files} for files in FILES)]
STATE: dict[str, Any] = {"version": 3, "adapters": {}, "deleted": [], "aliases": []}
ALIAS: dict[str, Any] = {"name": "x", "targets": [{"id": "a", "weight": 1, "digest": None}], "sticky": None}
ALIAS |= {"changed_at": "2026-01-01T00:00:00Z"}
WRONG_ALIASES: list[dict[str, Any]] = [
    {"name": 5},
    {"targets": []},
    {"targets": [{"id": "a", "weight": "1", "digest": None}]},
    {"targets": [{"id": "a"}]},
    {"sticky": 5},
    {"changed_at": "once"},
]
WRONG_STATES: list[dict[str, Any]] = [
    {"aliases": None},
    {"adapters": {"a": RECORD}},  # without the versions that are kept
    {"adapters": {"a": RECORD | {"kept": [5]}}},
    *({"aliases": [ALIAS | wrong]} for wrong in WRONG_ALIASES),
]


def put(source: Path, root: Path, name: str) -> str:
    shutil.copytree(source, root / name)
    return name


@pytest.fixture
def stocked(catalog: RegistryFixture, plain: Path, other: Path) -> RegistryFixture:
    """Two sources, deleted from the remembered registrations so that they are only found when asked
    for.
    """
    put(plain, catalog.root, "plain")
    put(other, catalog.root, "other")
    (catalog.root / ".adapterd.json").write_text(
        json.dumps({"version": 1, "adapters": {}, "deleted": ["plain", "other"]})
    )
    return catalog


def device(registry: Registry) -> FakeEngine:
    engine = registry._table.device
    assert isinstance(engine, FakeEngine)
    return engine


# ---- registering


async def test_registering_gives_the_card_and_loads(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        card, created = await registry.register_adapter("org/name.v1", "plain")
        assert created
        assert card.keys() >= CARD
        assert card["rank"] == 4
        assert card["parameters"] == 1792
        assert card["residency"] == "host"
        assert registry.card_of("org/name.v1") == card
        assert registry.list_cards() == [card]


async def test_the_same_content_again_changes_nothing_and_other_content_is_a_conflict(
    stocked: RegistryFixture,
) -> None:
    async with stocked.opened() as registry:
        first, _ = await registry.register_adapter("a", "plain")
        assert await registry.register_adapter("a", "plain", pinned=True) == (first, False)
        with pytest.raises(Conflict, match="taken by other content"):
            await registry.register_adapter("a", "other")
        assert registry.card_of("a") == first


async def test_what_no_step_could_run_is_refused_at_registration_and_by_a_check(
    stocked: RegistryFixture,
) -> None:
    limit = LayerLimit("model.layers.*.self_attn.v_proj", "Odd", "gives a tuple", by_peft=False)
    async with stocked.opened(limits=(limit,)) as registry:
        said = ["LoRA on Odd is not served: model.layers.*.self_attn.v_proj gives a tuple"]
        assert (await registry.check_adapter("a", "plain"))["problems"] == said
        with pytest.raises(AdapterUnsupported) as caught:
            await registry.register_adapter("a", "plain")
        assert caught.value.problems == said


async def test_parameters_that_the_base_adapts_in_the_batch_are_said_to_run_there(
    catalog: RegistryFixture, base: Path
) -> None:
    folder, name = catalog.root / "deep", "mlp.down_proj"
    making.noise(folder, base, 1, (), target_parameters=[f"{name}.weight"])
    for parameters, lane in (((), "shadow"), ((f"model.layers.*.{name}",), "pool")):
        async with catalog.opened(parameters=parameters) as registry:
            assert registry.summary_of("deep")["lane"] == lane


async def test_of_two_contents_racing_for_an_id_one_wins(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        gate = device(registry).load_gate = asyncio.Event()
        racing = asyncio.gather(
            registry.register_adapter("a", "plain"),
            registry.register_adapter("a", "other"),
            return_exceptions=True,
        )
        await asyncio.sleep(0.2)  # long enough for both to reach the device, if nothing keeps them
        gate.set()
        got = await racing
        assert [isinstance(one, Conflict) for one in got] in ([True, False], [False, True])
        assert len(registry.list_cards()) == 1


async def test_one_that_is_deleted_while_it_is_remembered_was_registered_all_the_same(
    stocked: RegistryFixture,
) -> None:
    async with stocked.opened() as registry:
        async with registry._changing:
            registering = asyncio.create_task(registry.register_adapter("x", "plain"))
            while not device(registry).known:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0)
            for _ in range(20):  # of the event loop, until it waits for its turn
                await asyncio.sleep(0)
            assert registry.list_cards() == [], "it is not there before it is remembered"
            pinning = asyncio.create_task(registry.pin_adapter("x", True))
            removing = asyncio.create_task(registry.remove_adapter("x"))
            await asyncio.sleep(0)
        assert (await registering)[0]["id"] == (await pinning)["id"] == (await removing)["id"] == "x"
        assert registry.list_cards() == []


async def test_many_ids_register_at_once(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        got = await asyncio.gather(
            *(registry.register_adapter(f"p{i}", ("plain", "other")[i % 2]) for i in range(8))
        )
        assert [created for _, created in got] == [True] * 8
        assert len({card["digest"] for card, _ in got}) == 2


@pytest.mark.parametrize("id", ["base", "__base__", "tiny", "check", "a/summary", "architecture", "upload"])
async def test_reserved_ids_are_a_conflict(stocked: RegistryFixture, id: str) -> None:
    async with stocked.opened() as registry:
        with pytest.raises(Conflict, match="reserved"):
            await registry.register_adapter(id, "plain")


@pytest.mark.parametrize(
    "id",
    [
        "",
        "..",
        "../x",
        "a/../b",
        "a//b",
        "/a",
        "a/",
        "a/b/c",
        ".hidden",
        "-x",
        "x" * 129,
        "é",
        "a b",
        "a\0",
        "a\n",
    ],
)
async def test_ids_that_break_the_pattern_are_refused(stocked: RegistryFixture, id: str) -> None:
    async with stocked.opened() as registry:
        for attempt in (
            registry.register_adapter(id, "plain"),
            registry.check_adapter(id, "plain"),
            registry.upload_adapter(id, {}),
        ):
            with pytest.raises(BadRequest, match=r"^id "):
                await attempt


async def test_a_bad_adapter_leaves_no_ghost(stocked: RegistryFixture, plain: Path) -> None:
    async with stocked.opened() as registry:
        making.edit(plain, stocked.root / "bad", {"r": 50000})
        with pytest.raises(AdapterInvalid, match="50000"):
            await registry.register_adapter("bad", "bad")
        with pytest.raises(AdapterNotFound):
            registry.card_of("bad")
        assert isinstance(registry._validator, InProcessValidator)
        assert not [folder for folder, _ in registry._validator.reads if folder.name == "bad"], (
            "a quick check of the config was not enough"
        )


async def test_a_load_that_fails_registers_nothing_and_is_taken_back(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        digest = (await registry.check_adapter("a", "plain"))["summary"]["digest"]
        device(registry).errors[digest] = "the disk is on fire"
        with pytest.raises(AdapterInvalid, match="on fire"):
            await registry.register_adapter("a", "plain")
        assert registry.list_cards() == []
        assert device(registry).dropped == [digest]


@pytest.mark.parametrize(
    ("code", "kind"), [(ErrorCode.OVERLOADED, Overloaded), (ErrorCode.NOT_READY, NotReady)]
)
async def test_a_load_that_fails_for_want_of_memory_or_of_a_worker_is_not_the_adapters_fault(
    stocked: RegistryFixture, code: ErrorCode, kind: type[AdapterdError]
) -> None:
    async with stocked.opened() as registry:
        digest = (await registry.check_adapter("a", "plain"))["summary"]["digest"]
        device(registry).errors[digest], device(registry).codes[digest] = "there is none", code
        with pytest.raises(kind, match="there is none") as refused:
            await registry.register_adapter("a", "plain")
        assert refused.value.retry_after
        assert (registry.list_cards(), device(registry).dropped) == ([], [digest])


async def test_without_preload_the_device_only_hears_of_it(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        card, _ = await registry.register_adapter("a", "plain", preload=False)
        assert card["residency"] == "disk"
        assert device(registry).known[card["digest"]].lane is ExecutionPath.POOL


async def test_a_dry_run_says_everything_and_registers_nothing(stocked: RegistryFixture, plain: Path) -> None:
    async with stocked.opened() as registry:
        told = await registry.check_adapter("a", "plain")
        assert (told["ok"], told["problems"], told["summary"]["parameters"]) == (True, [], 1792)
        making.edit(
            plain, stocked.root / "bad", weights=lambda t: {k: v for k, v in t.items() if "lora_B" not in k}
        )
        told = await registry.check_adapter("a", "bad")
        assert not told["ok"]
        assert "lora_B" in " ".join(told["problems"])
        assert registry.list_cards() == []


async def test_nothing_is_registered_before_the_base_is_there(catalog: RegistryFixture, plain: Path) -> None:
    put(plain, catalog.root, "plain")
    registry = Registry(catalog.settings(), catalog.device, validator=InProcessValidator)
    with pytest.raises(NotReady):
        await registry.register_adapter("a", "plain")


# ---- leases, replacing, removing


async def test_a_lease_counts_and_an_unknown_id_has_none(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        card, _ = await registry.register_adapter("a", "plain")
        assert card["last_used"] is None
        with registry.lease_adapter("a") as version:
            assert version.digest == card["digest"]
            assert (registry.card_of("a")["in_flight"], registry.card_of("a")["last_used"][-1]) == (1, "Z")
        assert registry.card_of("a")["in_flight"] == 0
        for typo in ("A", "a ", "", "b"):
            with pytest.raises(AdapterNotFound), registry.lease_adapter(typo):
                pass


async def test_a_replacement_is_atomic_and_the_old_content_ends_with_its_last_lease(
    stocked: RegistryFixture,
) -> None:
    async with stocked.opened(keep_versions=0) as registry:
        old, _ = await registry.register_adapter("a", "plain")
        with registry.lease_adapter("a") as version:
            new, created = await registry.register_adapter("a", "other", replace=True)
            assert (created, version.digest, registry.card_of("a")["digest"]) == (
                False,
                old["digest"],
                new["digest"],
            )
            await settle()
            assert device(registry).dropped == []
        await settle()
        assert device(registry).dropped == [old["digest"]]


async def test_a_replacement_that_cannot_be_loaded_leaves_the_old_one_serving(
    stocked: RegistryFixture,
) -> None:
    async with stocked.opened() as registry:
        old, _ = await registry.register_adapter("a", "plain")
        device(registry).errors[(await registry.check_adapter("b", "other"))["summary"]["digest"]] = (
            "no space"
        )
        with pytest.raises(AdapterInvalid):
            await registry.register_adapter("a", "other", replace=True)
        with registry.lease_adapter("a") as version:
            assert version.digest == old["digest"]


async def test_contents_that_alternate_under_leases_are_never_dropped_while_named(
    stocked: RegistryFixture,
) -> None:
    async with stocked.opened() as registry:
        for turn in range(6):
            await registry.register_adapter("a", ("plain", "other")[turn % 2], replace=True)
            with registry.lease_adapter("a") as version:
                await registry.register_adapter("a", ("other", "plain")[turn % 2], replace=True)
                assert version.digest in device(registry).known
                await settle()
                assert registry.card_of("a")["digest"] in device(registry).known


async def test_removing_waits_for_leases_frees_and_forgets(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        card, _ = await registry.register_adapter("a", "plain")
        metrics.adapter_served("a", 1, 3, 0.1)
        assert 'adapter="a"' in metrics.render_metrics("")[0].decode()
        held = registry.lease_adapter("a")
        held.__enter__()
        removal = asyncio.create_task(registry.remove_adapter("a"))
        await until_gone(registry, "a")
        await settle()
        assert not removal.done()
        assert 'adapter="a"' not in metrics.render_metrics("")[0].decode(), (
            "also for a client that leaves before the drain ends"
        )
        with pytest.raises(AdapterNotFound), registry.lease_adapter("a"):
            pass
        held.__exit__(None, None, None)
        assert await removal == {
            "id": "a",
            "digest": card["digest"],
            "drained_requests": 1,
            "freed_bytes": 7168,
        }
        with pytest.raises(AdapterNotFound):
            await registry.remove_adapter("a")


async def test_who_waits_for_a_lease_to_end_is_let_go_when_it_closes(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("b", "other")
        await registry.remove_adapter("b")
        await settle()
        assert registry._table._ending == set()
        await registry.register_adapter("a", "plain")
        with registry.lease_adapter("a"):
            removal = asyncio.create_task(registry.remove_adapter("a"))
            await until_gone(registry, "a")
            await registry.close()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(removal, 5)


async def test_of_two_removals_one_finds_nothing(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
        got = await asyncio.gather(
            registry.remove_adapter("a"), registry.remove_adapter("a"), return_exceptions=True
        )
        assert sorted(type(one).__name__ for one in got) == ["AdapterNotFound", "dict"]


async def test_content_that_another_id_has_stays(stocked: RegistryFixture, plain: Path) -> None:
    async with stocked.opened() as registry:
        put(plain, stocked.root, "twin")
        card, _ = await registry.register_adapter("a", "plain")
        await registry.register_adapter("b", "twin", pinned=True)
        assert device(registry).pinned == {card["digest"]}
        assert (await registry.remove_adapter("b"))["freed_bytes"] == 0
        assert device(registry).known[card["digest"]].config == str(
            (stocked.root / "plain/adapter_config.json").resolve()
        )
        assert device(registry).pinned == set()
        assert (await registry.remove_adapter("a"))["freed_bytes"] == 7168


async def test_an_id_can_be_taken_again_while_its_old_content_drains(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
        with registry.lease_adapter("a"):
            removal = asyncio.create_task(registry.remove_adapter("a"))
            await until_gone(registry, "a")
            card, created = await registry.register_adapter("a", "other")
            assert created
        await removal
        assert registry.card_of("a")["digest"] == card["digest"]
        assert card["digest"] in device(registry).known


async def test_pins_are_shared_by_content_and_told(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        card, _ = await registry.register_adapter("a", "plain", pinned=True)
        await registry.register_adapter("b", "plain", pinned=True)
        assert (await registry.pin_adapter("a", False))["pinned"] is False
        assert device(registry).pinned == {card["digest"]}
        await registry.pin_adapter("b", False)
        assert device(registry).pinned == set()
        assert (await registry.register_adapter("a", "plain", pinned=True, replace=True))[0]["pinned"] is True


async def test_a_registration_that_fails_leaves_the_content_as_the_others_have_it(
    stocked: RegistryFixture, plain: Path
) -> None:
    async with stocked.opened() as registry:
        put(plain, stocked.root, "twin")
        card, _ = await registry.register_adapter("a", "plain", preload=False)
        device(registry).errors[card["digest"]] = "the disk is on fire"
        with pytest.raises(AdapterInvalid, match="on fire"):
            await registry.register_adapter("b", "twin", pinned=True)
        assert device(registry).dropped == []
        assert device(registry).pinned == set()
        assert device(registry).known[card["digest"]].config == str(
            (stocked.root / "plain/adapter_config.json").resolve()
        )


@pytest.mark.parametrize("change", ["unpin", "remove"])
async def test_a_pin_holds_though_another_id_lets_its_own_go_meanwhile(
    stocked: RegistryFixture, change: str
) -> None:
    async with stocked.opened() as registry:
        card, _ = await registry.register_adapter("a", "plain", pinned=True, preload=False)
        gate = device(registry).load_gate = asyncio.Event()
        registering = asyncio.create_task(registry.register_adapter("b", "plain", pinned=True))
        while not registry._table.lock_for(card["digest"]).locked():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0)
        removing = asyncio.create_task(
            registry.pin_adapter("a", False) if change == "unpin" else registry.remove_adapter("a")
        )
        await settle()
        gate.set()
        assert (await registering)[0]["pinned"] is True
        await removing
        assert device(registry).pinned == {card["digest"]}


async def test_the_files_of_one_that_drains_are_those_of_the_content(
    stocked: RegistryFixture, plain: Path
) -> None:
    async with stocked.opened(keep_versions=0) as registry:
        put(plain, stocked.root, "twin")
        await registry.register_adapter("a", "plain")
        card, _ = await registry.register_adapter("b", "twin")
        with registry.lease_adapter("a"):
            await registry.register_adapter("a", "other", replace=True)
            await registry.remove_adapter("b")
            assert device(registry).known[card["digest"]].config == str(
                (stocked.root / "plain/adapter_config.json").resolve()
            )
        await settle()
        assert device(registry).dropped == [card["digest"]]


async def test_a_pin_goes_with_its_name_even_while_the_content_drains(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain", pinned=True)
        with registry.lease_adapter("a"):
            await registry.register_adapter("a", "other", replace=True)
            assert device(registry).pinned == set()


async def test_a_load_that_fails_later_shows_until_one_succeeds(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        card, _ = await registry.register_adapter("a", "plain")
        await registry.register_adapter("b", "other")
        registry.note_load(Load(card["digest"], 0.1, 0, "the file has another digest"))
        assert (registry.card_of("a")["state"], registry.card_of("a")["reason"]) == (
            "failed",
            "the file has another digest",
        )
        assert registry.card_of("b")["state"] == "ready"
        registry.note_load(Load(card["digest"], 0.1, 7168))
        assert registry.card_of("a")["state"] == "ready"


@pytest.mark.parametrize("replaced", [False, True], ids=["POST", "PUT"])
async def test_what_failed_is_tried_anew_when_it_is_registered_again(
    stocked: RegistryFixture, replaced: bool
) -> None:
    async with stocked.opened() as registry:
        card, _ = await registry.register_adapter("a", "plain", pinned=True)
        known = device(registry).known
        registry.note_load(Load(card["digest"], 0.0, 0, "this base cannot run this adapter"))
        known.clear()
        again, new = await registry.register_adapter("a", "plain", pinned=replaced, replace=replaced)
        assert (again["state"], again["pinned"], new) == ("ready", True, False)
        assert list(known) == [card["digest"]], "the device was not asked to try it again"
        assert device(registry).pinned == {card["digest"]}


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def until_gone(registry: Registry, id: str) -> None:
    """Until a deletion is remembered and made."""
    while id in {card["id"] for card in registry.list_cards()}:  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0)


# ---- what is told


async def test_the_summary_counts_what_the_file_holds(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
        told = registry.summary_of("a")
        parameters = told["base"]["parameters"]
        assert told["base_model"]["match"] is True
        assert (told["rank"], told["scaling"], told["alpha"]) == (
            {"min": 4, "max": 4},
            {"min": 2.0, "max": 2.0},
            8,
        )
        assert (told["layers"], told["modules"], told["target_modules"]) == (2, 4, ["q_proj", "v_proj"])
        assert told["size"]["tensor_bytes"] == 4 * told["parameters"] == told["size"]["arithmetic_bytes"]
        assert told["size"]["device_megabytes"] == 0.01
        assert told["percent_of_base"] == round(100 * 1792 / parameters, 2)
        assert told["footprint"]["base_megabytes"] == round(4 * parameters / 1e6, 2)
        text = registry.summary_text("a")
        assert all(word in text for word in ("a", "rank", "q_proj", "MB", "1,792"))
        assert "(lora_A): Linear(in_features=64, out_features=4" in registry.draw_architecture("a")


@pytest.mark.parametrize("name", ["/home/me/train/x", "no-such-org/no-such-model", "meta-llama/Llama-3.1-8B"])
async def test_a_foreign_base_name_is_a_warning(stocked: RegistryFixture, plain: Path, name: str) -> None:
    async with stocked.opened() as registry:
        making.edit(plain, stocked.root / "foreign", {"base_model_name_or_path": name, "revision": "abc123"})
        await registry.register_adapter("a", "foreign")
        told = registry.summary_of("a")
        assert told["base_model"] == {"claimed": name, "served": "tiny", "match": False}
        assert "base" in told["warnings"][0]


async def test_a_forecast_says_what_the_summary_later_says(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "other")
        told, real = registry.forecast_size(8, ["q_proj", "v_proj"]), registry.summary_of("a")
        assert told["parameters"] == real["parameters"]
        assert told["percent_of_base"] == real["percent_of_base"]
        assert [{k: v for k, v in row.items() if k != "scaling"} for row in real["by_module"]] == told[
            "by_module"
        ]


# ---- what the digest covers

TEMPLATE = "{{ messages[-1]['content'] }}"


async def test_a_template_that_changed_in_the_folder_is_other_content(stocked: RegistryFixture) -> None:
    file = stocked.root / "plain" / "chat_template.jinja"
    async with stocked.opened() as registry:
        bare, _ = await registry.register_adapter("a", "plain")
        digests = [bare["digest"]]
        for text in (TEMPLATE, "One. " + TEMPLATE):
            file.write_text(text)
            with pytest.raises(Conflict, match="taken by other content"):
                await registry.register_adapter("a", "plain")
            card, created = await registry.register_adapter("a", "plain", replace=True)
            assert not created
            digests.append(card["digest"])
        assert len(set(digests)) == 3
        await registry.remove_adapter("a")
        assert (await registry.register_adapter("a", "plain"))[0]["digest"] == digests[-1]
        file.unlink()
        assert (await registry.register_adapter("a", "plain", replace=True))[0]["digest"] == digests[0]


async def test_a_template_that_changed_is_noticed_over_a_restart(stocked: RegistryFixture) -> None:
    (stocked.root / "plain" / "generation_config.json").write_text('{"eos_token_id": 2}')
    async with stocked.opened() as registry:
        before, _ = await registry.register_adapter("a", "plain")
    (stocked.root / "plain" / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    async with stocked.opened() as registry:
        assert registry.card_of("a")["digest"] != before["digest"]
        assert "changed" in registry.summary_of("a")["warnings"][0]


async def test_the_summary_lists_the_files_with_sizes_and_hashes_also_after_a_restart(
    stocked: RegistryFixture,
) -> None:
    (stocked.root / "plain" / "chat_template.jinja").write_text(TEMPLATE)
    (stocked.root / "plain" / "README.md").write_text("not part of an answer")
    names = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
    contents = {name: (stocked.root / "plain" / name).read_bytes() for name in names}
    files = [
        {"name": name, "bytes": len(data), "sha256": sha256(data).hexdigest()}
        for name, data in contents.items()
    ]
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
        assert registry.summary_of("a")["files"] == files
    async with stocked.opened() as registry:
        assert registry.summary_of("a")["files"] == files
        assert (await registry.check_adapter("b", "plain"))["summary"]["files"] == files


async def test_the_same_files_have_one_digest_from_every_source(stocked: RegistryFixture) -> None:
    folder = stocked.root / "plain"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "vocab.json").write_text("{}")
    names = [path.name for path in folder.iterdir() if path.name != "README.md"]
    shutil.copytree(folder, stocked.root / "copy")
    (stocked.root / "copy" / "README.md").write_text("not part of an answer")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in names:
            archive.write(folder / name, f"run/{name}")
    async with stocked.opened() as registry:
        cards = [
            (await registry.register_adapter("a", "plain"))[0],
            (await registry.register_adapter("b", "copy"))[0],
        ]
        cards.append(
            (
                await registry.upload_adapter(
                    "c", {name: Part((folder / name).read_bytes()) for name in names}
                )
            )[0]
        )
        cards.append((await registry.upload_adapter("d", {"file": Part(packed.getvalue())}))[0])
        assert {card["digest"] for card in cards} == {cards[0]["digest"]}
        with registry.lease_adapter("d") as version:
            assert (version.folder / "chat_template.jinja").read_text() == TEMPLATE
        bare = {name: Part((folder / name).read_bytes()) for name in names if name.startswith("adapter_")}
        assert (await registry.upload_adapter("e", bare))[0]["digest"] != cards[0]["digest"]


async def test_files_that_change_while_they_are_read_are_not_registered(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = InProcessValidator.validate_adapter

    async def slow(validator: InProcessValidator, folder: Path, known: Manifest = ()) -> ValidatedAdapter:
        validated = await read(validator, folder, known)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        return validated

    async with stocked.opened() as registry:
        with monkeypatch.context() as patch:
            patch.setattr(InProcessValidator, "validate_adapter", slow)
            with pytest.raises(AdapterInvalid, match="changed while they were read"):
                await registry.register_adapter("a", "plain")
        assert registry.list_cards() == []
        await registry.register_adapter("a", "plain")


# ---- a dry run says what a registration would


async def test_a_dry_run_of_a_taken_id_says_so_beside_the_summary(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
        told = await registry.check_adapter("a", "other")
        with pytest.raises(Conflict) as refused:
            await registry.register_adapter("a", "other")
        assert (told["ok"], told["problems"], told["summary"]["rank"]["max"]) == (
            False,
            [refused.value.message],
            8,
        )
        assert (await registry.check_adapter("a", "plain"))["ok"]


@pytest.mark.filterwarnings("ignore")
async def test_a_dry_run_tries_out_what_only_peft_can_run(stocked: RegistryFixture, base: Path) -> None:
    kinds.SHADOW["lora_bias"](stocked.root / "shadow", base)
    async with stocked.opened() as registry:
        for id in [card["id"] for card in registry.list_cards()]:
            await registry.remove_adapter(id)
        told = await registry.check_adapter("a", "shadow")
        digest = told["summary"]["digest"]
        assert (told["ok"], device(registry).dropped[-1], registry.list_cards()) == (True, digest, [])
        device(registry).errors[digest] = "PEFT cannot put `LORA` on this base"
        assert not (await registry.check_adapter("a", "shadow"))["ok"]
        assert (await registry.check_adapter("a", "shadow", preload=False))["ok"], "as POST without a load"
        with pytest.raises(AdapterInvalid) as refused:
            await registry.register_adapter("a", "shadow")
        assert (await registry.check_adapter("a", "shadow"))["problems"] == refused.value.problems
        del device(registry).errors[digest]
        await registry.register_adapter("b", "shadow")
        assert (await registry.check_adapter("a", "shadow"))["ok"]
        assert digest in device(registry).known, "what another id has is not dropped"


# ---- a state of another version


def remembered(root: Path) -> Any:
    return json.loads((root / ".adapterd.json").read_text())


def aged(root: Path) -> None:
    """The state as version 1 wrote it: digests over two files, uploads in folders of such names."""
    state = remembered(root)
    for record in state["adapters"].values():
        del record["files"]
        if record["source"].startswith(".uploads/"):
            (root / record["source"]).rename(root / ".uploads" / ("a" * 64))
            record["source"] = ".uploads/" + "a" * 64
        record["digest"] = "sha256:" + "a" * 64
    (root / ".adapterd.json").write_text(json.dumps(state | {"version": 1}))


async def test_registrations_of_an_older_version_are_taken_over(
    stocked: RegistryFixture, other: Path
) -> None:
    (stocked.root / "plain" / "chat_template.jinja").write_text(TEMPLATE)
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain", pinned=True)
        await registry.upload_adapter("up", parts(other))
        before = {id: registry.summary_of(id) for id in ("a", "up")}
    assert remembered(stocked.root)["version"] == 3
    aged(stocked.root)
    async with stocked.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["a", "up"], (
            "and what was deleted stays deleted"
        )
        for id in ("a", "up"):
            told = registry.summary_of(id)
            kept = ("digest", "files", "pinned", "registered_at", "warnings")
            assert {key: told[key] for key in kept} == {key: before[id][key] for key in kept}
        with registry.lease_adapter("up") as version:
            assert (version.folder / "adapter_model.safetensors").read_bytes() == (
                other / "adapter_model.safetensors"
            ).read_bytes()
    assert remembered(stocked.root)["version"] == 3
    async with stocked.opened() as registry:
        assert isinstance(registry._validator, InProcessValidator)
        assert registry._validator.reads == [], "taken over once"
        assert await registry.upload_adapter("up", parts(other)) == (registry.card_of("up"), False)
        assert [path.name for path in (stocked.root / ".uploads").iterdir()] == ["a" * 64]
        await registry.remove_adapter("up", purge=True)
        assert list((stocked.root / ".uploads").iterdir()) == []


@pytest.mark.parametrize("rest", [{}, {"adapters": 5}])
async def test_a_newer_version_stops_the_start_and_is_not_written_over(
    stocked: RegistryFixture, rest: dict[str, Any]
) -> None:
    state = json.dumps(remembered(stocked.root) | {"version": 4} | rest)
    (stocked.root / ".adapterd.json").write_text(state)
    with pytest.raises(
        SettingsError, match=r"ADAPTERD_ADAPTERS_DIR: .*\.adapterd\.json .* version is 4, .* up to 3"
    ):
        Registry(stocked.settings(), stocked.device, validator=InProcessValidator)
    assert [path.name for path in stocked.root.glob(".adapterd*")] == [".adapterd.json"]
    assert (stocked.root / ".adapterd.json").read_text() == state


async def test_a_version_that_became_newer_while_the_base_was_loaded_stops_the_start_too(
    stocked: RegistryFixture,
) -> None:
    registry = Registry(stocked.settings(), stocked.device, validator=InProcessValidator)
    state = json.dumps(remembered(stocked.root) | {"version": 4})
    (stocked.root / ".adapterd.json").write_text(state)
    with pytest.raises(SettingsError):
        await registry.open_catalog()
    await registry.close()
    assert (stocked.root / ".adapterd.json").read_text() == state


# ---- over a restart


async def test_folders_are_registered_at_start_under_their_paths(
    catalog: RegistryFixture, plain: Path
) -> None:
    for name in ("found", "org/name", ".hidden/x", "a/b/c", "summary"):
        put(plain, catalog.root, name)
    async with catalog.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["found", "org/name"]
        metrics.adapter_served("found", 1, 3, 0.1)
        assert 'adapter="found"' in metrics.render_metrics("")[0].decode()
        assert '"found"' in (catalog.root / ".adapterd.json").read_text()
        assert device(registry).tier_of(registry.card_of("found")["digest"]) is Tier.DISK
        with registry.lease_adapter("found"):
            pass
        await registry.register_adapter("more", "found")
        assert len({one.digest for one in registry.list_versions()}) == 1, (
            "one content has one digest, and one text, under all its ids"
        )


async def test_a_broken_folder_is_listed_as_failed_and_harms_nothing(
    catalog: RegistryFixture, plain: Path, other: Path
) -> None:
    put(plain, catalog.root, "good")
    for name in ("cut", "short"):
        put(plain, catalog.root, name)
        (catalog.root / name / "adapter_model.safetensors").write_bytes(b"short")
    async with catalog.opened() as registry:
        cards = {card["id"]: card for card in registry.list_cards()}
        assert (cards["good"]["state"], cards["cut"]["state"]) == ("ready", "failed")
        assert "truncated" in cards["cut"]["reason"]
        assert registry.summary_of("cut")["state"] == "failed"
        with pytest.raises(AdapterInvalid, match="truncated"), registry.lease_adapter("cut"):
            pass
        shutil.rmtree(catalog.root / "cut")
        put(other, catalog.root, "cut")
        card, created = await registry.register_adapter("cut", "cut")
        assert (created, card["state"]) == (True, "ready")
        assert await registry.remove_adapter("short") == {
            "id": "short",
            "digest": None,
            "drained_requests": 0,
            "freed_bytes": 0,
        }


@pytest.mark.parametrize("kind", ["A2 mlx", "A5 missing", "A15 pickle"])
async def test_a_folder_without_weights_says_at_start_what_it_seems_to_be(
    catalog: RegistryFixture, base: Path, kind: str
) -> None:
    maker, word = kinds.REFUSED[kind]
    maker(catalog.root / "odd", base)
    async with catalog.opened() as registry:
        assert word.lower() in registry.card_of("odd")["reason"].lower()


async def test_registrations_and_pins_outlive_a_restart(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("renamed", "plain", pinned=True)
        (first,) = registry.list_versions()
        assert first.registered_at == registry.summary_of("renamed")["registered_at"]
    async with stocked.opened() as registry:
        assert [(card["id"], card["pinned"]) for card in registry.list_cards()] == [("renamed", True)]
        assert [one.registered_at for one in registry.list_versions()] == [first.registered_at]
        assert device(registry).pinned == {registry.card_of("renamed")["digest"]}


async def test_a_deleted_registration_stays_deleted_until_it_is_registered_again(
    catalog: RegistryFixture, plain: Path
) -> None:
    put(plain, catalog.root, "found")
    async with catalog.opened() as registry:
        await registry.remove_adapter("found")
    async with catalog.opened() as registry:
        assert registry.list_cards() == []
        await registry.register_adapter("found", "found")
    async with catalog.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["found"]


async def test_files_that_changed_meanwhile_are_a_new_content_with_a_warning(
    stocked: RegistryFixture, other: Path
) -> None:
    async with stocked.opened() as registry:
        before, _ = await registry.register_adapter("a", "plain")
    shutil.copytree(other, stocked.root / "plain", dirs_exist_ok=True)
    async with stocked.opened() as registry:
        assert registry.card_of("a")["digest"] != before["digest"]
        assert "changed" in registry.summary_of("a")["warnings"][0]


async def test_another_process_on_the_same_directory_is_followed(
    stocked: RegistryFixture, base: Path
) -> None:
    twin = RegistryFixture(stocked.root, base)
    async with stocked.opened(keep_versions=0) as leader, twin.opened(keep_versions=0) as follower:
        old, _ = await leader.register_adapter("a", "plain", pinned=True)
        await leader.register_adapter("b", "plain")
        await follower.follow_state_file()
        told = [(card["id"], card["digest"], card["pinned"]) for card in follower.list_cards()]
        assert told == [(card["id"], card["digest"], card["pinned"]) for card in leader.list_cards()]
        assert twin.device.pinned == {old["digest"]}
        with follower.lease_adapter("a") as version:
            new, _ = await leader.register_adapter("a", "other", replace=True)
            await leader.remove_adapter("b")
            await follower.follow_state_file()
            await settle()
            assert twin.device.dropped == []
            with follower.lease_adapter("a") as again:
                assert (again.digest, version.digest) == (new["digest"], old["digest"])
        await settle()
        assert twin.device.dropped == [old["digest"]]
        with pytest.raises(AdapterNotFound):
            follower.card_of("b")
        await leader.pin_adapter("a", True)
        await follower.follow_state_file()
        assert follower.card_of("a")["pinned"]


async def test_unchanged_files_are_not_read_again(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        card, _ = await registry.register_adapter("a", "plain")
    async with stocked.opened() as registry:
        assert isinstance(registry._validator, InProcessValidator)
        assert registry._validator.reads == []
        assert registry.card_of("a")["digest"] == card["digest"]


async def test_a_found_folder_that_is_gone_is_forgotten_and_a_named_one_fails(
    stocked: RegistryFixture, plain: Path
) -> None:
    put(plain, stocked.root, "found")
    async with stocked.opened() as registry:
        await registry.register_adapter("named", "plain")
    shutil.rmtree(stocked.root / "found")
    shutil.rmtree(stocked.root / "plain")
    async with stocked.opened() as registry:
        assert [(card["id"], card["state"]) for card in registry.list_cards()] == [("named", "failed")]


@pytest.mark.parametrize(
    "damage",
    [
        "{",
        "[]",
        '{"adapters": {}, "deleted": []}',
        *(
            json.dumps({"version": version, "adapters": {}, "deleted": []})
            for version in ("2", 0, True, None, 1.5)
        ),
        '{"version": 2, "adapters": {"a": {}}, "deleted": []}',
        '{"version": 2, "adapters": {"a": 5}, "deleted": []}',
        "[" * 100_000,
        *(json.dumps({"version": 2, "adapters": {"a": RECORD | wrong}, "deleted": []}) for wrong in WRONG),
        *(json.dumps(STATE | wrong) for wrong in WRONG_STATES),
    ],
)
async def test_a_damaged_state_file_is_put_aside(catalog: RegistryFixture, plain: Path, damage: str) -> None:
    put(plain, catalog.root, "found")
    (catalog.root / ".adapterd.json").write_text(damage)
    async with catalog.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["found"]
    assert (catalog.root / ".adapterd.json.damaged").read_text() == damage


def failing(monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    """What is done by this name to the file of registrations fails like this from now on; tests may
    run as root, whom no mode stops.
    """
    real = getattr(Path, name)

    def does(path: Path, *given: Any) -> Any:
        if path.name == ".adapterd.json":
            raise OSError(code, os.strerror(code))
        return real(path, *given)

    monkeypatch.setattr(Path, name, does)


async def test_registrations_that_cannot_be_read_are_not_written_over(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
    with monkeypatch.context() as patch:
        failing(patch, "read_bytes", errno.EACCES)
        async with stocked.opened() as registry:
            await registry.register_adapter("b", "other")
    async with stocked.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["a"]


async def test_a_damaged_state_file_that_cannot_be_put_aside_stops_nothing(
    catalog: RegistryFixture, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(plain, catalog.root, "found")
    (catalog.root / ".adapterd.json").write_text("{")
    failing(monkeypatch, "replace", errno.EROFS)
    async with catalog.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["found"]


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing can be synced."""

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)


def snapshot(root: Path) -> dict[str, bytes]:
    """The files that must outlive a restart, by path."""
    paths = [root / ".adapterd.json", *(root / ".uploads").rglob("*")]
    return {str(path.relative_to(root)): path.read_bytes() for path in paths if path.is_file()}


async def test_on_a_full_disk_each_change_is_refused_and_nothing_is_half_done(
    stocked: RegistryFixture, plain: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with stocked.opened() as registry:
        old, _ = await registry.register_adapter("a", "plain")
        await registry.upload_adapter("up", parts(other))
        cards, files, known = registry.list_cards(), snapshot(stocked.root), set(device(registry).known)
        changes: list[Callable[[], Awaitable[Any]]] = [
            lambda: registry.register_adapter("b", "plain"),
            lambda: registry.register_adapter("a", "other", replace=True, pinned=True),
            lambda: registry.upload_adapter("c", parts(plain)),
            lambda: registry.pin_adapter("a", True),
            lambda: registry.remove_adapter("a"),
            lambda: registry.remove_adapter("up", purge=True),
        ]
        with monkeypatch.context() as patch:
            fill_disk(patch)
            for change in changes:
                with pytest.raises(StorageFull, match="No space left on device"):
                    await change()
                await settle()
                assert registry.list_cards() == cards
                assert snapshot(stocked.root) == files
                assert (set(device(registry).known), device(registry).pinned) == (known, set())
        with registry.lease_adapter("a") as version:
            assert version.digest == old["digest"]
        for change in changes[:4]:
            await change()
    async with stocked.opened() as registry:
        assert [(card["id"], card["pinned"]) for card in registry.list_cards()] == [
            ("a", True),
            ("b", False),
            ("c", False),
            ("up", False),
        ]


async def test_a_full_disk_is_told_once_until_it_has_room_again(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = "changes are refused: the registrations cannot be written: No space left on device"
    async with stocked.opened() as registry:
        for times in (1, 2):
            await registry.register_adapter(f"fits{times}", "plain")
            with monkeypatch.context() as patch:
                fill_disk(patch)
                for id in ("a", "b"):
                    with pytest.raises(StorageFull):
                        await registry.register_adapter(id, "plain")
            assert caplog.messages.count(said) == times


async def test_a_change_whose_caller_leaves_is_kept_and_made_all_the_same(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go_on = threading.Event(), threading.Event()
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
        write = registry._state_file.write_file

        def write_slowly(*given: Any) -> None:
            writing.set()
            assert go_on.wait(60)
            write(*given)

        monkeypatch.setattr(registry._state_file, "write_file", write_slowly)
        pinning = asyncio.create_task(registry.pin_adapter("a", True))
        await asyncio.to_thread(writing.wait, 60)
        pinning.cancel()
        removing = asyncio.create_task(registry.remove_adapter("a"))
        await settle()
        assert [card["id"] for card in registry.list_cards()] == ["a"]
        assert not remembered(stocked.root)["adapters"]["a"]["pinned"]
        go_on.set()
        await removing
        assert device(registry).known == {}
    assert remembered(stocked.root)["adapters"] == {}


async def test_where_registrations_can_only_be_read_changes_are_taken_and_forgotten(
    stocked: RegistryFixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tests may run as root, whom no mode stops."""
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
    before = snapshot(stocked.root)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "why_unwritable", lambda folder: "Read-only file system")
        async with stocked.opened() as registry:
            await registry.register_adapter("b", "other")
            await registry.remove_adapter("a")
            assert [card["id"] for card in registry.list_cards()] == ["b"]
    assert snapshot(stocked.root) == before
    assert [message for message in caplog.messages if "restart" in message] == [
        f"no change will outlive a restart: {stocked.root} cannot be written: Read-only file system"
    ]


async def test_registrations_that_lie_elsewhere_leave_the_adapters_directory_alone(
    stocked: RegistryFixture, plain: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of the shipped adapters."""
    (stocked.root / ".adapterd.json").unlink()
    state = tmp_path / "state" / "demo"
    monkeypatch.setattr(Settings, "state", property(lambda settings: state))
    before = sorted(stocked.root.rglob("*"))
    async with stocked.opened() as registry:
        registry.claim_state()
        card, _ = await registry.upload_adapter("up", parts(making.edit(plain, tmp_path / "x", {"r": 4})))
        await registry.register_adapter("again", "plain")
        await registry.remove_adapter("plain")
        with registry.lease_adapter("up") as version:
            assert version.folder.parent == (state / ".uploads").resolve()
    assert sorted(stocked.root.rglob("*")) == before
    async with stocked.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["again", "other", "up"]
        assert registry.card_of("up")["digest"] == card["digest"]
        await registry.remove_adapter("up", purge=True)
        assert list((state / ".uploads").iterdir()) == []


async def test_a_directory_that_is_not_there_is_made_when_there_is_something_to_remember(
    catalog: RegistryFixture, plain: Path
) -> None:
    catalog.root.rmdir()
    async with catalog.opened() as registry:
        assert not catalog.root.exists()
        await registry.upload_adapter("up", parts(plain))
    async with catalog.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["up"]


# ---- uploads


class Part:
    def __init__(self, content: bytes) -> None:
        self.content = content

    async def read(self, size: int = -1) -> bytes:
        piece, self.content = self.content[:size], self.content[size:]
        return piece


def parts(folder: Path) -> dict[str, Part]:
    return {
        name: Part((folder / name).read_bytes())
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }


async def test_an_upload_is_stored_registered_and_purged(catalog: RegistryFixture, plain: Path) -> None:
    async with catalog.opened() as registry:
        card, created = await registry.upload_adapter("up", parts(plain))
        assert created
        with registry.lease_adapter("up") as version:
            assert (
                version.folder
                == (catalog.root / ".uploads" / card["digest"].removeprefix("sha256:")).resolve()
            )
            assert version.adapter is not None
            assert version.adapter.config == str(version.folder / "adapter_config.json")
        assert await registry.upload_adapter("up", parts(plain)) == (registry.card_of("up"), False)
        assert (card["pinned"], card["residency"]) == (False, "host")
        await registry.remove_adapter("up")
        assert version.folder.exists(), "nobody asked to purge it"
        await registry.upload_adapter("up", parts(plain))
    async with catalog.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["up"]
        await registry.remove_adapter("up", purge=True)
        assert list((catalog.root / ".uploads").iterdir()) == []


async def test_what_is_purged_is_not_taken_from_who_uploads_the_same_meanwhile(
    catalog: RegistryFixture, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removing: list[asyncio.Future[dict[str, Any]]] = []
    async with catalog.opened() as registry:
        await registry.upload_adapter("one", parts(plain))
        kept, loop = registry._store.keep_upload, asyncio.get_running_loop()

        def keep(staged: Path, content: str) -> SourceLocation:
            place = kept(staged, content)
            removal = asyncio.run_coroutine_threadsafe(registry.remove_adapter("one", purge=True), loop)
            wait([removal], 0.3)  # as long as it would take if nothing kept it
            removing.append(asyncio.wrap_future(removal, loop=loop))
            return place

        monkeypatch.setattr(registry._store, "keep_upload", keep)
        await registry.upload_adapter("two", parts(plain))
        await asyncio.gather(*removing)
        with registry.lease_adapter("two") as version:
            assert (version.folder / "adapter_config.json").exists()


async def test_purge_keeps_what_another_id_still_uses_and_what_was_not_uploaded(
    stocked: RegistryFixture, other: Path
) -> None:
    async with stocked.opened() as registry:
        await registry.upload_adapter("one", parts(other))
        await registry.upload_adapter("two", parts(other))
        await registry.remove_adapter("one", purge=True)
        with registry.lease_adapter("two") as version:
            assert (version.folder / "adapter_config.json").exists()
        await registry.register_adapter("kept", "plain")
        await registry.remove_adapter("kept", purge=True)
        assert (stocked.root / "plain" / "adapter_model.safetensors").exists()


async def test_a_refused_upload_leaves_no_files(catalog: RegistryFixture, plain: Path, other: Path) -> None:
    async with catalog.opened() as registry:
        bad = parts(plain)
        bad["adapter_model.safetensors"].content = bad["adapter_model.safetensors"].content[:3000]
        with pytest.raises(AdapterInvalid, match="truncated"):
            await registry.upload_adapter("bad", bad)
        await registry.upload_adapter("taken", parts(plain))
        with pytest.raises(Conflict):
            await registry.upload_adapter("taken", parts(other))
        assert [path.name for path in (catalog.root / ".uploads").iterdir()] == [
            registry.card_of("taken")["digest"].removeprefix("sha256:")
        ]


async def test_uploaded_files_are_no_source_for_others(catalog: RegistryFixture, plain: Path) -> None:
    async with catalog.opened() as registry:
        card, _ = await registry.upload_adapter("up", parts(plain))
        with pytest.raises(Forbidden):
            await registry.register_adapter("thief", f".uploads/{card['digest'].removeprefix('sha256:')}")


# ---- the audit


def audited(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str, str | None, str | None]]:
    """What was changed, of which id, and the digests before and after, since the last call."""
    fields = [record.__dict__["fields"] for record in caplog.records if record.name == "adapterd.audit"]
    caplog.clear()
    return [(line["what"], line["id"], line["before"], line["after"]) for line in fields]


async def test_each_change_is_audited_with_the_digests_before_and_after(
    stocked: RegistryFixture, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "adapterd.audit")
    async with stocked.opened() as registry:
        found = {what for what, *_ in audited(caplog)}
        assert found <= {"found"}
        first, _ = await registry.register_adapter("a", "plain")
        await registry.register_adapter("a", "plain")
        with pytest.raises(Conflict):
            await registry.register_adapter("a", "other")
        second, _ = await registry.register_adapter("a", "other", replace=True)
        await registry.pin_adapter("a", True)
        await registry.pin_adapter("a", False)
        await registry.remove_adapter("a")
        one, two = first["digest"], second["digest"]
        assert audited(caplog) == [
            ("registered", "a", None, one),
            ("replaced", "a", one, two),
            ("pinned", "a", two, two),
            ("unpinned", "a", two, two),
            ("deleted", "a", two, None),
        ]


async def test_a_rollback_and_an_aliass_targets_are_audited(
    stocked: RegistryFixture, caplog: pytest.LogCaptureFixture
) -> None:
    async with stocked.opened() as registry:
        one = (await registry.register_adapter("a", "plain"))[0]["digest"]
        two = (await registry.register_adapter("a", "other", replace=True))[0]["digest"]
        caplog.set_level("INFO", "adapterd.audit")
        await registry.roll_back("a")
        await registry.aliases.put_alias("prod", [AliasTarget("a", 9)], None)
        await registry.aliases.put_alias("prod", [AliasTarget("a", 1, one)], None)
        await registry.aliases.remove_alias("prod")
    assert audited(caplog) == [
        ("replaced", "a", two, one),
        ("alias set", "prod", None, "a 9"),
        ("alias set", "prod", "a 9", f"a@{one} 1"),
        ("alias removed", "prod", f"a@{one} 1", None),
    ]


async def test_what_changed_while_nothing_ran_is_audited_at_the_start(
    catalog: RegistryFixture, plain: Path, other: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "adapterd.audit")
    put(plain, catalog.root, "a")
    put(plain, catalog.root, "b")
    async with catalog.opened() as registry:
        digest = registry.card_of("a")["digest"]
    assert audited(caplog) == [("found", "a", None, digest), ("found", "b", None, digest)]
    shutil.rmtree(catalog.root / "a")
    shutil.copytree(other, catalog.root / "b", dirs_exist_ok=True)
    async with catalog.opened() as registry:
        changed = registry.card_of("b")["digest"]
    assert audited(caplog) == [("gone", "a", digest, None), ("found", "b", digest, changed)]
    (catalog.root / "b" / "adapter_config.json").write_text("{")
    async with catalog.opened():
        assert audited(caplog) == [], "one that cannot be read is still the same registration"


# ---- prefetching


async def test_a_prefetch_names_each_residency_and_asks_the_device_for_what_is_not_on_it(
    stocked: RegistryFixture,
) -> None:
    async with stocked.opened() as registry:
        engine = device(registry)
        cards = {}
        for id, source in (("a", "plain"), ("b", "other")):
            cards[id], _ = await registry.register_adapter(id, source, preload=False)
        engine.tiers[cards["b"]["digest"]] = Tier.DEVICE
        engine.preloads.clear()
        assert registry.prefetch_adapters(["b", "a", "a"]) == [
            {"id": "b", "residency": "device"},
            {"id": "a", "residency": "disk"},
        ]
        assert engine.preloads == [cards["a"]["digest"]]


async def test_a_prefetch_that_names_an_unknown_or_a_broken_one_begins_nothing(
    stocked: RegistryFixture,
) -> None:
    (stocked.root / "broken").mkdir()
    (stocked.root / "broken" / "adapter_config.json").write_text("{}")
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain", preload=False)
        device(registry).preloads.clear()
        with pytest.raises(AdapterNotFound, match="'none'"):
            registry.prefetch_adapters(["a", "none"])
        with pytest.raises(AdapterInvalid):
            registry.prefetch_adapters(["a", "broken"])
        assert device(registry).preloads == []
