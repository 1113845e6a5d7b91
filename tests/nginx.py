"""Runs nginx before a server, as a proxy on this machine; and finds the programs that tests drive."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.bench.servers import free_port

CONF = """
daemon off; master_process off; pid {folder}/pid; error_log stderr;
events {{ }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port};
    {locations}
  }}
}}
"""


def program(name: str, package: str) -> str:
    """Where it is. A test fails where it is missing: what it shows is not shown by another."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")
    assert found, f"{name} is needed for this test: apt-get install {package}"
    return found


@contextmanager
def proxying(locations: str, folder: Path) -> Iterator[int]:
    """The port of an nginx with these `location` blocks, which keeps its files in this folder."""
    port = free_port()
    text = CONF.format(folder=folder, port=port, locations=locations)
    (folder / "conf").write_text(text, encoding="utf-8")
    command = [program("nginx", "nginx-light"), "-p", str(folder), "-c", "conf", "-e", "stderr"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            wait_listening(process, port)
            yield port
        finally:
            process.kill()


def wait_listening(process: subprocess.Popen[str], port: int) -> None:
    while True:
        assert process.poll() is None, process.communicate()[1]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=20).close()
            return
        except ConnectionRefusedError:
            continue
