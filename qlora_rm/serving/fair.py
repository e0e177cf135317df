"""A queue that shares work fairly between clients and lets short requests overtake long ones."""

import heapq
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


@lru_cache(4096)
def client_of(address: str) -> str:
    """Return the client of an address: the address itself or, in IPv6, its /64 network, all of which one client may own."""
    try:
        known = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address  # such as a test client's
    if known.version == 4:
        return str(known)
    return str(known.ipv4_mapped or ipaddress.ip_network((known, 64), strict=False))


@dataclass
class _Client(Generic[T]):
    """One client's queued entries.

    Attributes:
        served: work that the client has received, in the unit of the costs.
        clock: the virtual time of weighted fair queueing: work done, divided by the entries that shared it.
    """

    served: float
    clock: float = 0.0
    entries: "list[tuple[float, int, float, T]]" = field(default_factory=list)


class FairQueue(Generic[T]):
    """Entries of several clients, each with a cost.

    The client that received the least work is next. A returning client starts at the least work of the waiting clients, so that
    no client accumulates turns. Within a client the order is weighted fair queueing: an entry waits for no more work of
    later entries than its own cost. Short entries overtake long ones, and no entry waits forever. Not thread-safe.

    Arguments:
        quantum: costs are rounded up to multiples of it. Entries of equal cost keep their order of arrival.
    """

    def __init__(self, quantum: float) -> None:
        self._quantum = quantum
        self._clients: dict[str, _Client[T]] = {}
        self._numbers = count()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        """Iterate over all entries, in no particular order."""
        return (entry[-1] for client in self._clients.values() for entry in client.entries)

    def push(self, item: T, client: str, cost: float) -> None:
        """Add an entry of `cost`, which counts as at least one quantum."""
        known = self._clients.get(client)
        if known is None:
            least = min((other.served for other in self._clients.values()), default=0.0)
            known = self._clients[client] = _Client(least)
        cost = max(1, -(-cost // self._quantum)) * self._quantum
        heapq.heappush(known.entries, (known.clock + cost, next(self._numbers), cost, item))
        self._length += 1

    def peek(self) -> T:
        """Return the next entry without removing it."""
        return self._clients[self._next()].entries[0][-1]

    def pop(self) -> T:
        """Remove and return the next entry, and count it as served."""
        item = self.peek()
        self.serve()
        return item

    def serve(self, part: float | None = None, stays: bool = False) -> None:
        """Count `part` of the next entry's cost (default: all of it) as served, and remove the entry unless it `stays`."""
        name = self._next()
        client = self._clients[name]
        cost = client.entries[0][2] if part is None else part
        client.clock += cost / len(client.entries)
        client.served += cost
        if stays:
            return
        heapq.heappop(client.entries)
        self._length -= 1
        if not client.entries:
            del self._clients[name]

    def remove(self, item: T) -> None:
        """Remove an entry that was not served.

        Raises:
            ValueError: it is not in the queue.
        """
        for name, client in self._clients.items():
            kept = [entry for entry in client.entries if entry[-1] is not item]
            if len(kept) < len(client.entries):
                client.entries = kept
                heapq.heapify(client.entries)
                self._length -= 1
                if not kept:
                    del self._clients[name]
                return
        raise ValueError("no such entry")

    def clear(self) -> None:
        """Drop all entries."""
        self._clients.clear()
        self._length = 0

    def _next(self) -> str:
        return min(self._clients, key=lambda name: self._clients[name].served)
