"""Takes an adapter's files out of a .zip or .tar that a stranger sent; in the API process.

Must not trust a name, a size or a link in it.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ...core.manifest import is_manifest_name
from ...errors import AdapterInvalid, PayloadTooLarge
from ..validator.header import CONFIG, WEIGHTS

MEMBERS = 10_000
PIECE = 1 << 20  # bytes
# Bytes that say which members there are: the libraries keep all of them in memory, however many
LISTING = 6_000_000
# The libraries' exceptions for such an archive: zipfile raises NotImplementedError for a compression
# that it lacks, RuntimeError for a password.
DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)
COMPRESSED: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    name: str
    size: int  # as the archive says
    plain: bool  # a regular file
    folder: bool


def extract_adapter(archive: Path, folder: Path, limit: int) -> None:
    """Writes the files of the manifest, and nothing else, into the folder.

    `limit` is in bytes, unpacked. Raises AdapterInvalid for what is no archive, holds no adapter or
    several, or has a member that would leave the folder; PayloadTooLarge over the limit.
    """
    try:
        with _open_stream(archive) as stream, _open_archive(stream) as members:
            wanted = _select_members(members, limit)
            stream.left = math.inf
            _write_members(members, wanted, folder)
    except (*DAMAGED, OSError) as error:
        # The disk's; what is compressed badly has no number
        if isinstance(error, OSError) and error.errno:
            raise
        raise AdapterInvalid([f"the archive is damaged: {error}"[:200]]) from None


def _write_members(members: _Zip | _Tar, wanted: Mapping[str, ArchiveMember], folder: Path) -> None:
    for name, member in wanted.items():
        with members(member) as source, (folder / name).open("xb") as target:
            # Neither format gives more than the size it has stated
            shutil.copyfileobj(source, target, PIECE)


class _Stream(io.BufferedReader):
    """The archive's bytes, `left` of which may still be read. Raises PayloadTooLarge."""

    left: float = LISTING

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self.left:
            raise PayloadTooLarge(f"the archive takes more than {LISTING} bytes to say what it holds")
        data = super().read(size)
        self.left -= len(data)
        return data


def _open_stream(archive: Path) -> _Stream:
    with archive.open("rb") as file:
        start = file.read(max(map(len, COMPRESSED)))
    for magic, open_compressed in COMPRESSED.items():
        if start.startswith(magic):
            return _Stream(open_compressed(archive))
    return _Stream(archive.open("rb", buffering=0))


class _Zip:
    def __init__(self, file: zipfile.ZipFile) -> None:
        self.file = file

    def __iter__(self) -> Iterator[ArchiveMember]:
        for info in self.file.infolist():
            kind = info.external_attr >> 28  # the unix file type; 0 when the archiver did not say
            folder = info.is_dir()
            yield ArchiveMember(info.filename, info.file_size, kind in (0, 8) and not folder, folder)

    def __call__(self, member: ArchiveMember) -> IO[bytes]:
        return self.file.open(member.name)


class _Tar:
    def __init__(self, file: tarfile.TarFile) -> None:
        self.file = file

    def __iter__(self) -> Iterator[ArchiveMember]:
        for info in self.file:
            yield ArchiveMember(info.name, info.size, info.isreg(), info.isdir())

    def __call__(self, member: ArchiveMember) -> IO[bytes]:
        content = self.file.extractfile(member.name)
        assert content is not None, "only regular members are asked for"
        return content


@contextmanager
def _open_archive(stream: _Stream) -> Iterator[_Zip | _Tar]:
    if isinstance(stream.raw, io.FileIO) and zipfile.is_zipfile(stream):
        with zipfile.ZipFile(stream) as file:
            yield _Zip(file)
    else:
        stream.seek(0)
        try:
            opened = tarfile.TarFile(fileobj=stream)
        except tarfile.TarError:
            raise AdapterInvalid(["`file` is neither a .zip nor a .tar"]) from None
        with opened:
            yield _Tar(opened)


def _select_members(members: _Zip | _Tar, limit: int) -> dict[str, ArchiveMember]:
    """The adapter's files by name.

    All members are looked at, so that an archive with one evil member is refused whole.
    """
    candidates: dict[str, list[ArchiveMember]] = {CONFIG: [], WEIGHTS: []}
    for member in _check_members(members, limit):
        name = PurePosixPath(member.name).name
        if member.plain and is_manifest_name(name):
            candidates.setdefault(name, []).append(member)
    if missing := [name for name, same_name in candidates.items() if not same_name]:
        raise AdapterInvalid([f"{name} is missing from the archive" for name in missing])
    return _choose_folder(candidates)


def _check_members(members: _Zip | _Tar, limit: int) -> Iterator[ArchiveMember]:
    """Raises AdapterInvalid, PayloadTooLarge."""
    total = 0
    for number, member in enumerate(members):
        total += member.size
        if total > limit or number >= MEMBERS:
            raise PayloadTooLarge(f"the archive holds more than {limit} bytes or {MEMBERS} members")
        _check_member(member)
        yield member


def _choose_folder(candidates: Mapping[str, Sequence[ArchiveMember]]) -> dict[str, ArchiveMember]:
    """The files that lie beside the config and the weights, once each; files elsewhere are not the
    adapter's. Raises AdapterInvalid.
    """
    folders = {_folder_of(member) for name in (CONFIG, WEIGHTS) for member in candidates[name]}
    several = len(folders) > 1
    chosen: dict[str, ArchiveMember] = {}
    for name, same_name in candidates.items():
        beside = [member for member in same_name if _folder_of(member) in folders]
        several |= len(beside) > 1
        if beside:
            chosen[name] = beside[0]
    if several:
        raise AdapterInvalid([f"the archive holds several adapters: {', '.join(sorted(folders))[:300]}"])
    return chosen


def _folder_of(member: ArchiveMember) -> str:
    return str(PurePosixPath(member.name).parent)


def _check_member(member: ArchiveMember) -> None:
    path = PurePosixPath(member.name)
    odd = any(sign in member.name for sign in "\\\0:")
    if odd or path.is_absolute() or ".." in path.parts:
        raise AdapterInvalid([f"the archive has a member outside of itself: {member.name[:100]!r}"])
    if not (member.plain or member.folder):
        raise AdapterInvalid([f"the archive has a member that is no plain file: {member.name[:100]!r}"])
