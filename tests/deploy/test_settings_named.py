"""No shipped file sets a variable that the service would refuse, and together a file's variables
let it start.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest

from service.settings import PREFIX, Settings, read_settings

from .files import DEPLOY, METRIC, ROOT, variables

OURS = [one for one in variables() if one[1].startswith(PREFIX)]


@pytest.mark.parametrize(("where", "name", "value"), OURS)
def test_a_shipped_file_sets_only_variables_that_exist(where: str, name: str, value: str) -> None:
    assert name.removeprefix(PREFIX).lower() in Settings.model_fields, f"{where}: {name}={value}"


def test_every_kind_of_shipped_file_sets_something() -> None:
    assert {where.split()[0] for where, _, _ in OURS} == {
        "compose",
        "kubernetes",
        "Dockerfile",
        "adapterd.service",
    }


def test_the_variables_of_a_file_together_make_settings(tmp_path: Path) -> None:
    key, base = tmp_path / "key", tmp_path / "base"
    key.write_text("a-key\n")
    base.mkdir()
    image = {name: value for where, name, value in OURS if where == "Dockerfile"}
    files: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for where, name, value in OURS:
        files[where][name] = f"@{key}" if value.startswith("@") else str(base) if value == "/base" else value
    for where, found in files.items():
        if where.startswith(("compose", "kubernetes")):
            assert read_settings(image | found).keyed, where


def test_prose_of_the_shipped_files_names_only_variables_that_exist() -> None:
    texts = [path for path in DEPLOY.rglob("*") if path.suffix in {".yaml", ".yml", ".service"}] + [
        ROOT / "Dockerfile"
    ]
    for path in texts:
        for word in path.read_text().replace('"', " ").split():
            name = word.strip("`.,:;()#").split("=")[0]
            if name.startswith(PREFIX) and not METRIC.match(name):
                assert name.removeprefix(PREFIX).lower() in Settings.model_fields, f"{path.name}: {name}"
