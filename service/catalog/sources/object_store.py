"""Reads the files of an adapter in a bucket through fsspec, with the credentials of the usual environment.

Runs in the API process, in threads that may wait; the packages that speak to each store are optional. Must
not know where the files go.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from ...core.manifest import is_manifest_name
from ...errors import AdapterInvalid
from ...source_urls import STORES
from .remote import RemoteFile

BLOCK = 16 << 20  # bytes of one request


def open_store(scheme: str) -> Any:
    """The file system of a scheme, without anything that it remembers.

    Raises AdapterInvalid where its package is missing.
    """
    import fsspec

    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError:
        package = STORES.get(scheme, scheme)
        raise AdapterInvalid(
            [f"{scheme}:// needs the package {package}, which is not installed here: pip install {package}"]
        ) from None


class StoreFolder:
    """The folder at this path of a file system, a bucket's name first."""

    def __init__(self, store: Any, path: str) -> None:
        self.store, self.path = store, path

    def open_files(self) -> Generator[RemoteFile, None, None]:
        """Each file of the manifest that is there, to be read before the next.

        Raises what the file system's library raises.
        """
        for entry in sorted(self._list_files(), key=lambda entry: str(entry["name"])):
            name = str(entry["name"]).rpartition("/")[2]
            with self.store.open(entry["name"], "rb", block_size=BLOCK) as file:
                yield RemoteFile(name, entry.get("size"), file)

    def _list_files(self) -> list[dict[str, Any]]:
        try:
            entries = self.store.ls(self.path, detail=True)
        except FileNotFoundError:
            return []
        return [entry for entry in entries if entry["type"] == "file" and self._is_wanted(str(entry["name"]))]

    def _is_wanted(self, path: str) -> bool:
        folder, _, name = path.strip("/").rpartition("/")
        return folder == self.path and is_manifest_name(name)
