"""What a scrape shows: valid exposition, bounded, and with series that go when their adapter goes."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from service import metrics

NAMES = """num_requests_running num_requests_waiting kv_cache_usage_ratio time_to_first_token_seconds inter_token_latency_seconds
e2e_request_latency_seconds request_queue_time_seconds prompt_tokens_total generation_tokens_total request_success_total
request_failure_total adapters pool_rank_used pool_rank_total adapter_load_seconds adapter_requests_total
adapter_generation_tokens_total worker_restarts_total"""


def samples() -> dict[tuple[str, str], float]:
    families = text_string_to_metric_families(metrics.exposition("text/plain")[0].decode())
    return {(s.name, ",".join(s.labels.values())): s.value for family in families for s in family.samples}


def test_every_promised_name_is_there() -> None:
    text = metrics.exposition("")[0].decode()
    for name in NAMES.split():
        kind = "counter" if name.endswith("_total") and name != "pool_rank_total" else "histogram" if name.endswith("_seconds") else "gauge"
        assert f"# TYPE adapterd_{name} {kind}\n" in text
    assert "_created" not in text


def test_openmetrics_where_it_is_asked_for() -> None:
    content, kind = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert content.endswith(b"# EOF\n")


def test_an_adapters_series_count_and_go_with_it() -> None:
    metrics.adapter_served("metrics/one", 5)
    metrics.adapter_served("metrics/one", 2)
    assert samples()["adapterd_adapter_requests_total", "metrics/one"] == 2
    assert samples()["adapterd_adapter_generation_tokens_total", "metrics/one"] == 7
    metrics.adapter_removed("metrics/one")
    metrics.adapter_removed("metrics/one")
    assert not [key for key in samples() if "metrics/one" in key]


def test_the_number_of_series_is_bounded() -> None:
    ids = [f"metrics-many-{i}" for i in range(metrics.SERIES + 10)]
    for id in ids:
        metrics.adapter_served(id, 1)
    try:
        shown = [label for name, label in samples() if name == "adapterd_adapter_requests_total"]
        assert len(shown) == metrics.SERIES + 1
        assert samples()["adapterd_adapter_requests_total", metrics.REST] >= 10
    finally:
        for id in ids:
            metrics.adapter_removed(id)
