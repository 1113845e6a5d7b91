"""The routes that list, describe, register, change and remove adapters, under our names and vLLM's.
API process; must not read an adapter file itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from ...catalog.sources.store import refuse_upload
from ...core.manifest import CONFIG, TEXT_FILES, WEIGHTS
from ...errors import AdapterNotFound, BadRequest, Conflict, Forbidden, NotFound, SourceMissing
from ...settings import Dtype
from ...threads import RENDER, run_in
from ..errors import document_errors
from ..generation.sse import JsonAnswer
from ..schemas.digests import EXPECTED, DigestStart, WholeDigest
from ..schemas.shared import StrictModel
from ..scopes import ADMIN_SCOPE, KEY_SCOPE
from ..services import OpenRegistry, Services, VisibleAdapters

reading = APIRouter(tags=["adapters"], dependencies=[KEY_SCOPE])
# A dry run reads files of the host, so it needs the admin scope as well.
changing = APIRouter(tags=["adapters"], dependencies=[ADMIN_SCOPE])

Id = Annotated[str, Path(description="The adapter's id; one with a slash is written raw or as %2F.")]
Reading = document_errors(404, 503)
Changing = document_errors(403, 404, 409, 422, 429, 503, 504, 507)
Aliased = document_errors(403, 404, 422, 429, 503, 507, openai=True)
SAME: dict[int | str, dict[str, Any]] = {
    200: {"description": "this content is already registered under this id"}
}
NEW: dict[int | str, dict[str, Any]] = {201: {"description": "the id is new"}}
JsonDict = dict[str, Any]
MOST_PREFETCHED = 1000  # ids in a request


class SourceBody(StrictModel):
    source: str = Field(
        description="A folder relative to the adapters directory, hub:org/name, or a URL that is allowed."
    )
    subfolder: str | None = None
    revision: str | None = None
    pinned: bool = False
    preload: bool = True
    expect: WholeDigest | None = Field(default=None, description="The digest that the content must have.")


class Registration(SourceBody):
    id: str


class Replacement(SourceBody):
    id: str | None = Field(default=None, description="If given, the same as in the path.")


class Change(StrictModel):
    pinned: bool


class Rollback(StrictModel):
    digest: DigestStart | None = Field(
        default=None,
        description="A version that is kept, by its digest or how that begins; else the one before.",
    )


class Prefetch(StrictModel):
    ids: Annotated[list[str], Field(max_length=MOST_PREFETCHED)]


class LoadLora(StrictModel):
    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLora(StrictModel):
    lora_name: str


class ForecastShape(BaseModel):
    model_config = ConfigDict(extra="forbid")

    r: Annotated[int, Field(ge=1, le=1 << 16)]
    target_modules: Annotated[str, Field(min_length=1, description="Comma-separated names.")]
    dtype: Dtype = "float32"


@reading.get("/adapters", responses=Reading)
async def list_adapters(services: OpenRegistry, scope: VisibleAdapters) -> JsonDict:
    """Every registered adapter, as a small card; to a key with a list of adapters, those on it."""
    cards = services.registry.list_cards()
    return {"adapters": [card for card in cards if scope.can_see(card["id"])]}


@changing.post("/adapters", status_code=201, responses=Changing | SAME)
async def register_adapter(body: Registration, services: OpenRegistry) -> Response:
    """Registers a folder, or content of the hub or of an allowed URL, under an id."""
    card, created = await services.registry.register_adapter(**body.model_dump())
    return _registration_answer(card, created)


@changing.post("/adapters/check", responses=Changing)
async def check_adapter(body: Registration, services: OpenRegistry) -> JsonDict:
    """The whole validation and the summary; registers nothing.

    `ok` says whether POST would take this body.
    """
    registration = body.model_dump(exclude={"pinned"})
    return await services.registry.check_adapter(**registration)


@changing.post("/adapters/prefetch", status_code=202, responses=Changing)
async def prefetch_adapters(body: Prefetch, services: OpenRegistry) -> JsonDict:
    """Has adapters read into host memory, and placed on the device while there is room; waits for neither.

    Nothing that runs or is pinned leaves for them. The answer says where each is now.
    """
    return {"adapters": services.registry.prefetch_adapters(body.ids)}


FILE = {"type": "string", "format": "binary"}
PARTS = (CONFIG, WEIGHTS, *TEXT_FILES, "vocab.json", "vocab.txt", "file")
MOST_PARTS = 32
FORM = {
    "type": "object",
    "additionalProperties": False,
    "properties": dict.fromkeys(PARTS, FILE) | {"expect": {"type": "string", "pattern": EXPECTED.pattern}},
}
UPLOAD = {
    "requestBody": {
        "required": True,
        "description": "An adapter's config and weights, and the files of its tokenizer and templates "
        "where it has any, or one .zip or .tar of them in `file`; in `expect` the digest that it must have.",
        "content": {"multipart/form-data": {"schema": FORM}},
    }
}


@changing.post("/adapters/{id:path}/upload", status_code=201, responses=Changing | SAME, openapi_extra=UPLOAD)
async def upload_adapter(id: Id, services: OpenRegistry, request: Request) -> Response:
    """Stores an adapter's files under the adapters directory and registers them."""
    return await _take_upload(id, services, request, replace=False)


