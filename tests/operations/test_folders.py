"""What an adapters directory can be like: not writable, and with names that are no text."""

from __future__ import annotations

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from ..catalog.conftest import RegistryFixture

pytestmark = pytest.mark.anyio
WARNING = "uploads will be refused: the adapters directory cannot be written: "


async def test_that_no_upload_can_be_stored_is_said_at_the_start(
    catalog: RegistryFixture, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / ".uploads").write_bytes(b"no folder, so that not even root can write into it")
    async with catalog.opened():
        assert f"{WARNING}Not a directory" in caplog.messages


async def test_a_directory_that_can_be_written_is_left_as_it_is(
    catalog: RegistryFixture, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        async with catalog.opened():
            assert (caplog.messages, os.listdir(root)) == ([], [])


async def test_a_folder_whose_name_is_no_text_keeps_no_other_from_being_registered(
    catalog: RegistryFixture, root: Path, plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(plain, root / "good")
    with suppress(OSError):  # some file systems have no such names
        shutil.copytree(plain, root / "bad\udcff")
    async with catalog.opened() as registry:
        assert [card["id"] for card in registry.list_cards()] == ["good"]
