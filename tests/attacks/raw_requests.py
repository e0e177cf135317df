"""Send raw requests over sockets, and read the answers."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

PATIENCE = 60
JSON = "Content-Type: application/json"


@contextmanager
def connected(url: str, sent: bytes = b"") -> Iterator[socket.socket]:
    """Open a raw connection to a server and send `sent`."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname, parts.port), timeout=PATIENCE) as connection:
        connection.sendall(sent)
        yield connection


def until_closed(connection: socket.socket) -> bytes:
    """Return everything that the server sends before it closes."""
    received = b""
    try:
        while part := connection.recv(65_536):
            received += part
    except ConnectionResetError:
        pass
    return received


def exchanged(url: str, sent: bytes) -> bytes:
    """Send raw bytes and return the server's answer, until it closes."""
    with connected(url) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sent)
        return until_closed(connection)


def request_of(
    body: Any = None,
    *headers: str,
    method: str = "POST",
    path: str = "/score",
    host: str = "localhost",
    end: bool = True,
) -> bytes:
    """Return a request as bytes. Without `end`, the last byte of its body is missing."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", JSON, f"Content-Length: {len(content)}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1") + (content if end else content[:-1])


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def reason_of(answer: bytes) -> str:
    """Return the `error` of an answer's JSON."""
    return json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
