"""Every Prometheus collector of the service, and their rendering (API process).

Must not know who counts: the callers report each thing that happens.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.samples import Sample

from .gpu import GpuReading

disable_created_metrics()  # type: ignore[no-untyped-call]


class WorkerLabelRegistry(CollectorRegistry):
    """Shows no label `device` where it is empty: there is one worker then, and nothing to tell apart."""

    def collect(self) -> Iterator[Metric]:
        for family in super().collect():
            family.samples = [_hide_device(sample) for sample in family.samples]
            yield family


def _hide_device(sample: Sample) -> Sample:
    if sample.labels.get("device") != "":
        return sample
    labels = {name: value for name, value in sample.labels.items() if name != "device"}
    return Sample(sample.name, labels, sample.value, sample.timestamp, sample.exemplar)


REGISTRY = WorkerLabelRegistry()

MOMENTS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
BETWEEN = (
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1,
    2.5,
    5,
    10,
)
SPANS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
COARSE = (0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # one set for each adapter, so few
TIERS = ("device", "host")

RUNNING = Gauge("adapterd_num_requests_running", "Requests that have a row.", ["device"], registry=REGISTRY)
WAITING = Gauge(
    "adapterd_num_requests_waiting", "Requests admitted and without a row yet.", ["device"], registry=REGISTRY
)
KV_USAGE = Gauge(
    "adapterd_kv_cache_usage_ratio",
    "KV blocks held by running requests, 0 to 1.",
    ["device"],
    registry=REGISTRY,
)
KV_BLOCKS = Gauge(
    "adapterd_kv_blocks",
    "KV blocks by state: used by running requests, cached for prompts that begin alike, empty.",
    ["device", "state"],
    registry=REGISTRY,
)
POOL_USED = Gauge(
    "adapterd_pool_rank_used",
    "Rank rows of the device pool that adapters hold.",
    ["device"],
    registry=REGISTRY,
)
POOL_TOTAL = Gauge("adapterd_pool_rank_total", "Rank rows of the device pool.", ["device"], registry=REGISTRY)
ADAPTERS = Gauge(
    "adapterd_adapters",
    "Registered contents by where they are: device, host or disk.",
    ["device", "tier"],
    registry=REGISTRY,
)
BASE_BYTES = Gauge(
    "adapterd_base_bytes",
    "Bytes of the resident base; 0 while there is no worker.",
    ["device"],
    registry=REGISTRY,
)
ADAPTER_BYTES = Gauge(
    "adapterd_adapter_bytes",
    "Bytes of the adapters on the device and in host memory.",
    ["device", "tier"],
    registry=REGISTRY,
)

FIRST_TOKEN = Histogram(
    "adapterd_time_to_first_token_seconds",
    "From admission to the first token.",
    ["device"],
    registry=REGISTRY,
    buckets=MOMENTS,
)
INTER_TOKEN = Histogram(
    "adapterd_inter_token_latency_seconds",
    "From one token to the next.",
    ["device"],
    registry=REGISTRY,
    buckets=BETWEEN,
)
END_TO_END = Histogram(
    "adapterd_e2e_request_latency_seconds",
    "From admission to the end.",
    ["device"],
    registry=REGISTRY,
    buckets=SPANS,
)
QUEUED = Histogram(
    "adapterd_request_queue_time_seconds",
    "From admission to a row.",
    ["device"],
    registry=REGISTRY,
    buckets=MOMENTS,
)

PROMPT_TOKENS = Counter(
    "adapterd_prompt_tokens", "Prompt tokens of the requests that began.", ["device"], registry=REGISTRY
)
PREFIX_QUERIES = Counter(
    "adapterd_prefix_cache_queries",
    "Prompt tokens that were looked for in the cache.",
    ["device"],
    registry=REGISTRY,
)
PREFIX_HITS = Counter(
    "adapterd_prefix_cache_hits", "Prompt tokens that were found in the cache.", ["device"], registry=REGISTRY
)
PREEMPTIONS = Counter(
    "adapterd_preemptions",
    "Times a running request gave up its KV blocks and was computed anew.",
    ["device"],
    registry=REGISTRY,
)
GENERATED_TOKENS = Counter("adapterd_generation_tokens", "Tokens generated.", ["device"], registry=REGISTRY)
SUCCESS = Counter(
    "adapterd_request_success", "Requests that ended well.", ["device", "finished_reason"], registry=REGISTRY
)
FAILURE = Counter(
    "adapterd_request_failure",
    "Requests that ended with an error, refused ones too.",
    ["code"],
    registry=REGISTRY,
)
KEY_REFUSALS = Counter(
    "adapterd_key_refusals",
    "Of the overloaded ones, those that were over their key's own limit.",
    registry=REGISTRY,
)
RESTARTS = Counter(
    "adapterd_worker_restarts", "Times the worker was started again.", ["device"], registry=REGISTRY
)

# ---- adapters on the move

LOAD = Histogram(
    "adapterd_adapter_load_seconds",
    "An adapter's way from disk to host memory.",
    ["device"],
    registry=REGISTRY,
    buckets=MOMENTS,
)
PLACE = Histogram(
    "adapterd_adapter_place_seconds",
    "An adapter's way from host memory to the device; "
    "on a GPU, what the steps spend on it: the copy itself runs beside them.",
    ["device"],
    registry=REGISTRY,
    buckets=MOMENTS,
)
EVICT = Histogram(
    "adapterd_adapter_evict_seconds",
    "Clearing an adapter's place.",
    ["device", "tier"],
    registry=REGISTRY,
    buckets=MOMENTS,
)
LOADED = Counter(
    "adapterd_adapter_load_bytes",
    "Bytes of the adapters read into host memory.",
    ["device"],
    registry=REGISTRY,
)
PLACED = Counter(
    "adapterd_adapter_place_bytes",
    "Bytes of the adapters copied to the device.",
    ["device"],
    registry=REGISTRY,
)
EVICTED = Counter(
    "adapterd_adapter_evict_bytes",
    "Bytes of the adapters that made room for others.",
    ["device", "tier"],
    registry=REGISTRY,
)
HITS = Counter(
    "adapterd_adapter_hits",
    "Requests whose adapter was there already, by tier.",
    ["device", "tier"],
    registry=REGISTRY,
)
MISSES = Counter(
    "adapterd_adapter_misses",
    "Requests whose adapter had to come from the tier below.",
    ["device", "tier"],
    registry=REGISTRY,
)


class WorkerMetrics:
    """The series of one worker; `device` tells them from another's, and is empty where there is one."""

    def __init__(self, device: str = "") -> None:
        self.device = device
        self.running, self.waiting = RUNNING.labels(device), WAITING.labels(device)
        self.kv_usage = KV_USAGE.labels(device)
        self.pool_used, self.pool_total = POOL_USED.labels(device), POOL_TOTAL.labels(device)
        self.base_bytes = BASE_BYTES.labels(device)
        self.device_bytes, self.host_bytes = (ADAPTER_BYTES.labels(device, tier) for tier in TIERS)
        self.first_token, self.inter_token = FIRST_TOKEN.labels(device), INTER_TOKEN.labels(device)
        self.end_to_end, self.queued = END_TO_END.labels(device), QUEUED.labels(device)
        self.prompt_tokens = PROMPT_TOKENS.labels(device)
        self.generated_tokens = GENERATED_TOKENS.labels(device)
        self.prefix_queries, self.prefix_hits = PREFIX_QUERIES.labels(device), PREFIX_HITS.labels(device)
        self.preemptions, self.restarts = PREEMPTIONS.labels(device), RESTARTS.labels(device)
        self._load, self._loaded = LOAD.labels(device), LOADED.labels(device)
        self._place, self._placed = PLACE.labels(device), PLACED.labels(device)
        for tier in TIERS:  # zero before the first one, so that the first one is seen as an increase
            for by_tier in (EVICT, EVICTED, HITS, MISSES):
                by_tier.labels(device, tier)

    def count_ending(self, reason: str) -> None:
        """Counts a request that ended well."""
        SUCCESS.labels(self.device, reason).inc()

    def set_blocks(self, **blocks: int) -> None:
        """The KV blocks by state."""
        for state, count in blocks.items():
            KV_BLOCKS.labels(self.device, state).set(count)

    def set_adapters(self, tier: str, count: int) -> None:
        ADAPTERS.labels(self.device, tier).set(count)

    def adapter_loaded(self, seconds: float, size: int) -> None:
        self._load.observe(seconds)
        self._loaded.inc(size)

    def adapter_placed(self, seconds: float, size: int) -> None:
        self._place.observe(seconds)
        self._placed.inc(size)

    def adapter_evicted(self, tier: str, seconds: float, size: int) -> None:
        EVICT.labels(self.device, tier).observe(seconds)
        EVICTED.labels(self.device, tier).inc(size)

    def adapter_looked_up(self, tier: str, found: bool) -> None:
        """Counts a hit or a miss of this tier for a request's adapter."""
        (HITS if found else MISSES).labels(self.device, tier).inc()


