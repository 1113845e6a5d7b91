"""What every test may rely on, and how the tests are split when several processes run them."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

from .split import PartScheduling, turn_of

# A proxy of this machine's knows no server of a test's
os.environ["no_proxy"] = "127.0.0.1,localhost"
# Else torch's threads wait for work at full speed, here and in what the tests start: where others want the
# processor, a test takes several times as much of it
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# No device here: kernels run in the interpreter, which Triton asks for when it is imported
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Tests marked `anyio` run on asyncio, as the service does."""
    return "asyncio"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> PartScheduling:
    """Hands out files and folders in the order of the collection, not by their number of tests."""
    config.option.loadscopereorder = False
    return PartScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first, where several processes share the tests."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: turn_of(item.nodeid))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test has printed crosses to another process, where no half of a character can go."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report
