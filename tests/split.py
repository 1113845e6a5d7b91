"""Splits the tests among the processes of `pytest -n`. Runs in the process that hands them out, and
in the others, which order them.

Knows files and folders of tests, not what is in them.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

# The tests of such a folder share a service, which would be started in each process
TOGETHER = ("tests/clients", "tests/console", "tests/live")
# What takes longer than a few seconds, the longest first, so that the processes end at about the same time
LONGEST = (
    "tests/test_chaos.py",
    "tests/clients",
    "tests/deploy/test_ray.py",
    "tests/console",
    "tests/catalog/test_cases.py",
    "tests/deploy/test_steps.py",
    "tests/test_memory.py",
    "tests/live",
    "tests/deploy/test_loading.py",
    "tests/test_isolation.py",
    "tests/model/test_parity.py",
    "tests/model/test_steps_ahead.py",
    "tests/model/test_experts.py",
)


def part_of(nodeid: str) -> str:
    """The file of a test, or its folder: what one process runs, without a test of another between."""
    file = nodeid.partition("::")[0]
    return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)


def turn_of(nodeid: str) -> int:
    """Sorts the tests by when they are handed out; equal for all of no known length."""
    part = part_of(nodeid)
    return LONGEST.index(part) if part in LONGEST else len(LONGEST)


class PartScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Hands out a part when a process has two tests left, in the order of the collection."""

    def _split_scope(self, nodeid: str) -> str:
        return part_of(nodeid)
