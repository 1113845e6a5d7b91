"""The worker serves only the bytes that were registered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from service.errors import AdapterInvalid
from service.model.adapter_file import read_files
from tests import making

from .test_peft_fallback import fallback_plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return making.noise(tmp_path / "a", making.tiny(tmp_path / "base"), 1)


def test_unchanged_files_give_their_tensors(folder: Path) -> None:
    config, found = read_files(fallback_plan(folder))
    assert config == (folder / making.CONFIG).read_bytes()
    assert found.keys() == making.tensors(folder).keys()
    assert all(torch.equal(tensor, making.tensors(folder)[name]) for name, tensor in found.items())


@pytest.mark.parametrize("name", [making.CONFIG, making.WEIGHTS])
def test_files_that_changed_on_disk_are_refused(folder: Path, name: str) -> None:
    plan = fallback_plan(folder)
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(AdapterInvalid, match="changed on disk"):
        read_files(plan)


def test_files_that_are_gone_are_refused(folder: Path) -> None:
    with pytest.raises(AdapterInvalid, match="cannot be read any more"):
        read_files(replace(fallback_plan(folder), weights=str(folder / "none")))
