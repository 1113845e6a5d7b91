"""Adapters from URLs in the registry: one content whatever its source, nothing left of what is refused, and
found again after a restart.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from service.errors import AdapterInvalid, AdapterNotFound, BadRequest, Conflict, Forbidden
from service.threads import DISK, run_in

from ..loopback import listening
from .conftest import RegistryFixture
from .test_registry import parts

pytestmark = pytest.mark.anyio


class FolderSite:
    """A folder on a web server; `opened` holds its answers back while it is not set."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.opened, self.reached = threading.Event(), threading.Event()
        self.opened.set()
        self.asked: list[str] = []


@pytest.fixture
def site(tmp_path: Path, plain: Path, other: Path) -> Iterator[FolderSite]:
    one = FolderSite(tmp_path / "site")
    shutil.copytree(plain, one.folder / "team" / "plain")
    shutil.copytree(other, one.folder / "team" / "other")

    class FolderHandler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            one.asked.append(self.path)
            one.reached.set()
            assert one.opened.wait(20)
            super().do_GET()

        def log_message(self, format: str, *arguments: object) -> None:
            return None

    handler: Any = partial(FolderHandler, directory=str(one.folder))
    with listening(handler) as url:
        one.url = url
        yield one


def downloads(catalog: RegistryFixture) -> list[str]:
    folder = catalog.root / ".downloads"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


async def test_a_download_has_the_digest_of_its_folder_and_outlives_a_restart(
    catalog: RegistryFixture, site: FolderSite, plain: Path
) -> None:
    source, sources = f"{site.url}/team/plain", (f"{site.url}/team",)
    async with catalog.opened(sources=sources) as registry:
        card, created = await registry.register_adapter("url", source, pinned=True)
        assert (created, card["residency"], card["pinned"]) == (True, "host", True)
        uploaded, _ = await registry.upload_adapter("up", parts(plain))
        assert uploaded["digest"] == card["digest"]
        assert registry.summary_of("url")["source"] == source
        assert await registry.register_adapter("url", source) == (registry.card_of("url"), False)
    assert downloads(catalog) == [card["digest"].removeprefix("sha256:")]
    site.asked.clear()
    async with catalog.opened(sources=sources) as registry:
        assert registry.card_of("url") | {"residency": "host"} == card | {"last_used": None}
        with registry.lease_adapter("url") as version:
            assert version.folder == (catalog.root / ".downloads" / downloads(catalog)[0]).resolve()
    assert site.asked == []


async def test_a_refused_download_leaves_nothing(catalog: RegistryFixture, site: FolderSite) -> None:
    async with catalog.opened(sources=(f"{site.url}/team",)) as registry:
        await registry.register_adapter("a", f"{site.url}/team/plain")
        with pytest.raises(Conflict):
            await registry.register_adapter("a", f"{site.url}/team/other")
        (site.folder / "team" / "other" / "adapter_config.json").write_text("{}")
        with pytest.raises(AdapterInvalid):
            await registry.register_adapter("b", f"{site.url}/team/other")
        for source, kind in (("https://x:y@host/a", BadRequest), ("https://host/a", Forbidden)):
            with pytest.raises(kind):
                await registry.register_adapter("c", source)
        assert len(downloads(catalog)) == 1


async def test_a_dry_run_keeps_nothing(catalog: RegistryFixture, site: FolderSite) -> None:
    async with catalog.opened(sources=(f"{site.url}/team",)) as registry:
        told = await registry.check_adapter("a", f"{site.url}/team/plain")
        assert (told["ok"], told["summary"]["source"]) == (True, f"{site.url}/team/plain")
        assert (downloads(catalog), registry.list_cards()) == ([], [])


async def test_purge_deletes_what_was_fetched_once_nobody_has_it(
    catalog: RegistryFixture, site: FolderSite
) -> None:
    async with catalog.opened(sources=(f"{site.url}/team",)) as registry:
        for id in ("a", "b"):
            await registry.register_adapter(id, f"{site.url}/team/plain")
        await registry.remove_adapter("a", purge=True)
        assert len(downloads(catalog)) == 1
        await registry.remove_adapter("b", purge=True)
        assert downloads(catalog) == []


async def test_what_a_replacement_has_left_goes_at_the_next_start(
    catalog: RegistryFixture, site: FolderSite
) -> None:
    sources = (f"{site.url}/team",)
    async with catalog.opened(sources=sources) as registry:
        await registry.register_adapter("a", f"{site.url}/team/plain")
        card, created = await registry.register_adapter("a", f"{site.url}/team/other", replace=True)
        assert not created
        assert len(downloads(catalog)) == 2
    async with catalog.opened(keep_versions=0, sources=sources) as registry:
        assert downloads(catalog) == [card["digest"].removeprefix("sha256:")]
        assert registry.card_of("a")["digest"] == card["digest"]


async def test_what_is_gone_is_fetched_again_at_start(catalog: RegistryFixture, site: FolderSite) -> None:
    sources = (f"{site.url}/team",)
    async with catalog.opened(sources=sources) as registry:
        card, _ = await registry.register_adapter("a", f"{site.url}/team/plain")
    shutil.rmtree(catalog.root / ".downloads")
    async with catalog.opened(sources=sources) as registry:
        assert (registry.card_of("a")["digest"], registry.card_of("a")["state"]) == (card["digest"], "ready")
    shutil.rmtree(catalog.root / ".downloads")
    async with catalog.opened() as registry:
        assert registry.card_of("a")["state"] == "failed"
        assert "ADAPTERD_SOURCES" in registry.card_of("a")["reason"]


async def test_the_card_shows_how_much_has_come(catalog: RegistryFixture, site: FolderSite) -> None:
    async with catalog.opened(sources=(f"{site.url}/team",)) as registry:
        site.opened.clear()
        fetching = asyncio.create_task(registry.register_adapter("a", f"{site.url}/team/plain"))
        assert await run_in(DISK, site.reached.wait, 10)
        card = registry.card_of("a")
        assert (card["id"], card["state"], card["fetching"]) == ("a", "fetching", {"bytes": None})
        assert registry.list_cards() == []
        with pytest.raises(AdapterNotFound), registry.lease_adapter("a"):
            pass
        site.opened.set()
        done, _ = await fetching
        assert card.keys() == done.keys() | {"fetching"}
        assert "fetching" not in registry.card_of("a")
        with registry._fetches.track("a") as fetch:
            fetch.note_progress(5)
            assert registry.card_of("a") == done | {"fetching": {"bytes": 5}}
