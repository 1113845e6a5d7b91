"""A real Prometheus with our configuration scrapes a live service, and under load every panel of
the dashboard has data.
"""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from deploy.bench.servers import free_port, stop

from .files import DEPLOY, documents, expressions, rules

PATIENCE_S = 120
NO_ERRORS = "job:adapterd_request_errors:ratio_rate5m"


@pytest.fixture
def prometheus(live: str, tmp_path: Path) -> Iterator[str]:
    """The address of a Prometheus that runs with the shipped files; only the target, the key and
    the pace are this test's.
    """
    (whole,) = documents(DEPLOY / "prometheus" / "prometheus.yml")
    (job,) = whole["scrape_configs"]
    (tmp_path / "key").write_text("none asked for")
    job["authorization"]["credentials_file"] = str(tmp_path / "key")
    job["static_configs"] = [{"targets": [live.removeprefix("http://")]}]
    whole["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    whole["rule_files"] = [str(path) for path in sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(whole))
    address = f"127.0.0.1:{free_port()}"
    flags = [
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address={address}",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *flags], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        stop(process)


def query(prometheus: str, expression: str) -> list[dict[str, Any]]:
    """The samples; none while Prometheus is still starting."""
    try:
        answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expression}, trust_env=False)
    except httpx.TransportError:
        return []
    found: list[dict[str, Any]] = answer.json()["data"]["result"] if answer.status_code == 200 else []
    return found


def ask(live: str, model: str) -> None:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8}
    httpx.post(f"{live}/v1/completions", json=body, timeout=60, trust_env=False).raise_for_status()


def leave(live: str, model: str) -> None:
    """A client that goes after the first event: the failure that every service sees."""
    body = {"model": model, "prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{live}/v1/completions", json=body, timeout=60, trust_env=False) as response:
        next(response.iter_lines())


def drive(until: Callable[[], bool], live: str) -> bool:
    """Requests for each model in turn, answered and left, until it is true or patience ends."""
    models = [model["id"] for model in httpx.get(f"{live}/v1/models", trust_env=False).json()["data"]]
    end = time.monotonic() + PATIENCE_S
    turn = itertools.cycle(models)
    while time.monotonic() < end:
        if until():
            return True
        model = next(turn)
        ask(live, model)
        leave(live, model)
    return False


def test_every_panel_and_rule_has_data_under_load(live: str, prometheus: str) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule} - {NO_ERRORS}
    missing = {*expressions(), *recorded}

    def all_seen() -> bool:
        missing.difference_update([one for one in sorted(missing) if query(prometheus, one)])
        return not missing

    drive(all_seen, live)
    assert missing == set()


def test_a_live_service_is_up_and_fires_no_alert(live: str, prometheus: str) -> None:
    """Once it is seen: a scrape that a busy machine cut short makes an alert pend until the next
    one.
    """
    seen = 'up{job="adapterd"} == 1 and on (job) instance:adapterd_pool_rank:ratio unless on () ALERTS'
    assert drive(lambda: bool(query(prometheus, seen)), live), query(prometheus, "ALERTS")
