"""Where it listens, whose address the log has, who gets metrics, and its description behind a prefix."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import server
from service.errors import SettingsError

from ..api.served_app import serve_app
from .processes import Started, serving

USER = {"authorization": "Bearer sk-user"}


def refuse(host: str, port: int = 0) -> str:
    with pytest.raises(SettingsError) as refused:
        server._open_socket(host, port)
    return str(refused.value)


# ---- where it listens


def test_a_host_that_cannot_be_resolved_is_blamed_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refuse("x" * 70) == f"ADAPTERD_HOST: {'x' * 70!r} cannot be resolved: no such name can be"

    def resolve(*asked: Any, **more: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert refuse("nobody") == "ADAPTERD_HOST: 'nobody' cannot be resolved: Name or service not known"


def test_an_address_of_another_machine_is_blamed_on_the_host() -> None:
    assert refuse("192.0.2.1").startswith("ADAPTERD_HOST: cannot listen on 192.0.2.1:0: ")


def test_a_port_that_is_taken_is_blamed_on_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
        assert refuse("127.0.0.1", port).startswith(f"ADAPTERD_PORT: cannot listen on 127.0.0.1:{port}: ")


def require_both_families() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("this system has no sockets of both families")


def test_every_address_is_one_of_both_families() -> None:
    require_both_families()
    with server._open_socket("::", 0) as listener:
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, listener.getsockname()[1])).close()


def test_a_name_of_both_families_is_the_one_of_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **more: found)
    with server._open_socket("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


# ---- the log's addresses


@contextmanager
def logging_to(log: Path, *flags: str) -> Iterator[Started]:
    with log.open("wb") as out, serving("--log-format", "json", *flags, stderr=out) as started:
        yield started
        started.send(signal.SIGTERM)
        assert started.end() == 0


def read_clients(log: Path) -> list[str]:
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return [record["client"] for record in records if record["message"] == "request"]


def test_the_log_has_the_peers_address_whatever_the_peer_tells(tmp_path: Path) -> None:
    with logging_to(tmp_path / "log") as started:
        started.get("/adapters", **{"x-forwarded-for": "203.0.113.9"})
    assert read_clients(tmp_path / "log") == ["127.0.0.1"]


def test_a_proxy_that_is_named_tells_the_address_and_clients_cannot(tmp_path: Path) -> None:
    """Each proxy adds the address that it sees, so that what a client has claimed comes before it."""
    with logging_to(tmp_path / "log", "--forwarded-allow-ips", "127.0.0.0/8, 10.0.0.1") as started:
        started.get("/adapters", **{"x-forwarded-for": "198.51.100.1, 203.0.113.9, 10.0.0.1"})
        started.get("/adapters", **{"x-forwarded-for": "x" * 1000})
    assert read_clients(tmp_path / "log") == ["203.0.113.9", "x" * 64]


def test_behind_a_socket_of_both_families_an_address_is_spelt_as_ever(tmp_path: Path) -> None:
    require_both_families()
    flags = ("--host", "::", "--admin-keys", "sk-admin", "--forwarded-allow-ips", "127.0.0.1")
    with logging_to(tmp_path / "log", *flags) as started:
        started.get("/adapters")
        started.get("/adapters", **{"x-forwarded-for": "203.0.113.9"})
        httpx.get(started.url.replace("127.0.0.1", "[::1]") + "/adapters", trust_env=False)
    assert read_clients(tmp_path / "log") == ["127.0.0.1", "203.0.113.9", "::1"]


# ---- metrics without a key


def test_open_metrics_need_no_key_and_nothing_else_is_open() -> None:
    """A gateway's picker sends none, and reads there who is resident."""
    with serve_app(api_keys="sk-user", metrics_open="on", lora_requests_info="on") as served:
        for headers in ({}, USER, {"authorization": "Bearer sk-wrong"}):
            answer = served.http.get("/metrics", headers=headers)
            assert (answer.status_code, "adapterd_lora_requests_info" in answer.text) == (200, True)
        assert served.http.post("/metrics").status_code == 405
        for path in ("/info", "/base", "/adapters", "/v1/models", "/docs", "/openapi.json", "/metrics/"):
            assert served.http.get(path).status_code == 401


def test_metrics_need_a_key_unless_they_are_open() -> None:
    with serve_app(api_keys="sk-user") as served:
        assert [served.http.get("/metrics", headers=headers).status_code for headers in ({}, USER)] == [
            401,
            200,
        ]


# ---- behind a prefix


def test_the_description_names_its_own_folder_as_the_server() -> None:
    with serve_app() as served:
        assert served.json("GET", "/openapi.json")["servers"] == [{"url": "."}]
