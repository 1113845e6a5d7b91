"""What config and header alone show to be wrong, and that looking costs no more than the header."""

from __future__ import annotations

import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import pytest

from service.catalog.validator import header as inspection
from service.catalog.validator.header import CONFIG, WEIGHTS
from service.errors import AdapterInvalid

from ... import making


def refused(folder: Path, max_rank: int = 64) -> str:
    """The problems that the quick check, then the patterns, and then the header find."""

    def look() -> None:
        inspection.quick_check(folder, max_rank)
        if problems := inspection.pattern_problems(inspection.read_config(folder)):
            raise AdapterInvalid(problems)
        inspection.read_header(folder / WEIGHTS)

    with pytest.raises(AdapterInvalid) as caught:
        look()
    assert str(folder) not in str(caught.value.details)
    return "\n".join(caught.value.problems)


def without(key: str) -> Any:
    return lambda config: {name: value for name, value in config.items() if name != key}


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"r": 50000}, "`r`: rank 50000 is over the limit of 64"),
        ({"rank_pattern": {"q_proj": 65}}, "'q_proj': rank 65"),
        ({"r": 0}, "`r`"),
        ({"r": -4}, "`r`"),
        ({"r": 4.5}, "`r`"),
        ({"r": True}, "`r`"),
        ({"r": None}, "`r`"),
        ({"lora_alpha": "16"}, "`lora_alpha`"),
        ({"lora_alpha": float("nan")}, "`lora_alpha`"),
        ({"lora_alpha": float("inf")}, "`lora_alpha`"),
        (without("r"), "`r` is missing"),
        (without("lora_alpha"), "`lora_alpha` is missing"),
        ({"lora_dropout": 2}, "`lora_dropout`"),
        ({"use_rslora": "yes"}, "`use_rslora`"),
        ({"rank_pattern": {"q_proj": "8"}}, "`rank_pattern`"),
        ({"alpha_pattern": [1]}, "`alpha_pattern`"),
        ({"target_modules": 5}, "`target_modules`"),
        ({"alora_invocation_tokens": "hi"}, "`alora_invocation_tokens`"),
        ({"target_modules": "(.*q_proj"}, "`target_modules` is not a valid regex"),
        ({"exclude_modules": "*x"}, "`exclude_modules` is not a valid regex"),
        ({"alpha_pattern": {"[": 4}}, "`alpha_pattern` is not a valid regex"),
        ({"rank_pattern": {f"layer{i}": 4 for i in range(5000)}}, "5000 entries"),
        ({"base_model_name_or_path": 7}, "`base_model_name_or_path`"),
        ({"base_model_name_or_path": "\ud800"}, "`base_model_name_or_path` holds half a character"),
        ({"peft_version": "0.21\udc00"}, "`peft_version` holds half a character"),
        ({"\ud800": True}, r"`\ud800` holds half a character"),
        ({"future": [float("nan")]}, "`future` holds"),
        ({"peft_type": "IA3", "lora_alpha": float("inf")}, "`lora_alpha` holds"),
        (without("peft_type"), "`peft_type` is missing"),
        (lambda _: {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "a model's config.json"),
        (
            lambda _: {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2}},
            "MLX",
        ),
    ],
)
def test_a_config_that_is_wrong_is_refused_naming_the_key(
    plain: Path, tmp_path: Path, config: Any, word: str
) -> None:
    assert word in refused(making.edit(plain, tmp_path / "a", config))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "[" * 100_000,
        '{"r": ' + "9" * 5000 + "}",
        "\ud800".encode("utf-8", "surrogatepass"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(plain: Path, tmp_path: Path, text: str | bytes) -> None:
    folder = making.edit(plain, tmp_path / "a")
    (folder / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert CONFIG in refused(folder)


def test_a_huge_config_is_refused_by_its_size(plain: Path, tmp_path: Path) -> None:
    folder = making.edit(plain, tmp_path / "a")
    with (folder / CONFIG).open("wb") as file:
        file.truncate(100_000_000)
    assert "100000000 bytes" in refused(folder)


# ---- weights


def test_an_mlx_pair_is_recognised(plain: Path, tmp_path: Path) -> None:
    folder = making.edit(plain, tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "adapters.safetensors")
    assert "MLX" in refused(folder)


def test_missing_weights_are_told_from_a_pickle_and_from_a_split_file(plain: Path, tmp_path: Path) -> None:
    folder = making.edit(plain, tmp_path / "a")
    (folder / WEIGHTS).unlink()
    assert f"{WEIGHTS} is missing" in refused(folder)
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    assert "several files" in refused(folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    assert "pickle" in refused(folder)


def test_a_pickle_beside_good_weights_is_ignored(plain: Path, tmp_path: Path) -> None:
    folder = making.edit(plain, tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))
    inspection.quick_check(folder, 64)


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[Any], start: Any = 0, end: Any = None, dtype: str = "F32") -> dict[str, Any]:
    return {
        "dtype": dtype,
        "shape": shape,
        "data_offsets": [start, end if end is not None else 4 * shape[0] + start],
    }


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "truncated: 0 bytes"),
        (b"short", "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16777216\n", "git-lfs pointer"),
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
        (pickle.dumps({"a": 1}), "pickle"),
        (b"PK\x03\x04" + bytes(40), "pickle"),
        (struct.pack("<Q", 1 << 62) + b"{}", "truncated"),
        (packed({}), "0 tensors"),
        (packed({"__metadata__": {"format": "pt"}}), "0 tensors"),
        (packed(b"nonsense"), "not JSON"),
        (packed(b"[" * 100_000), "not JSON"),
        (packed([]), "not an object"),
        (packed({"a": entry([4])}, bytes(8)), "truncated"),
        (packed({"a": entry([4])}, bytes(24)), "too long"),
        (packed({"a": entry([4], 0, 8)}, bytes(8)), "damaged entry for 'a'"),
        (packed({"a": entry([-1], 0, -4)}), "damaged entry"),
        (packed({"a": entry([1.0], 0, 4)}, bytes(4)), "damaged entry"),
        (packed({"a": entry([4], dtype="F31")}, bytes(16)), "damaged entry"),
        (packed({"a": 5}), "damaged entry"),
        (packed({"a": entry([4]), "b": entry([4], 8)}, bytes(24)), "overlap or leave a gap"),
        (packed({"a": entry([4]), "b": entry([4], 24)}, bytes(40)), "overlap or leave a gap"),
    ],
)
def test_weights_that_are_not_whole_are_refused_with_a_hint(
    plain: Path, tmp_path: Path, content: bytes, word: str
) -> None:
    folder = making.edit(plain, tmp_path / "a")
    (folder / WEIGHTS).write_bytes(content)
    assert word in refused(folder)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x10280])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    text = json.dumps({"a": entry([4])}).encode().ljust(length)
    (tmp_path / WEIGHTS).write_bytes(packed(text, bytes(16)))
    assert inspection.read_header(tmp_path / WEIGHTS).header_bytes == length + 8


def test_half_of_the_weights_is_truncated(plain: Path, tmp_path: Path) -> None:
    folder = making.edit(plain, tmp_path / "a")
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    assert "truncated" in refused(folder)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A file of 100 GB is described at once: its data is a hole that nobody reads."""
    size = 100_000_000_000
    (tmp_path / WEIGHTS).write_bytes(packed({"a": entry([size // 4])}))
    start = (tmp_path / WEIGHTS).stat().st_size
    with (tmp_path / WEIGHTS).open("r+b") as file:
        file.truncate(start + size)
    header = inspection.read_header(tmp_path / WEIGHTS)
    assert (header.file_bytes, header.header_bytes, header.tensor_bytes) == (start + size, start, size)


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    assert f"{CONFIG} is missing" in refused(tmp_path)


def test_a_glance_compiles_no_pattern(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these takes milliseconds, a config of 1 MB many minutes; and the quick check cannot
    be killed.
    """
    folder = making.edit(plain, tmp_path / "a", {"target_modules": "(?i)" + "[\u0100-\uffff]" * 100})
    monkeypatch.setattr(re, "compile", pytest.fail)
    inspection.quick_check(folder, 64)
