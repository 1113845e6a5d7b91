"""Several adapters as one content: what may be mixed, what the mix is named, how long the device has it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.catalog import mixes
from service.catalog.mixes import MixTable, make_mix
from service.catalog.versions import AdapterVersion
from service.core.adapter import ExecutionPath, LoraLayerSpec
from service.errors import AdapterUnsupported, BadRequest, NotFound
from tests.doubles.engine import FakeEngine
from tests.doubles.registry import make_version

from .conftest import RegistryFixture
from .test_registry import device, settle, stocked

__all__ = ["stocked"]

pytestmark = pytest.mark.anyio
POOL = 64


def version_of(id: str, rank: int = 4, module: str = "q_proj") -> AdapterVersion:
    """A version whose content is named after its id."""
    version = make_version(id, f"sha256:{id}", Path("/nowhere"))
    assert version.validated is not None
    spec = LoraLayerSpec(module, rank, 1.0, "a", "b")
    adapter = replace(version.validated.adapter, rank=rank, patches=(spec,))
    return replace(version, validated=replace(version.validated, adapter=adapter))


def test_a_mix_is_named_by_contents_weights_and_order() -> None:
    a, b = version_of("a"), version_of("b")
    digest = make_mix([a, b], [0.7, 0.3], POOL).digest
    assert digest == make_mix([replace(a, id="c"), b], [0.7, 0.3], POOL).digest
    others = [make_mix([a, b], [0.7, 0.31], POOL), make_mix([b, a], [0.3, 0.7], POOL)]
    assert len({digest, *(mix.digest for mix in others)}) == 3


def test_a_mix_takes_the_rows_of_the_layer_where_most_meet() -> None:
    parts = [version_of("a", 8), version_of("b", 4), version_of("c", 9, "v_proj")]
    mix = make_mix(parts, [1, 1, 1], POOL)
    assert (mix.adapter.rank, mix.adapter.size) == (12, 3000)


def test_parts_that_do_not_fit_the_pool_together_are_refused() -> None:
    with pytest.raises(BadRequest, match="rank 80 together, and the pool has 64"):
        make_mix([version_of("a", 40), version_of("b", 40)], [1, 1], POOL)


DORA = (LoraLayerSpec("q_proj", 4, 1.0, "a", "b", "magnitude"),)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"patches": DORA}, "DoRA"), ({"lane": ExecutionPath.SHADOW}, "PEFT"), ({"invocation": (5,)}, "aLoRA")],
)
def test_what_is_more_than_plain_lora_is_refused_by_name(changes: dict[str, Any], kind: str) -> None:
    special = version_of("special")
    assert special.validated is not None
    adapter = replace(special.validated.adapter, **changes)
    special = replace(special, validated=replace(special.validated, adapter=adapter))
    with pytest.raises(AdapterUnsupported) as refusal:
        make_mix([version_of("a"), special], [1, 1], POOL)
    assert "special" in str(refusal.value.message)
    assert kind in str(refusal.value.message)


async def test_the_device_has_a_mix_once_and_keeps_some_idle_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixes, "IDLE", 2)
    engine = FakeEngine()
    table = MixTable(engine)
    made = [make_mix([version_of("a"), version_of("b")], [1.0, weight], POOL) for weight in range(4)]
    with table.lease_mix(made[0]), table.lease_mix(made[0]):
        for mix in made[1:]:
            with table.lease_mix(mix):
                pass
        await settle()
        assert engine.dropped == [made[1].digest]
    await settle()
    assert engine.dropped == [made[1].digest, made[2].digest]
    assert set(engine.known) == {made[0].digest, made[3].digest}


async def test_a_mix_leases_its_parts_and_ends_with_their_content(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
        b, _ = await registry.register_adapter("b", "other")
        weights = [("a", 0.5), ("b", 2.0)]
        with registry.lease_mix(weights) as mix:
            assert [(part.id, part.weight) for part in mix.parts] == weights
            assert mix.parts[1].digest == b["digest"]
            assert [registry.card_of(id)["in_flight"] for id in ("a", "b")] == [1, 1]
            assert mix.digest in device(registry).known
        assert [registry.card_of(id)["in_flight"] for id in ("a", "b")] == [0, 0]
        await registry.remove_adapter("b")
        await settle()
        assert set(device(registry).dropped) == {mix.digest, b["digest"]}


async def test_a_mix_of_an_unknown_id_leases_nothing(stocked: RegistryFixture) -> None:
    async with stocked.opened() as registry:
        await registry.register_adapter("a", "plain")
        with pytest.raises(NotFound), registry.lease_mix([("a", 1), ("typo", 1)]):
            pass
        assert registry.card_of("a")["in_flight"] == 0
