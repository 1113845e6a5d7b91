"""Decodes token ids to text as it grows, whole characters only (API process).

Must not know tokenizer files, adapters or HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

CONTEXT = 6  # prompt tokens a decoder looks back at, for the space between prompt and answer

# Tokens that may wait for their character to become whole; no character has more bytes than four
HELD = 8

BROKEN = "\ufffd"


class IncrementalDecoder:
    """One sequence's text.

    `decode` turns ids into text by itself; `special` ids add none; `prompt` are the tokens that the
    sequence continues.

    The text of a token depends on its neighbours (bytes of a character, spaces), so each is decoded
    behind the last settled ones, and adds the difference. That costs two short decodes a token, however
    long the text is.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], special: Collection[int] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._decode, self._special = decode, special
        self._window = [id for id in prompt[-CONTEXT:] if id not in special]
        self._shown = decode(self._window) if self._window else ""
        if self._shown.endswith(BROKEN):
            self._window, self._shown = [], ""
        self._settled = len(self._window)

    def push_token(self, id: int) -> str:
        """The text this token completes; empty while a character is in the making."""
        if id in self._special:
            return ""
        self._window.append(id)
        text = self._decode(self._window)
        held = len(self._window) - self._settled
        if text.endswith(BROKEN) and held < HELD:
            return ""
        return self._settle_text(text)

    def flush_held(self) -> str:
        """The text held back; a character cut short becomes U+FFFD."""
        if len(self._window) == self._settled:
            return ""
        return self._settle_text(self._decode(self._window))

    def _settle_text(self, text: str) -> str:
        fresh = self._window[self._settled :]
        # byte-fallback tokenizers take back a whole run of characters while its last one is
        # incomplete
        added = text[len(self._shown) :] if text.startswith(self._shown) else self._decode(fresh)
        self._window, self._settled, self._shown = fresh, len(fresh), self._decode(fresh)
        return added
