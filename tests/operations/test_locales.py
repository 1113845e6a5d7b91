"""Files, names and answers are UTF-8 whatever the locale, and key files are read as editors save them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.keys import find_key
from service.settings import read_settings
from tests import making

from .processes import run

BARE = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose folder and config are not of ASCII alone."""
    folder = tmp_path_factory.mktemp("locales")
    base = making.tiny(folder / "base")
    return making.edit(
        making.noise(folder / "plain", base), folder / "jürgen", {"base_model_name_or_path": "Köln"}
    )


def make_latin(folder: Path) -> dict[str, str]:
    """The variables of a Latin-1 locale, made for the occasion."""
    if shutil.which("localedef"):
        words = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(folder / "en_US.ISO-8859-1")]
        subprocess.run(words, capture_output=True, check=False)
    if not (folder / "en_US.ISO-8859-1").is_dir():
        pytest.skip("this system cannot make a locale of Latin-1")
    return {"LOCPATH": str(folder), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}


@pytest.mark.parametrize("locale", ["C", "Latin-1"])
def test_what_is_read_and_said_is_utf8(locale: str, adapter: Path, tmp_path: Path) -> None:
    variables = BARE if locale == "C" else make_latin(tmp_path)
    ran = run("inspect", str(adapter), "--format", "json", variables=variables)
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.decode("utf-8"))
    assert (told["id"], told["base_model"]["claimed"]) == ("jürgen", "Köln")
    assert run("inspect", str(adapter), variables=variables).stdout.decode("utf-8").count("Köln") == 1


def test_a_key_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_bytes("\ufeffsk-first name=jürgen\n# für später\nsk-second\n".encode())
    keys = read_settings({"ADAPTERD_API_KEYS": f"@{file}"}).api_keys
    assert [key.name for key in keys] == ["jürgen", ""]
    assert all(find_key(secret, keys) for secret in ("sk-first", "sk-second"))


def test_a_key_file_that_cannot_be_read_is_named_with_the_reason(tmp_path: Path) -> None:
    latin = tmp_path / "latin"
    latin.write_bytes("sk-a name=jürgen".encode("latin-1"))
    for path, reason in (
        (tmp_path, "Is a directory"),
        (tmp_path / "gone", "No such file or directory"),
        (latin, "it is no UTF-8 text"),
    ):
        with pytest.raises(SettingsError) as refused:
            read_settings({"ADAPTERD_ADMIN_KEYS": f"@{path}"})
        assert str(refused.value) == f"ADAPTERD_ADMIN_KEYS: the key file {path} cannot be read: {reason}"
