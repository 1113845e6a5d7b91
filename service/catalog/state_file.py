"""Remembers registrations over a restart, in one file that is always whole; in the API process.

Must not know the content that is registered.

Each change writes the whole file. `POST /adapters` without loading takes 7 ms with 100 registered,
16 to 20 with 1,000 (6 of them here), 72 with 5,000, on two busy cores: not worth a journal that can
be torn. Two kept versions of each id make writing 1,000 take 2.2 times as long.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from .. import durable
from ..core.manifest import File, Manifest, is_manifest_name
from ..errors import SettingsError
from .aliases import Alias, parse_alias

log = logging.getLogger("adapterd.adapters")

STATE_FILE = ".adapterd.json"
# 1: the digest was over the config and the weights alone; 2: no kept versions and no aliases
VERSION = 3
MANIFESTS = 2  # the first version whose digests are those of manifests


@dataclass(frozen=True, slots=True)
class Record:
    """A registration.

    The fingerprint says whether the files are still those that had the digest (see
    SourceLocation.compute_fingerprint).

    `kept` are the versions before it that are kept, the last one first; they have none themselves.
    """

    source: str
    subfolder: str | None
    revision: str | None
    digest: str
    fingerprint: str
    pinned: bool
    registered_at: str
    files: Manifest = ()
    kept: tuple[Record, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As `asdict`, which takes four times as long to copy what cannot change: every change of
        one record writes all of them.
        """
        values = {name: getattr(self, name) for name in self.__slots__}
        values["files"] = [(file.name, file.bytes, file.sha256) for file in self.files]
        return values | {"kept": [record.to_json() for record in self.kept]}


class StateFile:
    """The registrations as the file has them.

    `deleted` names what is not to come back by itself: ids that were deleted, and the folders they
    were registered from.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        self.deleted: set[str] = set()
        self.aliases: dict[str, Alias] = {}
        self._is_kept = True
        self._write_failed = False

    def check_version(self) -> None:
        """Raises SettingsError where a newer service has written the file.

        Anything else about it is for `read_file`.
        """
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            self._check_version(json.loads(self.path.read_bytes()))

    def read_file(self) -> None:
        """Reads the registrations; none where there is no file.

        A damaged file is put aside, and everything in it is forgotten; one that cannot be read is not
        written over. Where it cannot be, or its folder can only be read, changes are taken and forgotten
        at the end; the log says so now. Of an older version the digests mean something else: they are
        forgotten. Raises SettingsError for a newer version.
        """
        refusal = self._describe_refusal()
        try:
            self._parse_file(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            pass
        except OSError as error:
            refusal = f"the registrations cannot be read: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._put_aside()
        self._is_kept = not refusal
        if refusal:
            log.warning("no change will outlive a restart: %s", refusal)

    def _parse_file(self, content: Any) -> None:
        version = self._check_version(content)
        entries = content["adapters"].items()
        records = {str(id): _parse_record(entry, version) for id, entry in entries}
        deleted = {str(name) for name in content["deleted"]}
        aliases = [parse_alias(alias) for alias in content["aliases"]] if version >= VERSION else []
        self.records, self.deleted = records, deleted
        self.aliases = {alias.name: alias for alias in aliases}

    def _put_aside(self) -> None:
        log.warning("the file of registrations is damaged and is put aside as %s.damaged", self.path.name)
        with suppress(OSError):  # where it cannot be, nothing can be written over it either
            self.path.replace(self.path.with_name(self.path.name + ".damaged"))

    def _check_version(self, content: Any) -> int:
        """Raises SettingsError, ValueError."""
        version = content["version"]
        if type(version) is not int or version < 1:
            raise ValueError("no version")
        if version > VERSION:
            raise SettingsError(
                f"ADAPTERD_ADAPTERS_DIR: {self.path} was written by a newer adapterd: its version is "
                f"{version}, this one reads versions up to {VERSION}; "
                "start that one, or name another directory"
            )
        return version

    def _describe_refusal(self) -> str:
        reason = durable.why_unwritable(self.path.parent)
        return f"{self.path.parent} cannot be written: {reason}" if reason else ""

    def write_file(
        self, records: Mapping[str, Record], deleted: set[str], aliases: Mapping[str, Alias]
    ) -> None:
        """Replaces the file in one step.

        Raises NotWritten; then the file is as it was, and the log has the reason, once until it can be
        written again.
        """
        records, deleted, aliases = dict(records), set(deleted), dict(aliases)
        if self._is_kept and (records or deleted or aliases or self.path.exists()):
            content = json.dumps(_describe_state(records, deleted, aliases)).encode()
            try:
                durable.write_file(self.path, content)
            except durable.NotWritten as error:
                self._warn_of_failure(error)
                raise
        self._write_failed = False
        self.records, self.deleted, self.aliases = records, deleted, aliases

    def _warn_of_failure(self, error: durable.NotWritten) -> None:
        if not self._write_failed:
            log.warning("changes are refused: the registrations cannot be written: %s", error.strerror)
        self._write_failed = True


def _describe_state(
    records: Mapping[str, Record], deleted: set[str], aliases: Mapping[str, Alias]
) -> dict[str, Any]:
    return {
        "version": VERSION,
        "adapters": {id: record.to_json() for id, record in records.items()},
        "deleted": sorted(deleted),
        "aliases": [alias.to_json() for alias in aliases.values()],
    }


def _parse_record(entry: Mapping[str, Any], version: int) -> Record:
    names = [field.name for field in fields(Record) if field.name not in ("files", "kept")]
    record = Record(**{name: entry[name] for name in names})
    if version < MANIFESTS:
        record = replace(record, digest="", fingerprint="")
    else:
        record = replace(record, files=tuple(_parse_file_entry(*file) for file in entry["files"]))
    if version >= VERSION:
        record = replace(record, kept=tuple(_parse_record(kept, version) for kept in entry["kept"]))
    texts = (record.source, record.digest, record.fingerprint, record.registered_at)
    if not all(isinstance(text, str) for text in texts) or type(record.pinned) is not bool:
        raise ValueError("a value of the wrong type")
    datetime.fromisoformat(record.registered_at)
    return record


def _parse_file_entry(name: Any, size: Any, sha256: Any) -> File:
    typed = isinstance(name, str) and type(size) is int and isinstance(sha256, str)
    if not typed or not is_manifest_name(name):
        raise ValueError("no file of a manifest")
    return File(name, size, sha256)
