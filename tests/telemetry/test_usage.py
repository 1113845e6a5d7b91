"""Usage in its file: exact, in batches, whole over damage and full disks, and pruned."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from pathlib import Path

import pytest

from service.telemetry.usage import FILE, KEPT_HOURS, MOST_PENDING, WRITE_S, UsageBook
from service.telemetry.usage_file import UsageCounts, UsageFile, UsageNotKept

pytestmark = pytest.mark.anyio

ONE = UsageCounts(1, 10, 4, 3, 0)
TWO = UsageCounts(2, 20, 8, 6, 0)
EVER = 2**62


async def read(book: UsageBook) -> dict[tuple[str, str], UsageCounts]:
    return await book.read_counts(-EVER, EVER)


# ---- the file


def test_counts_of_one_hour_adapter_and_key_add_up(tmp_path: Path) -> None:
    file = UsageFile(tmp_path / FILE)
    assert file.read_counts(0, 100) == {}
    assert not file.path.exists(), "to read makes no file"
    for hour, adapter in ((5, "a"), (5, "a"), (6, "a"), (6, "b")):
        file.add_counts({(hour, adapter, "k"): ONE}, oldest=0)
    again = UsageFile(tmp_path / FILE)
    assert again.read_counts(0, 100) == {("a", "k"): TWO + ONE, ("b", "k"): ONE}
    assert again.read_counts(5, 6) == {("a", "k"): TWO}
    assert again.read_counts(6, 7) == {("a", "k"): ONE, ("b", "k"): ONE}


def test_an_empty_file_is_no_damage_and_nothing_was_used(tmp_path: Path) -> None:
    """SQLite makes one where it finds no room for more."""
    (tmp_path / FILE).touch()
    file = UsageFile(tmp_path / FILE)
    assert file.read_counts(-EVER, EVER) == {}
    assert file.path.stat().st_size == 0
    file.add_counts({(5, "a", "k"): ONE}, oldest=0)
    assert file.read_counts(-EVER, EVER) == {("a", "k"): ONE}


def test_old_hours_are_forgotten(tmp_path: Path) -> None:
    file = UsageFile(tmp_path / FILE)
    for hour in (5, 6, 7):
        file.add_counts({(hour, "a", ""): ONE}, oldest=6)
    assert file.read_counts(-EVER, EVER) == {("a", ""): TWO}


def test_several_services_count_in_one_file(tmp_path: Path) -> None:
    files = [UsageFile(tmp_path / FILE) for _ in range(3)]
    for _ in range(5):
        for file in files:
            file.add_counts({(1, "a", "k"): ONE}, oldest=0)
    assert files[0].read_counts(0, 9)["a", "k"].requests == 15


def damage_header(path: Path) -> None:
    path.write_bytes(b"no database at all, but long enough to be taken for a header of one" * 30)


def damage_pages(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    path.write_bytes(content)


def drop_table(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DROP TABLE usage")
    database.close()


def change_table(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.executescript("DROP TABLE usage; CREATE TABLE usage (words TEXT)")
    database.close()


@pytest.mark.parametrize("damage", [damage_header, damage_pages, drop_table, change_table])
@pytest.mark.parametrize("known", [False, True], ids=["at start", "later"])
def test_a_damaged_file_is_put_aside_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, known: bool
) -> None:
    file = UsageFile(tmp_path / FILE)
    for hour in range(200):
        file.add_counts({(hour, f"adapter-{hour}" * 5, "k"): ONE}, oldest=0)
    assert callable(damage)
    damage(file.path)
    if not known:
        file = UsageFile(tmp_path / FILE)
    file.add_counts({(5, "a", "k"): ONE}, oldest=0)
    found = file.read_counts(-EVER, EVER)
    assert found["a", "k"] == ONE
    assert (tmp_path / f"{FILE}.damaged").exists()
    assert [record.getMessage() for record in caplog.records] == [
        f"the file of usage is damaged and is put aside as {FILE}.damaged"
    ]


def test_the_file_of_a_newer_service_is_left_as_it_is(tmp_path: Path) -> None:
    file = UsageFile(tmp_path / FILE)
    file.add_counts({(5, "a", "k"): ONE}, oldest=0)
    with sqlite3.connect(file.path) as database:
        database.execute("PRAGMA user_version = 2")
    database.close()
    before = file.path.read_bytes()
    for attempt in (lambda: file.add_counts({(6, "a", "k"): ONE}, 0), lambda: file.read_counts(0, 9)):
        with pytest.raises(UsageNotKept, match="newer adapterd"):
            attempt()
    assert file.path.read_bytes() == before


# ---- the book


async def test_counts_are_told_at_once_and_written_within_a_second(tmp_path: Path) -> None:
    book = UsageBook()
    book.keep_in(tmp_path)
    book.count_request("a", "k", ONE)
    assert not (tmp_path / FILE).exists()
    await asyncio.sleep(WRITE_S)
    for _ in range(200):
        await asyncio.sleep(0.01)
        if UsageFile(tmp_path / FILE).read_counts(-EVER, EVER):
            break
    assert UsageFile(tmp_path / FILE).read_counts(-EVER, EVER) == {("a", "k"): ONE}
    book.count_request("a", "k", ONE)
    assert await read(book) == {("a", "k"): TWO}
    await book.close()


async def test_what_is_left_is_written_in_the_end(tmp_path: Path) -> None:
    book = UsageBook()
    book.keep_in(tmp_path)
    for _ in range(2):
        book.count_request("a", "", ONE)
    await book.close()
    assert UsageFile(tmp_path / FILE).read_counts(-EVER, EVER) == {("a", ""): TWO}


async def test_without_a_file_it_counts_in_memory() -> None:
    book = UsageBook()
    book.count_request("a", "", ONE)
    assert await read(book) == {("a", ""): ONE}
    await book.close()


async def test_what_cannot_be_written_stays_in_memory_and_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    book, folder = UsageBook(), tmp_path / "later"
    book.keep_in(folder)
    for _ in range(2):
        book.count_request("a", "k", ONE)
        await book.write_pending()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert await read(book) == {("a", "k"): TWO}
    folder.mkdir()
    await book.close()
    assert UsageFile(folder / FILE).read_counts(-EVER, EVER) == {("a", "k"): TWO}


async def test_counts_that_come_while_a_write_fails_are_all_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = UsageBook(lambda: 0.0)
    book.keep_in(tmp_path)
    loop = asyncio.get_running_loop()

    def fail_after_another(self: UsageFile, batch: object, oldest: int) -> None:
        asyncio.run_coroutine_threadsafe(count_another(), loop).result()
        raise UsageNotKept("database or disk is full")

    async def count_another() -> None:
        book.count_request("a", "k", ONE)

    book.count_request("a", "k", ONE)
    with monkeypatch.context() as patched:
        patched.setattr(UsageFile, "add_counts", fail_after_another)
        await book.write_pending()
    assert await read(book) == {("a", "k"): TWO}
    await book.close()


async def test_a_reader_that_leaves_loses_nothing(tmp_path: Path) -> None:
    book = UsageBook()
    book.keep_in(tmp_path)
    book.count_request("a", "k", ONE)
    reading = asyncio.create_task(read(book))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    reading.cancel()
    assert await read(book) == {("a", "k"): ONE}
    await book.close()


async def test_a_request_counts_in_the_hour_that_it_is_and_400_days_are_kept(tmp_path: Path) -> None:
    now = [0.0]
    book = UsageBook(lambda: now[0])
    book.keep_in(tmp_path)
    for hour in (0, 1, KEPT_HOURS + 1):
        now[0] = hour * 3600 + 1800.0
        book.count_request("a", "k", ONE)
        await book.write_pending()
    assert await book.read_counts(0, 1) == {}
    assert await book.read_counts(1, 2) == {("a", "k"): ONE}
    await book.close()


async def test_memory_is_bounded_where_nothing_can_ever_be_written() -> None:
    now = [0.0]
    book = UsageBook(lambda: now[0])
    for hour in range(MOST_PENDING + 10):
        now[0] = hour * 3600.0
        book.count_request("a", "k", ONE)
    assert (await read(book))["a", "k"].requests == MOST_PENDING
    assert await book.read_counts(0, 10) == {}, "the oldest go"
    await book.close()
