"""What was validated once is not read again while nothing has changed, and is read again as soon as
anything has: a file, the base, a setting, the code, or the cache itself.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.catalog import validation_cache
from service.catalog.registry import Registry
from service.catalog.validation_cache import CACHE_FILE
from service.core.base_info import LayerLimit

from .. import kinds, making
from ..doubles.engine import FakeEngine
from .conftest import InProcessValidator, RegistryFixture

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]
LIMIT = LayerLimit("model.layers.*.self_attn.k_proj", "Odd", "gives a tuple", by_peft=False)


@pytest.fixture
def fleet(catalog: RegistryFixture, base: Path) -> RegistryFixture:
    """Two adapters of one recipe, and one each of DoRA, of PEFT's own path, and with a tokenizer's file."""
    for seed in (1, 2):
        making.noise(catalog.root / f"noise{seed}", base, seed)
    kinds.SHADOW["lora_bias"](catalog.root / "shadow", base)
    making.noise(catalog.root / "dora", base, 3, use_dora=True)
    making.noise(catalog.root / "text", base, 4)
    (catalog.root / "text" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}ß")
    return catalog


def reads(registry: Registry) -> list[str]:
    """The names of the folders that were validated."""
    assert isinstance(registry._validator, InProcessValidator)
    return sorted(folder.name for folder, _ in registry._validator.reads)


def describe(registry: Registry) -> dict[str, Any]:
    """All that is told of each adapter, and what the device was told."""
    device = registry._table.device
    assert isinstance(device, FakeEngine)
    ids = [card["id"] for card in registry.list_cards()]
    told = {id: (registry.summary_of(id), registry.draw_architecture(id)) for id in ids}
    return {"told": told, "device": device.known, "layers": list_layers(registry)}


def list_layers(registry: Registry) -> list[Any]:
    return [version.validated and version.validated.layers for version in registry.list_versions()]


async def start(fleet: RegistryFixture, **more: Any) -> tuple[list[str], dict[str, Any]]:
    async with fleet.opened(**more) as registry:
        return reads(registry), describe(registry)


ALL = ["dora", "noise1", "noise2", "shadow", "text"]


async def test_a_second_start_reads_nothing_and_knows_the_same(fleet: RegistryFixture) -> None:
    first, before = await start(fleet)
    again, after = await start(fleet)
    assert (first, again) == (ALL, [])
    assert after == before
    (fleet.root / ".adapterd.json").unlink()
    assert (await start(fleet))[0] == [], "found folders, too"


async def test_what_is_registered_while_it_runs_is_not_read_at_the_next_start_either(
    fleet: RegistryFixture, plain: Path
) -> None:
    async with fleet.opened() as registry:
        await registry.remove_adapter("noise1")
        await registry.register_adapter("posted", "noise1", preload=False)
        shutil.copytree(plain, fleet.root / "late")
        await registry.register_adapter("text", "late", preload=False, replace=True)
        before = describe(registry)
    again, after = await start(fleet)
    assert again == []
    assert after["told"] == before["told"]


def change_bytes(path: Path) -> None:
    """Another content of the same size, under the same times."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    while path.stat().st_ctime_ns == stat.st_ctime_ns:  # a file system's clock ticks
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


async def test_a_change_under_the_same_size_and_time_is_another_digest(
    fleet: RegistryFixture,
) -> None:
    _, before = await start(fleet)
    change_bytes(fleet.root / "noise1" / making.WEIGHTS)
    again, after = await start(fleet)
    assert again == ["noise1"]
    old, new = (told["told"]["noise1"][0] for told in (before, after))
    assert new["digest"] != old["digest"]
    assert "changed" in new["warnings"][0]
    assert (await start(fleet))[0] == []


