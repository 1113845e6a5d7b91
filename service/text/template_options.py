"""How a chat template is asked for a text, beside the conversation; API process, template processes.

Imports nothing heavy. Must not know templates or HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """How a conversation ends, and a request's own variables of the template.

    `opens_turn`: the text ends where the assistant answers; `continues`: within the last message.
    """

    variables: Mapping[str, Any] = field(default_factory=dict)
    opens_turn: bool = True
    continues: bool = False


PLAIN = TemplateOptions()
