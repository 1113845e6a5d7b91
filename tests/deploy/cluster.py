"""Run as a program, in a network namespace of its own: a Ray cluster with two engines, and what
becomes of requests to it, told as JSON.

`python -m tests.deploy.cluster FOLDER`, where FOLDER/base is a base, FOLDER/adapters markers of it
and FOLDER/late one more.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import json
import shutil
import socket
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from deploy.ray.app import application
from service.settings import Faults, Settings

from .test_ray import ADAPTERS

ROOT = Path(__file__).parents[2]
PORT = 8000
URL = f"http://127.0.0.1:{PORT}"
STUCK = 150
SETTINGS = {
    "base_id": "tiny",
    "dtype": "float32",
    "quantization": "none",
    "device": "cpu",
    "compile": "off",
    "max_rows": 4,
    "pool_rank": 64,
    "max_rank": 32,
    "faults": Faults(stuck=STUCK),
}
ADVERTISED_S = 2.0  # in which every replica has told Serve which adapters it holds
SIOCSIFFLAGS, UP = 0x8914, 0x1


def bring_up_loopback() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any:
        fcntl.ioctl(any, SIOCSIFFLAGS, struct.pack("16sh", b"lo", UP))


@contextmanager
def cluster(folder: Path) -> Iterator[None]:
    ray.init(
        num_cpus=6,
        include_dashboard=False,
        object_store_memory=100 * 1024**2,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
        log_to_driver="--loud" in sys.argv,
    )
    folders = {"base": str(folder / "base"), "adapters_dir": folder / "adapters"}
    settings = Settings.model_validate(SETTINGS | folders)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        serve.run(application(settings, replicas=2), name="adapterd")
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def generate(http: httpx.Client, adapter: str | None, tokens: int = 3) -> httpx.Response:
    return http.post(
        "/generate", json={"inputs": "Hello", "parameters": {"adapter_id": adapter, "max_new_tokens": tokens}}
    )


def samples(http: httpx.Client, name: str) -> dict[tuple[str, str], float]:
    """By replica and adapter (or tier)."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {
        (s.labels["replica"], s.labels.get("adapter") or s.labels.get("tier", "")): s.value for s in found
    }


def affinity(http: httpx.Client) -> dict[str, Any]:
    """Many requests for a few adapters by four clients: the share that met the engine where most of
    its adapter's went.
    """
    names = [f"m{i % ADAPTERS}" for i in range(180)]
    before = samples(http, "adapterd_adapter_requests_total")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        codes = {answer.status_code for answer in pool.map(lambda name: generate(http, name), names)}
    by_adapter: dict[str, list[float]] = defaultdict(list)
    by_replica: dict[str, float] = defaultdict(float)
    for (replica, adapter), count in samples(http, "adapterd_adapter_requests_total").items():
        by_adapter[adapter].append(count - before.get((replica, adapter), 0))
        by_replica[replica] += by_adapter[adapter][-1]
    at_home = sum(map(max, by_adapter.values())) / len(names)
    return {"codes": sorted(codes), "share": at_home, "by_engine": sorted(by_replica.values())}


def known(http: httpx.Client) -> list[int]:
    """How many adapters each engine knows."""
    counts: Counter[str] = Counter()
    for (replica, _), count in samples(http, "adapterd_adapters").items():
        counts[replica] += int(count)
    return sorted(counts.values())


def exercise_registry(http: httpx.Client, folder: Path) -> dict[str, Any]:
    """One is registered, asked for again and again, and deleted."""
    shutil.copytree(folder / "late", folder / "adapters" / "late")
    made = http.post("/adapters", json={"id": "late", "source": "late"})
    told: dict[str, Any] = {"made": made.status_code, "known": known(http)}
    told["asked"] = sorted({http.get("/adapters/late").status_code for _ in range(10)})
    told["said"] = sorted({generate(http, "late").json()["generated_text"] for _ in range(10)})
    told["again"] = http.post("/adapters", json={"id": "late", "source": "m1"}).status_code
    told["deleted"] = http.delete("/adapters/late").status_code
    told["known_then"] = known(http)
    told["asked_then"] = sorted({generate(http, "late").status_code for _ in range(10)})
    return told


