"""Writes the files of a folder elsewhere into a folder here, within limits; in the API process, in threads
that may wait. Must not know how they are fetched or what they mean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from ...core.manifest import CONFIG, WEIGHTS
from ...errors import AdapterInvalid, PayloadTooLarge, SourceMissing

PIECE = 1 << 20  # bytes
LONGEST_S = 1800  # that one download may take
TEXT_LIMIT = 100_000_000  # bytes of a file that is not the weights
CONFIG_LIMIT = 1_000_000


class RemoteFile(NamedTuple):
    """An open file; `size` is what its server says, None where it says nothing."""

    name: str
    size: int | None
    content: IO[bytes]


class RemoteFolder(Protocol):
    """Files elsewhere, each to be read before the next is asked for."""

    def open_files(self) -> Generator[RemoteFile, None, None]: ...


class Download:
    """One download into an empty folder of at most `limit` bytes."""

    def __init__(self, name: str, folder: Path, limit: int, on_progress: Callable[[int], None]) -> None:
        self.name, self.folder, self.limit, self.on_progress = name, folder, limit, on_progress
        self.received = 0
        self.end = time.monotonic() + LONGEST_S

    def fetch_files(self, remote: RemoteFolder) -> None:
        """Raises AdapterInvalid, PayloadTooLarge, and what the remote folder raises."""
        with closing(remote.open_files()) as files:
            for file in files:
                self._check_size(file.name, file.size or 0)
                self._fetch_file(file)
        missing = [name for name in (CONFIG, WEIGHTS) if not (self.folder / name).exists()]
        if len(missing) == 2:
            raise SourceMissing([f"{self.name}: no adapter lies there"])
        if missing:
            raise AdapterInvalid([f"{name} is missing from {self.name}" for name in missing])

    def _fetch_file(self, file: RemoteFile) -> None:
        size = 0
        with (self.folder / file.name).open("xb") as target:
            while piece := file.content.read(PIECE):
                size += len(piece)
                self._check_size(file.name, size)
                target.write(piece)
                self.on_progress(self.received + size)
        if file.size is not None and size != file.size:
            raise AdapterInvalid([f"{self.name}: {file.name} was cut after {size} bytes of {file.size}"])
        self.received += size

    def _check_size(self, name: str, size: int) -> None:
        """Raises PayloadTooLarge for so much of one file, AdapterInvalid where it has taken too long."""
        own = {CONFIG: CONFIG_LIMIT, WEIGHTS: self.limit}.get(name, TEXT_LIMIT)
        if size > own:
            raise PayloadTooLarge(f"{self.name}: {name} is over the limit of {own} bytes")
        if self.received + size > self.limit:
            raise PayloadTooLarge(f"{self.name} is over the limit of {self.limit} bytes")
        if time.monotonic() > self.end:
            raise AdapterInvalid([f"{self.name} was not fetched within {LONGEST_S} s"])
