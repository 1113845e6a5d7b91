"""A scrape shows valid exposition, bounded, and with series that go when their adapter goes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.telemetry import metrics
from service.telemetry.metrics import REST, AdapterLabels, AliasLabels

NAMES = """num_requests_running num_requests_waiting kv_cache_usage_ratio time_to_first_token_seconds
inter_token_latency_seconds e2e_request_latency_seconds request_queue_time_seconds prompt_tokens_total
generation_tokens_total request_success_total request_failure_total adapters pool_rank_used
pool_rank_total adapter_load_seconds adapter_requests_total adapter_generation_tokens_total
worker_restarts_total adapter_prompt_tokens_total adapter_e2e_request_latency_seconds adapter_hits_total
adapter_misses_total adapter_place_seconds adapter_evict_seconds adapter_load_bytes_total
adapter_place_bytes_total adapter_evict_bytes_total base_bytes adapter_bytes lora_requests_info
lora_adapter_loaded alias_requests_total alias_generation_tokens_total alias_e2e_request_latency_seconds
gpu_memory_used_bytes gpu_memory_total_bytes gpu_utilization_ratio gpu_temperature_celsius"""


def samples(named: bool = True) -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics.render_metrics("text/plain", named)[0].decode())
    return {(s.name, ",".join(s.labels.values())): s.value for family in families for s in family.samples}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[AdapterLabels]:
    """Room for three names; what is counted under them goes with the test."""
    for id in list(metrics.NAMES.requests):  # what other tests registered would show among them
        metrics.NAMES.forget_adapter(id)
    names = AdapterLabels(most=3)
    monkeypatch.setattr(metrics, "NAMES", names)
    yield names
    for id in list(names.requests):
        names.forget_adapter(id)


def serve(id: str, times: int = 1) -> None:
    for _ in range(times):
        metrics.adapter_served(id, prompt=4, generated=5, seconds=0.3)


def test_every_promised_name_is_there() -> None:
    text = metrics.render_metrics("")[0].decode()
    for name in NAMES.split():
        kind = (
            "counter"
            if name.endswith("_total") and name != "pool_rank_total"
            else "histogram"
            if name.endswith("_seconds")
            else "gauge"
        )
        assert f"# TYPE adapterd_{name} {kind}\n" in text
    assert "_created" not in text


def test_openmetrics_where_it_is_asked_for() -> None:
    content, kind = metrics.render_metrics("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert content.endswith(b"# EOF\n")


def test_an_adapters_series_count_and_go_with_it(few: AdapterLabels) -> None:
    before = len(samples())
    metrics.adapter_registered("metrics/one")
    assert len(samples()) == before, "nothing to show yet"
    serve("metrics/one", 2)
    found = samples()
    assert found["adapterd_adapter_requests_total", "metrics/one"] == 2
    assert found["adapterd_adapter_prompt_tokens_total", "metrics/one"] == 8
    assert found["adapterd_adapter_generation_tokens_total", "metrics/one"] == 10
    assert found["adapterd_adapter_e2e_request_latency_seconds_sum", "metrics/one"] == pytest.approx(0.6)
    metrics.adapter_registered("metrics/one")
    assert samples()["adapterd_adapter_requests_total", "metrics/one"] == 2, (
        "new content under the id goes on counting"
    )
    metrics.adapter_removed("metrics/one")
    metrics.adapter_removed("metrics/one")
    assert not [key for key in samples() if "metrics/one" in key[1]]


def test_a_request_that_outlives_its_adapter_brings_no_series_back(few: AdapterLabels) -> None:
    metrics.adapter_registered("metrics/gone")
    serve("metrics/gone")
    metrics.adapter_removed("metrics/gone")
    rest = samples().get(("adapterd_adapter_requests_total", REST), 0)
    serve("metrics/gone")
    found = samples()
    assert ("adapterd_adapter_requests_total", "metrics/gone") not in found
    assert found["adapterd_adapter_requests_total", REST] == rest + 1


def shown() -> set[str]:
    return {label for name, label in samples() if name == "adapterd_adapter_requests_total"} - {REST}


def test_a_thousand_adapters_stay_bounded_and_the_rest_is_one_series(few: AdapterLabels) -> None:
    for i in range(1000):
        metrics.adapter_registered(f"metrics/{i}")
    serve("metrics/0", 8)
    rest = samples().get(("adapterd_adapter_requests_total", REST), 0)
    size = None
    for i in range(1000):
        serve(f"metrics/{i}")
        size = size or (len(samples()) if i == 10 else None)
    assert len(samples()) == size, "after the first few there are no more series"
    assert len(shown()) == 3
    assert samples()["adapterd_adapter_requests_total", REST] == rest + 997


def test_the_busiest_are_shown_and_no_counter_falls(few: AdapterLabels) -> None:
    for id in "abcd":
        metrics.adapter_registered(f"metrics/{id}")
    for id in "abc":
        serve(f"metrics/{id}", 3)
    serve("metrics/d", 5)
    assert shown() == {"metrics/a", "metrics/b", "metrics/c"}, "not yet twice as busy"
    rest = samples()["adapterd_adapter_requests_total", REST]
    serve("metrics/a")
    serve("metrics/d", 2)
    assert "metrics/d" in shown()
    assert len(shown()) == 3
    assert "metrics/a" in shown(), "the least busy one went"
    assert samples()["adapterd_adapter_requests_total", REST] == rest
    serve("metrics/b")
    assert "metrics/d" in shown(), "they do not take turns"


def test_none_may_be_shown_by_name(few: AdapterLabels) -> None:
    few.most = 0
    metrics.adapter_registered("metrics/a")
    serve("metrics/a", 4)
    assert shown() == set()


def test_what_names_adapters_can_be_left_out(few: AdapterLabels) -> None:
    metrics.adapter_registered("metrics/secret")
    serve("metrics/secret")
    metrics.lora_info(3, ["metrics/secret"], [])
    metrics.show_loaded([("metrics/secret", "device", False, 8)])
    metrics.alias_served(("metrics/alias", "metrics/secret", "sha256:a"), 5, 0.3)
    try:
        assert "metrics/secret" not in metrics.render_metrics("", named=False)[0].decode()
        everything, left = samples(), samples(named=False)
        assert {name for name, _ in everything} - {name for name, _ in left} == {
            "adapterd_adapter_requests_total",
            "adapterd_adapter_prompt_tokens_total",
            "adapterd_adapter_generation_tokens_total",
            "adapterd_adapter_e2e_request_latency_seconds_bucket",
            "adapterd_adapter_e2e_request_latency_seconds_count",
            "adapterd_adapter_e2e_request_latency_seconds_sum",
            "adapterd_lora_requests_info",
            "adapterd_lora_adapter_loaded",
            "adapterd_alias_requests_total",
            "adapterd_alias_generation_tokens_total",
            "adapterd_alias_e2e_request_latency_seconds_bucket",
            "adapterd_alias_e2e_request_latency_seconds_count",
            "adapterd_alias_e2e_request_latency_seconds_sum",
        }
    finally:
        metrics.LORA_LOADED.clear()
        metrics.alias_removed("metrics/alias")
        metrics.LORA_INFO.clear()


def shown_aliases() -> dict[str, float]:
    name = "adapterd_alias_requests_total"
    return {labels: value for (known, labels), value in samples().items() if known == name}


@pytest.fixture
def few_aliases(monkeypatch: pytest.MonkeyPatch) -> Iterator[AliasLabels]:
    """Room for three series."""
    labels = AliasLabels(most=3)
    monkeypatch.setattr(metrics, "ALIASES", labels)
    yield labels
    for alias in {series[0] for series in labels.shown}:
        labels.forget_alias(alias)


def test_series_of_aliases_are_bounded_and_go_with_the_alias(few_aliases: AliasLabels) -> None:
    before = shown_aliases()
    for i in (0, 1, 2, 0, 3):
        metrics.alias_served((f"alias{i % 2}", "x", f"sha256:{i}"), 5, 0.3)
    told = {labels: count for labels, count in shown_aliases().items() if labels not in before}
    assert sorted(told.values()) == [1, 1, 2], "the one that was used longest ago is gone"
    assert not [labels for labels in told if "sha256:1" in labels]
    metrics.alias_removed("alias0")
    told = {labels: count for labels, count in shown_aliases().items() if labels not in before}
    assert len(told) == 1


def test_no_alias_is_shown_where_none_may_be(few_aliases: AliasLabels) -> None:
    few_aliases.most = 0
    before = shown_aliases()
    metrics.alias_served(("alias", "x", "sha256:a"), 5, 0.3)
    assert shown_aliases() == before


def test_the_routers_gauge_shows_what_is_in_a_memory() -> None:
    metrics.show_loaded([("gone", "device", True, 4)])
    metrics.show_loaded([("a", "device", True, 8), ("b", "host", False, 16), ("c", "disk", False, 4)])
    try:
        shown = metrics.render_metrics("")[0].decode().splitlines()
        assert [line for line in shown if line.startswith("adapterd_lora_adapter_loaded")] == [
            'adapterd_lora_adapter_loaded{adapter_name="a",level="gpu",pinned="true",rank="8"} 1.0',
            'adapterd_lora_adapter_loaded{adapter_name="b",level="cpu",pinned="false",rank="16"} 1.0',
        ]
    finally:
        metrics.LORA_LOADED.clear()


def test_the_gateways_gauge_is_one_series_that_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its labels, and that its value is a time, are the protocol's between model servers and the
    endpoint picker.
    """
    monkeypatch.setattr("service.telemetry.metrics.time.time", lambda: 1234.5)
    metrics.lora_info(2, ["b"], [])
    metrics.lora_info(8, ["b", "a"], ["c"])
    try:
        shown = metrics.render_metrics("")[0].decode().splitlines()
        lines = [line for line in shown if line.startswith("adapterd_lora")]
        labels = 'max_lora="8",running_lora_adapters="a,b",waiting_lora_adapters="c"'
        assert lines == [f"adapterd_lora_requests_info{{{labels}}} 1234.5"]
    finally:
        metrics.LORA_INFO.clear()


def test_hits_misses_and_evictions_are_counted_by_tier() -> None:
    worker = metrics.WorkerMetrics()
    before = samples()
    worker.adapter_looked_up("device", False)
    worker.adapter_looked_up("host", True)
    worker.adapter_evicted("device", 0.5, 100)
    after = samples()
    grown = {
        key: after[key] - before[key]
        for key in after
        if key[1] in ("device", "host") and after[key] != before.get(key)
    }
    assert grown == {
        ("adapterd_adapter_misses_total", "device"): 1,
        ("adapterd_adapter_hits_total", "host"): 1,
        ("adapterd_adapter_evict_seconds_count", "device"): 1,
        ("adapterd_adapter_evict_seconds_sum", "device"): 0.5,
        ("adapterd_adapter_evict_bytes_total", "device"): 100,
    }
