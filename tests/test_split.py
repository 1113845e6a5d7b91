"""Tests that share a service go to one process, the long ones first; what the split names is there."""

from __future__ import annotations

from .split import LONGEST, TOGETHER, part_of, turn_of
from .test_docs import ROOT


def name_test(part: str) -> str:
    return f"{part}/test_x.py::test_one" if part in TOGETHER else f"{part}::test_one"


def test_a_folder_that_shares_a_service_is_one_part_and_any_other_file_is_one() -> None:
    assert part_of("tests/live/test_fuzz.py::test_one[a::b]") == "tests/live"
    assert part_of("tests/api/test_chat.py::test_one") == "tests/api/test_chat.py"


def test_long_ones_have_the_first_turns_and_all_others_the_last() -> None:
    turns = [turn_of(name_test(part)) for part in LONGEST]
    assert turns == list(range(len(LONGEST)))
    assert turn_of("tests/test_keys.py::test_one") == len(LONGEST)


def test_each_part_that_is_named_is_there() -> None:
    for part in (*TOGETHER, *LONGEST):
        assert (ROOT / part).exists(), part
