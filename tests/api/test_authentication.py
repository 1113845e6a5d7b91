"""Keys: what is open, what needs a key, what needs the admin scope, and that no bytes on the wire
can break the comparison.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from fastapi import FastAPI, Response
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import install_handlers
from service.api.scopes import ADMIN_SCOPE, KEY_SCOPE, PUBLIC_SCOPE, KeyScope, declared_scopes
from service.keys import hash_secret

from .served_app import ServedApp, serve_app

USER, ADMIN = {"authorization": "Bearer sk-user-1"}, {"authorization": "Bearer sk-admin"}


@pytest.fixture(scope="module")
def served() -> Iterator[ServedApp]:
    with serve_app(api_keys="sk-user-1,sk-user-2,schlüssel", admin_keys="sk-admin") as app:
        yield app


CLOSED = ("/", "/metrics", "/info", "/docs", "/openapi.json", "/adapters", "/no-such", "/console/app.js")


def test_only_the_probes_are_open(served: ServedApp) -> None:
    for path in ("/health", "/ready"):
        assert served.http.get(path).status_code == 200
    for path in CLOSED:
        refusal = served.json("GET", path, status=401)
        assert refusal["error_type"] == "unauthorized"
        assert served.http.get(path, headers=USER).status_code != 401
    assert served.http.get("/adapters").headers["www-authenticate"] == "Bearer"


def test_the_openai_dialect_has_its_own_envelope(served: ServedApp) -> None:
    refusal = served.json("POST", "/v1/load_lora_adapter", {}, 401)
    assert refusal["error"]["type"] == "authentication_error"


WRONG = [
    b"",
    b"Bearer",
    b"Bearer ",
    b"Bearer sk-wrong",
    b"Bearer sk-user-",
    b"Bearer sk-user-1,sk-user-2",
    b"sk-user-1",
    b"Digest sk-user-1",
]


@pytest.mark.parametrize("sent", [*WRONG, "Bearer é".encode(), b"Bearer \xff\xfe", b"Basic ===", b"Basic !"])
def test_a_wrong_key_is_401_whatever_its_bytes(served: ServedApp, sent: bytes) -> None:
    assert served.http.get("/adapters", headers={b"authorization": sent}).status_code == 401


def test_a_key_outside_ascii_is_a_key(served: ServedApp) -> None:
    for scheme in (b"Bearer ", b"bearer  "):
        assert (
            served.http.get(
                "/adapters", headers={b"authorization": scheme + "schlüssel".encode()}
            ).status_code
            == 200
        )


CHANGES = [
    ("POST", "/adapters", {"id": "a", "source": "a"}),
    ("POST", "/adapters/check", {"id": "a", "source": "a"}),
    ("PUT", "/adapters/a", {"source": "b"}),
    ("PATCH", "/adapters/a", {"pinned": True}),
    ("POST", "/adapters/prefetch", {"ids": ["a"]}),
    ("POST", "/adapters/a/rollback", {}),
    ("GET", "/aliases", None),
    ("PUT", "/aliases/prod", {"targets": [{"id": "a", "weight": 1}]}),
    ("DELETE", "/aliases/prod", None),
    ("DELETE", "/adapters/a", None),
    ("POST", "/load_lora_adapter", {"lora_name": "a", "lora_path": "a"}),
    ("POST", "/unload_lora_adapter", {"lora_name": "a"}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "b", "lora_path": "b"}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "b"}),
]


def test_changing_adapters_needs_the_admin_scope(served: ServedApp) -> None:
    for method, path, body in CHANGES:
        refusal = served.json(method, path, body, 403, headers=USER)
        assert "forbidden" in (refusal["error_type"] if "error_type" in refusal else refusal["error"]["code"])
    assert served.http.post("/adapters/a/upload", headers=USER).status_code == 403
    assert not served.registry.calls
    for method, path, body in CHANGES:
        answer = served.http.request(method, path, headers=ADMIN, json=body)
        assert answer.status_code in (200, 201, 202), answer.text


GENERATION = {
    "/",
    "/generate",
    "/generate_stream",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
}


def changing(served: ServedApp) -> list[tuple[str, str]]:
    """Method and path of every route that may change something, as the service describes itself."""
    paths = served.json("GET", "/openapi.json", headers=ADMIN)["paths"]
    routes = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    rest = [(method, path) for method, path in routes if method != "GET" and path not in GENERATION]
    return [(method, path.replace("{id}", "org/none")) for method, path in rest]


BROKEN = [
    ({}, b"{"),
    ({"content-type": "text/plain"}, b"\xff"),
    ({"content-length": "99999999999"}, b""),
    ({"content-type": "multipart/form-data; boundary=x"}, b"--y"),
    ({"accept": "text/html"}, b'{"id": "../..", "source": 1}'),
]


@pytest.mark.parametrize(("headers", "body"), BROKEN)
def test_the_scope_is_asked_for_before_path_id_and_body(
    served: ServedApp, headers: dict[str, str], body: bytes
) -> None:
    routes = changing(served)
    assert len(routes) >= len(CHANGES)
    calls = len(served.registry.calls)
    for method, path in routes:
        for key, code in (({}, 401), ({"authorization": "Bearer sk-wrong"}, 401), (USER, 403)):
            sent = {"content-type": "application/json"} | headers | key
            answer = served.http.request(method, path, headers=sent, content=body)
            assert answer.status_code == code, (method, path, answer.text)
            error = answer.json()["error"]
            assert isinstance(error, dict) == path.startswith("/v1/"), "each dialect has its own envelope"
    assert len(served.registry.calls) == calls


async def receive_nothing() -> Message:
    raise AssertionError("the body is read")


@pytest.mark.parametrize(("key", "code"), [(b"", 401), (b"Bearer sk-user-1", 403)])
def test_a_body_is_not_waited_for_where_the_scope_is_missing(
    served: ServedApp, key: bytes, code: int
) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def ask() -> None:
        headers = [(b"authorization", key), (b"content-type", b"application/json")]
        rest = {"type": "http", "raw_path": b"", "query_string": b"", "headers": headers}
        await served.http.app({"method": "POST", "path": "/adapters", **rest}, receive_nothing, send)

    asyncio.run(ask())
    assert sent[0]["status"] == code


def included(app: ASGIApp) -> list[RouteContext]:
    return list(iter_route_contexts(cast(FastAPI, app).routes))


def test_every_route_declares_one_scope(served: ServedApp) -> None:
    """Those of the pages and of the description too; what is mounted could not."""
    scopes: dict[KeyScope, set[str]] = {scope: set() for scope in KeyScope}
    for route in included(served.http.app):
        declared = declared_scopes(route)
        assert len(declared) == 1, f"{route.methods} {route.path} declares {declared}"
        scopes[declared[0].scope] |= {f"{method} {route.path}" for method in route.methods or ()}
    assert scopes[KeyScope.PUBLIC] == {"GET /health", "GET /ready"}
    pages = {"/", "/docs", "/openapi.json", "/console/{path:path}", "/docs/{path:path}"}
    assert {f"GET {path}" for path in pages} <= scopes[KeyScope.KEY]
    reading = {name for name in scopes[KeyScope.KEY] if not name.startswith("GET ")}
    assert reading == {f"POST {path}" for path in GENERATION}, "whatever else is no GET needs the admin scope"
    looking = {name for name in scopes[KeyScope.ADMIN] if name.startswith("GET ")}
    assert looking == {"GET /aliases", "GET /usage"}


@pytest.mark.parametrize(
    ("granted", "codes"),
    [(None, (200, 403, 403)), (KeyScope.KEY, (200, 200, 403)), (KeyScope.ADMIN, (200, 200, 200))],
)
def test_a_declared_scope_is_asked_for_by_the_route_itself_as_well(
    granted: KeyScope | None,
    codes: tuple[int, ...],
) -> None:
    """Should whatever stands in front have let a request through."""
    app = FastAPI()
    install_handlers(app)
    for scope, declared in zip(KeyScope, (PUBLIC_SCOPE, KEY_SCOPE, ADMIN_SCOPE), strict=True):
        app.get(f"/{scope.name}", dependencies=[declared])(lambda: "done")

    async def front(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "state": {} if granted is None else {"granted": granted}}, receive, send)

    http = TestClient(front)
    assert tuple(http.get(f"/{scope.name}").status_code for scope in KeyScope) == codes


def test_a_route_that_declares_no_scope_is_closed_to_all_but_admins() -> None:
    """Wherever it stands, and however it got there."""
    for key, code in ((USER, 403), (ADMIN, 200), ({}, 401)):
        with serve_app(api_keys="sk-user-1", admin_keys="sk-admin") as served:
            app = cast(FastAPI, served.http.app)
            app.post("/v1/adapters")(lambda: "done")
            app.add_route("/plain", lambda request: Response("done"), methods=["POST"])
            app.mount("/mounted", Response("done"))
            for method, path in (("POST", "/v1/adapters"), ("POST", "/plain"), ("GET", "/mounted/x")):
                assert served.http.request(method, path, headers=key).status_code == code, path


def test_an_admin_key_reads_too(served: ServedApp) -> None:
    assert served.http.get("/adapters", headers=ADMIN).status_code == 200


def test_api_keys_without_admin_keys_close_management() -> None:
    with serve_app(api_keys="sk-user-1") as served:
        served.json("POST", "/adapters", {"id": "a", "source": "a"}, 403, headers=USER)
        served.json("POST", "/adapters", {"id": "a", "source": "a"}, 401)


def test_admin_keys_alone_still_ask_everybody_for_a_key() -> None:
    with serve_app(admin_keys="sk-admin") as served:
        assert served.http.get("/adapters").status_code == 401
        assert served.http.get("/adapters", headers=ADMIN).status_code == 200


def test_a_browser_may_offer_a_key_as_password_to_read_a_page_and_for_nothing_else(served: ServedApp) -> None:
    basic = {"authorization": "Basic " + base64.b64encode(b"me:sk-admin").decode()}
    refusal = served.http.get("/", headers={"accept": "text/html"})
    assert refusal.status_code == 401
    assert "Basic" in refusal.headers["www-authenticate"]
    assert served.http.get("/", headers=basic | {"accept": "text/html"}).status_code == 200
    assert served.http.delete("/adapters/none", headers=basic).status_code == 401


def test_a_page_of_another_site_can_change_nothing_even_without_keys() -> None:
    with serve_app() as served:
        for site, code in (("cross-site", 403), ("same-origin", 201)):
            answer = served.http.post(
                "/adapters/a/upload", files={"file": ("a.zip", b"zip")}, headers={"sec-fetch-site": site}
            )
            assert answer.status_code == code
        assert served.http.get("/adapters", headers={"sec-fetch-site": "cross-site"}).status_code == 200


def test_keys_from_a_file_and_neither_info_nor_the_settings_show_one(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-one\n\nsk-two\n")
    with serve_app(api_keys=f"@{tmp_path / 'keys'}") as served:
        answer = served.http.get("/info", headers={"authorization": "Bearer sk-two"})
        assert answer.json()["settings"]["keys"] is True
        assert "sk-" not in answer.text
        assert "sk-" not in repr(served.services.settings)


def test_a_keys_name_is_in_the_log_and_the_key_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text("sk-secret name=web\nsk-other\n")
    with (
        serve_app(api_keys=f"@{tmp_path / 'keys'}", log_level="debug") as served,
        caplog.at_level(logging.DEBUG),
    ):
        for key in ("sk-secret", "sk-other", "sk-wrong"):
            served.http.get("/adapters?key=sk-secret", headers={"authorization": f"Bearer {key}"})
        served.http.delete("/adapters/x", headers={"authorization": "Bearer sk-secret"})
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "adapterd.access"]
    assert [(line["status"], line.get("key")) for line in lines] == [
        (200, "web"),
        (200, None),
        (401, None),
        (403, "web"),
    ]
    assert "sk-" not in "".join(
        str(record.__dict__) for record in caplog.records if record.name.startswith("adapterd")
    )


def test_a_change_is_audited_under_the_name_of_its_key(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "keys").write_text("sk-secret name=ops\nsk-other\n")
    caplog.set_level(logging.INFO, "adapterd.audit")
    for file in (f"@{tmp_path / 'keys'}", ""):
        with serve_app(admin_keys=file) as served:
            for key in ("sk-secret", "sk-other"):
                body = {"id": key.removeprefix("sk-"), "source": "folder"}
                served.json("POST", "/adapters", body, 201, headers={"authorization": f"Bearer {key}"})
    lines = [record.__dict__["fields"] for record in caplog.records if record.name == "adapterd.audit"]
    assert [line["who"] for line in lines] == ["ops", hash_secret("sk-other")[:19], "anyone", "anyone"]
    assert "sk-" not in str(lines)


# ---- other sites' pages

SITE = "https://app.example.org"
FOREIGN = {"origin": SITE, "sec-fetch-site": "cross-site"}
PREFLIGHT = {
    "origin": SITE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


def test_no_other_site_is_let_in_unless_it_is_named() -> None:
    with serve_app() as served:
        answer = served.http.options("/adapters", headers=PREFLIGHT)
        assert answer.status_code == 405
        assert not [name for name in answer.headers if name.startswith("access-control-")]
        assert "access-control-allow-origin" not in served.http.get("/adapters", headers=FOREIGN).headers


def test_a_site_that_is_named_may_ask_with_a_key() -> None:
    with serve_app(admin_keys="sk-admin", cors_origins=f"{SITE}, https://b.example.org") as served:
        allowed = served.http.options("/adapters", headers=PREFLIGHT)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, SITE)
        assert allowed.headers["x-request-id"], "inside the layer that gives every answer its id"
        body = {"id": "a", "source": "a"}
        answer = served.http.post("/adapters", json=body, headers=ADMIN | FOREIGN)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (201, SITE)
        assert "access-control-allow-credentials" not in answer.headers
        assert served.http.post("/adapters", json=body, headers=FOREIGN).status_code == 401


ASKED = "x-stainless-os,user-agent,traceparent,x-api-key,http-referer"


@pytest.mark.parametrize("origin", [SITE, "app://obsidian.md", "tauri://localhost", "chrome-extension://abc"])
def test_a_named_origin_of_any_scheme_may_send_any_header(origin: str) -> None:
    asks = PREFLIGHT | {"origin": origin, "access-control-request-headers": ASKED}
    with serve_app(admin_keys="sk-admin", cors_origins=f"{SITE},{origin}") as served:
        allowed = served.http.options("/v1/chat/completions", headers=asks)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, origin)
        assert set(ASKED.split(",")) <= set(allowed.headers["access-control-allow-headers"].split(","))
        evil = asks | {"origin": "app://evil"}
        assert served.http.options("/v1/chat/completions", headers=evil).status_code == 403


def test_a_site_that_is_not_named_may_not_ask_and_a_named_one_not_in_every_way() -> None:
    other = {"origin": "https://evil.example.org", "sec-fetch-site": "cross-site"}
    with serve_app(admin_keys="sk-admin", cors_origins=f"{SITE}, https://b.example.org") as served:
        for preflight in (PREFLIGHT | other, PREFLIGHT | {"access-control-request-method": "TRACE"}):
            refusal = served.http.options("/adapters", headers=preflight)
            assert (refusal.status_code, refusal.json()["error_type"]) == (403, "forbidden")
            assert "access-control-allow-origin" not in refusal.headers
            error = served.http.options("/v1/models", headers=preflight).json()["error"]
            assert error["code"] == "forbidden"
        body = {"id": "a", "source": "a"}
        refused = served.http.post("/adapters", json=body, headers=ADMIN | other)
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (403, False)
