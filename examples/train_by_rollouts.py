"""Trains an adapter by reinforcement (REINFORCE, rewards normed over the answers to a prompt), on a CPU,
with rollouts from a running service: every few steps the trainer uploads its weights as the adapter's next
version, and asks for answers of that content alone.

    make serve
    .venv/bin/python -m examples.train_by_rollouts [--url URL] [--steps 24] [--plot rollouts.svg]

The reward is the share of the letter "e" in an answer: small, and told for every answer. Each answer must
name the digest of the version that was uploaded last, or the program stops. Knows the service by HTTP alone;
the demo's base is found as the service finds it.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from service.core.manifest import compute_digest, read_manifest
from service.model.loading import resolve_folder

ADAPTER = "letter-e"
PROMPTS = ("Tell me about the sea.", "What is a good breakfast?", "Describe a tree.", "Why do people sing?")
ROLLOUTS, TOKENS = 8, 24  # answers to a prompt, and how long they may be
EVERY = 2  # steps between two versions
RATE = 3e-3
FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Rollout:
    """An answer: the ids of prompt and answer, the log probabilities that were told, and the reward."""

    prompt: list[int]
    answer: list[int]
    logprobs: list[float]
    reward: float


@dataclass(frozen=True)
class Step:
    """What one step has found: the mean reward, and how far the log probabilities that were told are from the
    trainer's own, in nats, at the median.
    """

    reward: float
    gap: float


class RolloutClient:
    """Uploads versions of one adapter, and asks for answers of the last of them."""

    def __init__(self, url: str, key: str | None) -> None:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=300, trust_env=False)
        self.digest = ""

    def __enter__(self) -> RolloutClient:
        return self

    def __exit__(self, *ending: object) -> None:
        self._http.close()

    def upload(self, model: Any) -> None:
        """Replaces the adapter by the model's weights; the service must find the digest that they have."""
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            self.digest = compute_digest(read_manifest(Path(folder)))
            files = {name: (name, io.BytesIO((Path(folder) / name).read_bytes())) for name in FILES}
            answer = self._http.put(f"/adapters/{ADAPTER}/upload", files=files, data={"expect": self.digest})
        answer.raise_for_status()

    def sample(self, prompt: str, seed: int) -> list[Rollout]:
        """Answers to a prompt. Raises RuntimeError where another content has answered."""
        body = {
            "model": f"{ADAPTER}@{self.digest[: len('sha256:') + 16]}",
            "prompt": prompt,
            "n": ROLLOUTS,
            "max_tokens": TOKENS,
            "temperature": 1.0,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = self._http.post("/v1/completions", json=body).raise_for_status()
        if answer.headers["x-adapter-digest"] != self.digest:
            raise RuntimeError(f"{answer.headers['x-adapter-digest']} has answered, not {self.digest}")
        choices = answer.json()["choices"]
        prompt_ids = choices[0]["prompt_token_ids"]
        return [_make_rollout(prompt_ids, choice) for choice in choices]


def _make_rollout(prompt: list[int], choice: dict[str, Any]) -> Rollout:
    text = choice["text"]
    reward = text.lower().count("e") / max(len(text), 1)
    return Rollout(prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"], reward)


def make_model(folder: Path) -> Any:
    """The base in float32 with a new adapter."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))


def score_answers(model: Any, group: Sequence[Rollout]) -> list[Tensor]:
    """The log probabilities of each answer's tokens, [tokens of the answer], under the model as it is; all
    answers have the same prompt.
    """
    start, longest = len(group[0].prompt), max(len(rollout.answer) for rollout in group)
    rows = [rollout.prompt + rollout.answer + [0] * (longest - len(rollout.answer)) for rollout in group]
    ids = torch.tensor(rows)
    logits = model(input_ids=ids).logits[:, start - 1 : -1]
    scores = logits.float().log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]
    return [row[: len(rollout.answer)] for row, rollout in zip(scores, group, strict=True)]


def take_step(model: Any, optimizer: torch.optim.Optimizer, groups: Sequence[list[Rollout]]) -> Step:
    """One step of the policy gradient (Williams, 1992), with GRPO's advantages (arXiv:2402.03300)."""
    gaps: list[Tensor] = []
    count = sum(map(len, groups))
    for group in groups:
        rewards = torch.tensor([rollout.reward for rollout in group])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        loss = torch.zeros(())
        for rollout, advantage, scores in zip(group, advantages, score_answers(model, group), strict=True):
            gaps.append((scores.detach() - torch.tensor(rollout.logprobs)).abs())
            loss = loss - advantage * scores.sum() / count
        torch.autograd.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    reward = sum(rollout.reward for group in groups for rollout in group) / count
    return Step(reward, float(torch.cat(gaps).median()))


def train(client: RolloutClient, model: Any, steps: int) -> list[Step]:
    """Each step is told in a line; a version is uploaded before every EVERY-th."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    found: list[Step] = []
    for number in range(steps):
        began = time.monotonic()
        if number % EVERY == 0:
            client.upload(model)
        groups = [client.sample(prompt, 1000 * number + i) for i, prompt in enumerate(PROMPTS)]
        found.append(take_step(model, optimizer, groups))
        seconds = time.monotonic() - began
        told = f"reward {found[-1].reward:.3f}, gap {found[-1].gap:.4f} nats, {seconds:.1f} s"
        print(f"step {number + 1}/{steps}: {told}, version {client.digest[:15]}", flush=True)
    return found


def draw_plot(steps: Sequence[Step], file: Path) -> None:
    """The rewards as a line, in SVG."""
    width, height, margin = 640, 240, 36
    top = max(step.reward for step in steps) * 1.1 or 1.0
    across = (width - 2 * margin) / max(len(steps) - 1, 1)
    places = [
        f"{margin + i * across:.1f},{height - margin - step.reward / top * (height - 2 * margin):.1f}"
        for i, step in enumerate(steps)
    ]
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
        f'<path d="M{margin},{margin}V{height - margin}H{width - margin}" fill="none" stroke="#666"/>'
        f'<polyline points="{" ".join(places)}" fill="none" stroke="#2563eb" stroke-width="2"/>'
        f'<text x="{margin}" y="{margin - 12}">mean reward, up to {top:.2f}</text>'
        f'<text x="{width - margin}" y="{height - 12}" text-anchor="end">step {len(steps)}</text></svg>\n',
        encoding="utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--key", help="an admin key, where the service has keys")
    parser.add_argument("--base", type=Path, help="the folder of the service's base; else the demo's")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--plot", type=Path, help="an SVG file for the rewards")
    asked = parser.parse_args()
    model = make_model(asked.base or resolve_folder("demo"))
    with RolloutClient(asked.url, asked.key) as client:
        steps = train(client, model, asked.steps)
    if asked.plot:
        draw_plot(steps, asked.plot)


if __name__ == "__main__":
    main()
