"""Names that clients use as an adapter's, and that send each request to one of several adapters;
API process.

Must not know requests, files or what is registered.

A caller that an alias sticks to is sent by rendezvous hashing: each target draws a number from the
caller's name, and the lowest, divided by the weights, wins. So where weights change a little, or a
target comes or goes, only those callers move whose share has moved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from hashlib import sha256
from typing import Any

from ..core.adapter import Digest
from ..errors import BadRequest
from .ids import join_digest

USER = "user"  # sticks to the caller that the request's own field names
MOST_TARGETS = 32
HEAVIEST = 1e6


@dataclass(frozen=True, slots=True)
class AliasTarget:
    """An adapter, at whatever version is current or at one, and its share of the requests."""

    id: str
    weight: float
    digest: Digest | None = None

    @property
    def name(self) -> str:
        """The name that a request for this target would have."""
        return join_digest(self.id, self.digest)


@dataclass(frozen=True, slots=True)
class Alias:
    """`sticky` is `user`, or the header that names the caller; None: every request is drawn anew."""

    name: str
    targets: tuple[AliasTarget, ...]
    sticky: str | None
    changed_at: str

    def choose_target(self, caller: str | None) -> AliasTarget:
        """A target by weight; for the same caller the same one."""
        targets = [target for target in self.targets if target.weight]
        if caller is None:
            return random.choices(targets, [target.weight for target in targets])[0]
        return min(targets, key=lambda target: self._draw_number(target, caller) / target.weight)

    def _draw_number(self, target: AliasTarget, caller: str) -> float:
        """An exponentially distributed number that only these names decide."""
        words = "\0".join((self.name, target.name, caller))
        drawn = sha256(words.encode("utf-8", "surrogatepass")).digest()
        return -math.log((int.from_bytes(drawn[:8], "big") + 1) / 2**64)

    def describe_targets(self) -> str:
        """The targets' names and weights, for the audit."""
        return ", ".join(f"{target.name} {target.weight:g}" for target in self.targets)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_alias(name: str, targets: Iterable[AliasTarget], sticky: str | None, changed_at: str) -> Alias:
    """Raises BadRequest for targets that no request can be sent to by weight."""
    alias = Alias(name, tuple(targets), sticky, changed_at)
    _check_targets(alias.targets)
    return alias


def _check_targets(targets: tuple[AliasTarget, ...]) -> None:
    if not targets:
        raise BadRequest("targets: an alias needs at least one", param="targets")
    if len(targets) > MOST_TARGETS:
        raise BadRequest(f"targets: an alias has {MOST_TARGETS} at most", param="targets")
    for target in targets:
        if not 0 <= target.weight <= HEAVIEST:
            raise BadRequest(
                f"targets: a weight is 0 to {HEAVIEST:.0f}, not {target.weight}", param="targets"
            )
    if not any(target.weight for target in targets):
        raise BadRequest("targets: one of them needs a weight over 0", param="targets")
    if len({target.name for target in targets}) < len(targets):
        raise BadRequest("targets: one of them is named twice", param="targets")


def parse_alias(entry: Mapping[str, Any]) -> Alias:
    """An alias as `to_json` wrote it. Raises KeyError, TypeError, ValueError."""
    targets = [AliasTarget(**target) for target in entry["targets"]]
    texts = [entry["name"], entry["changed_at"], *(target.id for target in targets)]
    optional = [entry["sticky"], *(target.digest for target in targets)]
    typed = all(isinstance(text, str) for text in texts)
    if not typed or not all(text is None or isinstance(text, str) for text in optional):
        raise ValueError("an alias with a value of the wrong type")
    if not all(isinstance(target.weight, int | float) for target in targets):
        raise ValueError("a weight that is no number")
    datetime.fromisoformat(entry["changed_at"])
    try:
        return make_alias(entry["name"], targets, entry["sticky"], entry["changed_at"])
    except BadRequest as error:
        raise ValueError(error.message) from None
