"""Keeps the usage of each hour in an SQLite file; in the API process, on its disk threads.

Each call opens the file anew, and one transaction makes each change: several services may have one file.
Must not know requests, or when it is written.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TypeVar

log = logging.getLogger("adapterd.usage")

VERSION = 1
BUSY_S = 5  # to wait for another service that writes
COLUMNS = "requests, prompt_tokens, cached_tokens, generated_tokens, failures"
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS usage (hour INTEGER, adapter TEXT, key TEXT,
  {COLUMNS.replace(",", " INTEGER NOT NULL,")} INTEGER NOT NULL,
  PRIMARY KEY (hour, adapter, key)) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
COMMIT;
"""
ADD = f"""
INSERT INTO usage (hour, adapter, key, {COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (hour, adapter, key) DO UPDATE
SET {", ".join(f"{name} = {name} + excluded.{name}" for name in COLUMNS.split(", "))}
"""
READ = f"""
SELECT adapter, key, {", ".join(f"SUM({name})" for name in COLUMNS.split(", "))}
FROM usage WHERE hour >= ? AND hour < ? GROUP BY adapter, key
"""
PRUNE = "DELETE FROM usage WHERE hour < ?"
# What SQLite says of a file that is none of its own, or not the table that was written
DAMAGE = (
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_FORMAT,
    sqlite3.SQLITE_CONSTRAINT,
)

Group = tuple[int, str, str]  # the hour since 1970, the adapter, the key; empty where there is none
Owner = tuple[str, str]  # the adapter and the key
T = TypeVar("T")


class UsageNotKept(Exception):
    """The file cannot be written or read now; the message is the reason, fit for a person."""


@dataclass(frozen=True, slots=True)
class UsageCounts:
    """Requests that were admitted, their tokens, and those of them that ended in an error."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    failures: int = 0

    def __add__(self, other: UsageCounts) -> UsageCounts:
        return UsageCounts(*map(sum, zip(astuple(self), astuple(other), strict=True)))


class UsageFile:
    """The counts by hour, adapter and key.

    A damaged file is put aside, and a new one begun; one that a newer service has written stays as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked = False

    def add_counts(self, batch: Mapping[Group, UsageCounts], oldest: int) -> None:
        """Adds all of these counts, or none, and forgets the hours before `oldest`. Raises UsageNotKept."""
        rows = [(*group, *astuple(counts)) for group, counts in batch.items()]

        def write(database: sqlite3.Connection) -> None:
            if _read_version(database) == 0:
                database.executescript(SCHEMA)
            database.executemany(ADD, rows)
            database.execute(PRUNE, [oldest])

        self._run(write)

    def read_counts(self, since: int, until: int) -> dict[Owner, UsageCounts]:
        """The sums from the hour `since` to the one before `until`. Raises UsageNotKept."""
        if not self.path.exists():
            return {}

        def read(database: sqlite3.Connection) -> dict[Owner, UsageCounts]:
            if _read_version(database) == 0:  # begun on a full disk
                return {}
            rows = database.execute(READ, [since, until]).fetchall()
            return {(str(adapter), str(key)): UsageCounts(*counts) for adapter, key, *counts in rows}

        return self._run(read)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of the work, in one transaction; it is tried again once damage was put aside."""
        try:
            try:
                return self._try(work)
            except sqlite3.Error as error:
                if not _is_damage(error):
                    raise
                self._put_aside()
                return self._try(work)
        except (sqlite3.Error, OSError) as error:
            raise UsageNotKept(getattr(error, "strerror", None) or str(error)) from error

    def _try(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._open() as database, database:
            return work(database)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        database = sqlite3.connect(self.path, timeout=BUSY_S)
        try:
            self._check(database)
            yield database
        finally:
            database.close()

    def _check(self, database: sqlite3.Connection) -> None:
        """Refuses the file of a newer service; the first time also looks for damage."""
        if _read_version(database) > VERSION:
            raise UsageNotKept(f"{self.path.name} was written by a newer adapterd")
        if not self._checked:
            (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise _Damaged(found)
            self._checked = True

    def _put_aside(self) -> None:
        """Raises OSError."""
        name = f"{self.path.name}.damaged"
        log.warning("the file of usage is damaged and is put aside as %s", name)
        self.path.replace(self.path.with_name(name))
        with suppress(FileNotFoundError):  # what was half written belongs to that file alone
            self.path.with_name(f"{self.path.name}-journal").replace(self.path.with_name(f"{name}-journal"))


class _Damaged(sqlite3.DatabaseError):
    """The check has found damage."""


def _read_version(database: sqlite3.Connection) -> int:
    """The version of the table; 0 where there is none yet."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    return int(version)


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(error, _Damaged) or (code is not None and code & 0xFF in DAMAGE)
