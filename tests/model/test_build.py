"""The start of the worker: whatever a base's own code raises is one line; each grammar is compiled once, and
every request gets a matcher of its own; a base whose layers keep states has no recorded steps.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import llguidance
import pytest

from service.errors import SettingsError
from service.model import build, rope
from service.model.linear_calls import LinearCalls
from service.model.loading import no_progress
from service.model.states import StateSpec
from service.settings import Settings
from tests import making


@pytest.mark.parametrize("error", [IndexError("no such row\nin it"), AssertionError(), KeyError("kind")])
def test_what_a_bases_own_code_raises_is_a_refusal_in_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_it(*_: object) -> None:
        raise error

    monkeypatch.setattr(rope, "fix_frequencies", raise_it)
    values = {"base": str(making.tiny(tmp_path / "base")), "device": "cpu", "dtype": "float32", "kv_mb": 10}
    said = rf"^ADAPTERD_BASE: '.*base' cannot be served: {type(error).__name__}: [^\n]*$"
    with pytest.raises(SettingsError, match=said) as refused:
        build.build_runner(Settings.model_validate(values), no_progress)
    assert refused.value.__cause__ is error


def test_a_parent_that_is_gone_is_no_fault_of_the_base(tmp_path: Path) -> None:
    def lose_parent(*_: object) -> None:
        raise BrokenPipeError

    values = {"base": str(making.tiny(tmp_path / "base")), "device": "cpu", "dtype": "float32"}
    with pytest.raises(BrokenPipeError):
        build.build_runner(Settings.model_validate(values), lose_parent)


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


def test_a_base_whose_layers_keep_states_has_no_recorded_steps(caplog: pytest.LogCaptureFixture) -> None:
    none: Any = None
    auto, demanded = (Settings.model_validate({"compile": switch}) for switch in ("auto", "on"))
    base = build.ProbedBase(None, [], [StateSpec(None, ())], LinearCalls(), auto)
    with caplog.at_level(logging.WARNING):
        assert build._record_graphs(base, none, none, none, no_progress) is None
    assert "graphs: off; layers of this base keep states" in caplog.text
    with pytest.raises(SettingsError, match="ADAPTERD_COMPILE: on, but decode steps"):
        build._record_graphs(base._replace(settings=demanded), none, none, none, no_progress)
