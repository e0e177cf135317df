"""Limit idle, slow and malformed connections, so that they cannot block others.

uvicorn waits forever for the first request of a connection, for the rest of a request and for a client that does not read. It
closes no connection to admit others. `Connection` adds these limits.
"""

import asyncio
import json
from collections import Counter, OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qlora_rm.serving.fair import client_of
from qlora_rm.serving.strict_parser import StrictParser

Waits = Literal["idle", "head", "body", "answer", "end"]
"""What a connection waits for: a request, the rest of its head, the rest of its body, its answer, or the rest of a body that
is already answered."""

HEAD_SECONDS = 10.0
"""Limit from the start of a connection, or the first byte of a later request, to the end of the request's head."""
IDLE_SECONDS = 30.0
"""How long a connection stays open after an answer."""
BODY_SECONDS, BODY_RATE = 10.0, 16 * 1024
"""A body must be complete this long after its head, plus one second for each `BODY_RATE` bytes received."""
END_SECONDS = 5.0
"""Limit after an answer, for an unread body or a client that does not read."""
WRITE_SECONDS = 30.0
"""How long a client may leave an answer unread."""
HEAD_BYTES = 32 * 1024
"""Largest size of a request's head."""

CONNECTIONS = 2048
"""Most open connections; half of them from one address."""
FILES, OWN_FILES = 65_536, 256
"""Open files to request from the system, and how many of them are not connections."""


@dataclass(eq=False)
class Crowd:
    """All connections of a server.

    Attributes:
        limit, of_client: most open connections, in total and from one address. Above it, the connection that has waited longest
            for its client is closed to admit a new one.
    """

    limit: int
    of_client: int
    count: int = 0
    by_client: Counter[str] = field(default_factory=Counter)
    waiting: "OrderedDict[Connection, None]" = field(default_factory=OrderedDict)
    """Connections that wait for their clients, longest wait first."""

    def enter(self, connection: "Connection") -> bool:
        """Count a new connection. Return False if there is no room for it."""
        client = connection.address
        self.count += 1
        self.by_client[client] += 1
        if self.by_client[client] > self.of_client:
            return self._close_one(client)
        return self.count <= self.limit or self._close_one(None)

    def leave(self, connection: "Connection") -> None:
        self.waiting.pop(connection, None)
        self.count -= 1
        self.by_client[connection.address] -= 1
        if not self.by_client[connection.address]:
            del self.by_client[connection.address]

    def _close_one(self, client: str | None) -> bool:
        for connection in self.waiting:
            if client in (None, connection.address):
                connection.give_way()
                return True
        return False


class Connection(H11Protocol):
    """uvicorn's protocol with time limits on everything a client does, and errors as JSON.

    Arguments:
        crowd: all connections of the server; the other arguments come from uvicorn.
    """

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any, *, crowd: Crowd) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = self.parser = StrictParser(h11.SERVER, HEAD_BYTES)
        self.crowd, self.address = crowd, ""
        self.waits: Waits = "idle"
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._since, self._received = 0.0, 0
        self._entered = self._ended = False

    # ---- events of the transport -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = client_of(self.client[0]) if self.client else ""
        self._entered = True
        if not self.crowd.enter(self):
            self._refuse(503, "too many connections are open; try again")
            return
        self._wait("head")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
        if self._entered:
            self._entered = False
            self.crowd.leave(self)
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if self._ended or self.transport.is_closing():
            return
        self._received += len(data)
        try:
            super().data_received(data)
        except h11.ProtocolError:  # the parser's state does not allow this data
            self.transport.abort()
        if self.waits == "body":
            self.crowd.waiting.move_to_end(self)
        self._follow()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_deadline = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    # ---- what uvicorn decides --------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            self._wait("end")  # until the client has taken the answer
        else:
            self._follow()

    def send_400_response(self, msg: str) -> None:
        refusal = self.parser.refusal
        status = refusal.error_status_hint if refusal else 400
        self._refuse(status if 400 <= status < 500 else 400, f"no valid HTTP request: {str(refusal or msg)[:200]}")

    def timeout_keep_alive_handler(self) -> None:
        """Do nothing: `waits` has its own limit for this."""

    def shutdown(self) -> None:
        """Stop: end incomplete requests at once, and the others once they are answered."""
        if self.waits == "body":
            self._refuse(503, "the server is stopping")
        if self.waits != "answer":
            self._close()
        elif self.cycle is not None:
            self.cycle.keep_alive = False
            if self.flow.write_paused:
                self.loop.call_later(END_SECONDS, self.transport.abort)

    def give_way(self) -> None:
        """Close to make room for a new connection."""
        self._leave_application()
        self._stop_waiting()
        self.transport.abort()

    # ---- time --------------------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Start to wait for the next event."""
        if self._ended or self.transport.is_closing():
            return
        theirs = self.conn.their_state
        answered = self.cycle is not None and self.cycle.response_complete
        now: Waits
        if theirs is h11.IDLE:
            now = "head" if self.parser.begun or self.cycle is None else "idle"
        elif theirs is h11.SEND_BODY:
            now = "end" if answered else "body"
        else:
            now = "answer"
        if now != self.waits:
            self._wait(now)

    def _wait(self, waits: Waits) -> None:
        self._stop_waiting()
        self.waits, self._since, self._received = waits, self.loop.time(), 0
        seconds = {"idle": IDLE_SECONDS, "head": HEAD_SECONDS, "body": BODY_SECONDS, "end": END_SECONDS}.get(waits)
        if seconds is not None:
            self.crowd.waiting[self] = None
            self._deadline = self.loop.call_later(seconds, self._too_late)

    def _stop_waiting(self) -> None:
        self.crowd.waiting.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if self.waits == "body":
            until = self._since + BODY_SECONDS + self._received / BODY_RATE
            if until > self.loop.time():
                self._deadline = self.loop.call_at(until, self._too_late)
                return
            self._refuse(408, "the request's body came too slowly")
        elif self.waits == "head" and self.parser.begun:
            self._refuse(408, f"the request's head did not come within {HEAD_SECONDS:g} s")
        elif self.waits == "end":
            self.transport.abort()
        else:
            self._close()

    # ---- ends ----------------------------------------------------------------------------------------------------------------

    def _refuse(self, status: int, reason: str) -> None:
        """Answer in place of the application, unless it has begun to answer, and end the connection.

        For a while, further data from the client is read and dropped. Closing at once would reset the connection, and the
        answer could be lost.
        """
        if self._ended or self.transport.is_closing():
            return
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not begun:
            body = json.dumps({"error": reason}).encode()
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
        self._ended = True
        self._leave_application()
        with suppress(OSError):  # the client has left already
            self.transport.write_eof()
        self.flow.resume_reading()
        self._wait("end")

    def _close(self) -> None:
        """Close once all written data is sent."""
        self._leave_application()
        self.transport.close()
        self._wait("end")

    def _leave_application(self) -> None:
        """Signal to the application that its client is gone."""
        self._ended = True
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()


def protocol_for(limit: int) -> Any:
    """Return uvicorn's connection class for a server of at most `limit` connections, half of them from one address."""
    return partial(Connection, crowd=Crowd(limit, max(1, limit // 2)))


def connections_possible() -> int:
    """Raise this process's limit of open files as far as allowed. Return how many connections it can then have."""
    try:
        import resource
    except ImportError:  # not on Windows
        return CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    room = CONNECTIONS if soft == resource.RLIM_INFINITY else soft - OWN_FILES
    return max(16, min(CONNECTIONS, room))
