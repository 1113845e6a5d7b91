"""The counters of tokens served: who is next, and that nobody waits for ever."""

from __future__ import annotations

from service.engine.token_counters import MOST_TURNS, TokenCounters


def next_of(counters: TokenCounters, waiting: list[str]) -> str:
    return min(waiting, key=lambda adapter: counters.turn_of(0, adapter))


def test_the_adapter_that_was_served_least_is_next() -> None:
    counters = TokenCounters()
    counters.join(0, "a", [])
    counters.join(0, "b", ["a"])
    counters.begin_request(0, "a", 10)
    assert next_of(counters, ["a", "b"]) == "b"
    counters.begin_request(0, "b", 4)
    counters.charge_tokens(0, "b", 7)
    assert next_of(counters, ["a", "b"]) == "a"


def test_a_newcomer_is_lifted_to_the_least_of_those_that_wait() -> None:
    counters = TokenCounters()
    counters.join(0, "a", [])
    counters.join(0, "b", ["a"])
    counters.begin_request(0, "a", 50)
    counters.begin_request(0, "b", 30)
    counters.join(0, "new", ["a", "b"])
    assert [counters.turn_of(0, adapter)[1] for adapter in ("a", "b", "new")] == [50, 30, 30]
    counters.join(0, "a", ["b", "new"])
    assert counters.turn_of(0, "a")[1] == 50, "to be away makes no debt smaller"


def test_a_count_is_of_its_priority_alone() -> None:
    counters = TokenCounters()
    counters.join(0, "a", [])
    counters.join(5, "a", [])
    counters.begin_request(0, "a", 50)
    assert (counters.turn_of(0, "a")[1], counters.turn_of(5, "a")[1]) == (50, 0)


def test_all_begin_anew_once_none_waits() -> None:
    counters = TokenCounters()
    counters.join(0, "a", [])
    counters.charge_tokens(0, "a", 50)
    counters.end_waiting(0)
    counters.charge_tokens(0, "a", 50)
    counters.join(0, "b", [])
    counters.join(0, "a", ["b"])
    assert next_of(counters, ["b", "a"]) == "b"
    assert counters.turn_of(0, "a")[1] == 0


def test_what_is_forgotten_takes_no_memory() -> None:
    counters = TokenCounters()
    counters.join(0, "waits", [])
    for i in range(100):
        counters.join(0, f"sha256:{i}", ["waits"])
        counters.begin_request(0, f"sha256:{i}", 1)
        counters.forget_adapter(f"sha256:{i}")
    (level,) = counters._levels.values()
    assert (set(level.counts), set(level.since)) == ({"waits"}, {"waits"})


def test_an_endless_row_of_new_adapters_starves_nobody() -> None:
    """Each comes while the one before waits, with the lowest count there is."""
    counters = TokenCounters()
    counters.join(0, "old", [])
    counters.charge_tokens(0, "old", 10**9)
    newest = 0
    counters.join(0, "new0", ["old"])
    counters._levels[0].counts["new0"] = 0
    turns = 0
    while next_of(counters, ["old", f"new{newest}"]) != "old":
        newest += 1
        counters.join(0, f"new{newest}", ["old", f"new{newest - 1}"])
        counters.begin_request(0, f"new{newest - 1}", 1)
        turns += 1
    assert turns == MOST_TURNS
