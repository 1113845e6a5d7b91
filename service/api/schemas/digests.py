"""The types of the digests that requests name. API process; must not know what has them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field

EXPECTED = re.compile(r"sha256:[0-9a-f]{64}")
WholeDigest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
DigestStart = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{8,64}$")]
