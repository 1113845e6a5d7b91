"""A live service as it starts by default, kernels and all, with the demo base and adapters; and
what these answer.

`caller` is the orders adapter with a chat template of its own, which takes tools.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from pydantic import BaseModel

from deploy.bench.servers import started
from service.demo import card, dates, labels, orders
from service.settings import DEMO_ADAPTERS

RESULTS = card.read_results(DEMO_ADAPTERS.parent)
DATE, LABEL, ORDER = (
    RESULTS[task.name]["sample"]["adapter"] for task in (dates.TASK, labels.TASK, orders.TASK)
)
BASE_DATE = RESULTS["dates"]["sample"]["base"]
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = (
    "{% if tools %}{# <tool_call> #}{% endif %}"
    "{% for message in messages %}{{ message.content }}\n{% endfor %}JSON:"
)
SPOKEN_ORDER = orders.TASK.sample.removesuffix("\nJSON:")


class Order(BaseModel):
    name: str
    item: str
    quantity: int
    city: str


@dataclass(frozen=True)
class Demo:
    """`adapters` is the folder it serves; `http` asks it plainly."""

    url: str
    adapters: Path
    http: httpx.Client

    def generate(self, inputs: str, adapter: str | None, tokens: int = 16) -> str:
        asked = {"adapter_id": adapter, "max_new_tokens": tokens}
        answer = self.http.post("/generate", json={"inputs": inputs, "parameters": asked}).raise_for_status()
        text: str = answer.json()["generated_text"]
        return text


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    folder = tmp_path_factory.mktemp("demo")
    adapters = folder / "adapters"
    shutil.copytree(DEMO_ADAPTERS, adapters, ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(adapters / "orders", adapters / "caller")
    (adapters / "caller" / "chat_template.jinja").write_text(TEMPLATE)
    with (
        started({"adapters_dir": str(adapters)}, folder / "log") as server,
        httpx.Client(base_url=server.url, timeout=120, trust_env=False) as http,
    ):
        yield Demo(server.url, adapters, http)
