"""The scope that a route needs of a key: declared with the route, checked before its body. API process;
must not know a key.
"""

from __future__ import annotations

from enum import IntEnum

from fastapi import Depends, FastAPI, Request
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.routing import Match
from starlette.types import Scope

from ..errors import Forbidden


class KeyScope(IntEnum):
    """The scope that a caller has or a route needs; each contains those below it."""

    PUBLIC = 0
    KEY = 1
    ADMIN = 2


class RequireScope:
    """A route's dependency: declares the scope, and refuses a caller that has been granted less.

    A body is read before any dependency runs, so the authentication, which comes before the body,
    looks for the declaration itself.
    """

    def __init__(self, scope: KeyScope) -> None:
        self.scope = scope

    def scope_in(self, app: FastAPI) -> KeyScope:
        """The scope that the settings of this service make of the declared one."""
        return self.scope

    async def __call__(self, request: Request) -> None:
        """Raises Forbidden."""
        needed = self.scope_in(request.app)
        if granted_scope(request.scope) < needed:
            raise missing_scope(needed)


class RequireMetricsScope(RequireScope):
    """A key, unless the metrics are open to all who reach the service."""

    def scope_in(self, app: FastAPI) -> KeyScope:
        return KeyScope.PUBLIC if app.state.services.settings.metrics_open == "on" else self.scope


PUBLIC_SCOPE, KEY_SCOPE, ADMIN_SCOPE = (Depends(RequireScope(scope)) for scope in KeyScope)
METRICS_SCOPE = Depends(RequireMetricsScope(KeyScope.KEY))


def missing_scope(scope: KeyScope) -> Forbidden:
    suffix = " with the admin scope" if scope is KeyScope.ADMIN else ""
    return Forbidden("this needs a key" + suffix)


def grant_scope(request: Scope, scope: KeyScope) -> None:
    request["state"]["granted"] = scope


def granted_scope(request: Scope) -> KeyScope:
    granted: KeyScope = request.get("state", {}).get("granted", KeyScope.PUBLIC)
    return granted


def declared_scopes(route: RouteContext) -> list[RequireScope]:
    """The scopes of a route as it is included; a mounted app can declare none."""
    dependencies = (depends.dependency for depends in getattr(route, "dependencies", ()))
    return [dependency for dependency in dependencies if isinstance(dependency, RequireScope)]


def required_scope(request: Scope) -> KeyScope:
    """The scope that the request needs: its route's, and the admin scope where a route declares
    none.

    Where no route of its path takes the method, the highest that one of them needs; where there is
    no route, a key.
    """
    of_other_methods = []
    for route in iter_route_contexts(request["app"].routes):
        match, _ = route.matches(request)
        if match is not Match.NONE:
            scopes = (declared.scope_in(request["app"]) for declared in declared_scopes(route))
            needed = max(scopes, default=KeyScope.ADMIN)
            if match is Match.FULL:
                return needed
            of_other_methods.append(needed)
    return max(of_other_methods, default=KeyScope.KEY)
