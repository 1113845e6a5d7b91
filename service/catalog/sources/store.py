"""Finds adapters' files in every source, and stores uploads and downloads beside the registrations.

Runs in the API process; must not know ids or states. Whatever it hands out lies under the adapters
directory (or the registrations' folder, or the hub's cache) after every link is resolved, every
file of the manifest included.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Protocol

from ... import durable
from ...core.adapter import Digest
from ...core.manifest import is_manifest_name
from ...errors import AdapterdError, BadRequest, PayloadTooLarge
from ...source_urls import is_url
from ...threads import DISK, run_in
from ..validator.header import CONFIG, WEIGHTS
from .archive import PIECE, extract_adapter
from .base import (
    DOWNLOADS,
    UPLOADS,
    Source,
    SourceLocation,
    SourceRequest,
    ignore_progress,
)
from .hub import Hub
from .local import Folders, Uploads, is_stored
from .stored import delete_folder, folder_name, keep_folder, make_staging, refuse_storing

log = logging.getLogger("adapterd.adapters")

DEPTH = 4  # folders below the root that are looked at for adapters at start


class UploadedFile(Protocol):
    """A file of a multipart body, as the web framework hands it over."""

    async def read(self, size: int = -1) -> bytes: ...


class Store:
    """The adapters directory, the hub and other sources; `limit` is the largest upload or download
    in bytes.

    Uploads and downloads are kept in `state`, which is the adapters directory where nothing is
    given.
    """

    def __init__(
        self, root: Path, hub: Hub, limit: int, state: Path | None = None, more: Sequence[Source] = ()
    ) -> None:
        self.root, self.limit = root, limit
        self.state = state or root
        self._sources: tuple[Source, ...] = (hub, *more, Folders(root))
        self._uploads = Uploads(self.state)

    async def find_source(
        self,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        uploads: bool = False,
        held: Collection[str] = (),
        digest: Digest = "",
        on_progress: Callable[[int], None] = ignore_progress,
    ) -> SourceLocation:
        """The folder of a source.

        `uploads`: of an upload, too, and what is fetched is kept, for it was registered before, with `digest`
        and `held`, the names of its files. Raises Forbidden outside what is allowed, AdapterInvalid.
        """
        wanted = SourceRequest(source, subfolder, revision, self.limit, uploads, held, digest, on_progress)
        among = (self._uploads, *self._sources) if uploads else self._sources
        place = next(place for place in among if place.takes(source))
        return await run_in(place.threads, place.find_files, wanted)

    def has_folder(self, name: str) -> bool:
        """Whether an adapter's folder of this name lies below the root; the name is a plain relative path."""
        return os.path.isfile(self.root / name / CONFIG)

    def list_folders(self) -> Iterator[str]:
        """Every folder below the root that holds an adapter's config, hidden ones aside, by
        relative path.

        A link counts as the folder that it leads to, unless that lies outside of the root, which is
        logged, or the link lies in it.
        """
        top = self.root.resolve()
        pending: list[tuple[Path, tuple[Path, ...]]] = [(self.root, (top,))]
        while pending:
            folder, parents = pending.pop()
            entries = _list_visible(folder)
            if len(parents) > 1 and any(entry.name == CONFIG for entry in entries):
                yield folder.relative_to(self.root).as_posix()
            if len(parents) > DEPTH:
                continue
            for entry in entries:
                real = self._find_folder(entry, parents[-1], top)
                if real is not None and real not in parents:
                    pending.append((folder / entry.name, (*parents, real)))

    def _find_folder(self, entry: os.DirEntry[str], parent: Path, top: Path) -> Path | None:
        """The real folder of a folder in the real folder `parent`, or of a link there to a folder.

        None for anything else, and outside of `top`.
        """
        try:
            if not entry.is_dir():
                return None
            real = Path(entry.path).resolve() if entry.is_symlink() else parent / entry.name
        except (OSError, RuntimeError):  # a link without an end, a folder that cannot be looked into
            return None
        if real.is_relative_to(top):
            return real
        name = Path(entry.path).relative_to(self.root)
        log.warning("the link %s is not registered: it leaves the adapters directory", name)
        return None

    # ---- uploads

    async def stage_upload(self, files: Mapping[str, UploadedFile]) -> Path:
        """Writes the parts of an upload to a folder of their own; the caller keeps or discards it.

        Raises BadRequest naming a wrong part, PayloadTooLarge, AdapterInvalid for a bad archive,
        StorageFull or Forbidden when nothing can be stored.
        """
        _check_parts(files)
        try:
            folder = await run_in(DISK, make_staging, self.state / UPLOADS)
        except OSError as error:
            raise refuse_upload(error) from None
        try:
            await self._receive_files(files, folder)
            if "file" in files:
                await run_in(DISK, _unpack_archive, folder, self.limit)
        except OSError as error:
            await run_in(DISK, delete_folder, folder)
            raise refuse_upload(error) from None
        except BaseException:
            await run_in(DISK, delete_folder, folder)
            raise
        return folder

    async def _receive_files(self, files: Mapping[str, UploadedFile], folder: Path) -> None:
        left = self.limit
        for name, part in files.items():
            target = await run_in(DISK, (folder / name).open, "xb")
            try:
                while piece := await part.read(PIECE):
                    left -= len(piece)
                    if left < 0:
                        raise PayloadTooLarge(f"the upload is over the limit of {self.limit} bytes")
                    await run_in(DISK, target.write, piece)
            finally:
                await run_in(DISK, target.close)

    def keep_staged(self, staged: SourceLocation, content: Digest) -> SourceLocation:
        """Keeps a staged upload or download. Raises StorageFull, Forbidden."""
        if is_url(staged.source):
            return self.keep_download(staged, content)
        return self.keep_upload(staged.folder, content)

    def keep_upload(self, staged: Path, content: str) -> SourceLocation:
        """Moves a staged folder to the source of its digest, in one step; the folder that lay there
        already is kept if it has the same content.

        Raises StorageFull, Forbidden.
        """
        try:
            folder = keep_folder(staged, self.state / UPLOADS, content)
        except OSError as error:
            raise refuse_upload(error) from None
        return SourceLocation(folder, upload_source(content))

    def keep_download(self, staged: SourceLocation, content: Digest) -> SourceLocation:
        """The same of a staged download, whose source stays what it is. Raises StorageFull, Forbidden."""
        try:
            folder = keep_folder(staged.folder, self.state / DOWNLOADS, content)
        except OSError as error:
            raise refuse_storing(error, "the download") from None
        return replace(staged, folder=folder, staged=False)

    async def discard_staged(self, location: SourceLocation) -> None:
        """Deletes what a download has left, unless it is kept by now; any other location stays."""
        if location.staged:
            await run_in(DISK, delete_folder, location.folder)

    def purge_upload(self, source: str) -> None:
        """Deletes the folder of an upload or download; any other source is left alone."""
        if is_stored(source):
            delete_folder(self.state / source)

    def sweep_interrupted(self, older_than_s: float = 0) -> None:
        """Deletes what interrupted uploads and downloads have left, and what has been half written.

        Where other services write here, too, what is older than anything that they could be at.
        """
        durable.delete_unfinished(self.state, older_than_s)
        for parent in (UPLOADS, DOWNLOADS):
            for path in (self.state / parent).glob(".*"):
                if durable.age_of(path) >= older_than_s:
                    delete_folder(path)

    def sweep_replaced(self, state_file: Path, older_than_s: float = 0) -> None:
        """Deletes the downloads whose digests the registrations name nowhere any more, as after a PUT."""
        try:
            remembered = state_file.read_bytes()
        except OSError:
            return
        for path in (self.state / DOWNLOADS).glob("[!.]*"):
            if path.name.encode() not in remembered and durable.age_of(path) >= older_than_s:
                delete_folder(path)

    def try_writing(self) -> None:
        """Raises OSError where no upload can be stored; leaves nothing behind."""
        folder = self.state / UPLOADS
        while not folder.exists():
            folder = folder.parent
        with TemporaryFile(dir=folder) as file:
            file.write(b"x")


