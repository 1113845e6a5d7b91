"""What leaves a checkout that has been used, in an image or a wheel: the code and the shipped adapters,
and nothing of its builder's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from .files import ROOT
from .used_checkout import PLANTED, plant_builder_state, tracked_files

IGNORED = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
SHIPPED = ("service/", "pyproject.toml", "requirements.lock", "README.md", "LICENSE")
WHEEL = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


def translate_pattern(pattern: str) -> str:
    """The regular expression of a pattern of .dockerignore's."""
    parts = re.split(r"(\*\*/|\*\*|\*)", pattern.strip("/"))
    meanings = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    return "".join(meanings.get(part, re.escape(part)) for part in parts)


def is_sent(path: str) -> bool:
    """Whether Docker sends this file to the builder: of the lines that match it or a folder of it the last
    decides.
    """
    names = [path, *map(str, PurePosixPath(path).parents)][:-1]
    sent = True
    for line in IGNORED:
        if not line.startswith("#"):
            pattern = translate_pattern(line.removeprefix("!"))
            if any(re.fullmatch(pattern, name) for name in names):
                sent = line.startswith("!")
    return sent


@pytest.mark.parametrize("path", [*PLANTED, "service/__pycache__/app.cpython-311.pyc"])
def test_nothing_of_the_builders_is_sent_to_the_builder(path: str) -> None:
    assert not is_sent(path)


def test_what_is_sent_is_the_code_the_shipped_adapters_and_what_installs_them() -> None:
    tracked = tracked_files()
    assert [path for path in tracked if is_sent(path)] == [
        path for path in tracked if path.startswith(SHIPPED)
    ]


def test_a_wheel_holds_what_the_checkout_ships_and_nothing_of_the_builders(tmp_path: Path) -> None:
    source, made = tmp_path / "source", tmp_path / "made"
    for path in filter(is_sent, tracked_files()):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, source / path)
    plant_builder_state(source)
    subprocess.run([sys.executable, "-c", WHEEL, made], cwd=source, check=True, capture_output=True)
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        held = {name for name in opened.namelist() if name.startswith("service/")}
    assert held <= set(tracked_files())
    adapters = {path for path in tracked_files() if path.startswith("service/demo/adapters/")}
    assert adapters <= held
