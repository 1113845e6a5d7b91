"""What every test may rely on."""

from __future__ import annotations

import os

import pytest

# A proxy of this machine's knows no server of a test's
os.environ["no_proxy"] = "127.0.0.1,localhost"
# Else torch's threads wait for work at full speed, here and in what the tests start: where others want the
# processor, a test takes several times as much of it
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the service does."""
    return "asyncio"
