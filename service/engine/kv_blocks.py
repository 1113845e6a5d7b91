"""Allocates KV blocks to sequences, shares equal prefixes and keeps what may be asked for again; runs in
the worker process.

A block holds BLOCK_TOKENS positions. A full one is named by its scope, its parent's name and its tokens,
so a sequence that begins alike takes it over by reference. Integers and digests only; must not know
requests or tensors.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from ..core.base_info import BLOCK_TOKENS

Name = int
# The scope of a sequence's i-th block: contents with equal scopes compute equal KV from equal tokens
ScopeOf = Callable[[int], Hashable]
Key = tuple[Hashable, Name, tuple[int, ...]]

ROOT: Name = 0  # the parent of every first block


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence in the order of its positions; the first `shared` came from the cache.

    `named` of them are full and named, the last one by `parent`.
    """

    blocks: list[int] = field(default_factory=list)
    shared: int = 0
    named: int = 0
    parent: Name = ROOT


class KVBlocks:
    """`count` blocks, each referenced by the tables that hold it.

    A named block that no table holds stays cached until it is needed, least recently used first. Names
    are never used twice, so a key cannot be taken for another's.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._references = [0] * count
        self._empty = list(range(count - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._block_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._name_of: dict[int, Name] = {}
        self._last_name = ROOT

    @property
    def free(self) -> int:
        """Blocks that no table holds."""
        return len(self._empty) + len(self._cached)

    @property
    def used(self) -> int:
        return self.count - self.free

    @property
    def cached(self) -> int:
        """Blocks that no table holds, but that a prompt may find again."""
        return len(self._cached)

    def has_room(self, scope_of: ScopeOf, prefix: Sequence[int], positions: int) -> bool:
        """Whether a table for `positions` could be made now, the cached part of `prefix` shared."""
        if count_blocks(positions) <= self.free:
            return True
        held = sum(self._references[block] > 0 for block in self._match_prefix(scope_of, prefix))
        return count_blocks(positions) - held <= self.free

    def share_prefix(self, table: BlockTable, scope_of: ScopeOf, prefix: Sequence[int]) -> int:
        """Begins an empty table with the cached blocks of this prefix; the tokens that they hold."""
        for block in self._match_prefix(scope_of, prefix):
            self._references[block] += 1
            self._cached.pop(block, None)
            table.blocks.append(block)
            table.parent = self._name_of[block]
        table.shared = table.named = len(table.blocks)
        return table.shared * BLOCK_TOKENS

    def grow_table(self, table: BlockTable, positions: int) -> bool:
        """Adds blocks until the table has `positions`; whether it could, else it is left as it was."""
        missing = count_blocks(positions) - len(table.blocks)
        if missing > self.free:
            return False
        for _ in range(missing):
            block = self._take_block()
            self._references[block] = 1
            table.blocks.append(block)
        return True

    def name_blocks(self, table: BlockTable, scope_of: ScopeOf, tokens: Sequence[int], written: int) -> None:
        """Names the blocks that the first `written` of the sequence's tokens have filled."""
        while (end := (table.named + 1) * BLOCK_TOKENS) <= written:
            key = (scope_of(table.named), table.parent, tuple(tokens[end - BLOCK_TOKENS : end]))
            table.parent = self._name_block(table.blocks[table.named], key)
            table.named += 1

    def release_table(self, table: BlockTable, forget: bool = False) -> None:
        """Gives up the table's blocks, the last ones to be reused first.

        `forget`: nothing that this sequence has written is to be found again.
        """
        for index in reversed(range(len(table.blocks))):
            block = table.blocks[index]
            self._references[block] -= 1
            if self._references[block]:
                continue
            if forget and index >= table.shared:
                self._forget_name(block)
            if block in self._name_of:
                self._cached[block] = None
            else:
                self._empty.append(block)
        table.blocks, table.shared, table.named, table.parent = [], 0, 0, ROOT

    def _match_prefix(self, scope_of: ScopeOf, prefix: Sequence[int]) -> Iterator[int]:
        parent = ROOT
        for index in range(len(prefix) // BLOCK_TOKENS):
            tokens = tuple(prefix[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS])
            block = self._block_of.get((scope_of(index), parent, tokens))
            if block is None:
                return
            parent = self._name_of[block]
            yield block

    def _name_block(self, block: int, key: Key) -> Name:
        """The name of this content; where another block has it already, this one gets none."""
        if key in self._block_of:
            return self._name_of[self._block_of[key]]
        self._last_name += 1
        self._block_of[key], self._key_of[block], self._name_of[block] = block, key, self._last_name
        return self._last_name

    def _take_block(self) -> int:
        if self._empty:
            return self._empty.pop()
        block, _ = self._cached.popitem(last=False)
        self._forget_name(block)
        return block

    def _forget_name(self, block: int) -> None:
        if block in self._name_of:
            del self._block_of[self._key_of.pop(block)], self._name_of[block]


def count_blocks(positions: int) -> int:
    """The blocks that hold so many positions."""
    return -(-positions // BLOCK_TOKENS)
