"""Reads an adapter's files below an https:// or http:// URL; in the API process, in threads that may wait.

Asks the checked address alone, follows no redirect to another place, and takes no proxy and no password.
Must not know where the files go.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import IO, cast
from urllib.parse import urljoin

from ...core.manifest import CONFIG, TEXT_FILES, WEIGHTS
from ...errors import AdapterInvalid
from ...source_urls import SourceUrl, parse_url, web_host
from .remote import LONGEST_S, RemoteFile

# A web server lists nothing: each name is asked for
NAMES = (CONFIG, WEIGHTS, *TEXT_FILES, "vocab.json", "vocab.txt")
ABSENT = (404, 410)
MOVED = (301, 302, 303, 307, 308)
HOPS = 3  # redirects that are followed
HEADERS = {"user-agent": "adapterd", "connection": "close"}
PAGE = 1 << 16  # bytes of an error page
WAIT_S = 20  # for a connection, and for each piece


class WebFolder:
    """The folder at this URL, asked at one of these addresses of its host; `allows` says where a redirect
    on the same host may lead.
    """

    def __init__(self, url: SourceUrl, addresses: list[str], allows: Callable[[SourceUrl], bool]) -> None:
        self.url, self.addresses, self.allows = url, addresses, allows

    def open_files(self) -> Generator[RemoteFile, None, None]:
        """Each file of the manifest that is there, to be read before the next.

        Raises AdapterInvalid, OSError, HTTPException.
        """
        for name in NAMES:
            with self._ask(self.url.join(name)) as answer:
                if answer.status in ABSENT:
                    answer.read(PAGE)  # else the server sees its connection broken
                    continue
                if answer.status != 200:
                    raise AdapterInvalid([f"{self.url}: {name} was answered with {answer.status}"])
                _check_encoding(name, answer)
                # Its length is known, or the end of the connection is the end of the file
                yield RemoteFile(name, answer.length, cast(IO[bytes], answer))

    @contextmanager
    def _ask(self, url: SourceUrl) -> Iterator[HTTPResponse]:
        for _ in range(HOPS + 1):
            with closing(self._connect()) as connection, _limit_time(connection.sock):
                connection.request("GET", f"/{url.path}", headers=HEADERS)
                with connection.getresponse() as answer:
                    if answer.status not in MOVED:
                        yield answer
                        return
                    url = self._follow(url, answer.getheader("location", ""))
        raise AdapterInvalid([f"{self.url}: redirected again and again"])

    def _follow(self, url: SourceUrl, location: str) -> SourceUrl:
        """Raises AdapterInvalid; what the redirect says is not repeated, for it may hold a signature."""
        try:
            target = parse_url(urljoin(str(url), location))
        except ValueError:
            target = None
        here = (url.scheme, url.host, url.port)
        if target is None or (target.scheme, target.host, target.port) != here or not self.allows(target):
            raise AdapterInvalid([f"{url}: redirected to another place, which is not followed"])
        return target

    def _connect(self) -> HTTPConnection:
        """A connection to the first address that takes one. Raises OSError."""
        host, port = web_host(self.url), self.url.port
        raw = _open_socket(self.addresses, port)
        try:
            if self.url.scheme == "http":
                connection = HTTPConnection(host, port, timeout=WAIT_S)
                connection.sock = raw
                return connection
            context = ssl.create_default_context()
            connection = HTTPSConnection(host, port, timeout=WAIT_S, context=context)
            connection.sock = context.wrap_socket(raw, server_hostname=host)
        except BaseException:
            raw.close()
            raise
        return connection


def _open_socket(addresses: list[str], port: int) -> socket.socket:
    last: OSError = OSError("no address")
    for address in addresses:
        try:
            return socket.create_connection((address, port), timeout=WAIT_S)
        except OSError as error:
            last = error
    raise last


@contextmanager
def _limit_time(connected: socket.socket) -> Iterator[None]:
    """Ends the connection at some time, however steadily it drips."""
    timer = threading.Timer(LONGEST_S, _end_connection, (connected,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_connection(connected: socket.socket) -> None:
    with suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _check_encoding(name: str, answer: HTTPResponse) -> None:
    """Raises AdapterInvalid where the bytes that come are not the file's."""
    encoding = answer.getheader("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise AdapterInvalid([f"{name} comes in the encoding {encoding[:40]!r}, which was not asked for"])