async def test_files_that_come_go_or_are_replaced_are_read(fleet: RegistryFixture, other: Path) -> None:
    await start(fleet)
    (fleet.root / "text" / "chat_template.jinja").unlink()
    (fleet.root / "dora" / "vocab.txt").touch()
    shutil.rmtree(fleet.root / "noise2")
    shutil.copytree(other, fleet.root / "noise2")
    assert (await start(fleet))[0] == ["dora", "noise2", "text"]


async def test_another_limit_of_the_base_or_rank_or_code_reads_all(
    fleet: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    await start(fleet)
    assert (await start(fleet, limits=(LIMIT,)))[0] == ALL
    assert (await start(fleet, parameters=("model.layers.*.mlp.gate.weight",)))[0] == ALL
    assert (await start(fleet, max_rank=32))[0] == ALL
    assert (await start(fleet))[0] == [], "what was found before is still there"
    monkeypatch.setattr(validation_cache, "_hash_source", lambda: "another")
    assert (await start(fleet))[0] == ALL


async def test_a_change_of_the_bases_files_reads_all(
    fleet: RegistryFixture, base: Path, tmp_path: Path
) -> None:
    fleet.base = Path(shutil.copytree(base, tmp_path / "base"))
    await start(fleet)
    (fleet.base / ".checked").touch()  # what the cache of bases writes at each start of the machine
    assert (await start(fleet))[0] == []
    change_bytes(fleet.base / "model.safetensors")
    assert (await start(fleet))[0] == ALL


def test_the_code_is_that_of_the_whole_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "service"
    shutil.copytree(validation_cache.SOURCE, package, ignore=shutil.ignore_patterns("adapters", "static"))
    before = validation_cache._hash_source()
    monkeypatch.setattr(validation_cache, "SOURCE", package)
    assert validation_cache._hash_source() == before
    with (package / "catalog" / "facts.py").open("a") as file:
        file.write("\n")
    assert validation_cache._hash_source() != before


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def zero_middle(content: bytes) -> bytes:
    third = len(content) // 3
    return content[:third] + bytes(third) + content[2 * third :]


def change_letters(content: bytes) -> bytes:
    """Each still a line of JSON."""
    return content.replace(b'"q_proj"', b'"x_proj"')


DAMAGE = [cut, zero_middle, change_letters, lambda content: b"", lambda content: os.urandom(5000)]


@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_line_is_never_believed_and_is_written_anew(
    fleet: RegistryFixture, damage: Callable[[bytes], bytes]
) -> None:
    _, before = await start(fleet)
    cache = fleet.root / CACHE_FILE
    cache.write_bytes(damage(cache.read_bytes()))
    again, after = await start(fleet)
    assert again, "some of it was damaged"
    assert after == before
    assert (await start(fleet))[0] == []


async def test_a_cache_that_cannot_be_read_or_written_costs_time_alone(fleet: RegistryFixture) -> None:
    (fleet.root / CACHE_FILE).mkdir()
    for _ in range(2):
        first, told = await start(fleet)
        assert first == ALL
        assert {summary["state"] for summary, _ in told["told"].values()} == {"ready"}


async def test_what_nothing_uses_any_more_is_dropped_in_the_end(
    fleet: RegistryFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation_cache, "WASTE", 5)
    cache, sizes = fleet.root / CACHE_FILE, []
    for _ in range(8):
        for name in ALL:
            os.utime(fleet.root / name / making.WEIGHTS)
        assert (await start(fleet))[0] == ALL
        sizes.append(cache.stat().st_size)
    assert sizes[-1] < 4 * sizes[0]
    assert (await start(fleet))[0] == []


async def test_the_layers_of_one_recipe_are_kept_once(fleet: RegistryFixture) -> None:
    await start(fleet)
    lines = [line for line in (fleet.root / CACHE_FILE).read_text().splitlines() if line]
    kinds_of_lines = [line.split('"')[1] for line in lines]
    assert (kinds_of_lines.count("layers"), kinds_of_lines.count("adapter")) == (2, 5), (
        "with DoRA's magnitudes and without"
    )
