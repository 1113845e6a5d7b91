"""Every error code has one class and both statuses, and every error class has a code."""

from __future__ import annotations

import pytest

from service import errors
from service.api.errors import STATUSES, error_body, status_of
from service.core.error_codes import ErrorCode
from service.errors import ERROR_OF_CODE, AdapterdError

LOG_ONLY = {499}  # whom it could be sent to has left
LISTED_NOWHERE = {408}  # a client that is too slow is told so at any route


def make_error(kind: type[AdapterdError]) -> AdapterdError:
    return kind(["why"]) if issubclass(kind, errors.AdapterInvalid) else kind("why")


def list_classes() -> list[type[AdapterdError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in found if issubclass(kind, AdapterdError) and kind is not AdapterdError]


def test_the_table_has_every_code_and_no_other() -> None:
    assert set(ERROR_OF_CODE) == set(ErrorCode)


@pytest.mark.parametrize("code", ErrorCode)
def test_a_code_has_a_class_and_both_statuses(code: ErrorCode) -> None:
    error = make_error(ERROR_OF_CODE[code])
    assert error.code is code
    assert error.status in STATUSES.keys() | LOG_ONLY
    assert status_of(error, openai=True) in {400} | STATUSES.keys() | LOG_ONLY
    assert error_body(error, openai=False)["error_type"] == code.value
    assert error_body(error, openai=True)["error"]["code"]


@pytest.mark.parametrize("kind", list_classes())
def test_a_class_has_a_code_and_is_what_its_code_stands_for(kind: type[AdapterdError]) -> None:
    assert isinstance(kind.code, ErrorCode)
    assert issubclass(kind, ERROR_OF_CODE[kind.code])
    assert kind.status in STATUSES.keys() | LOG_ONLY | LISTED_NOWHERE
