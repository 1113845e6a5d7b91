"""Cuts text at stop strings, and holds back text that could still become one (API process).

Must not know tokens, adapters or HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopStrings:
    """Lets text through up to the first stop string; holds back text that could become one.

    `found` is the string that ended it, `rest` the text behind it in the same push.

    Works character by character (Knuth, Morris and Pratt), so that the same text in other pieces
    ends at the same character. Of strings that end at the same character the longest counts.
    """

    def __init__(self, strings: Sequence[str] = ()) -> None:
        self._strings = [s for s in dict.fromkeys(strings) if s]
        self._falls = [_failure_table(s) for s in self._strings]
        self._matched = [0] * len(self._strings)
        self._held = ""
        self.found: str | None = None
        self.rest = ""

    def push_text(self, text: str) -> str:
        """The part of the text so far that is certain to be kept and was not given before."""
        if not self._strings:
            return text
        whole = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            self.found = self._step_char(char)
            if self.found is not None:
                self._held, self.rest = "", whole[end:]
                return whole[: end - len(self.found)]
        kept = len(whole) - max(self._matched)
        self._held = whole[kept:]
        return whole[:kept]

    def flush_held(self) -> str:
        """The text held back, once no more can come."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._strings)
        return held

    def _step_char(self, char: str) -> str | None:
        for i, (string, falls) in enumerate(zip(self._strings, self._falls, strict=True)):
            at = self._matched[i]
            while at and string[at] != char:
                at = falls[at - 1]
            self._matched[i] = at + (string[at] == char)
        matches = zip(self._strings, self._matched, strict=True)
        ended = [string for string, matched in matches if matched == len(string)]
        return max(ended, key=len, default=None)


@lru_cache(maxsize=64)  # the many answers to one request have the same stop strings
def _failure_table(string: str) -> list[int]:
    """For each prefix of the string, the length of the longest proper prefix that also ends it."""
    falls = [0] * len(string)
    at = 0
    for i in range(1, len(string)):
        while at and string[i] != string[at]:
            at = falls[at - 1]
        at += string[i] == string[at]
        falls[i] = at
    return falls
