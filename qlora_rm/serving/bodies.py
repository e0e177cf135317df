"""Reading a request's body: no more of it than is allowed, and not more of all bodies together than memory is meant for."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from qlora_rm.serving.lanes import SHORT
from qlora_rm.serving.sizes import Refused

AT_ONCE = 64
"""Bodies of the largest size that are held at once, by all clients together. One client may hold half of them."""


class Held:
    """The bytes that one request holds."""

    def __init__(self, bodies: "Bodies", client: str) -> None:
        self.bytes = 0
        self._bodies, self._client = bodies, client

    def grow(self, size: int) -> None:
        """Hold `size` bytes; short bodies are not counted.

        Raises:
            Refused: too much is held already.
        """
        if size > SHORT:
            self._bodies.add(self._client, size - self.bytes)
            self.bytes = size


class Bodies:
    """How many bytes of large bodies are in memory.

    Arguments:
        largest: bytes that one body may have.
    """

    def __init__(self, largest: int) -> None:
        self._limit = AT_ONCE * max(largest, SHORT)
        self._of_clients: Counter[str] = Counter()

    @contextmanager
    def of(self, client: str) -> Iterator[Held]:
        """While one request of `client` is read."""
        held = Held(self, client)
        try:
            yield held
        finally:
            self._of_clients[client] -= held.bytes
            if not self._of_clients[client]:
                del self._of_clients[client]

    def add(self, client: str, size: int) -> None:
        if self._of_clients.total() + size > self._limit or self._of_clients[client] + size > self._limit / 2:
            raise Refused(503, "too many large bodies are being read; try again", {"Retry-After": "1"})
        self._of_clients[client] += size


async def read_body(request: Request, limit: int, held: Held) -> bytes:
    """The body of `limit` bytes at most.

    Raises:
        Refused: it is larger, is not JSON by its Content-Type, or too many others are being read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"the body is {kind or 'of no type'}; send JSON with Content-Type: application/json")
    if (length := request.headers.get("content-length", "0")).isdecimal() and int(length) > limit:
        raise Refused(413, f"the body is larger than {limit} bytes")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise Refused(413, f"the body is larger than {limit} bytes")
        held.grow(len(body))
    return bytes(body)