# ---- by adapter id

ADAPTER_REQUESTS = Counter(
    "adapterd_adapter_requests", "Requests by adapter id.", ["adapter"], registry=REGISTRY
)
ADAPTER_PROMPT = Counter(
    "adapterd_adapter_prompt_tokens", "Prompt tokens by adapter id.", ["adapter"], registry=REGISTRY
)
ADAPTER_TOKENS = Counter(
    "adapterd_adapter_generation_tokens", "Tokens generated by adapter id.", ["adapter"], registry=REGISTRY
)
ADAPTER_LATENCY = Histogram(
    "adapterd_adapter_e2e_request_latency_seconds",
    "From admission to the end, by adapter.",
    ["adapter"],
    registry=REGISTRY,
    buckets=COARSE,
)
ALIAS_LABELS = ("alias", "adapter", "digest")
ALIAS_REQUESTS = Counter(
    "adapterd_alias_requests",
    "Requests for an alias, by the adapter and the digest that answered.",
    ALIAS_LABELS,
    registry=REGISTRY,
)
ALIAS_TOKENS = Counter(
    "adapterd_alias_generation_tokens",
    "Tokens generated for an alias, by the adapter and the digest that answered.",
    ALIAS_LABELS,
    registry=REGISTRY,
)
ALIAS_LATENCY = Histogram(
    "adapterd_alias_e2e_request_latency_seconds",
    "From admission to the end, by alias, adapter and digest.",
    ALIAS_LABELS,
    registry=REGISTRY,
    buckets=COARSE,
)
BY_ALIAS = (ALIAS_REQUESTS, ALIAS_TOKENS, ALIAS_LATENCY)
BY_ADAPTER = (ADAPTER_REQUESTS, ADAPTER_PROMPT, ADAPTER_TOKENS, ADAPTER_LATENCY)
LORA_INFO = Gauge(
    "adapterd_lora_requests_info",
    "For the gateway's endpoint picker: adapters that could run now, "
    "and those that requests wait for; when it was told, in Unix seconds.",
    ["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
    registry=REGISTRY,
)

LORA_LOADED = Gauge(
    "adapterd_lora_adapter_loaded",
    "For the gateway's router: 1 for each adapter on the device (gpu) or in host memory (cpu).",
    ["adapter_name", "level", "pinned", "rank"],
    registry=REGISTRY,
)
LEVELS = {"device": "gpu", "host": "cpu"}

REST = "_other"  # no adapter id begins like this


class AdapterLabels:
    """Chooses the ids with series of their own: registered ones only, and of them the `most` with the
    most requests; the rest share one series.

    A busier id replaces another only once it has twice its requests, so that series do not come and go
    at each scrape. Counts stay under their label, for a counter never falls: a new series begins at zero,
    and the counts of a removed series are in no other.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.requests: dict[str, int] = {}  # of every registered id
        self.shown: set[str] = set()

    def label_for(self, id: str) -> str:
        """The label under which one more request for this id counts."""
        if id not in self.requests:
            return REST  # deleted while the request ran
        self.requests[id] += 1
        if id in self.shown:
            return id
        if not self._make_room(self.requests[id]):
            return REST
        self.shown.add(id)
        return id

    def forget_adapter(self, id: str) -> None:
        self.requests.pop(id, None)
        self._hide_adapter(id)

    def _make_room(self, requests: int) -> bool:
        if len(self.shown) < self.most:
            return True
        least = min(self.shown, key=self.requests.__getitem__, default=None)
        if least is None or requests < 2 * self.requests[least]:
            return False
        self._hide_adapter(least)
        return True

    def _hide_adapter(self, id: str) -> None:
        if id in self.shown:
            self.shown.discard(id)
            for collector in BY_ADAPTER:
                collector.remove(id)


NAMES = AdapterLabels(most=200)


def adapter_registered(id: str) -> None:
    NAMES.requests.setdefault(id, 0)


def adapter_removed(id: str) -> None:
    """The id is no longer registered: its series go, the totals stay."""
    NAMES.forget_adapter(id)


def adapter_served(id: str, prompt: int, generated: int, seconds: float) -> None:
    """A request for this id has ended, with so many tokens."""
    label = NAMES.label_for(id)
    ADAPTER_REQUESTS.labels(label).inc()
    ADAPTER_PROMPT.labels(label).inc(prompt)
    ADAPTER_TOKENS.labels(label).inc(generated)
    ADAPTER_LATENCY.labels(label).observe(seconds)


def lora_info(most: int, running: Iterable[str], waiting: Iterable[str]) -> None:
    """`most` adapters fit the device side by side; `running` could run now, requests wait for `waiting`.

    The labels are the gateway's.
    """
    LORA_INFO.clear()
    labels = str(most), ",".join(sorted(running)), ",".join(sorted(waiting))
    LORA_INFO.labels(*labels).set(time.time())


def show_loaded(adapters: Iterable[tuple[str, str, bool, int]]) -> None:
    """Shows the adapters that are in one of the memories, of all by name, tier, pin and rank; the labels are
    the gateway's.
    """
    LORA_LOADED.clear()
    for name, tier, pinned, rank in adapters:
        if level := LEVELS.get(tier):
            LORA_LOADED.labels(name, level, str(pinned).lower(), str(rank)).set(1)


# ---- by alias

AliasSeries = tuple[str, str, str]


class AliasLabels:
    """The series of aliases, at most `most`: where there are more, those go that no request was counted in
    for the longest time. A series that comes again begins at zero.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.shown: dict[AliasSeries, None] = {}  # the one that was used last is the last

    def touch_series(self, series: AliasSeries) -> bool:
        """Whether a request may count in this series; it does not where none are shown at all."""
        if self.most == 0:
            return False
        self.shown.pop(series, None)
        self.shown[series] = None
        if len(self.shown) > self.most:
            self._hide_series(next(iter(self.shown)))
        return True

    def forget_alias(self, alias: str) -> None:
        for series in [series for series in self.shown if series[0] == alias]:
            self._hide_series(series)

    def _hide_series(self, series: AliasSeries) -> None:
        del self.shown[series]
        for collector in BY_ALIAS:
            collector.remove(*series)


ALIASES = AliasLabels(most=200)


def alias_served(series: AliasSeries, generated: int, seconds: float) -> None:
    """A request for an alias has ended, which this adapter with this digest answered with so many tokens."""
    if ALIASES.touch_series(series):
        ALIAS_REQUESTS.labels(*series).inc()
        ALIAS_TOKENS.labels(*series).inc(generated)
        ALIAS_LATENCY.labels(*series).observe(seconds)


def alias_removed(alias: str) -> None:
    ALIASES.forget_alias(alias)


# ---- the GPUs

GPU_USED = Gauge(
    "adapterd_gpu_memory_used_bytes", "Memory in use on the GPU, by whomever.", ["gpu"], registry=REGISTRY
)
GPU_TOTAL = Gauge("adapterd_gpu_memory_total_bytes", "Memory of the GPU.", ["gpu"], registry=REGISTRY)
GPU_BUSY = Gauge(
    "adapterd_gpu_utilization_ratio",
    "Share of the time in which the GPU ran something, 0 to 1.",
    ["gpu"],
    registry=REGISTRY,
)
GPU_CELSIUS = Gauge("adapterd_gpu_temperature_celsius", "The GPU's temperature.", ["gpu"], registry=REGISTRY)


def set_gpus(readings: Collection[GpuReading]) -> None:
    """Sets the series to the readings; a value that a GPU does not have has no series."""
    for gauge in (GPU_USED, GPU_TOTAL, GPU_BUSY, GPU_CELSIUS):
        gauge.clear()
    for reading in readings:
        values = {
            GPU_USED: reading.memory_used,
            GPU_TOTAL: reading.memory_total,
            GPU_BUSY: reading.utilization,
            GPU_CELSIUS: reading.celsius,
        }
        for gauge, value in values.items():
            if value is not None:
                gauge.labels(reading.gpu).set(value)


# ---- showing


class _Unnamed(CollectorRegistry):
    """The registry without the collectors whose labels name adapters."""

    def collect(self) -> Iterator[Metric]:
        naming = (*BY_ADAPTER, *BY_ALIAS, LORA_INFO, LORA_LOADED)
        named = {family.name for collector in naming for family in collector.describe()}
        return (family for family in REGISTRY.collect() if family.name not in named)


def render_metrics(accept: str, named: bool = True) -> tuple[bytes, str]:
    """All series as Prometheus text, or OpenMetrics where `accept` names it; the bytes and their
    content type.

    `named`: with the series that name adapters.
    """
    encode, kind = choose_encoder(accept)
    return encode(REGISTRY if named else _Unnamed()), kind
