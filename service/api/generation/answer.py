"""One sequence as text: a ticket's events become pieces, with stop strings cut and errors raised.
API process; must not know wire shapes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from ... import errors
from ...core.error_codes import ErrorCode
from ...core.request import Event, Finish, Token
from ...text.incremental import IncrementalDecoder
from ...text.stop_strings import StopStrings

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer
    from ...worker.ticket import Ticket


class AnswerEnding(StrEnum):
    LENGTH = "length"
    EOS = "eos_token"
    STOP = "stop_sequence"


ENDINGS = {Finish.EOS: AnswerEnding.EOS, Finish.LENGTH: AnswerEnding.LENGTH}


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The text that one token adds, often none.

    `special`: the token is no text. The last piece has the ending.
    """

    token: Token | None
    text: str
    special: bool = False
    ending: AnswerEnding | None = None


@dataclass
class Answer:
    """One continuation of a prompt; it is read once, and its pieces and tokens are kept.

    Stop strings count after the request's `min_tokens`; `keep_stop`: what ends the text is part of it.
    `kept_special` are special tokens that are text.

    `scored` are the prompt's tokens with log probabilities, where the request wants them.
    """

    ticket: Ticket
    tokenizer: AdapterTokenizer
    stops: StopStrings
    keep_stop: bool = False
    kept_special: frozenset[int] = frozenset()
    pieces: list[TextPiece] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    scored: tuple[Token, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.ticket.request.prompt

    @property
    def seed(self) -> int:
        return self.ticket.request.sampling.seed

    async def read_pieces(self) -> AsyncIterator[TextPiece]:
        """Its pieces as they come; the last one has the ending.

        Raises the error that ended the sequence otherwise.
        """
        decoder = self.tokenizer.make_decoder(self.prompt, self.kept_special)
        async for event in self.ticket:
            piece = self._make_piece(event, decoder)
            self.pieces.append(piece)
            yield piece
            if piece.ending is not None:
                return
        raise failure_error(Event(self.ticket.request.id, finish=Finish.CANCELLED))

    async def read_to_end(self) -> None:
        """Reads all pieces."""
        async for _ in self.read_pieces():
            pass

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ending(self) -> AnswerEnding:
        """The ending of an answer that was read to its end."""
        ending = self.pieces[-1].ending
        assert ending is not None, "an answer is described after its end"
        return ending

    @property
    def likelihood(self) -> float:
        """The summed log probability of its tokens."""
        return sum(token.logprob or 0.0 for token in self.tokens)

    def _make_piece(self, event: Event, decoder: IncrementalDecoder) -> TextPiece:
        if event.finish in (Finish.FAILED, Finish.CANCELLED):
            raise failure_error(event)
        self.scored = event.prompt or self.scored
        token = event.token
        if token is not None:
            self.tokens.append(token)
        text = self._decode_event(event, decoder)
        if self.stops.found is not None:
            self.ticket.cancel_request(stopped=True)
            return TextPiece(token, text, ending=AnswerEnding.STOP)
        ending = ENDINGS[event.finish] if event.finish else None
        # held text that the eos lets go would be lost to clients that skip special tokens
        special = token is not None and not text and self._is_special(token, event)
        return TextPiece(token, text, special, ending)

    def _decode_event(self, event: Event, decoder: IncrementalDecoder) -> str:
        """The text of the event's token and, at the end, all that the decoder and the stop strings
        still hold.
        """
        decoded = ""
        if event.token is not None and (self.keep_stop or event.finish is not Finish.EOS):
            decoded = decoder.push_token(event.token.id)
        text = self._push_text(decoded, last=False)
        if self.stops.found is None and event.finish is not None:
            text += self._push_text(decoder.flush_held(), last=True)
        return text

    def _is_special(self, token: Token, event: Event) -> bool:
        return event.finish is Finish.EOS or token.id in self.tokenizer.special

    def _push_text(self, text: str, last: bool) -> str:
        min_tokens = self.ticket.request.sampling.min_tokens
        if min_tokens and len(self.tokens) <= min_tokens:
            return text
        text = self.stops.push_text(text)
        if self.stops.found is not None:
            return text + self.stops.found if self.keep_stop else text
        return text + self.stops.flush_held() if last else text


def failure_error(event: Event) -> errors.AdapterdError:
    """The error of a request's terminal event, which the engine has counted."""
    error = _failure_error(event)
    error.counted = True
    return error


def _failure_error(event: Event) -> errors.AdapterdError:
    if event.finish is Finish.CANCELLED:
        return errors.Cancelled("the client left")
    if event.code in (ErrorCode.ADAPTER_INVALID, ErrorCode.ADAPTER_UNSUPPORTED):
        return errors.AdapterInvalid([event.message])
    kind = errors.ERROR_OF_CODE[event.code] if event.code else errors.Internal
    return kind(event.message or "the request failed")
