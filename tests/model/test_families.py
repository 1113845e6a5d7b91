"""Thirty families, by tiny models of their classes: served, and equal to PEFT; docs/bases.md has the rest."""

from __future__ import annotations

import pytest

from . import families

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "phi", "phi3", "gpt2", "gpt_neox", "olmo2", "cohere2", "granite", "smollm3", "glm4",
    "exaone4",
    # The text of models that see images
    "gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "internvl", "smolvlm", "paligemma",
    "aya_vision", "lfm2_vl",
)  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_a_tiny_model_of_the_family_is_served_and_says_what_peft_says(kind: str) -> None:
    verdict = families.judge(kind)
    assert (verdict.state, verdict.told) == ("served", "9 of 9")


def test_the_page_has_a_row_for_each_architecture_and_its_sums_are_those_of_its_rows() -> None:
    causal, wrappers = families.all_kinds()
    rows = families.read_page()
    assert list(rows) == [*causal, *wrappers]
    served = {kind for kind, row in rows.items() if families.is_right(row)}
    page = families.PAGE.read_text(encoding="utf-8")
    assert f"**{len(served)} of {len(rows)} are served**" in page
    assert served >= set(FAMILIES)
    assert {row.state for row in rows.values()} == {"served", "refused", "not made"}
