"""Keeps folders of files under the digests of their content, beside the registrations; in the API process.

Must not know where the files came from.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ... import durable
from ...core.adapter import Digest
from ...core.manifest import compute_digest, read_manifest
from ...errors import AdapterdError, AdapterInvalid, Forbidden, StorageFull


def make_staging(parent: Path) -> Path:
    """A new folder, hidden from whoever looks for adapters. Raises OSError."""
    folder = parent / f".{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    return folder


@contextmanager
def delete_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        delete_folder(folder)
        raise


def keep_folder(staged: Path, parent: Path, content: Digest) -> Path:
    """Moves a staged folder to the name of its digest, in one step; the folder that lies there already is
    kept if it has the same content.

    Returns the real folder. Raises OSError.
    """
    target = parent / folder_name(content)
    if _is_content(target, content):
        delete_folder(staged)
    else:
        delete_folder(target)
        _publish_folder(staged, target, content)
    return target.resolve()


def folder_name(content: Digest) -> str:
    return content.removeprefix("sha256:")


def _publish_folder(staged: Path, target: Path, content: Digest) -> None:
    """Raises OSError unless another service has put the same content there meanwhile."""
    try:
        durable.publish_folder(staged, target)
    except OSError:
        if not _is_content(target, content):
            raise
        delete_folder(staged)


def _is_content(folder: Path, content: Digest) -> bool:
    try:
        return compute_digest(read_manifest(folder)) == content
    except (OSError, AdapterInvalid):
        return False


def refuse_storing(error: OSError, what: str) -> AdapterdError:
    """The refusal of files that could not be stored."""
    message = f"{what} cannot be stored: {error.strerror or type(error).__name__}"
    return Forbidden(message) if error.errno in durable.READ_ONLY else StorageFull(message)


def delete_folder(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
