"""The names that every dialect has for adapters and the base. API process; must not know wire shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..services import Services
from .admission import Admission

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer


def chosen_adapter(model: str, services: Services) -> str | None:
    """The id of the adapter that a model name means; None for the base.

    `base:adapter` is the adapter.
    """
    if model in services.bases:
        return None
    for base in services.bases:
        if model.startswith(base + ":"):
            return model.removeprefix(base + ":")
    return model


async def enter_named(model: str | None, admission: Admission, user: object = None) -> AdapterTokenizer:
    """Leases the adapter of this name until the request is over, and returns its tokenizer; None is the
    base. `user` is the caller as the body names it. Raises AdapterNotFound, BadRequest, DigestMismatch,
    NotReady.
    """
    admission.user = user
    return await admission.enter_adapter(None if model is None else chosen_adapter(model, admission.services))
