"""The service on a real Ray cluster with two engines: requests go where their adapter is, changes
reach all, and a death moves the traffic.

The cluster listens on all interfaces, so it gets a network namespace in which there is only
loopback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests import markers

from .files import ROOT

ADAPTERS = 6
LETTERS = [letter * 3 for letter in markers.LETTERS[: ADAPTERS + 1]]
Told = dict[str, Any]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("ray")
    base = markers.base(folder / "base")
    markers.write_adapters(folder / "adapters", base, ADAPTERS + 1)
    (folder / "adapters" / f"m{ADAPTERS}").rename(folder / "late")
    apart = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    home = {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}
    command = [*apart, sys.executable, "-m", "tests.deploy.cluster", str(folder)]
    ran = subprocess.run(
        command, cwd=ROOT, env=os.environ | home, capture_output=True, text=True, timeout=300
    )
    found = [line.removeprefix("TOLD ") for line in ran.stdout.splitlines() if line.startswith("TOLD ")]
    assert found, ran.stdout[-3000:] + ran.stderr[-3000:]
    one: Told = json.loads(found[0])
    return one


def test_each_adapter_answers_for_itself(told: Told) -> None:
    assert told["said"] == LETTERS[:ADAPTERS]


def test_requests_go_where_their_adapter_is(told: Told) -> None:
    """Without affinity about 0.58 of them would meet the engine where most of their adapter's went."""
    assert told["affinity"]["codes"] == [200]
    few, many = told["affinity"]["by_engine"]
    assert 0 < few <= many, "both work"
    assert told["affinity"]["share"] > 0.75


def test_an_adapter_that_is_registered_once_is_known_to_both_and_gone_from_both(told: Told) -> None:
    registry = told["registry"]
    assert (registry["made"], registry["known"]) == (201, [ADAPTERS + 1] * 2)
    assert (registry["asked"], registry["said"]) == ([200], [LETTERS[ADAPTERS]])
    assert (registry["again"], registry["deleted"]) == (409, 200)
    assert (registry["known_then"], registry["asked_then"]) == ([ADAPTERS] * 2, [404])


def test_the_contract_is_the_same(told: Told) -> None:
    assert told["contract"] == {
        "bad": [422, "validation"],
        "unknown": [404, "adapter_not_found"],
        "large": [413, "payload_too_large"],
        "method": [405, "method_not_allowed"],
        "unknown_openai": [404, "model_not_found"],
        "ready": [200, "mine"],
        "stream": ["text/event-stream", 6, True],
    }


def test_a_client_that_leaves_ends_its_work(told: Told) -> None:
    assert told["leaving"] == {"running": 0, "cancelled": 1}


def test_a_killed_engines_stream_ends_with_an_error_and_its_traffic_moves(told: Told) -> None:
    death = told["death"]
    assert death["stream"] == [200, "not_ready", "data: [DONE]"]
    assert (death["codes"], death["said"]) == ([200], LETTERS[:ADAPTERS])
    assert death["victim_is_gone"]
