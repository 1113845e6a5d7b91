"""The unit starts what docs/operating.md starts, stops it within its grace, and takes away what it
does not need.
"""

from __future__ import annotations

from service.settings import Settings

from .files import DEPLOY


def unit() -> dict[str, list[str]]:
    """Every directive with all of its values: a unit may repeat one."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / "adapterd.service").read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_it_runs_the_service_from_the_checkout() -> None:
    (directory,) = unit()["WorkingDirectory"]
    assert unit()["ExecStart"] == [f"{directory}/.venv/bin/python -m service serve"]


def test_the_worker_is_not_signalled_behind_the_services_back() -> None:
    assert unit()["KillMode"] == ["mixed"]
    assert float(unit()["TimeoutStopSec"][0]) >= Settings().drain_s + 10


def test_it_is_restarted_and_has_no_privileges() -> None:
    assert unit()["Restart"] == ["on-failure"]
    assert unit()["DynamicUser"] == unit()["NoNewPrivileges"] == ["yes"]
    assert unit()["CapabilityBoundingSet"] == [""]
