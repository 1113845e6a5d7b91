"""Prometheus' own tool accepts configuration and rules and runs the rules' unit tests; each rule
has one.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from .files import DEPLOY, documents, expressions, rules

PROMETHEUS = DEPLOY / "prometheus"


def promtool(*arguments: str, folder: Path = PROMETHEUS) -> str:
    done = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_configuration_is_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_the_rules_are_valid_and_pass_their_unit_tests() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint-fatal", "rules/recording.yml", "rules/alerts.yml")
    assert "SUCCESS" in promtool("test", "rules", "rules_test.yml")


def test_a_wrong_threshold_fails_the_unit_tests(tmp_path: Path) -> None:
    shutil.copytree(PROMETHEUS, tmp_path / "prometheus")
    alerts = tmp_path / "prometheus" / "rules" / "alerts.yml"
    alerts.write_text(alerts.read_text().replace("ratio_rate5m > 0.02", "ratio_rate5m > 0.2"))
    with pytest.raises(AssertionError, match="AdapterdErrors"):
        promtool("test", "rules", "rules_test.yml", folder=tmp_path / "prometheus")


def test_every_rule_has_a_unit_test() -> None:
    tests = (PROMETHEUS / "rules_test.yml").read_text()
    assert [
        name for rule in rules() if (name := str(rule.get("record", rule.get("alert")))) not in tests
    ] == []


@pytest.mark.parametrize(
    "rule", [rule for rule in rules() if "alert" in rule], ids=lambda rule: str(rule["alert"])
)
def test_an_alert_says_how_urgent_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert {"summary", "action"} <= set(rule["annotations"])
    assert rule["labels"]["severity"] in ("page", "ticket")


def test_the_dashboards_expressions_parse(tmp_path: Path) -> None:
    rows = "".join(f"  - record: panel:{i}\n    expr: {text!r}\n" for i, text in enumerate(expressions()))
    (tmp_path / "panels.yml").write_text(f"groups:\n- name: panels\n  rules:\n{rows}")
    assert f"{len(expressions())} rules found" in promtool("check", "rules", "panels.yml", folder=tmp_path)


def test_the_service_is_scraped_where_compose_runs_it() -> None:
    (whole,) = documents(PROMETHEUS / "prometheus.yml")
    (job,) = whole["scrape_configs"]
    assert job["job_name"] == "adapterd"
    assert job["static_configs"] == [{"targets": ["adapterd:8080"]}]
