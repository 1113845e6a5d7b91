"""The package carries what the service needs and nothing that a service has left in the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .files import ROOT

LEFT = (".adapterd.json", ".adapterd.validated", ".uploads/abc/adapter_config.json", ".making-1/x")
BUILD = ("-c", "import setuptools; setuptools.setup()", "--quiet", "build", "--build-lib", "built")


def test_the_shipped_adapters_come_along_and_nobodys_registrations_do(tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    hidden = shutil.ignore_patterns("__pycache__", ".*")
    shutil.copytree(ROOT / "service", tmp_path / "service", ignore=hidden)
    demo = Path("service", "demo", "adapters")
    shipped = {path.relative_to(tmp_path) for path in (tmp_path / demo).rglob("*") if path.is_file()}
    for name in LEFT:
        (tmp_path / demo / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / demo / name).touch()
    subprocess.run([sys.executable, *BUILD], cwd=tmp_path, check=True, capture_output=True, timeout=600)
    built = tmp_path / "built"
    assert {path.relative_to(built) for path in (built / demo).rglob("*") if path.is_file()} == shipped
    for name in ("model/kernels/ops.cpp", "api/static/console/index.html"):
        assert (built / "service" / name).is_file()
