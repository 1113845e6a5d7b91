"""The dashboard is what its code makes, and its panels neither overlap nor miss their data source."""

from __future__ import annotations

import itertools

from deploy.grafana import dashboard as code

from .files import DEPLOY, dashboard, documents, graphs


def test_the_file_is_what_the_code_makes() -> None:
    assert code.FILE.read_text() == code.text(), "run: python deploy/grafana/dashboard.py"


def test_panels_have_numbers_of_their_own_and_room_of_their_own() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for a, b in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart = (
            a["x"] + a["w"] <= b["x"]
            or b["x"] + b["w"] <= a["x"]
            or a["y"] + a["h"] <= b["y"]
            or b["y"] + b["h"] <= a["y"]
        )
        assert apart, (a, b)
        assert a["x"] + a["w"] <= 24


def test_every_query_asks_the_provisioned_source() -> None:
    (whole,) = documents(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yml")
    (source,) = whole["datasources"]
    assert {target["datasource"]["uid"] for panel in graphs() for target in panel["targets"]} == {
        source["uid"]
    }
    assert source["url"] == "http://prometheus:9090"
