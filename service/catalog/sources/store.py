"""Finds and stores adapters' files:
folders under one root, uploads in a hidden folder beside the registrations, content of the hub in its cache.

Runs in the API process; must not know ids or states. Whatever it hands out lies under the root (or the
registrations' folder, or the hub's cache) after every link is resolved, every file of the manifest
included.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Protocol

from ... import durable
from ...core.adapter import Digest
from ...core.manifest import compute_digest, is_manifest_name, list_names, read_manifest
from ...errors import (
    AdapterdError,
    AdapterInvalid,
    BadRequest,
    Forbidden,
    PayloadTooLarge,
    SourceMissing,
    StorageFull,
)
from ...threads import DISK, DOWNLOAD, run_in
from ..validator.header import CONFIG, WEIGHTS
from .archive import PIECE, extract_adapter
from .hub import Hub

log = logging.getLogger("adapterd.adapters")

UPLOADS = ".uploads"
DEPTH = 4  # folders below the root that are looked at for adapters at start
SHOWN = 20  # candidates that are listed
LONGEST = 1024  # bytes of a source


class UploadedFile(Protocol):
    """A file of a multipart body, as the web framework hands it over."""

    async def read(self, size: int = -1) -> bytes: ...


@dataclass(frozen=True, slots=True)
class SourceLocation:
    """A source that was found: the real folder, and for content of the hub the resolved revision."""

    folder: Path
    source: str
    subfolder: str | None = None
    revision: str | None = None

    @property
    def path(self) -> str:
        """The location below the adapters directory."""
        return f"{self.source}/{self.subfolder}" if self.subfolder else self.source

    def compute_fingerprint(self) -> str:
        """Changes when a file of the manifest comes, goes, is replaced or written to, if only its
        times are put back: nobody sets when its inode was changed. Cheap, and no proof of content.

        Raises OSError.
        """
        return ":".join(_fingerprint_file(self.folder / name) for name in list_names(self.folder))


def _fingerprint_file(path: Path) -> str:
    stat = os.stat(path)
    return f"{path.name}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ctime_ns}"


class Store:
    """The adapters directory and the hub; `limit` is the largest upload or download in bytes.

    Uploads are kept in `state`, which is the adapters directory where nothing is given.
    """

    def __init__(self, root: Path, hub: Hub, limit: int, state: Path | None = None) -> None:
        self.root, self.hub, self.limit = root, hub, limit
        self.state = state or root

    async def find_source(
        self,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        uploads: bool = False,
        held: Collection[str] = (),
    ) -> SourceLocation:
        """The folder of a source.

        `uploads`: of an upload, too; `held` names the files that it had when it was registered.
        Raises Forbidden outside what is allowed, AdapterInvalid.
        """
        if source.startswith("hub:"):
            return await self._find_on_hub(source, subfolder, revision, held)
        if revision:
            raise BadRequest("revision: only content of the hub has revisions", param="revision")
        return await run_in(DISK, self._find_local, source, subfolder, uploads)

    async def _find_on_hub(
        self, source: str, subfolder: str | None, revision: str | None, held: Collection[str]
    ) -> SourceLocation:
        inner = _check_relative(subfolder, "subfolder") if subfolder else None
        name = source.removeprefix("hub:")
        fetch = self.hub.fetch_adapter
        folder, commit = await run_in(DOWNLOAD, fetch, name, revision, inner, self.limit, held)
        location = SourceLocation(folder, source, inner, commit)
        return await run_in(DISK, _resolve_location, location, self.hub.cache)

    def _find_local(self, source: str, subfolder: str | None, uploads: bool) -> SourceLocation:
        is_upload = uploads and _is_upload(source)
        top = self.state if is_upload else self.root
        if not is_upload:
            source = _check_relative(source, "source")
        path = top / source
        inner = _check_relative(subfolder, "subfolder") if subfolder else None
        folder = path / inner if inner else path
        return _resolve_location(SourceLocation(folder, source, inner), top)

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
        folder = self.state / UPLOADS / f".{secrets.token_hex(8)}"
        try:
            await run_in(DISK, folder.mkdir, parents=True)
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

    def keep_upload(self, staged: Path, content: str) -> SourceLocation:
        """Moves a staged folder to the source of its digest, in one step; the folder that lay there
        already is kept if it has the same content.

        Raises StorageFull, Forbidden.
        """
        source = upload_source(content)
        target = self.state / source
        try:
            if target.exists() and _is_content(target, content):
                delete_folder(staged)
            else:
                delete_folder(target)
                durable.publish_folder(staged, target)
        except OSError as error:
            raise refuse_upload(error) from None
        return SourceLocation(target.resolve(), source)

    def purge_upload(self, source: str) -> None:
        """Deletes an upload's folder; any other source is left alone."""
        if _is_upload(source):
            delete_folder(self.state / source)

    def sweep_interrupted(self) -> None:
        """Deletes what interrupted uploads have left, and what has been half written."""
        durable.delete_unfinished(self.state)
        for path in (self.state / UPLOADS).glob(".*"):
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
    message = f"the upload cannot be stored: {error.strerror or type(error).__name__}"
    return Forbidden(message) if error.errno in durable.READ_ONLY else StorageFull(message)


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
    return f"{UPLOADS}/{content.removeprefix('sha256:')}"


def delete_folder(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack_archive(folder: Path, limit: int) -> None:
    extract_adapter(folder / "file", folder, limit)
    (folder / "file").unlink()


def _is_content(folder: Path, content: Digest) -> bool:
    try:
        return compute_digest(read_manifest(folder)) == content
    except (OSError, AdapterInvalid):
        return False


def _is_upload(source: str) -> bool:
    parts = PurePosixPath(source).parts
    return len(parts) == 2 and parts[0] == UPLOADS and parts[1].isalnum()


def _check_relative(path: str, field: str) -> str:
    """The path as it is, if it is a plain relative one without hidden parts.

    Raises BadRequest where it is no UTF-8, which libraries cannot open, Forbidden.
    """
    if not _is_utf8(path):
        raise BadRequest(f"{field} is no UTF-8 text: rename the folder", param=field)
    parts = path.rstrip("/").split("/")
    odd = len(path.encode()) > LONGEST or path.startswith("~") or any(sign in path for sign in "\0\\:")
    if odd or any(not part or part.startswith(".") for part in parts):
        raise Forbidden(
            f"{field} must be a folder under the adapters directory, or hub:org/name", param=field
        )
    return "/".join(parts)


def _is_utf8(path: str) -> bool:
    """Bytes of a name that are no UTF-8 are lone surrogates in Python, and so are some escapes of JSON."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _resolve_location(location: SourceLocation, root: Path) -> SourceLocation:
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