@changing.put("/adapters/{id:path}/upload", responses=Changing | NEW, openapi_extra=UPLOAD)
async def replace_by_upload(id: Id, services: OpenRegistry, request: Request) -> Response:
    """Replaces atomically by an upload, which is pinned where the version before it was."""
    return await _take_upload(id, services, request, replace=True)


async def _take_upload(id: str, services: Services, request: Request, replace: bool) -> Response:
    try:
        async with request.form(max_files=MOST_PARTS, max_fields=MOST_PARTS) as form:
            files, expect = _read_parts(form.multi_items())
            card, created = await services.registry.upload_adapter(id, files, replace, expect)
            return _registration_answer(card, created)
    except OSError as error:
        raise refuse_upload(error) from error


def _read_parts(parts: Sequence[tuple[str, UploadFile | str]]) -> tuple[dict[str, UploadFile], str | None]:
    """The files by their names, and the digest that is expected. Raises BadRequest."""
    files = {name: part for name, part in parts if isinstance(part, UploadFile)}
    fields = [(name, part) for name, part in parts if isinstance(part, str)]
    expected = [part for name, part in fields if name == "expect"]
    if len(files) + len(expected) < len(parts) or len(expected) > 1:
        raise BadRequest(
            "upload: every part but `expect` is a file, and no two have the same name", param="file"
        )
    if expected and not EXPECTED.fullmatch(expected[0]):
        raise BadRequest("expect: must be sha256: and 64 hexadecimal digits, in lower case", param="expect")
    return files, expected[0] if expected else None


@reading.get("/adapters/{id:path}/summary", responses=Reading | {200: {"content": {"text/plain": {}}}})
async def show_summary(
    id: Id,
    services: OpenRegistry,
    scope: VisibleAdapters,
    request: Request,
    format: Annotated[Literal["json", "text"] | None, Query()] = None,
) -> Response:
    """Everything about an adapter; as a table to read where `Accept` or `format` ask for text."""
    scope.require_visible(id)
    accept = request.headers.get("accept", "")
    accepts_text = "text/plain" in accept and "application/json" not in accept
    if format == "text" or (format is None and accepts_text):
        text = services.registry.summary_text(id)
        # Its files may hold lone surrogates
        return PlainTextResponse(text.encode("utf-8", "backslashreplace"))
    return JsonAnswer(services.registry.summary_of(id))


@reading.get("/adapters/{id:path}/architecture", responses=Reading, response_class=PlainTextResponse)
async def show_architecture(id: Id, services: OpenRegistry, scope: VisibleAdapters) -> str:
    """The module tree with the adapter in place; repeated layers folded."""
    scope.require_visible(id)
    # Of a base with many experts, 18,000 modules
    return await run_in(RENDER, services.registry.draw_architecture, id)


