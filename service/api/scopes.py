"""The scope of key that a route needs: declared where the route is, read before its body.

Knows no key.
"""

from __future__ import annotations

from enum import IntEnum

from fastapi import Depends, Request
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.routing import Match
from starlette.types import Scope

from ..errors import Forbidden


class KeyScope(IntEnum):
    """What a caller has, and what a route asks for; each has what is below it."""

    PUBLIC = 0
    KEY = 1
    ADMIN = 2


class RequireScope:
    """A route's dependency: declares the scope, and refuses a caller that has been granted less.

    A body is read before any dependency is asked, so the authentication, which comes before the
    body, looks for the declaration itself.
    """

    def __init__(self, scope: KeyScope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> None:
        """Raises Forbidden."""
        if granted_scope(request.scope) < self.scope:
            raise missing_scope(self.scope)


PUBLIC_SCOPE, KEY_SCOPE, ADMIN_SCOPE = (Depends(RequireScope(scope)) for scope in KeyScope)


def missing_scope(scope: KeyScope) -> Forbidden:
    return Forbidden("this needs a key" + (" with the admin scope" if scope is KeyScope.ADMIN else ""))


def grant_scope(request: Scope, scope: KeyScope) -> None:
    request["state"]["granted"] = scope


def granted_scope(request: Scope) -> KeyScope:
    granted: KeyScope = request.get("state", {}).get("granted", KeyScope.PUBLIC)
    return granted


def declared_scopes(route: RouteContext) -> list[KeyScope]:
    """Of a route as it is included; what is mounted can declare none."""
    found = (depends.dependency for depends in getattr(route, "dependencies", ()))
    return [dependency.scope for dependency in found if isinstance(dependency, RequireScope)]


def required_scope(request: Scope) -> KeyScope:
    """The scope that the request needs: its route's, and the admin scope where a route declares
    none.

    Where no route of its path takes the method, the highest that one of them needs; where there is
    no route, a key.
    """
    others = []
    for route in iter_route_contexts(request["app"].routes):
        match, _ = route.matches(request)
        if match is not Match.NONE:
            needed = max(declared_scopes(route), default=KeyScope.ADMIN)
            if match is Match.FULL:
                return needed
            others.append(needed)
    return max(others, default=KeyScope.KEY)
