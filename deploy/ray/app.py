"""The service on Ray Serve: an ingress and so many engines, each with a device of its own.

`serve run deploy.ray.app:app replicas=2`.

Settings come from ADAPTERD_* as for one service; the adapters directory must be the same on all
machines.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from service import settings as knobs
from service.settings import Settings

from .engine import Engine
from .ingress import ENGINE, Ingress

# Requests that an engine takes at once where no number of rows is set: it queues what its device
# cannot run
ROWS = 64
HEALTH_S = 2.0


def application(
    settings: Settings, replicas: int | tuple[int, int] = 1, gpus: float = 0, doors: int = 1
) -> Application:
    """`replicas` is a number, or the bounds between which it follows the load; `gpus` are those of
    one engine.
    """
    rows = settings.max_rows or ROWS
    options = engine_options(settings, rows, gpus) | scaling_options(replicas, rows)
    engines = serve.deployment(**options)(Engine).bind()
    ingress = serve.deployment(Ingress, name="door", num_replicas=doors, max_ongoing_requests=10_000)
    return ingress.bind(engines, settings)


def engine_options(settings: Settings, rows: int, gpus: float) -> dict[str, Any]:
    return {
        "name": ENGINE,
        "user_config": settings.model_dump(mode="json"),
        "max_ongoing_requests": rows + settings.queue_limit,
        "health_check_period_s": HEALTH_S,
        "graceful_shutdown_timeout_s": settings.drain_s,
        "ray_actor_options": {"num_cpus": 1, "num_gpus": gpus},
    }


def scaling_options(replicas: int | tuple[int, int], rows: int) -> dict[str, Any]:
    if isinstance(replicas, int):
        return {"num_replicas": replicas}
    low, high = replicas
    scaling = AutoscalingConfig(min_replicas=low, max_replicas=high, target_ongoing_requests=rows)
    return {"autoscaling_config": scaling}


def app(arguments: dict[str, str]) -> Application:
    """For `serve run`: `replicas=2` or `replicas=1-8`, `gpus=1`, `doors=1`."""
    low, _, high = arguments.get("replicas", "1").partition("-")
    replicas = (int(low), int(high)) if high else int(low)
    return application(
        knobs.read_settings(os.environ),
        replicas,
        float(arguments.get("gpus", "0")),
        int(arguments.get("doors", "1")),
    )
