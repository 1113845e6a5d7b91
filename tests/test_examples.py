"""The examples do what they say, against a service on a tiny base."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.bench.servers import Server, started
from examples import train_by_rollouts as example
from tests import making

SETTINGS = {"dtype": "float32", "quantization": "none", "device": "cpu", "compile": "off", "max_rows": "8"}

# PEFT asks transformers for a property by its old name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.tiny(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def service(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    settings = SETTINGS | {"base": str(base), "adapters_dir": str(folder)}
    with started(settings, folder.parent / "log") as server:
        yield server


def test_a_trainer_asks_the_version_that_it_uploaded_last(
    base: Path, service: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "ROLLOUTS", 2)
    monkeypatch.setattr(example, "TOKENS", 6)
    with example.RolloutClient(service.url, None) as client:
        steps = example.train(client, example.make_model(base), 2 * example.EVERY)
    assert all(step.gap < 1e-4 for step in steps), "the service and the trainer have other weights"
    found = httpx.get(f"{service.url}/adapters/{example.ADAPTER}/versions", trust_env=False).json()[
        "versions"
    ]
    current, before = found
    assert current["digest"] == client.digest != before["digest"]
    example.draw_plot(steps, tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text("utf-8").startswith("<svg")


def test_a_trainer_stops_where_another_version_would_answer(base: Path, service: Server) -> None:
    with example.RolloutClient(service.url, None) as client:
        client.upload(example.make_model(base))
        client.digest = "sha256:" + "0" * 64
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            client.sample("a", 1)
