"""Checks a request's key and its scope before its body is read, as plain ASGI.

API process; must not know a key but its hash, and never logs one.
"""

from __future__ import annotations

import base64
import binascii

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import Forbidden, Unauthorized
from ...keys import Key, find_key
from ...settings import Settings
from ...telemetry import audit
from ..scopes import KeyScope, grant_scope, missing_scope, required_scope
from .cors import CROSS_SITE
from .refusal import refuse_request

READING = ("GET", "HEAD", "OPTIONS")

BROWSER = {"www-authenticate": 'Basic realm="adapterd: any name, the key as password", charset="UTF-8"'}


class Authentication:
    """Lets a request through when its key is known and has the scope that its route declares.

    With no keys set, none is needed.

    A request whose key is known has it as `request.state.key`.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = required_scope(scope) if scope["type"] == "http" else KeyScope.PUBLIC
        if needed is KeyScope.PUBLIC:
            return await self.app(scope, receive, send)
        refusal = self._refuse_foreign(scope) or self._refuse_key(scope, needed)
        if refusal is None:
            return await self.app(scope, receive, send)
        headers = BROWSER if refusal.status == 401 and _is_browser_page(scope) else None
        return await refuse_request(refusal, scope, receive, send, headers)

    def _refuse_foreign(self, scope: Scope) -> Forbidden | None:
        """Refuses a page of another site, unless its origin is one of those that may: a form could
        send an upload without a preflight.
        """
        headers, origins = Headers(scope=scope), self.settings.cors_origins
        if scope["method"] in READING or headers.get("sec-fetch-site") != "cross-site":
            return None
        return None if "*" in origins or headers.get("origin") in origins else CROSS_SITE

    def _refuse_key(self, scope: Scope, needed: KeyScope) -> Unauthorized | Forbidden | None:
        if not self.settings.keyed:
            audit.set_author(audit.ANYONE)
            grant_scope(scope, KeyScope.ADMIN)
            return None
        secret = _read_secret(scope)
        if secret is None:
            return Unauthorized(
                "a key is needed: send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'"
            )
        user, admin = find_key(secret, self.settings.api_keys), find_key(secret, self.settings.admin_keys)
        key = admin or user
        if key is None:
            return Unauthorized("the key is not known")
        _remember_key(scope, key)
        granted = KeyScope.KEY if admin is None else KeyScope.ADMIN
        grant_scope(scope, granted)
        return missing_scope(needed) if granted < needed else None


def _is_browser_page(scope: Scope) -> bool:
    return scope["method"] == "GET" and "text/html" in Headers(scope=scope).get("accept", "")


def _remember_key(scope: Scope, key: Key) -> None:
    scope["state"]["key"] = key
    audit.set_author(key.label)
    if key.name:
        scope["state"]["log"]["key"] = key.name


def _read_secret(scope: Scope) -> str | None:
    """The key as the environment would spell it: bytes outside UTF-8 are kept, so that no key on
    the wire can break the comparison.

    A browser can only send a key for a page by Basic authentication, as the password. It would send
    it with any request that another site makes it send, too; so there it counts for reading only.
    """
    headers = dict(scope["headers"])
    raw = headers.get(b"authorization", b"").strip()
    plain = headers.get(b"x-api-key", b"").strip()  # Anthropic's clients send it so
    if plain and not raw:
        return str(plain.decode("utf-8", "surrogateescape"))
    scheme, _, credentials = raw.partition(b" ")
    credentials = credentials.strip()
    if scheme.lower() == b"bearer" and credentials:
        return str(credentials.decode("utf-8", "surrogateescape"))
    if scheme.lower() == b"basic" and scope["method"] in READING:
        return _read_password(credentials)
    return None


def _read_password(credentials: bytes) -> str | None:
    try:
        pair = base64.b64decode(credentials, validate=True)
    except binascii.Error:
        return None
    return pair.partition(b":")[2].decode("utf-8", "surrogateescape")
