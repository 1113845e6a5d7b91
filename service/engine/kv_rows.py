"""Keeps the tokens of each KV row and chooses rows for new sequences; runs in the worker process.

The row is chosen by how much of the prompt it holds already. A row that was left keeps its tokens until
it is needed. Token ids and digests only; must not know requests or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.adapter import Digest
from .plan import Fork

WORTH = 16  # positions: a shorter shared prefix is prefilled again rather than copied


@dataclass(slots=True)
class KVRow:
    """`tokens` are those whose KV the row holds, made under `digest`.

    `left` orders the free rows by when they were last left.
    """

    digest: Digest | None = None
    tokens: list[int] = field(default_factory=list)
    free: bool = True
    left: int = 0


class KVRows:
    def __init__(self, count: int) -> None:
        self.count = count
        self.rows = [KVRow() for _ in range(count)]
        self._clock = 0

    @property
    def free(self) -> int:
        return sum(row.free for row in self.rows)

    @property
    def positions(self) -> int:
        """Positions held by running sequences."""
        return sum(len(row.tokens) for row in self.rows if not row.free)

    def take_row(
        self, digest: Digest | None, prompt: Sequence[int], reuse: bool = True
    ) -> tuple[int, int, Fork | None]:
        """A free row for this prompt, how many of its first tokens the row will hold, and the copy
        that must be made for that.

        A free row is taken over where the match is most of its tokens; else the match is copied.
        The prompt's last token is never reused, since its logits are needed.
        """
        source, common = self._match_prefix(digest, list(prompt[:-1])) if reuse else (0, 0)
        if common < WORTH:
            return self._occupy_row(self._spare_row(), digest, []), 0, None
        held = self.rows[source]
        is_most = 2 * common >= len(held.tokens)
        if held.free and (is_most or self.free == 1):
            return self._occupy_row(source, digest, held.tokens[:common]), common, None
        target = self._spare_row(but=source)
        return self._occupy_row(target, digest, held.tokens[:common]), common, Fork(source, target, common)

    def record_tokens(self, row: int, tokens: Sequence[int]) -> None:
        self.rows[row].tokens.extend(tokens)

    def leave_row(self, row: int, warm: bool) -> None:
        self._clock += 1
        left = self.rows[row]
        left.free, left.left = True, self._clock
        if not warm:
            left.tokens = []

    def _match_prefix(self, digest: Digest | None, prompt: list[int]) -> tuple[int, int]:
        """The row that holds the longest part of the prompt's start, a free one among equals, and
        the length of that part.
        """
        best = (0, False, 0)
        for index, row in enumerate(self.rows):
            if row.digest == digest:
                best = max(best, (common_prefix(row.tokens, prompt), row.free, -index))
        return -best[2], best[0]

    def _spare_row(self, but: int = -1) -> int:
        """The free row whose tokens are missed least: an empty one, else the one left longest ago."""

        def order(index: int) -> tuple[int, int]:
            row = self.rows[index]
            return row.left if row.tokens else 0, index

        return min((index for index, row in enumerate(self.rows) if row.free and index != but), key=order)

    def _occupy_row(self, row: int, digest: Digest | None, tokens: list[int]) -> int:
        self.rows[row] = KVRow(digest, tokens, free=False)
        return row


def common_prefix(left: list[int], right: list[int]) -> int:
    """The length of the longest common start, by halving: slices compare in C."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
