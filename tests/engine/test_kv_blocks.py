"""KV blocks: references, names, eviction; no content finds another's."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable

import pytest

from service.core.base_info import BLOCK_TOKENS
from service.engine.kv_blocks import BlockTable, KVBlocks, ScopeOf, count_blocks

PROMPT = list(range(100, 100 + 3 * BLOCK_TOKENS))


def scope(content: Hashable) -> ScopeOf:
    return lambda block: content


def write_prompt(blocks: KVBlocks, content: Hashable, tokens: list[int]) -> BlockTable:
    """A table that holds the KV of these tokens, named as far as its blocks are full."""
    table = BlockTable()
    blocks.share_prefix(table, scope(content), tokens)
    assert blocks.grow_table(table, len(tokens))
    blocks.name_blocks(table, scope(content), tokens, len(tokens))
    return table


def test_a_prefix_is_shared_by_reference_and_stays_cached_when_all_have_gone() -> None:
    blocks = KVBlocks(10)
    first = write_prompt(blocks, "a", PROMPT)
    second = BlockTable()
    assert blocks.share_prefix(second, scope("a"), [*PROMPT, 1, 2]) == len(PROMPT)
    assert second.blocks == first.blocks
    assert blocks.used == 3
    blocks.release_table(first)
    assert (blocks.used, blocks.cached) == (3, 0)
    blocks.release_table(second)
    assert (blocks.used, blocks.cached, blocks.free) == (0, 3, 10)
    assert blocks.share_prefix(second, scope("a"), PROMPT[:40]) == 2 * BLOCK_TOKENS


@pytest.mark.parametrize("other", [None, "b"])
def test_equal_tokens_of_another_content_share_nothing(other: str | None) -> None:
    blocks = KVBlocks(10)
    write_prompt(blocks, "a", PROMPT)
    assert blocks.share_prefix(BlockTable(), scope(other), PROMPT) == 0
    assert write_prompt(blocks, other, PROMPT).shared == 0


def test_equal_tokens_after_another_start_share_nothing() -> None:
    blocks = KVBlocks(10)
    write_prompt(blocks, "a", PROMPT)
    assert blocks.share_prefix(BlockTable(), scope("a"), [0, *PROMPT[1:]]) == 0
    moved = [*PROMPT[BLOCK_TOKENS:], *PROMPT]
    assert blocks.share_prefix(BlockTable(), scope("a"), moved) == 0


def test_the_least_recently_used_block_is_needed_first_and_ends_before_starts() -> None:
    blocks = KVBlocks(6)
    old, new = write_prompt(blocks, "old", PROMPT), write_prompt(blocks, "new", PROMPT)
    blocks.release_table(old)
    blocks.release_table(new)
    taken = BlockTable()
    assert blocks.grow_table(taken, 2 * BLOCK_TOKENS)
    assert blocks.share_prefix(BlockTable(), scope("old"), PROMPT) == BLOCK_TOKENS
    assert blocks.share_prefix(BlockTable(), scope("new"), PROMPT) == len(PROMPT)


def test_a_table_that_cannot_grow_is_left_as_it_was() -> None:
    blocks = KVBlocks(3)
    table = BlockTable()
    assert blocks.grow_table(table, BLOCK_TOKENS + 1)
    held = list(table.blocks)
    assert not blocks.grow_table(table, 4 * BLOCK_TOKENS)
    assert table.blocks == held
    assert blocks.free == 1


def test_room_counts_what_is_shared_once() -> None:
    blocks = KVBlocks(4)
    write_prompt(blocks, "a", PROMPT)
    assert blocks.has_room(scope("a"), PROMPT, 4 * BLOCK_TOKENS)
    assert not blocks.has_room(scope("b"), PROMPT, 2 * BLOCK_TOKENS)


def test_what_a_failed_sequence_has_written_is_not_found_again() -> None:
    blocks = KVBlocks(10)
    write_prompt(blocks, "a", PROMPT[:BLOCK_TOKENS])
    failed = write_prompt(blocks, "a", PROMPT)
    assert failed.shared == 1
    blocks.release_table(failed, forget=True)
    assert blocks.share_prefix(BlockTable(), scope("a"), PROMPT) == BLOCK_TOKENS


def test_two_sequences_that_compute_the_same_keep_their_own_blocks() -> None:
    blocks = KVBlocks(10)
    tables = [BlockTable(), BlockTable()]
    for table in tables:
        assert blocks.grow_table(table, len(PROMPT) + 1)
    for written in (BLOCK_TOKENS, len(PROMPT)):
        for table in tables:
            blocks.name_blocks(table, scope("a"), PROMPT, written)
    assert not set(tables[0].blocks) & set(tables[1].blocks)
    late = BlockTable()
    blocks.share_prefix(late, scope("a"), PROMPT)
    assert late.blocks == tables[0].blocks[:3]
    for table in (*tables, late):
        blocks.release_table(table)
    assert (blocks.free, blocks.cached) == (10, 3)


@pytest.mark.parametrize("seed", range(40))
def test_references_add_up_whatever_comes(seed: int) -> None:
    """Every block has as many references as tables hold it, and no block that is written has two."""
    rng = random.Random(seed)
    blocks = KVBlocks(rng.randrange(4, 20))
    held: list[tuple[BlockTable, list[int], Hashable]] = []
    for _ in range(300):
        if held and rng.random() < 0.4:
            table, _, _ = held.pop(rng.randrange(len(held)))
            blocks.release_table(table, forget=rng.random() < 0.2)
        else:
            content = rng.choice((None, "a", "b"))
            tokens = [rng.randrange(2)] * rng.choice((0, 17, 40)) + [rng.randrange(5) for _ in range(9)]
            table = BlockTable()
            has_room = blocks.has_room(scope(content), tokens[:-1], len(tokens))
            blocks.share_prefix(table, scope(content), tokens[:-1])
            assert blocks.grow_table(table, len(tokens)) == has_room
            if has_room:
                blocks.name_blocks(table, scope(content), tokens, len(tokens))
                held.append((table, tokens, content))
            else:
                blocks.release_table(table)
        check_references(blocks, held)


def check_references(blocks: KVBlocks, held: list[tuple[BlockTable, list[int], Hashable]]) -> None:
    holders = Counter(block for table, _, _ in held for block in table.blocks)
    assert len(holders) == blocks.used
    content_of: dict[int, tuple[Hashable, list[int]]] = {}
    for table, tokens, content in held:
        assert len(table.blocks) == count_blocks(len(tokens))
        for index, block in enumerate(table.blocks):
            start = tokens[: (index + 1) * BLOCK_TOKENS]
            assert content_of.setdefault(block, (content, start)) == (content, start)
            is_full = len(start) == (index + 1) * BLOCK_TOKENS
            assert holders[block] == 1 or is_full, "a block that is written has a second owner"