def refuse_upload(error: OSError) -> AdapterdError:
    """The refusal of an upload that could not be stored."""
    return refuse_storing(error, "the upload")


def _list_visible(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder that are not hidden, the last first; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError:
        return []
    return sorted(visible, key=lambda entry: entry.name, reverse=True)


def _check_parts(files: Mapping[str, UploadedFile]) -> None:
    names = set(files)
    unpacked = {CONFIG, WEIGHTS} <= names and all(map(is_manifest_name, names))
    if unpacked or names == {"file"}:
        return
    wanted = (
        f"{CONFIG} and {WEIGHTS}, with files of its tokenizer and templates where it has any, "
        "or one archive in `file`"
    )
    raise BadRequest(f"upload: wanted {wanted}; got {', '.join(sorted(names)) or 'nothing'}", param="file")


def upload_source(content: Digest) -> str:
    """The source of an uploaded content."""
    return f"{UPLOADS}/{folder_name(content)}"


def stored_source(staged: SourceLocation, content: Digest) -> str:
    """Where a staged content will be kept (see SourceLocation.stored)."""
    return f"{DOWNLOADS}/{folder_name(content)}" if is_url(staged.source) else upload_source(content)


def _unpack_archive(folder: Path, limit: int) -> None:
    extract_adapter(folder / "file", folder, limit)
    (folder / "file").unlink()
