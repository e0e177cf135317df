"""Read request bodies within two limits: the size of one body, and the memory of all bodies together."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from qlora_rm.serving.lanes import SHORT
from qlora_rm.serving.sizes import Refused

AT_ONCE = 64
"""Bodies of the largest size that may be in memory at once, over all clients. One client may hold half of them."""


class Held:
    """The bytes that one request holds."""

    def __init__(self, bodies: "Bodies", client: str) -> None:
        self.bytes = 0
        self._bodies, self._client = bodies, client

    def grow(self, size: int) -> None:
        """Count `size` bytes for this request. Short bodies are not counted.

        Raises:
            Refused: too many bytes are held already.
        """
        if size > SHORT:
            self._bodies.add(self._client, size - self.bytes)
            self.bytes = size


class Bodies:
    """The count of bytes of large bodies in memory.

    Arguments:
        largest: most bytes of one body.
    """

    def __init__(self, largest: int) -> None:
        self._limit = AT_ONCE * max(largest, SHORT)
        self._of_clients: Counter[str] = Counter()

    @contextmanager
    def of(self, client: str) -> Iterator[Held]:
        """Count one request of `client` while it is being read."""
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
    """Return a body of at most `limit` bytes.

    Raises:
        Refused: it is larger, its Content-Type is not JSON, or too many other bodies are being read.
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
