"""Folders that cannot be written or read: one line names them and the variable that moves them, and what can
be done without them is done.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.bench.servers import free_port
from service import durable
from service.model import kernels, processor
from tests.model.test_loading import KINDS, written

from .places import LIMIT_S, MODES_COUNT, ROOT, mounted, require_modes, run_python

SOMEBODY = 12345  # a user without a name
WRITABLE = "import sys; from pathlib import Path; from service.durable import why_unwritable as why;"
WRITABLE += "print(why(Path(sys.argv[1])))"
CONVERT = """
import sys, torch
from pathlib import Path
from service.errors import SettingsError
from service.model import loading
for _ in range(2):
    try:
        print(loading.convert_gguf(Path(sys.argv[1]), torch.float32, loading.no_progress))
    except SettingsError as error:
        print(error)
"""


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    written(tmp_path / "base.gguf", KINDS.F32)
    return tmp_path / "base.gguf"


def test_a_folder_that_is_mounted_to_be_read_is_told_from_one_with_other_modes(tmp_path: Path) -> None:
    with mounted("ro") as folder:
        assert durable.why_unwritable(folder) == "Read-only file system"
        assert durable.why_unwritable(folder / "below" / "it") == "Read-only file system"
    require_modes()
    closed = tmp_path / "closed"
    closed.mkdir(0o755)
    os.chown(closed, SOMEBODY, SOMEBODY)
    assert run_python(WRITABLE, str(closed), by=MODES_COUNT) == "Permission denied\n"


def test_a_cache_that_another_user_made_and_closed_is_named(tmp_path: Path, gguf_file: Path) -> None:
    require_modes()
    cache = tmp_path / "cache"
    first, again = run_python(CONVERT, str(gguf_file), XDG_CACHE_HOME=str(cache)).splitlines()
    assert first == again
    for path in (cache, *cache.rglob("*")):
        os.chown(path, SOMEBODY, SOMEBODY)
    assert run_python(CONVERT, str(gguf_file), by=MODES_COUNT, XDG_CACHE_HOME=str(cache)).startswith(first), (
        "modes are the umask's, so that others can read it"
    )
    (Path(first) / "model.safetensors").chmod(0o600)
    line, _ = run_python(CONVERT, str(gguf_file), by=MODES_COUNT, XDG_CACHE_HOME=str(cache)).splitlines()
    assert line == (
        f"XDG_CACHE_HOME: the cache folder {cache}/adapterd cannot be read: Permission denied; "
        "XDG_CACHE_HOME can name another place"
    )


def test_a_service_whose_home_cannot_be_written_ends_with_one_line(tmp_path: Path, gguf_file: Path) -> None:
    names = ("XDG_CACHE_HOME", "XDG_STATE_HOME")
    kept = {name: text for name, text in os.environ.items() if name not in names}
    kept |= {"HOME": "/proc/nope", "ADAPTERD_BASE": str(gguf_file), "ADAPTERD_PORT": str(free_port())}
    kept |= {"ADAPTERD_ADAPTERS_DIR": str(tmp_path / "adapters"), "ADAPTERD_LOG_LEVEL": "error"}
    ran = subprocess.run(
        [sys.executable, "-m", "service", "serve"],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr.splitlines()[-1] == (
        "XDG_CACHE_HOME: the cache folder /proc/nope/.cache/adapterd cannot be written: "
        "No such file or directory; XDG_CACHE_HOME can name another place"
    )
    assert "Traceback" not in ran.stderr


@pytest.mark.skipif(processor.find_compiler() is None, reason="no C++ compiler")
def test_a_library_in_a_folder_that_nothing_may_run_from_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(kernels, "SOURCES", [source])
    monkeypatch.setattr(kernels, "FLAGS", ["-fPIC", "-shared"])
    with mounted("noexec") as cache:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        assert not kernels._load_library("auto")
    (said,) = caplog.messages
    assert said.startswith("kernels: off, their library cannot be loaded: ")
    assert said.endswith("failed to map segment from shared object")
