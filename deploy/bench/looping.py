"""The worker's own loop around a runner, in this process: scheduler, sampling and reports as in the
service, without an API process.

Knows no figures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from multiprocessing import Pipe

from service.core.adapter import Adapter
from service.core.base_info import BaseInfo
from service.core.request import Event, Finish, Request
from service.model.runner import ModelRunner
from service.settings import Settings
from service.worker.loop import Worker


class Looping:
    """Rows that are answered together; their adapters are in host memory, and in no pool rows."""

    def __init__(self, runner: ModelRunner, card: BaseInfo, settings: Settings) -> None:
        self.runner = runner
        self.connection, theirs = Pipe()
        self.worker = Worker(theirs, runner, card, settings)

    def time_turns(
        self, prompts: Sequence[Sequence[int]], mix: Mapping[int, Adapter | None], count: int
    ) -> list[float]:
        """Seconds of each turn in which every row gets a token, as many tokens as that are asked for."""
        scheduler = self.worker.scheduler
        for each in {adapter.digest: adapter for adapter in mix.values() if adapter is not None}.values():
            scheduler.add_adapter(each)
            scheduler.mark_hosted(each.digest, each.size)
        for row, adapter in mix.items():
            digest = adapter.digest if adapter is not None else None
            scheduler.submit_request(Request(row, tuple(prompts[row]), count, digest))
        seconds, ended = [], 0
        while ended < len(mix):
            began = time.perf_counter()
            self.worker.run_turn()
            took = time.perf_counter() - began
            events = self._take_events()
            ended += sum(event.finish is not None for event in events)
            seconds += [took] if sum(event.token is not None for event in events) == len(mix) else []
        self.worker.loader.end_reading()
        return seconds

    def _take_events(self) -> list[Event]:
        events: list[Event] = []
        while self.connection.poll():
            events += self.connection.recv().events
        for event in events:
            if event.finish is Finish.FAILED:
                raise RuntimeError(f"row {event.request}: {event.message}")
        return events
