"""What a system forbids is skipped, and each reason is a line at the end of the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .processes import LIMIT_S, ROOT

FORBIDDEN = """
import pytest
from tests.operations.processes import require_command

@pytest.mark.parametrize("number", [1, 2, 3])
def test_it(number):
    require_command("no-such-program")
"""


def test_each_reason_is_one_line_at_the_end_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "test_forbidden.py").write_text(FORBIDDEN, encoding="utf-8")
    where = ["-c", "pyproject.toml", f"--rootdir={ROOT}", "-p", "no:cacheprovider", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", "--quiet", *where]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    *_, line, total = ran.stdout.splitlines()
    assert line.startswith("SKIPPED [3] ")
    assert line.endswith(": this system does not let us use no-such-program")
    assert total.startswith("3 skipped")
