"""The private part of tokenizers that the texts lean on is there and means what its name says."""

from __future__ import annotations

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers

from service.text.compat import is_panic


def test_a_panic_of_the_librarys_is_told_from_every_other_error() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(Regex("(a+)+$"), "x")
    with pytest.raises(BaseException, match="retry-limit") as panic:
        tokenizer.encode("a" * 40 + "!")
    assert is_panic(panic.value)
    assert not isinstance(panic.value, Exception)
    with pytest.raises(TypeError) as refused:
        tokenizer.encode("\ud800")
    assert not is_panic(refused.value)
