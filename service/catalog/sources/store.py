"""Finds and stores adapters' files:
folders under one root, uploads in a hidden part of it, content of the hub in its cache.

Runs in the API process; must not know ids or states. Whatever it hands out lies under the root (or the
hub's cache) after every link is resolved, every file of the manifest included.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Protocol

from ...core.adapter import Digest
from ...core.manifest import compute_digest, is_manifest_name, list_names, read_manifest
from ...errors import AdapterInvalid, BadRequest, Forbidden, PayloadTooLarge, SourceMissing
from ...threads import DISK, DOWNLOAD, run_in
from ..validator.header import CONFIG, WEIGHTS
from .archive import PIECE, extract_adapter
from .hub import Hub

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
        """Changes when a file of the manifest comes, goes, is replaced or written to; cheap, and no
        proof of content.
        """
        return ":".join(_fingerprint_file(self.folder / name) for name in list_names(self.folder))


def _fingerprint_file(path: Path) -> str:
    stat = os.stat(path)
    return f"{path.name}-{stat.st_ino}-{stat.st_size}-{stat.st_mtime_ns}"


class Store:
    """The adapters directory and the hub; `limit` is the largest upload or download in bytes."""

    def __init__(self, root: Path, hub: Hub, limit: int) -> None:
        self.root, self.hub, self.limit = root, hub, limit

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
        if not (uploads and _is_upload(source)):
            source = _check_relative(source, "source")
        path = self.root / source
        inner = _check_relative(subfolder, "subfolder") if subfolder else None
        folder = path / inner if inner else path
        return _resolve_location(SourceLocation(folder, source, inner), self.root)

    def list_folders(self) -> Iterator[str]:
        """Every folder below the root that holds an adapter's config, hidden ones aside, by
        relative path.
        """
        for path, below, files in os.walk(self.root):
            folder = Path(path).relative_to(self.root)
            shown = sorted(name for name in below if not name.startswith("."))
            below[:] = shown if len(folder.parts) < DEPTH else []
            if CONFIG in files and folder.parts:
                yield folder.as_posix()

    # ---- uploads

    async def stage_upload(self, files: Mapping[str, UploadedFile]) -> Path:
        """Writes the parts of an upload to a folder of their own; the caller keeps or discards it.

        Raises BadRequest naming a wrong part, PayloadTooLarge, AdapterInvalid for a bad archive,
        Forbidden when nothing can be stored.
        """
        _check_parts(files)
        folder = self.root / UPLOADS / f".{secrets.token_hex(8)}"
        try:
            await run_in(DISK, folder.mkdir, parents=True)
            await self._receive_files(files, folder)
            if "file" in files:
                await run_in(DISK, _unpack_archive, folder, self.limit)
        except OSError as error:
            await run_in(DISK, delete_folder, folder)
            raise Forbidden(f"the upload cannot be stored: {error.strerror}") from None
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
        """
        source = upload_source(content)
        target = self.root / source
        if target.exists() and _is_content(target, content):
            delete_folder(staged)
        else:
            delete_folder(target)
            staged.rename(target)
        return SourceLocation(target.resolve(), source)

    def purge_upload(self, source: str) -> None:
        """Deletes an upload's folder; any other source is left alone."""
        if _is_upload(source):
            delete_folder(self.root / source)

    def sweep_interrupted(self) -> None:
        """Deletes the folders that interrupted uploads have left."""
        for path in (self.root / UPLOADS).glob(".*"):
            delete_folder(path)

    def try_writing(self) -> None:
        """Raises OSError where no upload can be stored; leaves nothing behind."""
        folder = self.root / UPLOADS
        while not folder.exists():
            folder = folder.parent
        with TemporaryFile(dir=folder) as file:
            file.write(b"x")


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
