"""What an adapter may be called, and what the base is. Knows no registrations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..core.defaults import DEMO_BASE
from ..errors import AdapterNotFound, BadRequest, Conflict

PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
LONGEST = 128  # characters
BASE = frozenset({"base", "__base__"})  # what requests call the base
ROUTES = frozenset({"summary", "architecture", "upload"})  # as last parts they would hide a route


def check_id(id: str, base_id: str) -> None:
    """Raises Conflict for a reserved id, BadRequest for one that breaks the pattern."""
    if id in BASE or id == base_id or id == "check" or id.rpartition("/")[2] in ROUTES:
        raise Conflict(f"the id {id[:LONGEST]!r} is reserved", param="id")
    if not is_valid(id):
        raise BadRequest(
            f"id {id[:LONGEST]!r} must be letters, digits, '.', '_' and '-', begin with a letter or digit, have at most one '/' and no "
            f"'..', and be at most {LONGEST} characters long",
            param="id",
        )


def unknown_adapter(id: str) -> AdapterNotFound:
    """What is said of an id that nobody registered, or that is not to be known of."""
    return AdapterNotFound(f"no adapter {id[:LONGEST]!r} is registered", param="model")


def is_valid(id: str) -> bool:
    return len(id) <= LONGEST and ".." not in id and PATTERN.fullmatch(id) is not None


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base by the name clients use, and by the setting it was loaded from."""

    id: str
    setting: str

    def matches_claim(self, claimed: str | None) -> bool:
        """Whether an adapter's own name for its base means this one: the last parts are compared,
        for trainers write down paths.
        """
        return claimed is not None and _last_part(claimed) in {
            _last_part(self.id),
            _last_part(self.setting),
            _last_part(base_name(self.setting)),
        }


@cache
def base_name(setting: str) -> str:
    """What a base is called when nobody says otherwise: its hub id, or the name of its folder or
    file.

    The disk is asked once.
    """
    if setting == "demo":
        return DEMO_BASE
    path = Path(setting)
    return path.stem if setting.endswith(".gguf") else path.resolve().name if path.exists() else setting


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
