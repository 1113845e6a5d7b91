"""The `Source` protocol: what every place that adapters come from is to the registry; in the API process.

Must not know any one of them. Whatever a source hands out lies below a root of its own after every link is
resolved, every file of the manifest included.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ...core.adapter import Digest
from ...core.manifest import CONFIG, list_names
from ...errors import AdapterInvalid, BadRequest, Forbidden, SourceMissing
from ...source_urls import is_url
from ...threads import Threads

UPLOADS, DOWNLOADS = ".uploads", ".downloads"  # folders beside the registrations
HUB = "hub:"  # how the names of its content begin
SHOWN = 20  # candidates that are listed
LONGEST = 1024  # bytes of a source


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """A source that was found: the real folder, and for content of the hub the resolved revision.

    A `staged` folder is for this once: who has it keeps it under its digest, or deletes it.
    """

    folder: Path
    source: str
    subfolder: str | None = None
    revision: str | None = None
    staged: bool = False

    @property
    def path(self) -> str:
        """The location below the adapters directory."""
        return f"{self.source}/{self.subfolder}" if self.subfolder else self.source

    @property
    def stored(self) -> str:
        """Of files that the service stores itself, the folder below the registrations'; else the source."""
        return f"{DOWNLOADS}/{self.folder.name}" if is_url(self.source) else self.source

    def compute_fingerprint(self) -> str:
        """Changes when a file of the manifest comes, goes, is replaced or written to, if only its
        times are put back: nobody sets when its inode was changed. Cheap, and no proof of content.

        Raises OSError.
        """
        return ":".join(_fingerprint_file(self.folder / name) for name in list_names(self.folder))


def _fingerprint_file(path: Path) -> str:
    stat = os.stat(path)
    return f"{path.name}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


def is_fetched(source: str) -> bool:
    """Whether it comes from another machine."""
    return is_url(source) or source.startswith(HUB)


def ignore_progress(received: int) -> None:
    """For those who do not look at how many bytes have come."""


@dataclass(frozen=True, slots=True)
class SourceRequest:
    """What is wanted of a source; `limit` is the largest download in bytes.

    `registered`: it was registered before, with this `digest` and files of the names `held`; it may be there
    already, and is kept. `on_progress` is told how many bytes have come.
    """

    source: str
    subfolder: str | None = None
    revision: str | None = None
    limit: int = 0
    registered: bool = False
    held: Collection[str] = ()
    digest: Digest = ""
    on_progress: Callable[[int], None] = ignore_progress


class Source(Protocol):
    """A place that adapters come from; `threads` are those that `find_files` may hold."""

    @property
    def threads(self) -> Threads: ...

    def takes(self, source: str) -> bool:
        """Whether a source of this name is this place's to find, or to refuse."""
        ...

    def find_files(self, wanted: SourceRequest) -> SourceLocation:
        """The folder with the adapter's files.

        Raises BadRequest, Forbidden, AdapterInvalid, PayloadTooLarge, StorageFull.
        """
        ...


def refuse_revision(wanted: SourceRequest) -> None:
    """Raises BadRequest."""
    if wanted.revision:
        raise BadRequest("revision: only content of the hub has revisions", param="revision")


def check_relative(path: str, field: str) -> str:
    """The path as it is, if it is a plain relative one without hidden parts.

    Raises BadRequest where it is no UTF-8, which libraries cannot open, Forbidden.
    """
    if not _is_utf8(path):
        raise BadRequest(f"{field} is no UTF-8 text: rename the folder", param=field)
    parts = path.rstrip("/").split("/")
    odd = len(path.encode()) > LONGEST or path.startswith("~") or any(sign in path for sign in "\0\\:")
    if odd or any(not part or part.startswith(".") for part in parts):
        raise Forbidden(
            f"{field} must be a folder under the adapters directory, hub:org/name, or a URL that "
            "ADAPTERD_SOURCES allows"
            if field == "source"
            else f"{field} must be a folder below the source",
            param=field,
        )
    return "/".join(parts)


def _is_utf8(path: str) -> bool:
    """Bytes of a name that are no UTF-8 are lone surrogates in Python, and so are some escapes of JSON."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def resolve_location(location: SourceLocation, root: Path) -> SourceLocation:
    """The location with its real folder.

    Raises Forbidden when it or a file of it lies elsewhere, AdapterInvalid when it is no adapter's.
    """
    name = location.path[:200]
    try:
        folder, top = location.folder.resolve(), root.resolve()
        _check_inside(folder, top, f"source {name!r}")
        if not folder.is_dir():
            raise SourceMissing([f"source {name!r}: there is no such folder"])
        _check_files(folder, top, name)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a loop of links"
        raise AdapterInvalid([f"source {name!r} cannot be read: {reason}"]) from None
    return replace(location, folder=folder)


def _check_files(folder: Path, top: Path, name: str) -> None:
    files = list_names(folder)
    for file in files:
        _check_inside((folder / file).resolve(), top, f"{file} of source {name!r}")
    if not (folder / CONFIG).is_file():
        raise AdapterInvalid([f"{CONFIG} is missing from {name!r}", *_list_candidates(folder)])
    if strange := [file for file in files if not (folder / file).is_file()]:
        raise AdapterInvalid([f"{file} of source {name!r} is no file" for file in strange])


def _check_inside(path: Path, top: Path, name: str) -> None:
    if not path.is_relative_to(top):
        raise Forbidden(f"{name} is a link that leaves the adapters directory", param="source")


def _list_candidates(folder: Path) -> list[str]:
    """A hint that names the folders below which hold an adapter's config; none where there are none."""
    configs = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"*/*/{CONFIG}")]
    folders = sorted(path.parent.relative_to(folder).as_posix() for path in configs)
    return [f"name one of its folders as `subfolder`: {', '.join(folders[:SHOWN])}"] if folders else []
