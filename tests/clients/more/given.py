"""What each script here is given, and how it tells what it got; in its own process, in .venv-clients.

Must not know the service, which is not installed there: a script is given a URL and texts, as anybody is.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel

GIVEN = json.load(sys.stdin)
URL, V1 = GIVEN["url"], f"{GIVEN['url']}/v1"
CACTUS, SPOKEN_ORDER = GIVEN["cactus"], GIVEN["order"]
KEY = "none"
BRIEFLY: int = GIVEN["tokens"]  # of an answer


class Order(BaseModel):
    name: str
    item: str
    quantity: int
    city: str


def as_call(name: str, arguments: Any) -> dict[str, Any]:
    """A tool's call, whose arguments may be JSON text."""
    return {"name": name, "arguments": json.loads(arguments) if isinstance(arguments, str) else arguments}


def tell(**results: Any) -> None:
    print(json.dumps(results))
