"""Moves registrations and uploads from where an earlier version kept them; in the API process.

That was beside the shipped adapters, in the code itself.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from .. import durable
from .sources.base import UPLOADS
from .state_file import STATE_FILE

log = logging.getLogger("adapterd.adapters")


def take_over_state(old: Path, new: Path) -> None:
    """Moves them to the folder `new`, unless it has registrations of its own; the log says so.

    The registrations come last, so that an interrupted move is made again.
    """
    if not (old / STATE_FILE).is_file() or (new / STATE_FILE).exists():
        return
    try:
        for folder in (old / UPLOADS).glob("[!.]*"):
            _copy_upload(folder, new / UPLOADS)
        durable.write_file(new / STATE_FILE, (old / STATE_FILE).read_bytes())
    except OSError as error:
        log.warning("the registrations in %s cannot be taken over: %s", old, error.strerror)
        return
    shutil.rmtree(old / UPLOADS, ignore_errors=True)
    with suppress(OSError):  # an installation that is only read
        (old / STATE_FILE).unlink()
    log.info("the registrations of an earlier version were moved from %s to %s", old, new)


def _copy_upload(folder: Path, uploads: Path) -> None:
    target = uploads / folder.name
    if not target.exists():
        staged = uploads / f".{secrets.token_hex(8)}"
        shutil.copytree(folder, staged)
        durable.publish_folder(staged, target)
