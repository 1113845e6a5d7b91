"""The benchmark asks for what it says, counts what came, and makes the right numbers of it; its
server is a fake one.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from deploy.bench import adapters, bench, grid, health
from deploy.bench.load import Lengths, Sample, Shape, closed, connect, jobs, opened, picks, prompt
from deploy.bench.report import BASE, Cell, Summary, median, percentile, plot, summarize, table, write
from deploy.bench.servers import Server, free_port, memory_mb, models
from deploy.bench.slow_hub import COMMIT, slow_hub
from service.catalog.sources.hub import Hub

from .fake import Fake, serving

LIKE = Summary(4, 0, 2.0, 100.0, 2.0, 64.0, 10, 20, 30, 1, 2, 3, 100, 200, 300)


def summary(**other: float) -> Summary:
    return Summary(**{**LIKE.__dict__, **other})


def short(words: int, tokens: int) -> Shape:
    return Shape(Lengths(words, words), tokens)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as found:
        yield found


def collect(fake: Fake, names: list[str], clients: int, count: int, tokens: int = 4) -> list[Sample]:
    async def go() -> list[Sample]:
        async with connect(fake.url) as client:
            return await closed(client, jobs(names, "round-robin", count, short(5, tokens), seed=0), clients)

    return asyncio.run(go())


def test_a_closed_loop_keeps_that_many_requests_running_and_no_more(fake: Fake) -> None:
    fake.gate = threading.Barrier(3)
    samples = collect(fake, ["a", "b"], clients=3, count=9)
    assert [sample.error for sample in samples] == [None] * 9
    assert (len(samples), fake.most) == (9, 3)
    assert Counter(body["model"] for body in fake.asked) == {"a": 5, "b": 4}


def test_every_request_asks_for_exactly_its_tokens_greedily(fake: Fake) -> None:
    collect(fake, ["a"], clients=1, count=1, tokens=7)
    (body,) = fake.asked
    assert (
        body["max_tokens"],
        body["min_tokens"],
        body["ignore_eos"],
        body["temperature"],
        body["stream"],
    ) == (7, 7, True, 0, True)
    assert len(body["prompt"].split()) == 5


def test_a_sample_splits_the_time_to_the_first_token_from_the_gaps(fake: Fake) -> None:
    fake.first, fake.gap = 0.08, 0.02
    (sample,) = collect(fake, ["a"], clients=1, count=1)
    assert sample.first >= 0.08
    assert len(sample.gaps) == 3
    assert min(sample.gaps) > 0
    assert sample.whole >= sample.first + sum(sample.gaps) >= 0.08 + 3 * 0.02
    assert (sample.tokens, sample.prompt_tokens) == (4, 5)


@pytest.mark.parametrize(("model", "says"), [("broken", "500"), ("torn", "the worker died")])
def test_a_failed_request_is_counted_and_not_timed(fake: Fake, model: str, says: str) -> None:
    good, bad = collect(fake, ["a", model], clients=1, count=2)
    assert bad.error is not None
    assert says in bad.error
    assert summarize([good, bad], 1.0).errors == 1
    assert summarize([good, bad], 1.0).tokens_per_s == 4


def test_a_server_that_is_not_there_is_an_error_of_every_request() -> None:
    samples = collect(Fake(url="http://127.0.0.1:1"), ["a"], clients=2, count=3)
    assert [sample.error is None for sample in samples] == [False] * 3


def test_an_open_loop_does_not_wait_for_answers(fake: Fake) -> None:
    fake.gate = threading.Barrier(5)

    async def go() -> list[Sample]:
        async with connect(fake.url) as client:
            return await opened(client, jobs(["a"], "uniform", 5, short(3, 1), seed=0), rate=1000, seed=0)

    assert [sample.error for sample in asyncio.run(go())] == [None] * 5
    assert fake.most == 5


def test_popularity_is_what_it_is_called() -> None:
    names = [f"m{i}" for i in range(10)]
    assert picks(names, "round-robin", 12, seed=0) == [*names, "m0", "m1"]
    zipf, uniform = (Counter(picks(names, how, 20_000, seed=3)) for how in ("zipf:1.0", "uniform"))
    assert zipf["m0"] / zipf["m4"] == pytest.approx(5, rel=0.1)
    assert uniform["m0"] / uniform["m4"] == pytest.approx(1, rel=0.1)
    assert picks(names, "zipf:1.0", 50, seed=1) == picks(names, "zipf:1.0", 50, seed=1)


def test_prompts_differ_from_their_first_words_on() -> None:
    heads = {tuple(prompt(64, f"0/{i}").split()[:4]) for i in range(50)}
    assert len(heads) == 50
    assert len(prompt(64, "0/1").split()) == 64


def test_lengths_between_two_are_by_zipf() -> None:
    lengths = Lengths.parse("30-2000")
    drawn = [lengths.draw(f"{i}") for i in range(4000)]
    assert (min(drawn), max(drawn)) >= (30, 1900)
    assert max(drawn) <= 2000
    below, above = (sum(low <= n < high for n in drawn) for low, high in ((30, 245), (245, 2001)))
    assert below / above == pytest.approx(1, rel=0.15)  # 30 × 2000 is 245 squared
    assert Lengths.parse("64") == (64, 64)
    with pytest.raises(ValueError, match="LEAST-MOST"):
        Lengths.parse("9-3")


def test_prompts_with_a_shared_start_differ_behind_it() -> None:
    shape = Shape(Lengths(8, 8), shared=20)
    prompts = [job.prompt.split() for job in jobs(["a"], "round-robin", 5, shape, seed=1)]
    assert len({tuple(words[:20]) for words in prompts}) == 1
    assert len({tuple(words[20:]) for words in prompts}) == 5
    assert {len(words) for words in prompts} == {28}
    (other,) = jobs(["a"], "round-robin", 1, shape, seed=2)
    assert other.prompt.split()[:4] != prompts[0][:4]


def test_sampled_requests_say_how(fake: Fake) -> None:
    async def go() -> None:
        async with connect(fake.url) as client:
            await closed(client, jobs(["a"], "round-robin", 1, replace(short(3, 1), sampled=True), 0), 1)

    asyncio.run(go())
    assert (fake.asked[0]["temperature"], fake.asked[0]["top_p"]) == (0.8, 0.9)


def test_adapters_of_llama_cpp_are_asked_for_by_number() -> None:
    with serving(Fake(adapters=["x.gguf", "y.gguf"], is_llama=True)) as fake:
        base, names = models(Server("llama", fake.url))
        assert (base, names) == ("base", ["lora:0", "lora:1"])
        assert [sample.error for sample in collect(fake, [base, *names], clients=1, count=3)] == [None] * 3
    assert [body.get("model") for body in fake.asked] == ["base", None, None]
    assert [body.get("lora") for body in fake.asked] == [None, *([{"id": i, "scale": 1.0}] for i in (0, 1))]


def test_percentiles_are_numpys() -> None:
    values = [5.0, 1.0, 9.0, 2.0, 7.5]
    for percent in (0, 50, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))
    assert math.isnan(percentile([], 50))


def test_a_summary_is_in_milliseconds_and_tokens_a_second() -> None:
    samples = [Sample("a", first=0.1, gaps=(0.01, 0.03), whole=0.14, tokens=3, prompt_tokens=64)] * 2
    found = summarize(samples, seconds=0.5)
    assert (found.first_p50, found.gap_p50, found.gap_p99, found.whole_p95) == (100.0, 20.0, 30.0, 140.0)
    assert (found.tokens_per_s, found.requests_per_s, found.prompt_tokens, found.errors) == (12.0, 4.0, 64, 0)


def test_the_median_of_runs_hides_no_error() -> None:
    found = median([summary(tokens_per_s=v, errors=e) for v, e in ((90.0, 1), (110.0, 0), (300.0, 2))])
    assert (found.tokens_per_s, found.errors) == (110.0, 3)


def test_the_table_compares_with_the_base_and_with_the_peer() -> None:
    cells = [
        Cell("ours", BASE, 16, summary(tokens_per_s=400.0)),
        Cell("ours", "all different", 16, summary(tokens_per_s=360.0)),
    ]
    cells.append(Cell("peer", "all different", 16, summary(tokens_per_s=120.0)))
    rows = [
        [part.strip() for part in line.split("|")[1:-1]] for line in table(cells, "ours").splitlines()[2:]
    ]
    assert [row[2:6] for row in rows] == [
        ["ours", "400.0", "1.00", "1.00"],
        ["ours", "360.0", "0.90", "1.00"],
        ["peer", "120.0", "–", "3.00"],
    ]


def test_a_plot_is_a_picture_and_the_results_can_be_read_back(tmp_path: Path) -> None:
    cells = [Cell("ours", BASE, 1, LIKE), Cell("peer", BASE, 1, LIKE), Cell("ours", BASE, 8, LIKE)]
    plot(cells, tmp_path / "alone.png")
    assert (tmp_path / "alone.png").read_bytes().startswith(b"\x89PNG")
    shown = write(tmp_path / "out", cells, {"machine": "a small one"}, "ours")
    assert "- machine: a small one" in shown
    assert (
        json.loads((tmp_path / "out" / "results.json").read_text())["cells"][2]["summary"]["tokens_per_s"]
        == 100.0
    )
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", ".md", ".png"]


def test_the_grid_measures_every_server_in_every_cell(fake: Fake) -> None:
    with serving(Fake()) as other:
        servers = [Server("ours", fake.url), Server("peer", other.url)]
        cells = grid.measure(servers, [1, 2], repeats=1, rounds=1, shape=short(3, 2))
    mixes = [(1, BASE), (1, "one adapter"), (2, BASE), (2, "one adapter"), (2, "all different")]
    assert [(cell.clients, cell.mix, cell.server) for cell in cells] == [
        (c, m, s) for c, m in mixes for s in ("ours", "peer")
    ]
    assert {cell.summary.errors for cell in cells} == {0}
    assert {body["model"] for body in fake.asked} == {"base", "a", "b"}


def test_no_two_runs_of_the_grid_ask_the_same_and_all_servers_are_asked_it(fake: Fake) -> None:
    with serving(Fake()) as other:
        for _ in range(2):
            grid.measure([Server("ours", fake.url), Server("peer", other.url)], [1, 2], 1, 1, short(3, 2))
    prompts = [body["prompt"] for body in fake.asked]
    assert len(set(prompts)) == len(prompts)
    assert Counter(prompts) == Counter(body["prompt"] for body in other.asked)


def test_the_load_generator_prints_what_it_measured(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "bench",
        f"x={fake.url}@{os.getpid()}",
        "--clients",
        "2",
        "--requests",
        "4",
        "--tokens",
        "3",
        "--popularity",
        "zipf:1",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    shown = json.loads(capsys.readouterr().out)
    assert (shown["requests"], shown["errors"], shown["popularity"]) == (4, 0, "zipf:1")
    assert shown["shape"] == {"words": [64, 64], "tokens": 3, "shared": 0, "sampled": False}
    assert shown["memory_mb"] > 1


def test_a_servers_models_are_told_apart_by_their_parent(fake: Fake) -> None:
    assert models(Server("x", fake.url)) == ("base", ["a", "b"])


def test_a_running_server_is_named_with_its_process() -> None:
    assert Server.parse("vllm=http://127.0.0.1:8011/@42") == Server("vllm", "http://127.0.0.1:8011", 42)
    with pytest.raises(ValueError, match="NAME=URL"):
        Server.parse("127.0.0.1:8011")


def test_a_free_port_is_given_to_nobody_who_asks_for_any() -> None:
    """Of 14,000 ports that may be given, 500 are; then each can be had by who names it."""
    ports = {free_port() for _ in range(200)}
    with ExitStack() as held:
        others = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(500)]
        assert not ports & {other.getsockname()[1] for other in others}
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


def test_memory_counts_the_whole_tree() -> None:
    assert memory_mb(os.getpid()) > 1
    assert memory_mb(0) == 0


def test_adapters_are_readable_differ_and_are_not_made_twice(tmp_path: Path) -> None:
    names = adapters.make(tmp_path, 3, ranks=(4, 8))
    assert names == ["rank4-000", "rank8-001", "rank4-002"]
    files = [tmp_path / name / "adapter_model.safetensors" for name in names]
    assert len({path.read_bytes() for path in files}) == 3
    before = files[0].stat().st_mtime_ns
    adapters.make(tmp_path, 3, ranks=(4, 8))
    assert files[0].stat().st_mtime_ns == before
    with safe_open(files[1], "pt") as opened_file:
        assert len(opened_file.keys()) == 2 * 4 * adapters.LAYERS
        tensor = opened_file.get_tensor("base_model.model.model.layers.29.self_attn.v_proj.lora_B.weight")
    assert tuple(tensor.shape) == (adapters.KV, 8)
    assert str(tensor.dtype) == "torch.bfloat16"
    assert 0.5 * adapters.STD < float(tensor.float().std()) < 1.5 * adapters.STD


def test_the_slow_hub_is_one_to_the_hubs_own_client(tmp_path: Path) -> None:
    adapters.write(tmp_path / "hub" / "one", 4, seed=1, layers=1)
    with slow_hub(tmp_path / "hub", 0.0, tmp_path / "cache") as asked:
        hub = Hub(("slow/*",), asked["HF_ENDPOINT"], tmp_path / "cache" / "hub")
        folder, commit = hub.fetch_adapter("slow/one", None, None, 10_000_000)
    assert commit == COMMIT
    for file in (tmp_path / "hub" / "one").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_each_phase_asks_all_that_must_stay_quick_and_says_which(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    async def go() -> None:
        async with health.polled(Server("fake", fake.url), "a phase"):
            await asyncio.sleep(0.3)

    asyncio.run(go())
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in rows] == [
        ["a phase", path] for path in ("/health", "/metrics", "/adapters/rank16-000/summary")
    ]
    assert {row[-1] for row in rows} == {"0"}
