"""One service at a time has a directory of registrations, the next is told who, and a killed one blocks
nobody.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from service import durable, file_lock
from service.catalog.ownership import LOCK, claim_directory
from service.errors import DirectoryHeld

ROOT = Path(__file__).parents[2]


def test_the_second_is_told_who_has_it_and_the_third_gets_it_once_that_is_closed(tmp_path: Path) -> None:
    first = claim_directory(tmp_path / "adapters", 8080)
    assert first is not None
    with pytest.raises(DirectoryHeld) as caught:
        claim_directory(tmp_path / "adapters", 9090)
    said = (
        rf"ADAPTERD_ADAPTERS_DIR: {tmp_path}/adapters is held by another service, process {os.getpid()} "
        rf"on the host {re.escape(socket.gethostname())}, port 8080, since 20\S+Z: stop that one, name "
        r"another directory, or share this one \(ADAPTERD_SHARED\)"
    )
    assert re.fullmatch(said, str(caught.value))
    first.close()
    third = claim_directory(tmp_path / "adapters", 9)
    assert third is not None
    with pytest.raises(DirectoryHeld, match="port 9, since"):
        claim_directory(tmp_path / "adapters", 8080)
    third.close()


def test_those_that_follow_each_other_have_it_together_and_nobody_else_beside_them(tmp_path: Path) -> None:
    first, second = (claim_directory(tmp_path, port, shared=True) for port in (1, 2))
    assert first is not None
    assert second is not None
    for lock in (first, second):
        with pytest.raises(DirectoryHeld):
            claim_directory(tmp_path, 3)
        lock.close()
    alone = claim_directory(tmp_path, 3)
    assert alone is not None
    with pytest.raises(DirectoryHeld), alone:
        claim_directory(tmp_path, 1, shared=True)


HOLDER = """
import sys, time
from pathlib import Path
from service.catalog.ownership import claim_directory
held = claim_directory(Path(sys.argv[1]), 8080)
print("held", flush=True)
time.sleep(1000)
"""


def test_a_service_that_was_killed_blocks_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(DirectoryHeld, match=f"process {holder.pid} on"):
                claim_directory(tmp_path, 1)
        finally:
            holder.kill()
    lock = claim_directory(tmp_path, 1)
    assert lock is not None
    lock.close()


def test_a_directory_that_can_only_be_read_is_anybodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "why_unwritable", lambda folder: "Read-only file system")
    assert claim_directory(tmp_path / "adapters", 1) is None
    assert not (tmp_path / "adapters").exists()


def test_where_nothing_can_be_locked_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*given: object, **named: object) -> bool:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(file_lock, "try_lock", refuse)
    assert claim_directory(tmp_path, 1) is None
    assert caplog.messages == [
        f"no other service may use {tmp_path}, which cannot be locked: No locks available"
    ]


def test_a_shorter_description_leaves_nothing_of_a_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("h" * 60, "short"):
        monkeypatch.setattr(socket, "gethostname", partial(str, name))
        lock = claim_directory(tmp_path, 1)
        assert lock is not None
        lock.close()
    assert "h" * 10 not in (tmp_path / LOCK).read_text()
    assert len((tmp_path / LOCK).read_text().splitlines()) == 1
