"""API keys: their hashes, adapters and limits, read from lists and files.

API process; must not keep, show or name a key in the clear.
"""

from __future__ import annotations

import hmac
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

HASH = re.compile(r"^sha256:[0-9a-f]{64}$")
LABEL = len("sha256:") + 12  # characters of a hash that tell keys apart
OPTIONS = ("name", "adapters", "rate", "concurrency", "tokens", "max_priority")


@dataclass(frozen=True, slots=True)
class Key:
    """`adapters` are patterns of the ids that the key may use (None: all), `rate` is requests a second,
    `concurrency` requests at once, `tokens` tokens a minute; None of these three is the default of all keys.

    `name` stands for the key in the log. `max_priority` is the lowest number that its requests may have as
    their priority; None: any.
    """

    digest: str
    name: str = ""
    adapters: tuple[str, ...] | None = None
    rate: float | None = None
    concurrency: int | None = None
    tokens: int | None = None
    max_priority: int | None = None

    @property
    def label(self) -> str:
        """The words that stand for the key where it is told of: its name, or a piece of its hash."""
        return self.name or self.digest[:LABEL]

    def may_use(self, id: str) -> bool:
        return self.adapters is None or any(fnmatchcase(id, pattern) for pattern in self.adapters)


def hash_secret(secret: str) -> str:
    return "sha256:" + sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def find_key(secret: str, keys: tuple[Key, ...]) -> Key | None:
    """The key of this secret; compares all of them, in constant time each."""
    digest = hash_secret(secret)
    matching = [key for key in keys if hmac.compare_digest(key.digest, digest)]
    return matching[0] if matching else None


def parse_keys(value: str) -> tuple[Key, ...]:
    """The keys of a comma-separated list, or of `@file`. Raises ValueError, whose words hold no key."""
    if value.startswith("@"):
        return _read_key_file(Path(value[1:]))
    return tuple(Key(_parse_hash(part.strip())) for part in value.split(",") if part.strip())


def _read_key_file(path: Path) -> tuple[Key, ...]:
    """One key a line, in the clear or as its hash; options may follow it.

    A line that begins with # is a remark.
    """
    keys = []
    for number, line in enumerate(_read_lines(path), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            try:
                keys.append(_parse_key(words))
            except ValueError as error:
                raise ValueError(f"line {number} of the key file: {error}") from None
    if not keys:
        raise ValueError("the key file holds no key")
    return tuple(keys)


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()  # editors put a byte order mark first
    except OSError as error:
        raise ValueError(f"{_name_file(path)} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{_name_file(path)} cannot be read: it is no UTF-8 text") from None


def _name_file(path: Path) -> str:
    """What is no absolute path and no file may be a key that begins with @: it is not shown."""
    return f"the key file {path}" if path.is_absolute() or os.path.exists(path) else "the key file"


def _parse_hash(secret: str) -> str:
    if not secret.startswith("sha256:"):
        return hash_secret(secret)
    if not HASH.match(secret.lower()):
        raise ValueError("a hash is sha256: and 64 hexadecimal digits")
    return secret.lower()


def _parse_key(words: list[str]) -> Key:
    options: dict[str, Any] = {}
    for word in words[1:]:
        name, given, text = word.partition("=")
        if not (given and text and name in OPTIONS) or name in options:
            known = "=, ".join(OPTIONS)
            raise ValueError(f"after the key, only {known}= may follow, each once")
        options[name] = _parse_option(name, text)
    return Key(_parse_hash(words[0]), **options)


def _parse_option(name: str, text: str) -> Any:
    if name == "adapters":
        return tuple(part for part in text.split(",") if part)
    if name == "name":
        return text
    return _parse_integer(text) if name == "max_priority" else _parse_limit(name, text)


def _parse_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("max_priority= is an integer") from None


def _parse_limit(name: str, text: str) -> float:
    try:
        number = float(text) if name == "rate" else int(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise ValueError(f"{name}= is a number over 0")
    return number
