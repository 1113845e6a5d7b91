"""What every test may rely on."""

from __future__ import annotations

import os

import pytest

# A proxy of this machine's knows no server of a test's
os.environ["no_proxy"] = "127.0.0.1,localhost"
# No device here: kernels run in the interpreter, which Triton asks for when it is imported
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the service does."""
    return "asyncio"
