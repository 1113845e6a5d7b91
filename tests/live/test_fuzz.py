"""schemathesis over /openapi.json, as its command line runs it: no 5xx, and no status, type or
shape that is not documented.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.bench.servers import started
from tests import making

from .conftest import SETTINGS

# What no schema can say is refused too (which ids the vocabulary has, which modules the base), so a
# request that fits it may be. A path that hides a longer one takes that one's methods: an id may
# have a slash.
LEFT_OUT = ("positive_data_acceptance", "unsupported_method", "allow_header_conformance")
EXAMPLES = 10


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    base = making.tiny(tmp_path / "base")
    making.noise(tmp_path / "adapters" / "noise", base)
    with started(
        {**SETTINGS, "base": str(base), "adapters_dir": str(tmp_path / "adapters")}, tmp_path / "log"
    ) as server:
        yield server.url


def test_the_api_is_what_it_says_it_is(url: str, tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "schemathesis")
    line = [program, "run", f"{url}/openapi.json", "--phases", "examples,coverage,fuzzing"]
    line += ["--checks", "all", "--exclude-checks", ",".join(LEFT_OUT)]
    line += ["--max-examples", str(EXAMPLES), "--seed", "1", "--no-color"]
    line += ["--generation-database", "none", "--request-timeout", "30"]
    ran = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert " generated, " in ran.stdout, ran.stdout[-2000:]
