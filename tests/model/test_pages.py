"""Memory that is given back keeps what it held."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from service.model.memory import HugePageArena, lazy_zeros, release_pages, trim_heap


def test_released_pages_come_back_as_they_were(tmp_path: Path) -> None:
    made = torch.arange(1 << 20, dtype=torch.float32)
    save_file({"w": made}, tmp_path / "w.safetensors")
    for held in (load_file(tmp_path / "w.safetensors")["w"], made.clone(), made[3:9].clone()):
        want = held.clone()
        release_pages(held)
        trim_heap()
        assert torch.equal(held, want)


def test_an_arena_keeps_copies_apart_until_it_is_full() -> None:
    arena = HugePageArena(192)
    first, second = arena.copy_in(torch.ones(3)), arena.copy_in(torch.full((20,), 2.0))
    assert first.tolist() == [1.0] * 3
    assert second.tolist() == [2.0] * 20
    with pytest.raises(ValueError, match="buffer"):
        arena.copy_in(torch.ones(17))


def test_zeros_are_zeros_of_the_asked_shape() -> None:
    for huge in (False, True):
        made = lazy_zeros(3, 5, dtype=torch.bfloat16, huge=huge)
        assert made.shape == (3, 5)
        assert not made.any()
