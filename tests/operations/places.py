"""Makes the places in which these tests run: small file systems, and users who are not allowed all.

What a host forbids is a skip that names it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT_S = 600  # against hangs only
# root, for whom the modes of other users' files count
MODES_COUNT = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


@contextmanager
def mounted(*options: str) -> Iterator[Path]:
    """A file system in memory of its own, with these options of mount."""
    folder = Path(tempfile.mkdtemp(prefix="adapterd-disk-")).resolve()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(("mode=755", *options)), "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        folder.rmdir()
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        # Files that are still open there keep it alive, not its name
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


def fill(folder: Path) -> None:
    """Takes all room that there is."""
    with suppress(OSError), (folder / "ballast").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def make_room(folder: Path) -> None:
    (folder / "ballast").unlink()


def run_python(code: str, *arguments: str, by: Sequence[str] = (), **environment: str) -> str:
    """What a program prints; `by` is the command that starts it. Fails where it does not end with 0."""
    line = [*by, sys.executable, "-c", code, *arguments]
    given = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    ran = subprocess.run(line, cwd=ROOT, env=given, capture_output=True, text=True, timeout=LIMIT_S)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def require_modes() -> None:
    """Skips where nobody can be made for whom modes count."""
    probe = subprocess.run([*MODES_COUNT, "true"], capture_output=True, check=False)
    if os.geteuid() != 0 or probe.returncode:
        pytest.skip("no user without all rights can be made here")
