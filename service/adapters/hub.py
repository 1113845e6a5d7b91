"""Fetches an adapter's two files from the Hugging Face hub, where the settings allow it. Knows nothing of what they mean."""

from __future__ import annotations

import re
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..errors import AdapterdError, AdapterInvalid, Forbidden, PayloadTooLarge
from .inspection import CONFIG, WEIGHTS

COMMIT = re.compile(r"[0-9a-f]{40}")


class Hub:
    """`allowed` are patterns such as org/* and org/name; `endpoint` and `cache` default to the library's own."""

    def __init__(self, allowed: tuple[str, ...], endpoint: str | None = None, cache: Path | None = None) -> None:
        self.allowed, self.endpoint = allowed, endpoint
        self.cache = cache or Path(constants.HF_HUB_CACHE)

    def fetch(self, name: str, revision: str | None, subfolder: str | None, limit: int) -> tuple[Path, str]:
        """The local folder and the commit it is pinned to; from the cache when the hub cannot be reached.

        Raises Forbidden unless a pattern allows the name, AdapterInvalid with the hub's reason, PayloadTooLarge over `limit` bytes.
        """
        if not any(fnmatchcase(name, pattern) for pattern in self.allowed):
            raise Forbidden(f"hub:{name[:100]} is not among the allowed sources (ADAPTERD_HUB)", param="source")
        files = [f"{subfolder}/{file}" if subfolder else file for file in (CONFIG, WEIGHTS)]
        try:
            folder = self._download(name, revision, files, limit)
        except AdapterdError:
            raise
        except HFValidationError:
            raise AdapterInvalid([f"hub:{name[:100]} is no name of a repository"]) from None
        except HfHubHTTPError as error:
            raise AdapterInvalid([f"hub:{name}: {type(error).__name__} {error.response.status_code}"]) from None
        except LocalEntryNotFoundError:
            raise AdapterInvalid([f"hub:{name}: the hub cannot be reached, and the files are not in its cache"]) from None
        except Exception as error:  # a broken download raises what the HTTP library under it raises
            raise AdapterInvalid([f"hub:{name}: {type(error).__name__}"]) from None
        return folder / subfolder if subfolder else folder, folder.name

    def _download(self, name: str, revision: str | None, files: list[str], limit: int) -> Path:
        if COMMIT.fullmatch(revision or ""):  # a commit does not change: what is there needs no asking
            with suppress(LocalEntryNotFoundError):
                found = self._cached(name, revision, files)
                if all((found / file).is_file() for file in files):
                    return found
        try:
            told = HfApi(endpoint=self.endpoint).model_info(name, revision=revision, files_metadata=True, timeout=20)
        except HFValidationError:
            raise
        except Exception as error:  # unreachable: the exception's class depends on the HTTP library's version
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            return self._cached(name, revision, files)
        size = sum(file.size or 0 for file in told.siblings or () if file.rfilename in files)
        if size > limit:
            raise PayloadTooLarge(f"hub:{name}: {size} bytes are over the limit of {limit}")
        return Path(snapshot_download(name, revision=revision, cache_dir=self.cache, allow_patterns=files, endpoint=self.endpoint))

    def _cached(self, name: str, revision: str | None, files: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, cache_dir=self.cache, allow_patterns=files, local_files_only=True))
