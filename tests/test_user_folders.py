"""The user's folders are where XDG and HOME say, and one line says which variable can name another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.settings import DEMO_ADAPTERS, Settings
from service.user_folders import cache_folder, state_folder


@pytest.mark.parametrize(
    ("variables", "cache", "state"),
    [
        ({"HOME": "/home/a"}, "/home/a/.cache/adapterd", "/home/a/.local/state/adapterd"),
        ({"HOME": "/home/a", "XDG_CACHE_HOME": "/c"}, "/c/adapterd", "/home/a/.local/state/adapterd"),
        ({"HOME": "/home/a", "XDG_STATE_HOME": "/s"}, "/home/a/.cache/adapterd", "/s/adapterd"),
        ({"XDG_CACHE_HOME": "/c", "XDG_STATE_HOME": "/s"}, "/c/adapterd", "/s/adapterd"),
        (
            {"HOME": "/h", "XDG_CACHE_HOME": "", "XDG_STATE_HOME": "x"},
            "/h/.cache/adapterd",
            "/h/.local/state/adapterd",
        ),
    ],
)
def test_they_are_named_by_the_variables(
    variables: dict[str, str], cache: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    assert (cache_folder(), state_folder()) == (Path(cache), Path(state))


def test_a_user_without_a_home_is_told_which_variables_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654)
    for find, variable in ((cache_folder, "XDG_CACHE_HOME"), (state_folder, "XDG_STATE_HOME")):
        with pytest.raises(SettingsError, match=rf"^{variable}: HOME is not set .* {variable} can name"):
            find()


def test_registrations_lie_beside_the_adapters_but_for_the_shipped_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/s")
    shipped = Settings()
    assert (shipped.adapters, shipped.state) == (DEMO_ADAPTERS, Path("/s/adapterd/demo"))
    for settings in (Settings(adapters_dir=tmp_path), Settings(base="org/name")):
        assert settings.state == settings.adapters
