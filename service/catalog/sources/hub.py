"""Fetches an adapter's files from the Hugging Face hub, where the settings allow it; in the API process.

Must not know what the files mean.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from contextlib import suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ... import durable
from ...core.manifest import PATTERNS, is_manifest_name
from ...errors import AdapterdError, AdapterInvalid, Forbidden, PayloadTooLarge, StorageFull
from ...threads import DOWNLOAD
from .base import HUB, SourceLocation, SourceRequest, check_relative, resolve_location

log = logging.getLogger("adapterd.adapters")

COMMIT = re.compile(r"[0-9a-f]{40}")


class Hub:
    """The hub, behind its cache, as a source of adapters.

    `allowed` are patterns such as org/* and org/name; `endpoint` and `cache` default to the library's
    own.
    """

    threads = DOWNLOAD

    def __init__(
        self, allowed: tuple[str, ...], endpoint: str | None = None, cache: Path | None = None
    ) -> None:
        self.allowed, self.endpoint = allowed, endpoint
        self.cache = cache or Path(constants.HF_HUB_CACHE)

    def takes(self, source: str) -> bool:
        return source.startswith(HUB)

    def find_files(self, wanted: SourceRequest) -> SourceLocation:
        """As `fetch_adapter`."""
        inner = check_relative(wanted.subfolder, "subfolder") if wanted.subfolder else None
        name = wanted.source.removeprefix(HUB)
        folder, commit = self.fetch_adapter(name, wanted.revision, inner, wanted.limit, wanted.held)
        return resolve_location(SourceLocation(folder, wanted.source, inner, commit), self.cache)

    def fetch_adapter(
        self, name: str, revision: str | None, subfolder: str | None, limit: int, held: Collection[str] = ()
    ) -> tuple[Path, str]:
        """The local folder and the commit it is pinned to; from the cache when the hub cannot be
        reached.

        `held` names the files that this commit is known to have: with all of them in the cache it
        is not asked for again. Raises Forbidden unless a pattern allows the name, AdapterInvalid
        with the hub's reason, PayloadTooLarge over `limit` bytes, StorageFull where the cache has no
        room.
        """
        if not any(fnmatchcase(name, pattern) for pattern in self.allowed):
            refusal = f"hub:{name[:100]} is not among the allowed sources (ADAPTERD_HUB)"
            raise Forbidden(refusal, param="source")
        try:
            folder = self._download_files(name, revision, subfolder, limit, held)
        except AdapterdError:
            raise
        except Exception as error:  # a broken download raises what the HTTP library under it raises
            if isinstance(error, OSError) and error.errno in durable.FULL:
                raise StorageFull(f"hub:{name} cannot be stored: {error.strerror}") from None
            raise AdapterInvalid([_describe_failure(name, error)]) from None
        commit = folder.name
        return folder / subfolder if subfolder else folder, commit

    def _download_files(
        self, name: str, revision: str | None, subfolder: str | None, limit: int, held: Collection[str]
    ) -> Path:
        if held and COMMIT.fullmatch(revision or ""):  # a commit does not change
            with suppress(LocalEntryNotFoundError):
                folder = self._find_cached(name, revision, subfolder)
                inner = folder / (subfolder or "")
                if all((inner / file).is_file() for file in held):
                    return folder
        info = self._request_info(name, revision)
        if info is None:
            return self._find_cached(name, revision, subfolder)
        return self._download_snapshot(name, revision, info, subfolder, limit)

    def _request_info(self, name: str, revision: str | None) -> ModelInfo | None:
        """The repository's files as the hub lists them; None where it cannot be reached."""
        api = HfApi(endpoint=self.endpoint)
        try:
            return api.model_info(name, revision=revision, files_metadata=True, timeout=20)
        except HFValidationError:
            raise
        except Exception as error:  # unreachable: the exception's class depends on the HTTP library's version
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            log.warning(
                "hub:%s cannot be asked which files it has (%s): what its cache holds is taken",
                name,
                type(error).__name__,
            )
            return None

    def _download_snapshot(
        self, name: str, revision: str | None, info: ModelInfo, subfolder: str | None, limit: int
    ) -> Path:
        """All files of the manifest that the commit has, also where the cache had a part of them."""
        below = f"{subfolder}/" if subfolder else ""
        paths = [file.rfilename for file in info.siblings or ()]
        paths = [path for path in paths if _is_manifest_path(path, below)]
        _check_size(name, info, paths, limit)
        patterns = [escape(path) for path in paths]
        snapshot = snapshot_download(
            name, revision=revision, cache_dir=self.cache, allow_patterns=patterns, endpoint=self.endpoint
        )
        folder = Path(snapshot)
        if info.sha and folder.name != info.sha:
            raise AdapterInvalid([f"hub:{name} has changed while it was fetched: ask again"])
        if not all((folder / path).is_file() for path in paths):
            raise AdapterInvalid([f"hub:{name} was fetched in part only: ask again"])
        return folder

    def _find_cached(self, name: str, revision: str | None, subfolder: str | None) -> Path:
        below = f"{escape(subfolder)}/" if subfolder else ""
        paths = [below + pattern for pattern in PATTERNS]
        snapshot = snapshot_download(
            name, revision=revision, cache_dir=self.cache, allow_patterns=paths, local_files_only=True
        )
        return Path(snapshot)


def _check_size(name: str, info: ModelInfo, paths: Collection[str], limit: int) -> None:
    """Raises PayloadTooLarge where these paths together are over `limit` bytes."""
    wanted = [file for file in info.siblings or () if file.rfilename in paths]
    size = sum(file.size or 0 for file in wanted)
    if size > limit:
        raise PayloadTooLarge(f"hub:{name}: {size} bytes are over the limit of {limit}")


def _describe_failure(name: str, error: Exception) -> str:
    """The reason for the client; anything unknown is named by its class alone."""
    if isinstance(error, HFValidationError):
        return f"hub:{name[:100]} is no name of a repository"
    kind = type(error).__name__
    if isinstance(error, HfHubHTTPError):
        return f"hub:{name}: {kind} {error.response.status_code}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"hub:{name}: the hub cannot be reached, and the files are not in its cache"
    return f"hub:{name}: {kind}"


def _is_manifest_path(path: str, below: str) -> bool:
    name = path.removeprefix(below)
    return path.startswith(below) and is_manifest_name(name)
