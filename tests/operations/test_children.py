"""What the processes below the service are started with: whose modules, which encoding, no progress bars."""

from __future__ import annotations

import os
import socket
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest

from service.child_process import start_child
from service.exit_codes import ExitCode

from .processes import REAL, run

FALSE = "raise SystemExit('a module of the working directory was imported')\n"


def fill_folder(folder: Path) -> Path:
    """Modules that have names of the library's and of the service's."""
    (folder / "service").mkdir()
    for name in ("queue.py", "service/__init__.py"):
        (folder / name).write_text(FALSE, encoding="utf-8")
    return folder


def ask_child(**variables: str) -> dict[str, Any]:
    """What a child of ours says of itself."""
    ours, theirs = Pipe()
    with ours:
        with theirs:
            process = start_child("tests.operations.child", theirs, environment=os.environ | variables)
        said: dict[str, Any] = ours.recv()
        assert process.wait() == 0
    return said


def test_a_child_finds_no_modules_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fill_folder(tmp_path))
    said = ask_child()
    assert said["folder"] == str(tmp_path)
    assert not {str(tmp_path), ""} & set(said["path"])


def test_the_service_itself_finds_none_there_either(tmp_path: Path) -> None:
    """It gets as far as its socket, by when all is imported; only its own name is another's here."""
    fill_folder(tmp_path)
    (tmp_path / "service" / "__init__.py").unlink()
    (tmp_path / "service").rmdir()
    with socket.create_server(("127.0.0.1", 0)) as held:
        ran = run("serve", "--port", str(held.getsockname()[1]), program=REAL, cwd=tmp_path)
    assert (ran.returncode, ran.stderr.partition(b": ")[0]) == (ExitCode.REFUSED, b"ADAPTERD_PORT")


def test_a_child_reads_and_writes_utf8_whatever_the_locale() -> None:
    said = ask_child(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    assert (said["opens"], said["names"]) == ("utf-8", "utf-8")


def test_a_child_shows_no_progress() -> None:
    assert ask_child(TQDM_DISABLE="0", HF_HUB_DISABLE_PROGRESS_BARS="0")["bars"] == []
