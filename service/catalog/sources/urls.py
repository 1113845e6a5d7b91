"""The source of adapters at URLs that the settings allow: buckets and web servers; in the API process.

What is fetched lies under its digest beside the registrations, where a restart finds it again. Must not
know ids, states or what the files mean. No error repeats more of a URL than its one plain spelling, and of
a library's error only its class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...core.manifest import compute_digest, read_manifest
from ...durable import FULL
from ...errors import AdapterdError, AdapterInvalid, BadRequest, Forbidden
from ...source_urls import WEB, SourceUrl, is_allowed, is_url, parse_url, web_host
from ...threads import DOWNLOAD
from .addresses import find_addresses
from .base import (
    DOWNLOADS,
    SourceLocation,
    SourceRequest,
    check_relative,
    refuse_revision,
    resolve_location,
)
from .object_store import StoreFolder, open_store
from .remote import Download, RemoteFolder
from .stored import delete_on_failure, folder_name, keep_folder, make_staging, refuse_storing
from .web import WebFolder


class Urls:
    """URLs below the prefixes `allowed`; `opener` gives the file system of an object store's scheme."""

    threads = DOWNLOAD

    def __init__(
        self, allowed: tuple[str, ...], state: Path, opener: Callable[[str], Any] = open_store
    ) -> None:
        self.allowed = tuple(map(parse_url, allowed))
        self.downloads, self.opener = state / DOWNLOADS, opener

    def takes(self, source: str) -> bool:
        return is_url(source)

    def find_files(self, wanted: SourceRequest) -> SourceLocation:
        """The staged folder of what is fetched now; of content that was registered before, its kept one."""
        refuse_revision(wanted)
        source = _parse(wanted.source, "source")
        inner = check_relative(wanted.subfolder, "subfolder") if wanted.subfolder else None
        url = _parse(f"{source}/{inner}", "subfolder") if inner else source
        self._require_allowed(url)
        kept = SourceLocation(self.downloads / folder_name(wanted.digest), str(source), inner)
        if not wanted.registered:
            return replace(kept, folder=self._stage_files(url, wanted), staged=True)
        if not wanted.held or not all((kept.folder / name).is_file() for name in wanted.held):
            kept = replace(kept, folder=self._fetch_again(url, wanted))
        return resolve_location(kept, self.downloads)

    def _require_allowed(self, url: SourceUrl) -> None:
        """Raises Forbidden."""
        if not is_allowed(url, self.allowed):
            place = f"{url.scheme}://{url.host}"[:200]
            refusal = f"{place}, or this part of it, is not among the allowed sources (ADAPTERD_SOURCES)"
            raise Forbidden(refusal, param="source")

    def _fetch_again(self, url: SourceUrl, wanted: SourceRequest) -> Path:
        """Content that was registered before and is gone from here; it may be another one now."""
        staged = self._stage_files(url, wanted)
        with delete_on_failure(staged):
            try:
                return keep_folder(staged, self.downloads, compute_digest(read_manifest(staged)))
            except OSError as error:
                raise refuse_storing(error, "the download") from None

    def _stage_files(self, url: SourceUrl, wanted: SourceRequest) -> Path:
        try:
            staged = make_staging(self.downloads)
        except OSError as error:
            raise refuse_storing(error, "the download") from None
        with delete_on_failure(staged):
            self._fetch_files(url, staged, wanted)
        return staged

    def _fetch_files(self, url: SourceUrl, staged: Path, wanted: SourceRequest) -> None:
        download = Download(str(url), staged, wanted.limit, wanted.on_progress)
        try:
            download.fetch_files(self._open_folder(url))
        except AdapterdError:
            raise
        except Exception as error:  # a broken download raises what the library under it raises
            if isinstance(error, OSError) and error.errno in FULL:
                raise refuse_storing(error, "the download") from None
            raise AdapterInvalid([f"{url} cannot be fetched: {type(error).__name__}"]) from None

    def _open_folder(self, url: SourceUrl) -> RemoteFolder:
        """Raises Forbidden, AdapterInvalid."""
        if url.scheme in WEB:
            named = {web_host(prefix) for prefix in self.allowed}
            addresses = find_addresses(web_host(url), named)
            return WebFolder(url, addresses, lambda target: is_allowed(target, self.allowed))
        return StoreFolder(self.opener(url.scheme), "/".join((url.host, *url.parts)))


def _parse(text: str, field: str) -> SourceUrl:
    try:
        return parse_url(text)
    except ValueError as error:
        raise BadRequest(f"{field}: {error}", param=field) from None