def contract(http: httpx.Client) -> dict[str, Any]:
    """What is refused, by whom and how; and what a whole stream looks like."""
    unknown = http.post("/v1/completions", json={"model": "typo", "prompt": "Hi"})
    answers = {
        "bad": http.post("/generate", json={"inputs": "Hi", "surprise": 1}),
        "unknown": generate(http, "typo"),
        "large": http.post("/generate", content=b"x" * 5_000_000),
        "method": http.get("/generate"),
    }
    told: dict[str, Any] = {
        name: [answer.status_code, answer.json()["error_type"]] for name, answer in answers.items()
    }
    told["unknown_openai"] = [unknown.status_code, unknown.json()["error"]["code"]]
    named = http.get("/ready", headers={"x-request-id": "mine"})
    told["ready"] = [named.status_code, named.headers["x-request-id"]]
    return told | {"stream": whole_stream(http)}


def whole_stream(http: httpx.Client) -> list[Any]:
    """Its content type, the number of its events, and whether it ends as it must."""
    body = {"model": "tiny:m1", "prompt": "Hi", "max_tokens": 5, "stream": True}
    stream = http.post("/v1/completions", json=body)
    content_type = stream.headers["content-type"].split(";")[0]
    return [content_type, stream.text.count("data: "), stream.text.endswith("data: [DONE]\n\n")]


def leaving(http: httpx.Client) -> dict[str, Any]:
    """A client that goes after the first token."""
    body = {"inputs": "Hello", "parameters": {"adapter_id": "m2", "max_new_tokens": STUCK - 2}}
    with http.stream("POST", "/generate_stream", json=body) as stream:
        next(stream.iter_lines())
    end = time.monotonic() + 20
    while any(samples(http, "adapterd_num_requests_running").values()) and time.monotonic() < end:
        time.sleep(0.1)
    return {
        "running": sum(samples(http, "adapterd_num_requests_running").values()),
        "cancelled": sum(failures(http, "cancelled")),
    }


def failures(http: httpx.Client, code: str) -> list[float]:
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    failed = [sample for sample in samples if sample.name == "adapterd_request_failure_total"]
    return [sample.value for sample in failed if sample.labels["code"] == code]


def kill_running_engine(http: httpx.Client) -> str:
    """The replica that was killed: the one with a request."""
    running = samples(http, "adapterd_num_requests_running")
    (victim,) = (replica for (replica, _), count in running.items() if count)
    ray.kill(ray.get_actor(f"SERVE_REPLICA::adapterd#engine#{victim}", namespace="serve"))
    return victim


def death(http: httpx.Client) -> dict[str, Any]:
    """An engine is killed in the middle of a stream, which hangs at token STUCK; then everybody is
    asked for again.
    """
    body = {"model": "m0", "prompt": "Hello", "max_tokens": STUCK + 20, "stream": True}
    lines: list[str] = []
    with http.stream("POST", "/v1/completions", json=body) as stream:
        for line in filter(None, stream.iter_lines()):
            lines.append(line)
            if len(lines) == STUCK - 1:
                victim = kill_running_engine(http)
    after = [generate(http, f"m{i % ADAPTERS}") for i in range(3 * ADAPTERS)]
    left = {replica for replica, _ in samples(http, "adapterd_num_requests_running")}
    return {
        "stream": [stream.status_code, json.loads(lines[-2][6:])["error"]["code"], lines[-1]],
        "codes": sorted({answer.status_code for answer in after}),
        "said": [answer.json()["generated_text"] for answer in after[:ADAPTERS]],
        "victim_is_gone": victim not in left,
    }


def main(folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    with cluster(folder), httpx.Client(base_url=URL, timeout=60, trust_env=False) as http:
        told: dict[str, Any] = {
            "said": [generate(http, f"m{i}").json()["generated_text"] for i in range(ADAPTERS)]
        }
        time.sleep(ADVERTISED_S)
        told |= {
            "affinity": affinity(http),
            "registry": exercise_registry(http, folder),
            "contract": contract(http),
            "leaving": leaving(http),
            "death": death(http),
        }
    return told | {"seconds": time.monotonic() - began}


if __name__ == "__main__":
    bring_up_loopback()
    print("TOLD " + json.dumps(main(Path(sys.argv[1]))))
