"""How much an adapter changes, held to the product itself; measured once for each content, and
never of changed files.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from service.catalog import norms
from service.catalog.validator.check import measure_norms as measured
from service.catalog.validator.check import product_norm, validate_adapter
from service.catalog.validator.messages import ValidatedAdapter
from service.catalog.validator.process import Validator
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import LoraLayerSpec
from service.errors import AdapterInvalid, AdapterNotFound

from .. import making
from .conftest import RegistryFixture

LAYER0 = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {LAYER0: 64}},
        {"rank_pattern": {LAYER0: 16}},
        {"use_dora": True},
        {"targets": ("lm_head", "o_proj")},
    ],
    ids=str,
)
def test_norms_are_those_of_the_change_that_peft_makes(
    skeleton: Skeleton, base: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    folder = making.noise(tmp_path / "adapter", base, 5, **recipe)
    validated = validate_adapter(skeleton, folder, 64)
    found = measured(validated.adapter, validated.layers)
    model = making.served(base, folder)
    deltas = {
        name.removeprefix("base_model.model."): float(layer.get_delta_weight("default").norm())
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert found == pytest.approx(deltas, rel=1e-5)
    assert min(found.values()) > 0


def test_bfloat16_factors_are_multiplied_exactly(tmp_path: Path) -> None:
    a, b = torch.randn(8, 300).bfloat16(), torch.randn(200, 8).bfloat16()
    assert product_norm(a, b) == pytest.approx(float((b.double() @ a.double()).norm()), rel=1e-12)
    assert product_norm(torch.zeros(2, 3), torch.ones(3, 2)) == 0


def test_changed_files_are_not_measured(skeleton: Skeleton, plain: Path, tmp_path: Path) -> None:
    folder = making.edit(plain, tmp_path / "edited")
    validated = validate_adapter(skeleton, folder, 64)
    making.edit(plain, folder, weights=lambda tensors: {key: tensor * 2 for key, tensor in tensors.items()})
    with pytest.raises(AdapterInvalid, match="changed on disk"):
        measured(validated.adapter, validated.layers)


def test_ranks_and_norms_are_told_by_layer_and_what_lies_in_none_apart() -> None:
    ranks = {
        "model.layers.0.x.q": 4,
        "model.layers.2.x.q": 8,
        "model.layers.2.y.q": 16,
        "m.h.1.v": 2,
        "lm_head": 1,
    }
    sizes = {
        "model.layers.0.x.q": 3.0,
        "model.layers.2.x.q": 1.0,
        "model.layers.2.y.q": 1.0,
        "m.h.1.v": 5.0,
        "lm_head": 2.0,
    }
    told = norms.group_by_layer(
        [LoraLayerSpec(module, rank, 1.0, "a", "b") for module, rank in ranks.items()], sizes, 3
    )
    assert told == {
        "layers": 3,
        "modules": [
            {"name": "q", "ranks": [4, None, 16], "norms": [3.0, None, pytest.approx(2**0.5)]},
            {"name": "v", "ranks": [None, 2, None], "norms": [None, 5.0, None]},
        ],
        "outside": [{"name": "lm_head", "rank": 1, "norm": 2.0}],
    }
    deep = norms.group_by_layer([LoraLayerSpec("layers.4.q", 2, 1.0, "a", "b")], {"layers.4.q": 1.0}, 2)
    assert (deep["layers"], deep["modules"][0]["norms"]) == (5, [None] * 4 + [1.0])
    assert norms.group_by_layer([], {}, 3) == {"layers": 3, "modules": [], "outside": []}


class Counting(Validator):
    """Measures when it is let;

    `asked` remembers of what, and the first answer is a refusal when `refuse` is set.
    """

    def __init__(self) -> None:
        super().__init__(64)
        self.asked: list[str] = []
        self.refuse = False

    async def measure_norms(self, validated: ValidatedAdapter) -> dict[str, float]:
        self.asked.append(validated.adapter.digest)
        await asyncio.sleep(0)
        if self.refuse:
            self.refuse = False
            raise AdapterInvalid(["gone"])
        return {"lm_head": 1.0}


@pytest.mark.anyio
async def test_each_content_is_measured_once_however_many_ask_and_a_failure_is_not_remembered(
    skeleton: Skeleton, plain: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = validate_adapter(skeleton, plain, 64), validate_adapter(skeleton, other, 64)
    validator = Counting()
    known = norms.NormCache(validator)
    assert (
        list(await asyncio.gather(known.measure_norms(one), known.measure_norms(one)))
        == [{"lm_head": 1.0}] * 2
    )
    await known.measure_norms(one)
    assert len(validator.asked) == 1
    validator.refuse = True
    with pytest.raises(AdapterInvalid, match="gone"):
        await known.measure_norms(two)
    await known.measure_norms(two)
    assert validator.asked == [one.adapter.digest, two.adapter.digest, two.adapter.digest]
    monkeypatch.setattr(norms, "KEPT", 2)
    await known.measure_norms(
        validate_adapter(skeleton, making.edit(plain, plain.parent / "third", {"lora_dropout": 0.5}), 64)
    )
    await known.measure_norms(one)
    assert validator.asked[-1] == one.adapter.digest, "only as many as KEPT are remembered"


@pytest.mark.anyio
async def test_a_registered_adapter_says_where_it_acts(catalog: RegistryFixture, base: Path) -> None:
    making.noise(catalog.root / "some", base, 3, layers_to_transform=[1])
    (catalog.root / "broken").mkdir()
    (catalog.root / "broken" / making.CONFIG).write_text("{")
    async with catalog.opened() as registry:
        told = await registry.measure_norms("some")
        assert (told["id"], told["digest"], told["layers"]) == ("some", registry.card_of("some")["digest"], 2)
        assert [(one["name"], one["norms"][0], one["norms"][1] > 0) for one in told["modules"]] == [
            ("q_proj", None, True),
            ("v_proj", None, True),
        ]
        with pytest.raises(AdapterNotFound):
            await registry.measure_norms("none")
        with pytest.raises(AdapterInvalid):
            await registry.measure_norms("broken")


def test_a_norm_over_all_numbers_can_still_be_told() -> None:
    """JSON has neither infinity nor NaN, and factors of 1e300 make both."""
    names = ["layers.0.q", "layers.1.q"]
    told = norms.group_by_layer(
        [LoraLayerSpec(name, 2, 1.0, "a", "b") for name in names],
        {names[0]: float("inf"), names[1]: float("nan")},
        2,
    )
    assert json.dumps(told, allow_nan=False).count("e+308") == 2
