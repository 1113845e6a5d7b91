"""Writes a line of the log for each change of what is served: its author, and the content before
and after.

API process. Must not know how a change is made, or a key but its name.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar

log = logging.getLogger("adapterd.audit")

SERVICE = "service"  # by itself, as at its start
ANYONE = "anyone"  # where no key is asked for

_author: ContextVar[str] = ContextVar("author", default=SERVICE)


def set_author(name: str) -> None:
    """The changes that are made from here on, and in the tasks that begin here, are this one's."""
    _author.set(name)


def record_change(what: str, id: str, before: str | None, after: str | None) -> None:
    """`before` and `after` are digests, of an alias its targets with their weights; none where
    there was or is nothing under the id.
    """
    fields = {"who": _author.get(), "what": what, "id": id, "before": before or None, "after": after or None}
    log.info("change", extra={"fields": fields})
