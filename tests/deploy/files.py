"""Reads the files under deploy/ and the root's container files for the tests here, and follows what
they say to do; knows their places and nothing else.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
METRIC = re.compile(r"(?<![:\w])adapterd_[a-z0-9_]+")


def documents(path: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(path.read_text(encoding="utf-8")) if document]


def compose() -> dict[str, Any]:
    (whole,) = documents(ROOT / "docker-compose.yml")
    return whole


def follow_key_recipe(folder: Path, umask: int = 0o077) -> Path:
    """The folder of keys that the compose file's first lines make in this folder."""
    text = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    lines = re.findall(r"^#   (.*)$", text.partition("docker compose --profile")[0], re.MULTILINE)
    subprocess.run(["sh", "-ec", "\n".join(lines)], cwd=folder, umask=umask, check=True)
    return folder / "keys"


def manifests() -> list[dict[str, Any]]:
    """Every Kubernetes object, in the order of its files."""
    return [
        d
        for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
        if path.stem != "kustomization"
        for d in documents(path)
    ]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboards" / "adapterd.json").read_text())
    return found


def graphs() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """The dashboard's, with its variables filled in as Grafana would."""
    found = [target["expr"] for panel in graphs() for target in panel["targets"]]
    return [text.replace("$__rate_interval", "1m").replace("$instance", ".*") for text in found]


def rules() -> list[dict[str, Any]]:
    files = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
    return [
        rule
        for path in files
        for whole in documents(path)
        for group in whole["groups"]
        for rule in group["rules"]
    ]


def variables() -> Iterator[tuple[str, str, str]]:
    """Where, name and value of each ADAPTERD_ variable that a file sets."""
    for name, service in compose()["services"].items():
        for key, value in service.get("environment", {}).items():
            yield f"compose {name}", key, str(value)
    for manifest in manifests():
        for container in manifest.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
            for one in container["env"]:
                yield f"kubernetes {manifest['kind']}", one["name"], one["value"]
    for path in (ROOT / "Dockerfile", DEPLOY / "systemd" / "adapterd.service"):
        for key, value in re.findall(r"^[^#\n]*?\b(ADAPTERD_\w+)=(\S+)", path.read_text(), re.MULTILINE):
            yield path.name, key, value
