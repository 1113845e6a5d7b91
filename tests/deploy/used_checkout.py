"""Makes a checkout look as after weeks of use: with the state, uploads and caches of its builder."""

from __future__ import annotations

import subprocess
from pathlib import Path

from .files import ROOT

DEMO = "service/demo/adapters"
PLANTED = (
    f"{DEMO}/.adapterd.json",
    f"{DEMO}/.adapterd.json.damaged",
    f"{DEMO}/.uploads/private/adapter_model.safetensors",
    f"{DEMO}/private/adapter_config.json",
    f"{DEMO}/private/adapter_model.safetensors",
    f"{DEMO}/dates/.cache/huggingface/download.lock",
    "service/.env",
    "service/.mypy_cache/3.11/service.data.json",
    "service/api/static/console/.swp",
    ".adapterd.json",
    ".git/config",
    ".venv/pyvenv.cfg",
    "adapters/private/adapter_config.json",
    "keys/api",
)


def tracked_files() -> list[str]:
    """The files of the checkout that are its own, by their paths in it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split("\0") if path and (ROOT / path).exists()]


def plant_builder_state(folder: Path) -> None:
    for name in PLANTED:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("of the builder alone", encoding="utf-8")
