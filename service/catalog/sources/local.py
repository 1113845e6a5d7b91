"""Two sources on this machine's disk: folders of the adapters directory, and what the service has stored
of uploads; in the API process. Must not know ids or states.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from ...threads import DISK
from .base import (
    DOWNLOADS,
    UPLOADS,
    SourceLocation,
    SourceRequest,
    check_relative,
    refuse_revision,
    resolve_location,
)


class Folders:
    """Folders below one root; any name is theirs."""

    threads = DISK

    def __init__(self, root: Path) -> None:
        self.root = root

    def takes(self, source: str) -> bool:
        return True

    def find_files(self, wanted: SourceRequest) -> SourceLocation:
        refuse_revision(wanted)
        source = check_relative(wanted.source, "source")
        return _find_below(self.root, source, wanted.subfolder)


class Uploads:
    """Uploads beside the registrations, which a restart finds again; no client names one."""

    threads = DISK

    def __init__(self, state: Path) -> None:
        self.state = state

    def takes(self, source: str) -> bool:
        return is_stored(source)

    def find_files(self, wanted: SourceRequest) -> SourceLocation:
        return _find_below(self.state, wanted.source, wanted.subfolder)


def is_stored(name: str) -> bool:
    """Whether it names the folder of one upload or download."""
    parts = PurePosixPath(name).parts
    return len(parts) == 2 and parts[0] in (UPLOADS, DOWNLOADS) and parts[1].isalnum()


def _find_below(top: Path, source: str, subfolder: str | None) -> SourceLocation:
    inner = check_relative(subfolder, "subfolder") if subfolder else None
    folder = top / source / inner if inner else top / source
    return resolve_location(SourceLocation(folder, source, inner), top)
