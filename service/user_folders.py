"""Names the folders of this user that outlive a run: the cache, and the state. In every process.

They are where the XDG base directory specification has them, as the libraries' own are.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import SettingsError

NAME = "adapterd"


def cache_folder() -> Path:
    """The folder of what can be made again. Raises SettingsError where the user has none."""
    return _find_folder("XDG_CACHE_HOME", ".cache")


def state_folder() -> Path:
    """The folder of what cannot be made again. Raises SettingsError where the user has none."""
    return _find_folder("XDG_STATE_HOME", ".local/state")


def _find_folder(variable: str, below_home: str) -> Path:
    named = Path(os.environ.get(variable, ""))
    if named.is_absolute():
        return named / NAME
    try:
        return Path.home() / below_home / NAME
    except RuntimeError:
        reason = f"HOME is not set and this user has no home folder: {variable} can name"
        raise SettingsError(f"{variable}: {reason} a folder that can be written") from None
