"""Reads the URLs that adapters come from, and compares them with the prefixes that are allowed.

Runs in the API process; must not know files, addresses of hosts or how anything is fetched. A URL has one
spelling: no user, no query, no escapes, no `.` or `..`; nothing of one that breaks this is repeated in an
error, for it may hold a password.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

WEB = {"http": 80, "https": 443}  # and their ports
STORES = {"s3": "s3fs", "gs": "gcsfs"}  # and the packages that speak to them
LONGEST = 1024  # characters
SIGN = "://"
HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+\]")
SEGMENT = re.compile(r"[A-Za-z0-9._~@+=:,!-]+")
PLAIN = (
    "wanted SCHEME://HOST/FOLDER of letters, digits and -._~@+=:,! with no user, query, escape, '.' or '..'"
)


@dataclass(frozen=True, slots=True)
class SourceUrl:
    """`host` is a bucket where the scheme is of an object store, and `port` is then 0."""

    scheme: str
    host: str
    port: int
    parts: tuple[str, ...]

    def __str__(self) -> str:
        port = "" if self.port in (0, WEB.get(self.scheme)) else f":{self.port}"
        return f"{self.scheme}{SIGN}{'/'.join((self.host + port, *self.parts))}"

    @property
    def path(self) -> str:
        return "/".join(self.parts)

    def starts_with(self, prefix: SourceUrl) -> bool:
        """Whether it is the prefix or lies below it: `/team` has `/team/a` below it, and not `/team-b`."""
        same_host = (self.scheme, self.host, self.port) == (prefix.scheme, prefix.host, prefix.port)
        return same_host and self.parts[: len(prefix.parts)] == prefix.parts

    def join(self, path: str) -> SourceUrl:
        """This URL with a relative path below it. Raises ValueError."""
        return parse_url(f"{self}/{path}")


def is_url(source: str) -> bool:
    return SIGN in source


def is_allowed(url: SourceUrl, prefixes: Iterable[SourceUrl]) -> bool:
    return any(map(url.starts_with, prefixes))


def parse_url(text: str) -> SourceUrl:
    """Raises ValueError, which says nothing of the text."""
    scheme, sign, rest = text.partition(SIGN)
    scheme = scheme.lower()
    if not sign or len(text) > LONGEST:
        raise ValueError(PLAIN)
    if scheme not in WEB and scheme not in STORES:
        raise ValueError(f"adapters come from {', '.join(f'{name}{SIGN}' for name in (*STORES, *WEB))} alone")
    authority, _, path = rest.partition("/")
    host, port = _parse_authority(scheme, authority)
    return SourceUrl(scheme, host, port, _parse_path(path))


def check_prefix(text: str) -> str:
    """The prefix as it is spelled. Raises ValueError for one that no URL could begin with."""
    return str(parse_url(text))


def _parse_authority(scheme: str, authority: str) -> tuple[str, int]:
    if scheme in STORES:
        host, port = authority, ""
    else:
        host, port = _split_port(authority)
    if not HOST.fullmatch(host) or ".." in host:
        raise ValueError(PLAIN)
    if scheme in STORES:
        return host, 0
    return host.lower(), int(port) if port else WEB[scheme]


def _split_port(authority: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::([0-9]{1,5}))?", authority)
    if match is None or int(match[2] or 1) not in range(1, 1 << 16):
        raise ValueError(PLAIN)
    return match[1], match[2] or ""


def _parse_path(path: str) -> tuple[str, ...]:
    """Its parts; one slash may end it."""
    if not path:
        return ()
    parts = tuple(path.removesuffix("/").split("/"))
    if any(not SEGMENT.fullmatch(part) or part in (".", "..") for part in parts):
        raise ValueError(PLAIN)
    return parts


def web_host(url: SourceUrl) -> str:
    """The host as a resolver takes it: an address of IPv6 without its brackets."""
    return url.host.strip("[]")
