"""Dashboard, rules and autoscaler ask only for metrics, and only for codes, that the service has."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from service import errors
from service.telemetry.metrics import REGISTRY

from .files import DEPLOY, METRIC, expressions, rules

SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
ASKED = [*expressions(), *(rule["expr"] for rule in rules())]


def defined() -> set[str]:
    return {family.name + suffix for family in REGISTRY.collect() for suffix in SUFFIXES[family.type]}


def codes(kind: type[errors.AdapterdError] = errors.AdapterdError) -> Iterator[str]:
    yield kind.code
    for below in kind.__subclasses__():
        yield from codes(below)


@pytest.mark.parametrize("expression", ASKED)
def test_an_expression_asks_for_what_the_service_exposes(expression: str) -> None:
    asked = set(METRIC.findall(expression))
    assert asked - defined() == set()
    recorded = set(re.findall(r"(?:job|instance|instance_tier):[\w:]+", expression))
    assert recorded - RECORDED == set()
    assert asked | recorded | set(re.findall(r"\bup\b", expression)), "it asks for something"


def test_the_manifests_name_only_metrics_that_exist() -> None:
    prose = "".join(path.read_text() for path in (DEPLOY / "kubernetes").glob("*.yaml"))
    assert set(METRIC.findall(prose)) - defined() == set()


def test_failures_are_asked_for_by_codes_that_exist() -> None:
    asked = {
        code for text in ASKED for found in re.findall(r'code=~?"([^"]*)"', text) for code in found.split("|")
    }
    assert asked == {
        "internal",
        "not_ready",
        "deadline_exceeded",
        "overloaded",
        "unauthorized",
        "storage_full",
    }
    assert asked <= set(codes())
