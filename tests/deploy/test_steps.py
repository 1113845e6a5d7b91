"""The benchmark of single steps runs to its end on what any machine has, and what it says follows from what it timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.bench import steps

ASKED = ["--shape", "tiny", "--rows", "3", "--steps", "4", "--prompt", "8"]
HEAVY = ("fastapi", "uvicorn", "prometheus_client", "matplotlib", "psutil")


@pytest.mark.filterwarnings("ignore")
def test_all_is_found_and_the_ratio_is_that_of_the_times(tmp_path: Path) -> None:
    found = steps.main([*ASKED, "--quantization", "none", "--out", str(tmp_path)])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert not [what for what in found if what.endswith("raised")]
    for rows in (1, 3):
        times = {name: found[f"{name}, {rows} rows, no graphs: ms a step"] for name in ("base only", "one", "different")}
        assert min(times.values()) > 0
        assert found[f"different over base only, {rows} rows, no graphs"] == times["different"] / times["base only"]
        assert found[f"one, {rows} rows, no graphs: tokens a second"] == pytest.approx(1000 * rows / times["one"])
    assert found["rows that say alone what they say together, of 2"] == 2
    assert found["PEFT's adapter_names, 3 rows, all different: ms a step"] > 0
    assert found["placing an adapter: ms"] > 0


def test_what_raises_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*asked: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(steps, "variants", broken)
    found = steps.main([*ASKED, "--no-peft", "--out", str(tmp_path)])
    assert found["3 rows, no graphs raised"] == "RuntimeError: no such luck"
    assert found["rows that say alone what they say together, of 2"] == 2


def test_it_needs_no_web_server_and_no_plotting() -> None:
    hidden = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); import deploy.bench.steps"
    assert subprocess.run([sys.executable, "-c", hidden], check=False).returncode == 0