# One part deeper than any id goes, so no id can hide it.
@reading.get("/adapters/{id:path}/architecture/norms", responses=document_errors(404, 422, 503))
async def show_norms(id: Id, services: OpenRegistry, scope: VisibleAdapters) -> JsonDict:
    """Where it acts: rank and Frobenius norm of `scaling · B · A` by module and layer;

    DoRA's magnitudes are not in it.
    """
    scope.require_visible(id)
    return await services.registry.measure_norms(id)


@reading.get("/adapters/{id:path}/versions", responses=Reading)
async def list_versions(id: Id, services: OpenRegistry, scope: VisibleAdapters) -> JsonDict:
    """The versions that answer: the current one, then those that are kept, the last one first."""
    scope.require_visible(id)
    return {"versions": services.registry.versions_of(id)}


@changing.post("/adapters/{id:path}/rollback", responses=Changing)
async def roll_back(id: Id, body: Rollback, services: OpenRegistry) -> JsonDict:
    """Makes the version before current again, or the one that is named."""
    return await services.registry.roll_back(id, body.digest)


@reading.get("/adapters/{id:path}", responses=Reading)
async def show_card(id: Id, services: OpenRegistry, scope: VisibleAdapters) -> JsonDict:
    scope.require_visible(id)
    return services.registry.card_of(id)


@changing.put("/adapters/{id:path}", responses=Changing | NEW)
async def replace_adapter(id: Id, body: Replacement, services: OpenRegistry) -> Response:
    """Replaces atomically: requests in flight finish on the old content."""
    if body.id not in (None, id):
        raise BadRequest(f"id: {body.id!r} is not the id of the path, {id!r}", param="id")
    registration = body.model_dump() | {"id": id}
    card, created = await services.registry.register_adapter(**registration, replace=True)
    return _registration_answer(card, created)


@changing.patch("/adapters/{id:path}", responses=Changing)
async def change_adapter(id: Id, body: Change, services: OpenRegistry) -> JsonDict:
    """Pins to, or unpins from, the device."""
    return await services.registry.pin_adapter(id, body.pinned)


@changing.delete("/adapters/{id:path}", responses=Changing)
async def remove_adapter(id: Id, services: OpenRegistry, purge: bool = False) -> JsonDict:
    """Stops new requests at once, lets those in flight finish, frees;

    `purge` also deletes files that were uploaded.
    """
    return await services.registry.remove_adapter(id, purge)


@contextmanager
def _as_vllm() -> Iterator[None]:
    """Raises errors with vLLM's codes, their fields named as in vLLM's body."""
    try:
        yield
    except SourceMissing as error:
        raise NotFound(error.message, param="lora_path") from error
    except Forbidden as error:
        raise BadRequest(error.message, param="lora_path") from error
    except (BadRequest, Conflict, AdapterNotFound) as error:
        error.param = "lora_name"
        raise


@changing.post("/v1/load_lora_adapter", responses=Aliased, response_class=PlainTextResponse)
async def load_lora(body: LoadLora, services: OpenRegistry) -> str:
    """vLLM's name for registering; `load_inplace` replaces, and leaves the pin as it is."""
    with _as_vllm():
        await services.registry.register_adapter(
            body.lora_name, body.lora_path, pinned=None, replace=body.load_inplace
        )
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@changing.post("/v1/unload_lora_adapter", responses=Aliased, response_class=PlainTextResponse)
async def unload_lora(body: UnloadLora, services: OpenRegistry) -> str:
    """vLLM's name for deleting."""
    with _as_vllm():
        await services.registry.remove_adapter(body.lora_name, False)
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


@reading.get("/forecast", responses=document_errors(422, 503))
async def show_forecast(shape: Annotated[ForecastShape, Query()], services: OpenRegistry) -> JsonDict:
    """What an adapter of that shape would weigh on the served base."""
    modules = [name.strip() for name in shape.target_modules.split(",") if name.strip()]
    return services.registry.forecast_size(shape.r, modules, shape.dtype)


def _registration_answer(card: JsonDict, created: bool) -> Response:
    return JsonAnswer(card, 201 if created else 200)
