"""A stand-in on loopback for the Hugging Face hub, whose weights come late.

Knows as much of its protocol as its client needs.

Every folder below one root is a repository, `slow/NAME`, at one commit.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40
OWNER = "slow"
WEIGHTS = "adapter_model.safetensors"


class Handler(BaseHTTPRequestHandler):
    root: Path
    late_s: float

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[:3] == ["api", "models", OWNER] and len(parts) > 3:
            return self._answer(
                json.dumps(self._told(parts[3], tree="tree" in parts[4:5])).encode(), "application/json"
            )
        if (
            parts[0] == OWNER
            and parts[2:4] == ["resolve", COMMIT]
            and (file := self.root / parts[1] / parts[-1]).is_file()
        ):
            if self.command == "GET" and file.name == WEIGHTS:
                time.sleep(self.late_s)
            return self._answer(file.read_bytes(), "application/octet-stream")
        return self._answer(b"{}", "application/json", 404)

    def _told(self, name: str, tree: bool) -> Any:
        files = sorted((self.root / name).iterdir())
        if tree:
            listed = [(file.name, file.read_bytes()) for file in files]
            return [
                {"type": "file", "path": path, "size": len(data), "oid": _etag(data)} for path, data in listed
            ]
        siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in files]
        return {"id": f"{OWNER}/{name}", "sha": COMMIT, "siblings": siblings}

    def _answer(self, body: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        headers = {
            "content-type": kind,
            "content-length": str(len(body)),
            "x-repo-commit": COMMIT,
            "etag": f'"{_etag(body)}"',
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        return None


def _etag(data: bytes) -> str:
    return sha256(data).hexdigest()[:40]


@contextmanager
def slow_hub(root: Path, late_s: float, cache: Path) -> Iterator[dict[str, str]]:
    """Serves the folders until the block ends; the environment in which the hub's client asks here."""
    handler = type("Late", (Handler,), {"root": root, "late_s": late_s})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        patience = {"HF_HUB_ETAG_TIMEOUT": "60", "HF_HUB_DOWNLOAD_TIMEOUT": str(int(60 + late_s))}
        try:
            yield {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(cache),
                "HF_HUB_CACHE": str(cache / "hub"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                **patience,
            }
        finally:
            server.shutdown()
            thread.join()
