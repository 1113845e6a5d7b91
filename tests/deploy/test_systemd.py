"""The unit starts what docs/operating.md starts, stops it within its grace, and takes away what it
does not need.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from service.settings import Settings

from .files import DEPLOY, ROOT

UNIT = DEPLOY / "systemd" / "adapterd.service"
EXPOSURE = 1.5  # of systemd's own scale up to 10, in which less is better


def unit() -> dict[str, list[str]]:
    """Every directive with all of its values: a unit may repeat one."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text(encoding="utf-8").splitlines():
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


def test_what_restarts_cannot_mend_is_not_restarted() -> None:
    command = [sys.executable, "-m", "service", "serve", "--port", "none"]
    code = subprocess.run(command, cwd=ROOT, capture_output=True).returncode
    assert unit()["RestartPreventExitStatus"] == [str(code)]


def test_other_failures_are_restarted_for_longer_than_a_drain_and_not_for_ever() -> None:
    pause, tries = float(unit()["RestartSec"][0]), int(unit()["StartLimitBurst"][0])
    assert pause * tries > Settings().drain_s
    assert pause * tries < float(unit()["StartLimitIntervalSec"][0])


def test_where_memory_runs_out_the_unit_goes_on() -> None:
    assert unit()["OOMPolicy"] == ["continue"]


def test_its_caches_are_where_systemd_lets_it_write() -> None:
    (home,) = [line for line in unit()["Environment"] if line.startswith("HOME=")]
    folders = dict(word.split("=", 1) for word in home.split())
    assert folders.keys() == {"HOME", "XDG_CACHE_HOME"}
    assert set(folders.values()) == {f"/var/cache/{unit()['CacheDirectory'][0]}"}


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True)


def test_systemd_understands_each_line(tmp_path: Path) -> None:
    copy = tmp_path / UNIT.name
    text = UNIT.read_text(encoding="utf-8").replace("/opt/adapterd/.venv/bin/python", sys.executable)
    copy.write_text(text, encoding="utf-8")
    done = analyze("verify", str(copy))
    assert (done.returncode, done.stderr) == (0, "")
    copy.write_text(text.replace("ProtectClock=", "ProtectClocks="), encoding="utf-8")
    assert "ProtectClocks" in analyze("verify", str(copy)).stderr


def test_what_is_exposed_is_little() -> None:
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", "--no-pager", str(UNIT))
    assert done.returncode == 0, done.stdout[-2000:]


def test_it_is_restarted_and_has_no_privileges() -> None:
    assert unit()["Restart"] == ["on-failure"]
    assert unit()["DynamicUser"] == unit()["NoNewPrivileges"] == ["yes"]
    assert unit()["CapabilityBoundingSet"] == [""]
