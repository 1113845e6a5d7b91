"""Grammar matchers: a start compiles each grammar once, and every request gets one of its own."""

from __future__ import annotations

from pathlib import Path

import llguidance
import pytest

from service.model import build
from tests import making


def test_a_grammar_is_compiled_once_and_each_request_follows_it_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile(words: object, grammar: str) -> llguidance.LLMatcher:
        compiled.append(grammar)
        return real(words, grammar)

    real = llguidance.LLMatcher
    monkeypatch.setattr(llguidance, "LLMatcher", compile)
    making.tokenizer().save_pretrained(tmp_path)
    made = build.make_matchers(tmp_path, len(making.tokenizer()))
    grammar = real.grammar_from_regex("[ab]{2}")
    first, second, other = made(grammar), made(grammar), made(real.grammar_from_regex("c"))
    (a,) = making.ids("a")
    assert all(first.consume_token(a) for _ in range(2))
    assert [one.is_accepting() for one in (first, second)] == [True, False]
    assert [one.consume_token(a) for one in (made(grammar), other)] == [True, False]
    assert len(compiled) == 2
