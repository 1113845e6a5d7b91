"""A base that does not fit is refused by both figures before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from service import limits
from service.core import capacity
from service.core.base_info import BLOCK_TOKENS
from service.errors import DoesNotFit, SettingsError
from service.limits import FreeMemory
from service.model import base_size, build, kv, loading
from service.model.gguf_header import count_values
from service.settings import Settings
from tests import making

CPU = torch.device("cpu")
LAYERS: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return making.tiny(tmp_path / "base", **LAYERS)


def leave(monkeypatch: pytest.MonkeyPatch, memory: int, swap: int = 0, disk: int = 1 << 40) -> None:
    left = FreeMemory(memory, swap, "the control group's memory.max is 700 MB")
    monkeypatch.setattr(limits, "free_memory", lambda: left)
    monkeypatch.setattr(limits, "free_disk", lambda folder: disk)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [("none", "float32"), ("none", "bfloat16"), ("nf4", "float32"), ("int8", "bfloat16")],
)
def test_the_size_is_that_of_the_loaded_weights(base: Path, quantization: str, dtype: str) -> None:
    values = {"base": str(base), "quantization": quantization, "dtype": dtype, "device": "cpu"}
    with making.quiet():
        model = loading.load_base(base, Settings.model_validate(values), loading.no_progress)
    loaded = sum(loading.resident_bytes(model).values())
    measured = base_size._measure_folder(base, loading.DTYPES[dtype], quantization)
    assert 0.97 * loaded < measured <= loaded


def test_what_is_stored_quantized_counts_as_it_is_stored(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    size = (base / "model.safetensors").stat().st_size
    assert base_size._measure_folder(base, torch.float32, "none") == size


def test_a_base_that_does_not_fit_is_refused_by_both_figures(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = base_size._measure_folder(base, torch.float32, "none")
    needed = weights + base_size.WORKING_BYTES
    leave(monkeypatch, needed - 1)
    with pytest.raises(DoesNotFit) as refused:
        base_size.check_base(base, "org/base", CPU, torch.float32, "none")
    assert str(refused.value) == (
        f"ADAPTERD_BASE: 'org/base' needs {round(needed / 1e6)} MB of memory ({round(weights / 1e6)} MB of "
        f"weights and 400 MB to work in); {round(needed / 1e6)} MB are free, for the control group's "
        "memory.max is 700 MB"
    )
    leave(monkeypatch, needed - 1, swap=1)
    base_size.check_base(base, "org/base", CPU, torch.float32, "none")


def test_a_gpu_has_its_own_memory(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 0)
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000_000, 24_000_000))
    base_size.check_base(base, "b", gpu, torch.bfloat16, "none")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000_000, 24_000_000))
    with pytest.raises(DoesNotFit, match="1 MB are free, for cuda:0 has 24 MB"):
        base_size.check_base(base, "b", gpu, torch.bfloat16, "none")


def test_a_folder_that_cannot_be_understood_is_left_to_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(monkeypatch, 0)
    (tmp_path / "config.json").write_text("{}")
    base_size.check_base(tmp_path, "b", CPU, torch.float32, "none")


def test_the_worker_asks_before_it_loads(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(monkeypatch, 1000)
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("it was loaded"))
    values = {"base": str(base), "device": "cpu", "dtype": "float32"}
    with pytest.raises(DoesNotFit, match="0 MB are free"):
        build.build_runner(Settings.model_validate(values), loading.no_progress)


# ---- GGUF files


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A GGUF file of 3 · 32 + 64 values, with metadata of all kinds before them."""
    file = tmp_path / "base.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_array("words", ["", "a", "ü" * 300])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("shares", [0.5, 1.5])
    writer.add_float32("share", 0.5)
    writer.add_uint64("most", 1 << 40)
    writer.add_bool("is", True)
    writer.add_string("text", "x" * 1000)
    writer.add_tensor("one", np.zeros((3, 32), np.float32))
    quantized = gguf.quants.quantize(np.zeros((2, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("two", quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_values_of_a_gguf_file_are_counted_as_the_library_counts_them(packed: Path) -> None:
    assert count_values(packed) == 3 * 32 + 64
    demo = loading.demo_file()
    assert count_values(demo) == 134_515_008


@pytest.mark.parametrize("length", [0, 3, 4, 20, 100, 400, 1500])
def test_a_gguf_file_that_is_cut_or_none_is_told(packed: Path, length: int) -> None:
    packed.write_bytes(packed.read_bytes()[:length])
    with pytest.raises(ValueError, match="no GGUF file"):
        count_values(packed)


def test_a_gguf_file_that_says_what_cannot_be_is_told(packed: Path) -> None:
    whole = packed.read_bytes()
    at = whole.rindex(b"one") + 3
    packed.write_bytes(whole[:at] + b"\xff\xff\xff\xff" + whole[at + 4 :])
    with pytest.raises(ValueError, match="damaged"):
        count_values(packed)
    at = whole.index(b"numbers") + 7
    packed.write_bytes(whole[: at + 8] + b"\xff" * 8 + whole[at + 16 :])
    with pytest.raises(ValueError, match="offset-sized"):
        count_values(packed)


def test_a_conversion_needs_all_values_in_float32_and_once_more(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 160 * (4 + 2) + base_size.WORKING_BYTES
    leave(monkeypatch, needed)
    base_size.check_conversion(packed, torch.bfloat16, packed.parent)
    leave(monkeypatch, needed - 1)
    with pytest.raises(DoesNotFit, match=r"'base\.gguf' needs 400 MB of memory \(to be converted, once\)"):
        base_size.check_conversion(packed, torch.bfloat16, packed.parent)
    leave(monkeypatch, needed, disk=319)
    with pytest.raises(DoesNotFit, match="on the disk of the cache folder"):
        base_size.check_conversion(packed, torch.bfloat16, packed.parent)


def test_converting_asks_first(
    packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    leave(monkeypatch, 1000)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.raises(DoesNotFit):
        loading.convert_gguf(packed, torch.float32, loading.no_progress)
    assert not list(cache.rglob("*.safetensors"))


# ---- what the rest of a start takes


def test_no_more_threads_compute_than_the_quota_keeps_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for usable, threads in ((8, 2), (1, 1)):
            monkeypatch.setattr(limits, "usable_processors", lambda usable=usable: usable)
            build._limit_threads(None)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_context_that_the_group_has_no_memory_for_is_refused_by_the_setting(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"base": str(base), "device": "cpu", "dtype": "float32", "compile": "off", "max_context": 64}
    settings = Settings.model_validate(values)
    with making.quiet():
        model = loading.load_base(base, settings, loading.no_progress)
    probed = build._probe_base(model, settings)
    pool = capacity.pool_bytes(loading.list_linear_kinds(model, ()), settings.pool_rank, 4)
    block = BLOCK_TOKENS * kv.bytes_per_position(probed.attention, torch.float32)
    leave(monkeypatch, pool + 4 * 4 * block)  # a quarter of what the pool leaves
    assert build._compute_capacity(probed)[1:] == (64, 4, 0)
    leave(monkeypatch, pool + 4 * 3 * block)
    with pytest.raises(DoesNotFit, match="ADAPTERD_MAX_CONTEXT: 64 tokens do not fit into memory; 48 do"):
        build._compute_capacity(probed)
    assert issubclass(DoesNotFit, SettingsError)
