"""Fetches an adapter's files from the Hugging Face hub, where the settings allow it.

Knows nothing of what they mean.
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

from ...core.manifest import PATTERNS, is_manifest_name
from ...errors import AdapterdError, AdapterInvalid, Forbidden, PayloadTooLarge

log = logging.getLogger("adapterd.adapters")

COMMIT = re.compile(r"[0-9a-f]{40}")


class Hub:
    """`allowed` are patterns such as org/* and org/name;

    `endpoint` and `cache` default to the library's own.
    """

    def __init__(
        self, allowed: tuple[str, ...], endpoint: str | None = None, cache: Path | None = None
    ) -> None:
        self.allowed, self.endpoint = allowed, endpoint
        self.cache = cache or Path(constants.HF_HUB_CACHE)

    def fetch_adapter(
        self, name: str, revision: str | None, subfolder: str | None, limit: int, held: Collection[str] = ()
    ) -> tuple[Path, str]:
        """The local folder and the commit it is pinned to; from the cache when the hub cannot be
        reached.

        `held` names the files that this commit is known to have: with all of them in the cache it
        is not asked for again. Raises Forbidden unless a pattern allows the name, AdapterInvalid
        with the hub's reason, PayloadTooLarge over `limit` bytes.
        """
        if not any(fnmatchcase(name, pattern) for pattern in self.allowed):
            raise Forbidden(
                f"hub:{name[:100]} is not among the allowed sources (ADAPTERD_HUB)", param="source"
            )
        try:
            folder = self._download_files(name, revision, subfolder, limit, held)
        except AdapterdError:
            raise
        except HFValidationError:
            raise AdapterInvalid([f"hub:{name[:100]} is no name of a repository"]) from None
        except HfHubHTTPError as error:
            raise AdapterInvalid(
                [f"hub:{name}: {type(error).__name__} {error.response.status_code}"]
            ) from None
        except LocalEntryNotFoundError:
            raise AdapterInvalid(
                [f"hub:{name}: the hub cannot be reached, and the files are not in its cache"]
            ) from None
        except Exception as error:  # a broken download raises what the HTTP library under it raises
            raise AdapterInvalid([f"hub:{name}: {type(error).__name__}"]) from None
        return folder / subfolder if subfolder else folder, folder.name

    def _download_files(
        self, name: str, revision: str | None, subfolder: str | None, limit: int, held: Collection[str]
    ) -> Path:
        if held and COMMIT.fullmatch(revision or ""):  # a commit does not change
            with suppress(LocalEntryNotFoundError):
                found = self._find_cached(name, revision, subfolder)
                if all((found / (subfolder or "") / file).is_file() for file in held):
                    return found
        try:
            told = HfApi(endpoint=self.endpoint).model_info(
                name, revision=revision, files_metadata=True, timeout=20
            )
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
            return self._find_cached(name, revision, subfolder)
        return self._fetched(name, revision, told, subfolder, limit)

    def _fetched(
        self, name: str, revision: str | None, told: ModelInfo, subfolder: str | None, limit: int
    ) -> Path:
        """All files of the manifest that the commit has, also where the cache had a part of them."""
        below = f"{subfolder}/" if subfolder else ""
        wanted = [file for file in told.siblings or () if _is_manifest_path(file.rfilename, below)]
        size = sum(file.size or 0 for file in wanted)
        if size > limit:
            raise PayloadTooLarge(f"hub:{name}: {size} bytes are over the limit of {limit}")
        paths = [escape(file.rfilename) for file in wanted]
        found = snapshot_download(
            name, revision=revision, cache_dir=self.cache, allow_patterns=paths, endpoint=self.endpoint
        )
        folder = Path(found)
        if told.sha and folder.name != told.sha:
            raise AdapterInvalid([f"hub:{name} has changed while it was fetched: ask again"])
        if not all((folder / file.rfilename).is_file() for file in wanted):
            raise AdapterInvalid([f"hub:{name} was fetched in part only: ask again"])
        return folder

    def _find_cached(self, name: str, revision: str | None, subfolder: str | None) -> Path:
        below = f"{escape(subfolder)}/" if subfolder else ""
        paths = [below + pattern for pattern in PATTERNS]
        return Path(
            snapshot_download(
                name, revision=revision, cache_dir=self.cache, allow_patterns=paths, local_files_only=True
            )
        )


def _is_manifest_path(path: str, below: str) -> bool:
    return path.startswith(below) and is_manifest_name(path.removeprefix(below))
