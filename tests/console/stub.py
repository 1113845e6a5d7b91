"""A small server that speaks the contract's shapes, for the console's tests. Serves the real page; has no model and no files.

Answers are made up but their arithmetic is right. Uploads whose weights begin with "broken" are refused as invalid.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from starlette.datastructures import UploadFile

import service.api

PAGE = Path(service.api.__file__).parent / "console"
POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
POLICY += "script-src 'self'; connect-src 'self'; font-src 'self'; style-src 'self'; img-src 'self' data:"
LAYERS, HIDDEN = 30, 576
SHAPES = {"q_proj": (576, 576), "k_proj": (576, 192), "v_proj": (576, 192), "o_proj": (576, 576)} | {
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}
PARAMETERS, RESIDENT_MB, POOL, MAX_RANK = 134_515_008, 269.06, 512, 256
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
WORDS = re.findall(r"\S+", "A small answer that comes word by word, as it would from a model; every one of them is counted once.")
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

Told = dict[str, Any]


def by_module(rank: int, targets: list[str], dtype: str = "bfloat16") -> list[Told]:
    rows = []
    for name in sorted(targets):
        inside, outside = SHAPES[name]
        parameters = LAYERS * rank * (inside + outside)
        row: Told = {"name": name, "count": LAYERS, "in_features": inside, "out_features": outside, "rank": rank, "scaling": 2.0}
        row |= {"lora_A": [rank, inside], "lora_B": [outside, rank], "parameters": parameters}
        rows.append(row | {"megabytes": round(parameters * ITEMSIZE[dtype] / 1e6, 2)})
    return rows


class Adapter:
    def __init__(self, id: str, rank: int, targets: list[str], residency: str = "device", pinned: bool = False) -> None:
        self.id, self.rank, self.targets, self.residency, self.pinned = id, rank, targets, residency, pinned
        self.digest = "sha256:" + hashlib.sha256(f"{id}{rank}{targets}".encode()).hexdigest()
        self.rows = by_module(rank, targets)
        self.parameters = sum(row["parameters"] for row in self.rows)
        self.tokens = self.in_flight = 0
        self.last_used: str | None = None

    def card(self) -> Told:
        told: Told = {"id": self.id, "digest": self.digest, "state": "ready", "residency": self.residency, "rank": self.rank}
        told |= {"parameters": self.parameters, "megabytes": round(self.parameters * 2 / 1e6, 2), "pinned": self.pinned}
        return told | {"in_flight": self.in_flight, "last_used": self.last_used}

    def summary(self) -> Told:
        size = self.parameters * 2
        told = self.card() | {"source": self.id, "registered_at": "2026-01-02T03:04:05Z"}
        told |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "peft_version": "0.21.2", "use_rslora": False, "use_dora": False}
        told |= {"base_model": {"claimed": "HuggingFaceTB/SmolLM2-135M-Instruct", "served": "smollm2-135m-instruct", "match": True}}
        told |= {"rank": {"min": self.rank, "max": self.rank}, "alpha": 2 * self.rank, "scaling": {"min": 2.0, "max": 2.0}, "dropout": 0.05}
        told |= {"target_modules": sorted(self.targets), "layers": LAYERS, "modules": LAYERS * len(self.targets), "by_module": self.rows}
        told |= {"percent_of_base": round(100 * self.parameters / PARAMETERS, 2), "warnings": []}
        told["size"] = {"file_bytes": size + 9000, "header_bytes": 9000, "tensor_bytes": size, "megabytes": round(size / 1e6, 2)}
        told["size"] |= {"dtypes": {"BF16": 2 * LAYERS * len(self.targets)}, "arithmetic_bytes": size, "matches_file": True}
        told["size"] |= {"device_megabytes": round(size / 1e6, 2)}
        told["base"] = {"parameters": PARAMETERS, "float32_megabytes": 538.06, "quantization": "none", "resident_megabytes": RESIDENT_MB}
        total = round(RESIDENT_MB + size / 1e6, 2)
        return told | {"footprint": {"base_megabytes": RESIDENT_MB, "with_adapter_megabytes": total}}

    def architecture(self) -> str:
        def module(name: str) -> str:
            inside, outside = SHAPES[name]
            plain = f"Linear(in_features={inside}, out_features={outside}, bias=False)"
            if name not in self.targets:
                return f"        ({name}): {plain}\n"
            factors = f"          (lora_A): Linear(in_features={inside}, out_features={self.rank}, bias=False)\n"
            factors += f"          (lora_B): Linear(in_features={self.rank}, out_features={outside}, bias=False)\n"
            head = f"        ({name}): LoRA(rank={self.rank}, scaling=2, dropout=0.05)\n"
            return head + f"          (base_layer): {plain}\n" + factors

        blocks = {"self_attn): LlamaAttention": list(SHAPES)[:4], "mlp): LlamaMLP": list(SHAPES)[4:]}
        inner = "".join(f"      ({title}\n" + "".join(module(name) for name in names) for title, names in blocks.items())
        return f"LlamaForCausalLM\n  (model): LlamaModel\n   (layers): ModuleList\n    (0-29): 30 x LlamaDecoderLayer\n{inner}"


class Stub:
    """The state behind the routes. `key` empty: no key is asked for."""

    def __init__(self, key: str = "") -> None:
        shown = [Adapter("dates", 16, ["q_proj", "v_proj"], pinned=True), Adapter("labels", 8, ["q_proj", "k_proj", "v_proj", "o_proj"])]
        shown += [Adapter("orders", 8, ["q_proj", "k_proj", "v_proj", "o_proj"]), Adapter("team/pirate", 2, list(SHAPES)[4:], "host")]
        shown += [Adapter("redact", 32, list(SHAPES), "disk")]
        self.key = key
        self.adapters = {one.id: one for one in shown}
        self.running = self.prompt_tokens = self.tokens = 0
        self.first_tokens: list[float] = []

    def error(self, status: int, kind: str, message: str, problems: list[str] | None = None) -> JSONResponse:
        details = {"details": {"problems": problems}} if problems else {}
        return JSONResponse({"error": message, "error_type": kind, **details}, status)

    def add(self, id: str, replace: bool = False, rank: int = 4) -> Response:
        made = Adapter(id, rank, ["q_proj", "v_proj"], "host")
        if id in self.adapters and not replace:
            return self.error(409, "conflict", f"the id {id!r} is taken by other content; PUT replaces it")
        self.adapters[id] = made
        return JSONResponse(made.card(), 201)

    def base(self) -> Told:
        linears = [{"name": name, "in_features": a, "out_features": b, "count": LAYERS} for name, (a, b) in SHAPES.items()]
        told: Told = {"id": "smollm2-135m-instruct", "architecture": "LlamaForCausalLM", "layers": LAYERS, "parameters": PARAMETERS}
        told |= {"quantization": "none", "dtype": "bfloat16", "resident_megabytes": RESIDENT_MB, "context_length": 8192, "modules": linears}
        start, held = 0, []
        for one in self.adapters.values():
            if one.residency == "device":
                held.append({"digest": one.digest, "start": start, "rank": one.rank})
                start += one.rank
        told["pool"] = {"rank_total": POOL, "rank_used": start, "placements": held}
        return told | {"host_bytes": 9_400_000}

    def metrics(self) -> str:
        tiers = [one.residency for one in self.adapters.values()]
        lines = [f'adapterd_adapters{{tier="{tier}"}} {tiers.count(tier)}' for tier in ("device", "host", "disk")]
        lines += [f'adapterd_adapter_generation_tokens_total{{adapter="{one.id}"}} {one.tokens}.0' for one in self.adapters.values()]
        lines += [f"adapterd_num_requests_running {self.running}", "adapterd_num_requests_waiting 0"]
        lines += [f"adapterd_kv_cache_usage_ratio {self.running / 16}", "adapterd_worker_restarts_total 0"]
        lines += [f"adapterd_prompt_tokens_total {self.prompt_tokens}.0", f"adapterd_generation_tokens_total {self.tokens}.0"]
        for bound in BOUNDS:
            below = sum(seconds <= bound for seconds in self.first_tokens)
            lines.append(f'adapterd_time_to_first_token_seconds_bucket{{le="{bound}"}} {below}')
        lines.append(f'adapterd_time_to_first_token_seconds_bucket{{le="+Inf"}} {len(self.first_tokens)}')
        return "# HELP adapterd_adapters by tier\n# TYPE adapterd_adapters gauge\n" + "\n".join(lines) + "\n"

    async def words(self, inputs: str, adapter: Adapter | None, length: int) -> AsyncIterator[str]:
        began = time.monotonic()
        self.running += 1
        self.prompt_tokens += len(inputs.split())
        try:
            for index in range(length):
                await asyncio.sleep(0.03)
                if index == 0:
                    self.first_tokens.append(time.monotonic() - began)
                self.tokens += 1
                if adapter:
                    adapter.tokens += 1
                yield (" " if index else "") + WORDS[index % len(WORDS)]
        finally:
            self.running -= 1


Source = AsyncIterator[str]


def event(told: Told) -> str:
    return f"data: {json.dumps(told)}\n\n"


async def native(words: Source, told: Told | None, length: int) -> Source:
    text = ""
    async for word in words:
        text += word
        yield event({"token": {"id": 1, "text": word, "logprob": -0.1, "special": False}, "generated_text": None, "details": None})
    last = {"token": {"id": 2, "text": "", "logprob": -0.1, "special": True}, "generated_text": text, "adapter": told}
    yield event(last | {"details": {"finish_reason": "length", "generated_tokens": length}})


async def openai(words: Source, told: Told | None, length: int) -> Source:
    async for word in words:
        yield event({"choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}], "adapter": told})
    yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "adapter": told})
    yield event({"choices": [], "usage": {"completion_tokens": length}, "adapter": told})
    yield "data: [DONE]\n\n"


def build(stub: Stub) -> FastAPI:
    """The routes the console uses, and the page itself under the strict policy it must live with."""
    app = FastAPI()

    @app.middleware("http")
    async def door(request: Request, call_next: Any) -> Response:
        path = request.url.path
        is_open = path in ("/health", "/") or path.startswith("/console/")
        if stub.key and not is_open and request.headers.get("authorization") != f"Bearer {stub.key}":
            return stub.error(401, "unauthorized", "a key is needed: send it as 'Authorization: Bearer KEY'")
        response: Response = await call_next(request)
        response.headers["content-security-policy"] = POLICY
        return response

    @app.get("/")
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @app.get("/console/{path:path}")
    def part(path: str) -> FileResponse:
        return FileResponse(PAGE / path)

    @app.get("/health")
    def health() -> Told:
        return {"state": "ready", "reason": ""}

    @app.get("/info")
    def info() -> Told:
        return {"versions": {}, "state": "ready", "settings": {"max_rank": MAX_RANK, "host_cache_mb": 4096}}

    app.get("/base")(stub.base)
    app.get("/metrics", response_class=PlainTextResponse)(stub.metrics)
    _add_generation(app, stub)
    _add_management(app, stub)
    return app


def _add_generation(app: FastAPI, stub: Stub) -> None:
    def answer(id: str | None, prompt: str, length: int, dialect: Callable[[Source, Told | None, int], Source]) -> Response:
        adapter = stub.adapters.get(id) if id else None
        told = {"id": adapter.id, "digest": adapter.digest} if adapter else None
        headers = {"cache-control": "no-cache"} | ({"x-adapter-digest": told["digest"]} if told else {})
        words = stub.words(prompt, adapter, length)
        return StreamingResponse(dialect(words, told, length), media_type="text/event-stream", headers=headers)

    @app.post("/generate_stream")
    async def generate(request: Request) -> Response:
        body = await request.json()
        asked = body["parameters"]
        return answer(asked.get("adapter_id"), body["inputs"], asked["max_new_tokens"], native)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        if body["model"] not in ("base", *stub.adapters):
            told = {
                "message": f"no model named {body['model']!r}",
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
            return JSONResponse({"error": told}, 404)
        return answer(body["model"], body["messages"][0]["content"], body["max_tokens"], openai)

    @app.get("/forecast")
    def forecast(r: int, target_modules: str, dtype: str = "float32") -> Told:
        rows = [{key: row[key] for key in row if key != "scaling"} for row in by_module(r, target_modules.split(","), dtype)]
        parameters = sum(row["parameters"] for row in rows)
        told: Told = {"r": r, "dtype": dtype, "by_module": rows, "parameters": parameters}
        told |= {"megabytes": round(parameters * ITEMSIZE[dtype] / 1e6, 2), "percent_of_base": round(100 * parameters / PARAMETERS, 2)}
        return told | {"base": {"parameters": PARAMETERS, "float32_megabytes": 538.06}}


def _add_management(app: FastAPI, stub: Stub) -> None:
    @app.get("/adapters")
    def cards() -> Told:
        return {"adapters": [one.card() for one in stub.adapters.values()]}

    @app.post("/adapters")
    async def register(request: Request) -> Response:
        return stub.add((await request.json())["id"])

    @app.post("/adapters/check")
    async def check(request: Request) -> Told:
        body = await request.json()
        if body["source"] == "nowhere":
            return {"ok": False, "summary": None, "problems": ["the folder 'nowhere' does not exist"]}
        return {"ok": True, "summary": Adapter(body["id"], 4, ["q_proj", "v_proj"]).summary(), "problems": []}

    @app.post("/adapters/{id:path}/upload")
    async def upload(id: str, request: Request) -> Response:
        async with request.form() as form:
            weights = form.get("adapter_model.safetensors") or form.get("file")
            start = await weights.read(6) if isinstance(weights, UploadFile) else b""
        if start == b"broken":
            problem = "adapter_model.safetensors is no safetensors file: its header is not JSON"
            return stub.error(422, "adapter_invalid", problem, [problem, "`r` is missing"])
        await asyncio.sleep(0.2)
        return stub.add(id)

    @app.get("/adapters/{rest:path}")
    def read(rest: str) -> Response:
        part = next((name for name in ("summary", "architecture") if rest.endswith(f"/{name}")), "")
        id = rest.removesuffix(f"/{part}")
        one = stub.adapters.get(id)
        if one is None:
            return stub.error(404, "adapter_not_found", f"no adapter is called {id!r}")
        if part == "architecture":
            return PlainTextResponse(one.architecture())
        return JSONResponse(one.summary() if part == "summary" else one.card())

    @app.put("/adapters/{id:path}")
    def replace(id: str) -> Response:
        return stub.add(id, replace=True, rank=6)

    @app.patch("/adapters/{id:path}")
    async def pin(id: str, request: Request) -> Told:
        one = stub.adapters[id]
        one.pinned = (await request.json())["pinned"]
        one.residency = "device" if one.pinned else one.residency
        return one.card()

    @app.delete("/adapters/{id:path}")
    def remove(id: str) -> Told:
        one = stub.adapters.pop(id)
        return {"id": id, "digest": one.digest, "drained_requests": 0, "freed_bytes": one.parameters * 2}
