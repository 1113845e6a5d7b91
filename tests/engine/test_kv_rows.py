"""A prompt gets the KV row that holds the most of it, and never a wrong token."""

from __future__ import annotations

from service.engine.kv_rows import WORTH, KVRows, common_prefix
from service.engine.plan import Fork

LONG = list(range(WORTH))


def left(rows: KVRows, digest: str | None, tokens: list[int]) -> int:
    """A row that held these tokens and was left warm."""
    row, kept, _ = rows.take_row(digest, [*tokens, 0])
    rows.record_tokens(row, tokens[kept:])
    rows.leave_row(row, warm=True)
    return row


def test_cold_rows_first_then_the_one_left_longest_ago() -> None:
    rows = KVRows(3)
    assert [left(rows, None, [i]) for i in range(3)] == [0, 1, 2]
    assert left(rows, None, [7]) == 0
    assert left(rows, None, [8]) == 1


def test_a_warm_row_is_taken_over_by_the_prompt_that_goes_on() -> None:
    rows = KVRows(2)
    left(rows, "a", LONG)
    assert rows.take_row("a", [*LONG, 99]) == (0, WORTH, None)
    assert rows.rows[0].tokens == LONG


def test_the_last_token_of_a_prompt_is_never_reused() -> None:
    rows = KVRows(2)
    left(rows, None, [*LONG, 1, 2])
    assert rows.take_row(None, [*LONG, 1, 2]) == (0, WORTH + 1, None)


def test_nothing_crosses_digests() -> None:
    rows = KVRows(2)
    left(rows, "a", LONG)
    assert rows.take_row("b", [*LONG, 1]) == (1, 0, None)
    assert rows.take_row(None, [*LONG, 1]) == (0, 0, None)


def test_a_short_match_is_not_worth_it() -> None:
    rows = KVRows(2)
    left(rows, None, LONG[:-1])
    assert rows.take_row(None, [*LONG[:-1], 50, 51]) == (1, 0, None)


def test_a_small_part_of_a_long_row_is_copied_and_the_row_stays() -> None:
    rows = KVRows(2)
    left(rows, None, [*LONG, *range(100, 150)])
    assert rows.take_row(None, [*LONG, 7]) == (1, WORTH, Fork(0, 1, WORTH))
    assert rows.rows[0].free
    assert len(rows.rows[0].tokens) == WORTH + 50


def test_what_is_copied_from_is_not_what_is_given_up_for_the_copy() -> None:
    rows = KVRows(2)
    left(rows, None, [*LONG, *range(100, 150)])
    left(rows, None, [7])
    assert rows.take_row(None, [*LONG, 7]) == (1, WORTH, Fork(0, 1, WORTH))


def test_of_cold_rows_the_first_is_next() -> None:
    rows = KVRows(2)
    for _ in range(2):
        rows.take_row(None, [1])
    for row in (1, 0):
        rows.leave_row(row, warm=False)
    assert rows.take_row(None, [1]) == (0, 0, None)


def test_a_small_part_is_taken_over_where_no_other_row_is_free() -> None:
    rows = KVRows(1)
    left(rows, None, [*LONG, *range(100, 150)])
    assert rows.take_row(None, [*LONG, 7]) == (0, WORTH, None)


def test_a_running_row_is_copied() -> None:
    rows = KVRows(2)
    rows.take_row("a", [*LONG, 1])
    rows.record_tokens(0, [*LONG, 1])
    assert rows.take_row("a", [*LONG, 2]) == (1, WORTH, Fork(0, 1, WORTH))
    assert rows.positions == WORTH + 1 + WORTH


def test_a_row_left_cold_is_not_reused() -> None:
    rows = KVRows(1)
    rows.take_row(None, [*LONG, 1])
    rows.record_tokens(0, [*LONG, 1])
    rows.leave_row(0, warm=False)
    assert rows.take_row(None, [*LONG, 1]) == (0, 0, None)


def test_no_reuse_where_every_logit_is_wanted() -> None:
    rows = KVRows(2)
    left(rows, None, LONG)
    assert rows.take_row(None, [*LONG, 1], reuse=False) == (1, 0, None)


def test_the_common_start_is_found_by_halving() -> None:
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2, 3], [1, 2, 3, 4]) == 3
    for length in range(40):
        assert common_prefix([0] * length + [1] * 20, [0] * length + [2] * 20) == length
