"""The generation options that completions and chat share, made from a parsed body.

API process; must not know a route.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...errors import BadRequest
from ...threads import TEXT, run_in
from ..schemas.openai import OpenAIRequest
from .admission import GenerationOptions
from .grammar import compile_grammar

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

BadWords = tuple[tuple[int, ...], ...]


async def bound_grammar(body: OpenAIRequest) -> str | None:
    """The grammar of what the answer must be; None for free text. Raises BadRequest naming the field."""
    if body.bound is None:
        return None
    name, bound = body.bound
    return await compile_grammar(bound, name)


async def openai_options(
    body: OpenAIRequest, tokenizer: AdapterTokenizer, logprobs: int | None, grammar: str | None
) -> GenerationOptions:
    """All options but the limit of tokens. Raises BadRequest for words that are no text."""
    sampling = body.make_sampling(logprobs, grammar)
    if body.bad_words:
        sampling = replace(sampling, bad_words=await _encode_words(tokenizer, body.bad_words))
    return GenerationOptions(
        sampling=sampling,
        max_tokens=None,
        default_tokens=None,
        stop=body.stop or (),
        stop_ids=tuple(body.stop_token_ids or ()),
        keep_stop=bool(body.include_stop_str_in_output),
        kept_special=tokenizer.special if body.skip_special_tokens is False else frozenset(),
        count=body.n or 1,
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        prompt_logprobs=body.prompt_logprobs,
        priority=body.priority,
    )


async def _encode_words(tokenizer: AdapterTokenizer, words: Sequence[str]) -> BadWords:
    """The ids of each word; off the event loop where an adapter's own tokenizer may take any time."""
    if tokenizer.words.own:
        return await run_in(TEXT, _encode_each, tokenizer, words)
    return _encode_each(tokenizer, words)


def _encode_each(tokenizer: AdapterTokenizer, words: Sequence[str]) -> BadWords:
    """Each word as a text begins with it and as it is behind a space, which most tokenizers write
    with other tokens.
    """
    try:
        spelled = [
            tokenizer.encode(space + word.lstrip(), special=False) for word in words for space in ("", " ")
        ]
    except BadRequest as error:
        raise BadRequest(f"bad_words: {error.message}", param="bad_words") from None
    return tuple(dict.fromkeys(ids for ids in spelled if ids))
