"""Writes files and folders that must outlive the process and a loss of power; in every process.

What is written lies beside its target first, is synced, and takes the target's name in one step: a reader
finds the old content or the new one, and never a part. Modes are the umask's. A folder that is kept to be
used again has a record of its files' sizes and checksums in it, by which damage is found. Must not know
what the content means.

The checksum is CRC-32: it is there for lost pages and cut files, not for people, and costs half of SHA-256
where the processor has no instruction for that. It is computed once after each start of the machine: no
power was lost since, and whatever else changes a file shows in its times.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from . import file_lock

log = logging.getLogger("adapterd.storage")

UNFINISHED = ".making-"  # how the names of what is not finished begin
LOCK = ".making.lock"  # held, shared, while anything is made in its folder
RECORD, CHECKED = ".files.json", ".checked"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PIECE = 1 << 20  # bytes
# Of network shares that cannot sync a folder
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
FULL = (errno.ENOSPC, errno.EDQUOT)
# Of what this process may only read, by its mount or its modes
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class NotWritten(OSError):
    """What should have lasted could not be written, and what was there before is as it was.

    `strerror` is the system's reason; as a text it is a sentence that names the file, without its folder.
    """

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(error.errno, error.strerror or type(error).__name__)
        self.name = path.name

    def __str__(self) -> str:
        return f"{self.name} cannot be written: {self.strerror}"


def write_file(path: Path, content: bytes) -> None:
    """Replaces the file, or makes it and its folder. Raises NotWritten."""
    new = _name_unfinished(path)
    with _telling_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with new.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except BaseException:
            with suppress(OSError):
                new.unlink()
            raise
        _sync(path.parent)


def publish_folder(made: Path, target: Path) -> None:
    """Gives a finished folder on the same file system, synced, the target's name, which must be free.

    Raises NotWritten.
    """
    with _telling_of(target):
        _sync_all(made)
        made.rename(target)
        _sync(target.parent)


@contextmanager
def making_folder(target: Path) -> Iterator[Path]:
    """A folder beside the target, to be filled; once the block has ended it has the target's name, and a
    record of its files.

    It takes the place of a damaged folder; one that another process has finished meanwhile is kept.
    Whatever raises leaves the target as it was. Raises NotWritten.
    """
    made = _name_unfinished(target)
    with _telling_of(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = file_lock.open_lock(target.parent / LOCK)
    with lock:
        with suppress(OSError):  # a share without locks
            file_lock.wait_for_shared_lock(lock)
        try:
            with _telling_of(target):
                made.mkdir()
            yield made
            with _telling_of(target):
                _seal_folder(made)
                _take_place(made, target)
        finally:
            shutil.rmtree(made, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Whether a folder that `making_folder` makes is there and as it was written; the log has the damage.

    Raises OSError where it cannot be read.
    """
    if not folder.exists():
        return False
    if damage := find_damage(folder):
        log.warning("%s is damaged and is made anew: %s", folder, damage)
    return not damage


def find_damage(folder: Path) -> str:
    """How a folder that `making_folder` has made differs from what was written; empty where it does not.

    Sizes first, then checksums, unless these were computed since the machine started and no file has
    changed. Raises OSError where it cannot be read.
    """
    try:
        files = _read_record(folder)
    except FileNotFoundError:
        return "it has no record of its files"
    except (ValueError, TypeError, KeyError):
        return f"{RECORD} is damaged"
    for file in files:
        if wrong := _find_wrong_size(folder, file):
            return wrong
    mark = _describe_files(folder, files)
    if mark and _read_mark(folder) == mark:
        return ""
    for file in files:
        if _compute_checksum(folder / file.name) != file.checksum:
            return f"{file.name} has other bytes than were written"
    with suppress(OSError):  # a cache that is only read
        write_file(folder / CHECKED, mark)
    return ""


def sweep_unfinished(folder: Path) -> None:
    """Deletes what processes that were killed have left half made in this folder, if nobody makes
    anything there.
    """
    with suppress(OSError), file_lock.open_lock(folder / LOCK) as lock:
        if file_lock.try_lock(lock):
            delete_unfinished(folder)


def delete_unfinished(folder: Path, older_than_s: float = 0) -> None:
    """The same of a folder that only the caller writes to, or others no longer than for so many seconds."""
    for path in folder.glob(f"{UNFINISHED}*"):
        if age_of(path) < older_than_s:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def age_of(path: Path) -> float:
    """Seconds since anything was made or renamed in a folder, or a file was written; 0 for what is gone."""
    try:
        return max(0.0, time.time() - path.lstat().st_mtime)
    except OSError:
        return 0.0


def why_unwritable(folder: Path) -> str:
    """Why mount or modes let nothing be written there, were it only made; empty where they do."""
    existing = next((path for path in (folder, *folder.parents) if os.path.exists(path)), Path("/"))
    if os.access(existing, os.W_OK | os.X_OK):
        return ""
    is_mounted_so = os.statvfs(existing).f_flag & os.ST_RDONLY
    return os.strerror(errno.EROFS if is_mounted_so else errno.EACCES)


# ---- inside


class _File(NamedTuple):
    """A line of a record: `name` is relative to the folder, `size` in bytes, `checksum` CRC-32."""

    name: str
    size: int
    checksum: int


@contextmanager
def _telling_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotWritten(path, error) from error


def _name_unfinished(path: Path) -> Path:
    return path.with_name(f"{UNFINISHED}{secrets.token_hex(4)}-{path.name}")


def _take_place(made: Path, target: Path) -> None:
    old = _name_unfinished(target)
    if target.exists() and find_damage(target):
        target.rename(old)
    try:
        made.rename(target)
    except OSError:
        if not target.exists() or find_damage(target):
            raise
    shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _seal_folder(folder: Path) -> None:
    """Syncs all files, with the modes that new files have here, and records them."""
    mode = folder.stat().st_mode & 0o666
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        path.chmod(mode)
    files = [_describe_file(folder, path) for path in paths]
    write_file(folder / RECORD, json.dumps({"files": files}).encode())
    write_file(folder / CHECKED, _describe_files(folder, files))
    _sync_all(folder)


def _describe_file(folder: Path, path: Path) -> _File:
    name = path.relative_to(folder).as_posix()
    return _File(name, path.stat().st_size, _compute_checksum(path))


def _read_record(folder: Path) -> list[_File]:
    """Raises OSError, ValueError, TypeError, KeyError."""
    files = [_File(*entry) for entry in json.loads((folder / RECORD).read_bytes())["files"]]
    for name, size, checksum in files:
        if not isinstance(name, str) or not type(size) is type(checksum) is int:
            raise ValueError("an entry of the wrong types")
    if not files:
        raise ValueError("no entry")
    return files


def _find_wrong_size(folder: Path, file: _File) -> str:
    try:
        size = (folder / file.name).stat().st_size
    except FileNotFoundError:
        return f"{file.name} is missing"
    return "" if size == file.size else f"{file.name} has {size} bytes of {file.size}"


def _compute_checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def _describe_files(folder: Path, files: list[_File]) -> bytes:
    """What changes with each start of the machine, and with each change of a file; empty where the system
    does not tell.
    """
    try:
        boot = BOOT_ID.read_text(encoding="utf-8").strip()
    except OSError:
        return b""
    stats = [(folder / file.name).stat() for file in files]
    return json.dumps([boot, *((stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)]).encode()


def _read_mark(folder: Path) -> bytes:
    try:
        return (folder / CHECKED).read_bytes()
    except OSError:
        return b""


def _sync_all(folder: Path) -> None:
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            _sync(Path(path, name))
        _sync(Path(path))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)
