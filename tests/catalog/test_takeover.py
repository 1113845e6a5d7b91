"""Registrations and uploads of an earlier version, which lie beside the shipped adapters, move to the state
folder once; nothing of them is lost on the way.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from service import durable
from service.catalog.sources.base import UPLOADS
from service.catalog.state_file import STATE_FILE
from service.catalog.takeover import take_over_state

UPLOAD = "a" * 64


@pytest.fixture
def old(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    (folder / UPLOADS / UPLOAD).mkdir(parents=True)
    (folder / UPLOADS / UPLOAD / "adapter_config.json").write_text("{}")
    (folder / UPLOADS / ".half").mkdir()
    (folder / STATE_FILE).write_text("registrations")
    (folder / "pirate").mkdir()
    return folder


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return tmp_path / "state" / "demo"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_they_move_and_the_shipped_adapters_stay(
    old: Path, new: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    take_over_state(old, new)
    assert (new / STATE_FILE).read_text() == "registrations"
    assert names(new) == [STATE_FILE, f"{UPLOADS}/{UPLOAD}/adapter_config.json"]
    assert [path.name for path in old.iterdir()] == ["pirate"]
    assert f"were moved from {old} to {new}" in caplog.text
    take_over_state(old, new)
    assert (new / STATE_FILE).read_text() == "registrations"


def test_newer_registrations_are_never_written_over(old: Path, new: Path) -> None:
    durable.write_file(new / STATE_FILE, b"newer")
    take_over_state(old, new)
    assert (new / STATE_FILE).read_bytes() == b"newer"
    assert (old / STATE_FILE).exists()


def test_an_interrupted_move_is_made_again(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        raise durable.NotWritten(path, OSError(28, "No space left on device"))

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write_file", refuse)
        take_over_state(old, new)
    assert "cannot be taken over: No space left on device" in caplog.text
    assert (old / STATE_FILE).exists()
    assert (old / UPLOADS / UPLOAD).exists()
    take_over_state(old, new)
    assert names(new) == [STATE_FILE, f"{UPLOADS}/{UPLOAD}/adapter_config.json"]


def test_where_there_are_none_nothing_is_made(old: Path, new: Path) -> None:
    (old / STATE_FILE).unlink()
    take_over_state(old, new)
    shutil.rmtree(old)
    take_over_state(old, new)
    assert not new.exists()
