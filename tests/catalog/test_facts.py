"""The numbers people ask for equal those counted by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.catalog import facts, summary_text
from service.catalog.facts import LoraModuleInfo
from service.catalog.validator import header
from service.catalog.validator.check import validate_adapter
from service.catalog.validator.header import TensorInfo
from service.catalog.validator.skeleton import Skeleton
from service.cli import inspect_folder
from service.core.base_info import LinearKind
from service.errors import AdapterInvalid, BadRequest

from .. import making


def adapted(
    module: str, rank: int = 4, scaling: float = 2.0, inside: int = 8, outside: int = 6, dtype: str = "F32"
) -> LoraModuleInfo:
    a, b = (
        TensorInfo(dtype, shape, shape[0] * shape[1] * header.ITEMSIZE[dtype])
        for shape in ((rank, inside), (outside, rank))
    )
    return LoraModuleInfo(module, scaling, a, b)


def test_modules_are_grouped_by_name_shape_rank_and_scaling() -> None:
    modules = [
        adapted("m.0.q"),
        adapted("m.1.q"),
        adapted("m.2.q", rank=8),
        adapted("m.3.q", scaling=1.0),
        adapted("m.0.v", outside=2),
    ]
    assert [
        (row["name"], row["count"], row["rank"], row["scaling"], row["parameters"])
        for row in facts.by_module(modules)
    ] == [
        ("q", 1, 4, 1.0, 56),
        ("q", 2, 4, 2.0, 112),
        ("q", 1, 8, 2.0, 112),
        ("v", 1, 4, 2.0, 40),
    ]


def test_megabytes_are_of_the_file_s_own_types() -> None:
    big = {"inside": 4096, "outside": 4096, "rank": 32}
    assert [
        facts.by_module([adapted("q", dtype=dtype, **big)])[0]["megabytes"] for dtype in ("F32", "BF16")
    ] == [1.05, 0.52]


def test_layers_are_counted_once_by_their_first_number() -> None:
    assert (
        facts.count_layers(["m.layers.0.q", "m.layers.0.v", "m.layers.1.experts.3.w1", "lm_head", "h.0"]) == 3
    )


def test_what_the_keys_alone_tell_is_what_peft_tells(skeleton: Skeleton, base: Path, tmp_path: Path) -> None:
    """For recipes whose patterns name whole modules, and with nothing but the folder."""
    recipes: tuple[dict[str, Any], ...] = (
        {},
        {"r": 16, "use_rslora": True},
        {"alpha_pattern": {"q_proj": 64}, "rank_pattern": {"v_proj": 2}},
        {"use_dora": True},
    )
    for i, recipe in enumerate(recipes):
        folder = making.noise(tmp_path / f"a{i}", base, 3, **recipe)
        told, read_facts = inspect_folder(folder), validate_adapter(skeleton, folder, 64).facts
        shared = told.keys() & read_facts.keys()
        assert shared >= {
            "by_module",
            "rank",
            "scaling",
            "layers",
            "modules",
            "target_modules",
            "parameters",
            "size",
        }
        assert {key: told[key] for key in shared} == {key: read_facts[key] for key in shared}


def test_a_folder_is_described_in_text_too(plain: Path) -> None:
    text = summary_text.format_summary(inspect_folder(plain))
    assert all(word in text for word in ("LORA", "q_proj", "1,792", "8 x F32", "4 x 64", "0.01 MB"))


def test_a_folder_of_another_peft_type_is_described_by_its_tensors(base: Path, tmp_path: Path) -> None:
    import peft

    folder = making.adapter(tmp_path / "a", base, peft.IA3Config(task_type="CAUSAL_LM"), seed=1)
    told = inspect_folder(folder)
    assert (told["peft_type"], told["by_module"], told["rank"], told["problems"]) == ("IA3", [], None, [])
    assert sum(row["parameters"] for row in told["tensors"]) == told["parameters"] == 384
    assert "layers.*.mlp.down_proj.ia3_l" in summary_text.format_summary(told)


def test_what_is_wrong_with_a_folder_is_said_beside_what_can_be_read(plain: Path, tmp_path: Path) -> None:
    told = inspect_folder(making.edit(plain, tmp_path / "a", {"lora_alpha": "16"}))
    assert told["parameters"] == 1792
    assert "! `lora_alpha`" in summary_text.format_summary(told)
    with pytest.raises(AdapterInvalid, match=r"adapter_config\.json is missing"):
        inspect_folder(tmp_path)


LINEARS = (LinearKind("q_proj", 64, 64, 2), LinearKind("v_proj", 64, 32, 2), LinearKind("v_proj", 64, 64, 1))


def test_a_forecast_counts_every_shape_of_a_name() -> None:
    told = facts.forecast_size(LINEARS, 100_000, 8, ["v_proj"], "bfloat16")
    assert [(row["count"], row["lora_A"], row["lora_B"]) for row in told["by_module"]] == [
        (2, [8, 64], [32, 8]),
        (1, [8, 64], [64, 8]),
    ]
    assert (told["parameters"], told["percent_of_base"]) == (2 * 768 + 1024, 2.56)
    assert "2.56 %" in summary_text.format_forecast(told)


@pytest.mark.parametrize(
    ("r", "modules", "dtype", "param"),
    [
        (0, ["q_proj"], "float32", "r"),
        (8, ["nope"], "float32", "target_modules"),
        (8, [], "float32", "target_modules"),
        (8, ["q_proj"], "int3", "dtype"),
    ],
)
def test_a_forecast_refuses_by_name(r: int, modules: list[str], dtype: str, param: str) -> None:
    with pytest.raises(BadRequest, match=param) as caught:
        facts.forecast_size(LINEARS, 1, r, modules, dtype)
    assert caught.value.param == param
