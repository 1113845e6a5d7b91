"""The services that the routes use, and whether they are ready. API process.

Must not know wire shapes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from ..catalog import ids
from ..errors import NotReady
from ..keys import Key
from ..settings import Settings
from ..telemetry.usage import UsageBook
from .generation.key_limits import TokenBudgets

if TYPE_CHECKING:  # the services themselves import much; listening starts before they are there
    from ..text.tokenizers import Tokenizers
    from .protocols import AdapterRegistry, EngineClient


@dataclass
class Services:
    """The worker's client, the registry and the tokenizers, and the state of the whole.

    `loaded_tokenizers` and `opened` are set once the base is loaded; `failure` says why it never
    will be. `running` is the number of requests in the process; once `draining`, no more are
    admitted. `usage` counts those that were, `budgets` what their keys may still use.
    """

    settings: Settings
    client: EngineClient
    registry: AdapterRegistry
    loaded_tokenizers: Tokenizers | None = None
    opened: bool = False
    draining: bool = False
    running: int = 0
    failure: str = ""
    usage: UsageBook = field(default_factory=UsageBook)
    budgets: TokenBudgets = field(init=False)

    def __post_init__(self) -> None:
        self.budgets = TokenBudgets(self.settings)

    @property
    def bases(self) -> tuple[str, ...]:
        """The names of the base, its own first."""
        return (self.registry.base_id, *ids.BASE)

    @property
    def tokenizers(self) -> Tokenizers:
        """Raises NotReady while the base loads."""
        if self.loaded_tokenizers is None:
            raise self.not_ready("the base is loading")
        return self.loaded_tokenizers

    @property
    def state(self) -> str:
        """`loading`, `ready`, `restarting`, `draining` or `failed`: the worker's, but loading until
        the registrations are there.
        """
        if self.draining or self.client.state == "draining":
            return "draining"
        if self.failure or self.client.state == "failed":
            return "failed"
        return "loading" if self.client.state == "ready" and not self.opened else self.client.state

    def require_ready(self) -> None:
        """Raises NotReady unless a request would be served now."""
        if self.state != "ready" or not self.client.ready:
            raise self.not_ready(self.reason)

    @property
    def reason(self) -> str:
        """Why a request would not be served now, fit for a person; empty when it would."""
        if self.state == "ready":
            return "" if self.client.ready else self.client.reason or "the worker does not answer"
        if self.state == "loading":
            return f"the base is loading: {self._loading_stage()}"
        if self.state == "draining":
            return "the service is shutting down"
        if self.state == "restarting":
            return self.client.reason or "the worker is restarting"
        return self._hide_folder(self.failure or self.client.reason or "the base cannot be loaded")

    def _loading_stage(self) -> str:
        if self.client.state != "loading":
            return "looking at adapters"
        return f"{self.client.stage or 'starting'} ({self.client.fraction:.0%})"

    def _hide_folder(self, reason: str) -> str:
        """The reason without the host's folders: the log may name them, an answer may not."""
        base = Path(self.settings.base)
        return reason.replace(str(base), base.name) if base.is_absolute() else reason

    def not_ready(self, reason: str) -> NotReady:
        return NotReady(f"not ready: {reason}", retry_after=1 if self.state == "restarting" else 2)


# Each of these is `async`: the framework runs any other dependency in a thread, and those may all be
# busy.


async def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def get_registered(services: Annotated[Services, Depends(get_services)]) -> Services:
    """The services, once the registrations are there; the worker may be restarting.

    Raises NotReady before that.
    """
    if not services.opened:
        raise services.not_ready(services.reason)
    return services


async def get_ready(services: Annotated[Services, Depends(get_services)]) -> Services:
    """The services, once the base serves. Raises NotReady before that and while draining."""
    services.require_ready()
    return services


@dataclass(frozen=True, slots=True)
class AdapterScope:
    """The adapters that a request may know of: all of them, unless its key has a list.

    An adapter that is not on the list is an unknown one.
    """

    key: Key | None

    @property
    def whole(self) -> bool:
        return self.key is None or self.key.adapters is None

    def can_see(self, id: str) -> bool:
        return self.key is None or self.key.may_use(id)

    def require_visible(self, id: str) -> None:
        """Raises AdapterNotFound, in the words in which an unknown id is refused."""
        if not self.can_see(id):
            raise ids.unknown_adapter(id)


def get_scope(request: Request) -> AdapterScope:
    return AdapterScope(request.scope.get("state", {}).get("key"))


async def _adapter_scope(request: Request) -> AdapterScope:
    return get_scope(request)


VisibleAdapters = Annotated[AdapterScope, Depends(_adapter_scope)]
AnyServices = Annotated[Services, Depends(get_services)]
OpenRegistry = Annotated[Services, Depends(get_registered)]
ReadyServices = Annotated[Services, Depends(get_ready)]
