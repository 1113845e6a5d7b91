"""Checks adapters' ids, and names the base, in the API process. Must not know registrations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..core.defaults import DEMO_BASE
from ..errors import AdapterNotFound, BadRequest, Conflict, UnexpectedDigest

PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
LONGEST = 128  # characters
BASE = frozenset({"base", "__base__"})  # requests' names for the base
# As last parts they would hide a route
ROUTES = frozenset({"summary", "architecture", "upload", "versions", "rollback"})
DIGEST_MARK = "@sha256:"
PREFIX = re.compile(r"[0-9a-f]{8,64}")


def check_id(id: str, base_id: str) -> None:
    """Raises Conflict for a reserved id, BadRequest for one that breaks the pattern."""
    if is_reserved(id, base_id):
        raise Conflict(f"the id {id[:LONGEST]!r} is reserved", param="id")
    if not is_valid(id):
        raise BadRequest(
            f"id {id[:LONGEST]!r} must be letters, digits, '.', '_' and '-', begin with a letter or digit, "
            f"have at most one '/' and no '..', and be at most {LONGEST} characters long",
            param="id",
        )


def is_reserved(id: str, base_id: str) -> bool:
    return id in BASE or id == base_id or id == "check" or id.rpartition("/")[2] in ROUTES


def unknown_adapter(id: str) -> AdapterNotFound:
    """The error for an id that nobody registered, or that is not to be known of."""
    return AdapterNotFound(f"no adapter {id[:LONGEST]!r} is registered", param="model")


def unexpected_digest(expected: str, found: str) -> UnexpectedDigest:
    message = f"expect: the digest of these files is {found}, not {expected}"
    return UnexpectedDigest(message, details={"expected": expected, "digest": found}, param="expect")


def split_digest(name: str) -> tuple[str, str]:
    """The id of a request's name for an adapter, and the digest that it demands, or the beginning of one;
    empty where it demands none.

    Raises BadRequest.
    """
    id, mark, digits = name.partition(DIGEST_MARK)
    if mark and not PREFIX.fullmatch(digits):
        raise BadRequest(
            f"{name[:LONGEST]!r}: behind @sha256: come 8 to 64 hexadecimal digits in lower case",
            param="model",
        )
    return id, f"sha256:{digits}" if mark else ""


def join_digest(id: str, digest: str | None) -> str:
    """The name that demands this digest of an id."""
    return f"{id}@{digest}" if digest else id


def is_valid(id: str) -> bool:
    return len(id) <= LONGEST and ".." not in id and PATTERN.fullmatch(id) is not None


@dataclass(frozen=True, slots=True)
class ServedBase:
    """The base by the name clients use, and by the setting it was loaded from."""

    id: str
    setting: str

    def matches_claim(self, claimed: str | None) -> bool:
        """Whether an adapter's own name for its base means this one.

        The last parts are compared, for trainers write down paths.
        """
        names = (self.id, self.setting, base_name(self.setting))
        return claimed is not None and _last_part(claimed) in map(_last_part, names)


@cache
def base_name(setting: str) -> str:
    """The base's name by default: its hub id, or the name of its folder or file.

    The disk is asked once.
    """
    if setting == "demo":
        return DEMO_BASE
    path = Path(setting)
    if setting.endswith(".gguf"):
        return path.stem
    return path.resolve().name if path.exists() else setting


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
