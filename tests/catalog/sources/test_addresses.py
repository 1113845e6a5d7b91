"""Which addresses a host may have: the internet's, and of a network's own those that somebody has named."""

from __future__ import annotations

import socket
from ipaddress import ip_address
from typing import Any

import pytest

from service.catalog.sources.addresses import find_addresses, is_public
from service.errors import AdapterInvalid, Forbidden

PUBLIC = ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]
INNER = [
    "127.0.0.1", "127.9.9.9", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%lo", "fc00::1", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "64:ff9b::a9fe:a9fe",
]  # fmt: skip


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", INNER)
def test_an_address_of_this_host_or_its_network_is_not_also_within_another(address: str) -> None:
    assert not is_public(ip_address(address))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What the resolver says of a name."""
    found: dict[str, list[str]] = {}

    def resolve(host: str, *given: Any, **named: Any) -> list[Any]:
        if host not in found:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in found[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return found


def test_every_address_of_a_name_is_looked_at(names: dict[str, list[str]]) -> None:
    names["files.example.com"] = ["8.8.8.8", "8.8.4.4", "8.8.8.8"]
    assert find_addresses("files.example.com", ()) == ["8.8.8.8", "8.8.4.4"]
    names["files.example.com"] = ["8.8.8.8", "169.254.169.254"]
    with pytest.raises(Forbidden, match=r"not of the internet.*ADAPTERD_SOURCES") as caught:
        find_addresses("files.example.com", ())
    assert "169.254" not in caught.value.message


@pytest.mark.parametrize(
    "host", ["minio", "localhost", "files.internal", "minio.store.svc", "a.cluster.local"]
)
def test_a_name_that_only_a_network_of_ones_own_has_may_lead_inside(
    names: dict[str, list[str]], host: str
) -> None:
    names[host] = ["10.0.0.7"]
    assert find_addresses(host, ()) == ["10.0.0.7"]


def test_an_inner_address_is_taken_where_it_is_named_itself(names: dict[str, list[str]]) -> None:
    names |= {"127.0.0.1": ["127.0.0.1"], "files.example.com": ["10.0.0.7"]}
    assert find_addresses("127.0.0.1", {"127.0.0.1"}) == ["127.0.0.1"]
    assert find_addresses("files.example.com", {"files.example.com", "10.0.0.7"}) == ["10.0.0.7"]
    with pytest.raises(Forbidden):
        find_addresses("files.example.com", {"files.example.com"})


def test_a_host_without_an_address_is_no_source(names: dict[str, list[str]]) -> None:
    with pytest.raises(AdapterInvalid, match=r"'typo\.example\.com' has no address"):
        find_addresses("typo.example.com", ())
