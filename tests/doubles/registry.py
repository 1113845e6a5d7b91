"""The one stand-in for the registry: `service.api.protocols.AdapterRegistry` without a validator.

Imports neither torch nor a tokenizer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from service.catalog.alias_registry import AliasRegistry
from service.catalog.ids import split_digest, unexpected_digest
from service.core.adapter import Adapter, Digest, ExecutionPath
from service.core.manifest import CONFIG, WEIGHTS, Manifest, compute_digest, read_manifest
from service.errors import (
    AdapterInvalid,
    AdapterNotFound,
    Conflict,
    DigestMismatch,
    Forbidden,
    SourceMissing,
)
from service.telemetry import metrics
from service.telemetry.audit import record_change

if TYPE_CHECKING:
    from service.catalog.aliases import Alias, AliasTarget
    from service.catalog.mixes import Mix
    from service.catalog.sources.store import UploadedFile
    from service.catalog.versions import AdapterVersion

Json = dict[str, Any]
T = TypeVar("T")

REGISTERED = "2026-11-25T12:00:00.500Z"
DIGEST = "sha256:" + "a" * 64
NOWHERE = Path("/nowhere")


class FakeRegistry:
    """Cards by id. An adapter's folder is `root`/id: a lease is of what lies there, or of the card's digest
    where nothing does.

    `ids` are registered from the start, `folders` once a request names them. `calls` are the registrations,
    uploads and the end that came, `leased` the ids that are leased now. A source may be named after the error
    that it raises.
    """

    base_id = "tiny"

    def __init__(self, root: Path = NOWHERE, ids: Iterable[str] = ()) -> None:
        self.root = root
        self.cards: dict[str, Json] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.leased: list[str] = []
        self.aliases = AliasRegistry(self, make_change, write_nothing)
        self.folders: set[str] = set()
        for id in ids:
            self.cards[id] = {"id": id, "digest": DIGEST, "source": id}
            metrics.adapter_registered(id)

    # ---- its life

    def claim_state(self) -> None:
        return None

    async def start_validator(self) -> None:
        return None

    async def open_catalog(self) -> None:
        return None

    async def close(self) -> None:
        self.calls.append(("close",))

    # ---- changing

    async def register_adapter(
        self,
        id: str,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        pinned: bool | None = False,
        preload: bool = True,
        replace: bool = False,
        expect: Digest | None = None,
    ) -> tuple[Json, bool]:
        given: Json = {"subfolder": subfolder, "revision": revision, "pinned": pinned, "preload": preload}
        if expect is not None:
            given["expect"] = expect
        self.calls.append(("register", id, source, replace, given))
        if expect not in (None, DIGEST):
            raise unexpected_digest(str(expect), DIGEST)
        return self._register_source(id, source, bool(pinned), replace)

    def _register_source(self, id: str, source: str, pinned: bool, replace: bool) -> tuple[Json, bool]:
        check_source(source)
        held = self.cards.get(id)
        if held and held["source"] == source:
            return held, False
        if held and not replace:
            raise Conflict(f"{id} is taken by other content", param="id")
        self.cards[id] = {"id": id, "source": source, "digest": "sha256:" + source, "pinned": pinned}
        what, before = ("replaced", held["digest"]) if held else ("registered", None)
        record_change(what, id, before, self.cards[id]["digest"])
        return self.cards[id], held is None

    async def check_adapter(
        self,
        id: str,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        preload: bool = True,
        expect: Digest | None = None,
    ) -> Json:
        summary: Json = {"id": id, "source": source, "subfolder": subfolder, "revision": revision}
        summary["preload"] = preload
        if expect is not None:
            summary["expect"] = expect
        return {"ok": True, "summary": summary, "problems": []}

    async def upload_adapter(
        self,
        id: str,
        files: Mapping[str, UploadedFile],
        replace: bool = False,
        expect: Digest | None = None,
    ) -> tuple[Json, bool]:
        contents = {name: await part.read(-1) for name, part in files.items()}
        self.calls.append(("upload", id, contents))
        return await self.register_adapter(id, ".uploads/x", replace=replace, expect=expect)

    async def roll_back(self, id: str, digest: Digest | None = None) -> Json:
        self.calls.append(("roll_back", id, digest))
        return self.card_of(id)

    def is_registered(self, id: str) -> bool:
        return id in self.cards

    def find_digest(self, target: AliasTarget) -> Digest | None:
        digest = str(self.card_of(target.id)["digest"])
        if target.digest and not digest.startswith(target.digest):
            raise DigestMismatch(f"{target.id} has {digest}")
        return digest if target.digest else None

    async def remove_adapter(self, id: str, purge: bool = False) -> Json:
        held = self.card_of(id)
        del self.cards[id]
        return {"id": id, "digest": held["digest"], "drained_requests": 0, "freed_bytes": 7, "purge": purge}

    async def pin_adapter(self, id: str, pinned: bool) -> Json:
        self.card_of(id)["pinned"] = pinned
        return self.card_of(id)

    def prefetch_adapters(self, wanted: Sequence[str]) -> list[Json]:
        self.calls.append(("prefetch", list(wanted)))
        return [{"id": self.card_of(id)["id"], "residency": "disk"} for id in wanted]

    # ---- using and looking

    async def resolve_adapter(self, id: str) -> None:
        if id in self.folders:
            self.cards.setdefault(id, {"id": id, "digest": DIGEST, "source": id})

    @contextmanager
    def lease_adapter(self, name: str) -> Iterator[AdapterVersion]:
        id, demanded = split_digest(name)
        card = self.card_of(id)
        if not card["digest"].startswith(demanded):
            raise DigestMismatch(f"{id} has {card['digest']}", param="model")
        self.leased.append(id)
        try:
            folder = self.root / id
            files = read_manifest(folder) if folder.exists() else ()
            digest = compute_digest(files) if files else card["digest"]
            yield make_version(id, digest, folder, files)
        finally:
            self.leased.remove(id)

    @contextmanager
    def lease_mix(self, weights: Sequence[tuple[str, float]]) -> Iterator[Mix]:
        from service.catalog.mixes import Mix, MixPart

        with ExitStack() as leases:
            parts = [(leases.enter_context(self.lease_adapter(id)), weight) for id, weight in weights]
            adapter = Adapter("sha256:mix", "", "", ExecutionPath.POOL, 8, 2000)
            yield Mix(
                adapter, tuple(MixPart(version.id, version.digest, weight) for version, weight in parts)
            )

    def list_versions(self) -> list[AdapterVersion]:
        return [make_version(id, card["digest"], self.root / id) for id, card in self.cards.items()]

    def versions_of(self, id: str) -> list[Json]:
        return [{"digest": self.card_of(id)["digest"], "in_flight": 0}]

    def list_cards(self) -> list[Json]:
        return list(self.cards.values())

    def card_of(self, id: str) -> Json:
        if id not in self.cards:
            raise AdapterNotFound(f"no adapter {id!r} is registered", param="model")
        return self.cards[id]

    def summary_of(self, id: str) -> Json:
        return self.card_of(id) | {"rank": 4}

    def summary_text(self, id: str) -> str:
        return f"{self.card_of(id)['id']} rank 4"

    def draw_architecture(self, id: str) -> str:
        return f"{self.card_of(id)['id']}: base_layer"

    async def measure_norms(self, id: str) -> Json:
        return {"id": self.card_of(id)["id"], "modules": [{"name": "q_proj", "norms": [0.5, None]}]}

    def forecast_size(self, r: int, modules: Sequence[str], dtype: str = "float32") -> Json:
        return {"r": r, "target_modules": modules, "dtype": dtype}


async def make_change(change: Callable[[], Awaitable[T]]) -> T:
    return await change()


async def write_nothing(aliases: Mapping[str, Alias]) -> None:
    return None


def check_source(source: str) -> None:
    """Raises the error that the source is named after."""
    if source == "bad":
        raise AdapterInvalid(["lora_A of q_proj has no lora_B", "r is 0"])
    if source == "gone":
        raise SourceMissing(["source 'gone': there is no such folder"])
    if source == "outside":
        raise Forbidden("the source is outside the adapters directory")


def make_version(id: str, digest: str, folder: Path, files: Manifest = ()) -> AdapterVersion:
    """A version of this content; one of an id with a slash came from the hub."""
    # Here, for it imports the hub's client
    from service.catalog.sources.base import SourceLocation
    from service.catalog.validator.messages import ValidatedAdapter
    from service.catalog.versions import AdapterVersion

    location = SourceLocation(folder, f"hub:{id}" if "/" in id else id)
    config, weights = str(folder / CONFIG), str(folder / WEIGHTS)
    adapter = Adapter(digest, config, weights, ExecutionPath.POOL, 4, 1000, files=files)
    return AdapterVersion(id, location, "", REGISTERED, ValidatedAdapter(adapter, facts={}))
