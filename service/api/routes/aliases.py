"""The routes that list, set and remove aliases. API process; must not choose a target."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Response
from pydantic import Field

from ...catalog.aliases import HEAVIEST, MOST_TARGETS, AliasTarget
from ..errors import document_errors
from ..generation.sse import JsonAnswer
from ..schemas.digests import DigestStart
from ..schemas.shared import StrictModel
from ..scopes import ADMIN_SCOPE
from ..services import OpenRegistry

router = APIRouter(tags=["aliases"], dependencies=[ADMIN_SCOPE])

JsonDict = dict[str, Any]
Name = Annotated[str, Path(description="The alias's name, of the form of an adapter's id.")]
HEADER = r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$"
REPLACED: dict[int | str, JsonDict] = {200: {"description": "the alias was there, and is another now"}}


class Target(StrictModel):
    """An adapter that gets a share of an alias's requests."""

    id: str
    digest: DigestStart | None = Field(
        default=None, description="A version of it, by its digest or how that begins; else the current one."
    )
    weight: Annotated[float, Field(ge=0, le=HEAVIEST)]


class AliasBody(StrictModel):
    """Where the requests for an alias go."""

    targets: Annotated[list[Target], Field(min_length=1, max_length=MOST_TARGETS)]
    sticky: Annotated[str, Field(pattern=HEADER)] | None = Field(
        default=None,
        description="`user` or a header's name: the same caller gets the same target; null: none does.",
    )


@router.get("/aliases", responses=document_errors(403, 503))
async def list_aliases(services: OpenRegistry) -> JsonDict:
    """Every alias with its targets."""
    return {"aliases": [alias.to_json() for alias in services.registry.aliases.list_aliases()]}


@router.put(
    "/aliases/{name:path}",
    status_code=201,
    responses=document_errors(403, 404, 409, 422, 503, 507) | REPLACED,
)
async def put_alias(name: Name, body: AliasBody, services: OpenRegistry) -> Response:
    """Sends requests for this name to these adapters, from the next one on."""
    targets = [AliasTarget(target.id, target.weight, target.digest) for target in body.targets]
    alias, created = await services.registry.aliases.put_alias(name, targets, body.sticky)
    return JsonAnswer(alias.to_json(), 201 if created else 200)


@router.delete("/aliases/{name:path}", responses=document_errors(403, 404, 503, 507))
async def remove_alias(name: Name, services: OpenRegistry) -> JsonDict:
    """Ends an alias: a request for its name is 404 from now on; its targets stay."""
    alias = await services.registry.aliases.remove_alias(name)
    return alias.to_json()
