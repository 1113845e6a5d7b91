"""Finds the addresses of a host that adapters may be fetched from, so that a name leads nowhere inside.

Runs in the API process; must not know what is fetched. The caller connects to an address that was checked
here and asks no resolver again: a name that changes meanwhile changes nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from ...errors import AdapterInvalid, Forbidden

Address = IPv4Address | IPv6Address

NAT64 = ip_network("64:ff9b::/96")
# Names that no registry gives away: who names one means a host of his own network
INSIDE = ("localhost", "internal", "local", "home.arpa", "svc")


def find_addresses(host: str, named: Collection[str]) -> list[str]:
    """The host's addresses, each of which may be connected to.

    `named` are the hosts of the allowed prefixes: an address that is not the internet's is refused unless it
    is one of them, or the host's name is for use inside a network. Raises Forbidden, AdapterInvalid where
    the host has no address.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise AdapterInvalid([f"the host {host!r} has no address that is known here"]) from None
    texts = list(dict.fromkeys(str(address[0]) for *_, address in found))
    refused = [text for text in texts if not is_public(ip_address(text)) and text not in named]
    if refused and not _is_inside(host):
        raise Forbidden(
            f"the host {host!r} leads to an address that is not of the internet; where that is meant, "
            "name the address itself in ADAPTERD_SOURCES, too",
            param="source",
        )
    return texts


def is_public(address: Address) -> bool:
    """Whether it is of the internet at large, also as IPv6 may carry an address of IPv4."""
    if isinstance(address, IPv6Address):
        address = _carried(address) or address
    return address.is_global and not address.is_multicast


def _carried(address: IPv6Address) -> IPv4Address | None:
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)


def _is_inside(host: str) -> bool:
    return "." not in host.strip(".") or any(host.endswith(f".{end}") for end in INSIDE)
