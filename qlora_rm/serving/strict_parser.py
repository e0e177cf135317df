"""A stricter h11, for a server behind proxies that read the same requests."""

import re
from typing import Any

import h11

FOLDED = re.compile(rb"\n[ \t]")
END_OF_HEAD = re.compile(rb"\n\r?\n")


class StrictParser(h11.Connection):
    """h11 that also refuses what proxies and servers read differently: folded lines, and two lengths of one body."""

    refusal: h11.RemoteProtocolError | None = None
    begun: bool = False
    """Whether part of the next request's head has arrived."""

    def next_event(self) -> Any:
        before = self.their_state
        try:
            if before is h11.IDLE:
                self._check_lines(self.trailing_data[0])
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_request(event)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event

    def _check_lines(self, data: bytes) -> None:
        self.begun = bool(data)
        end = END_OF_HEAD.search(data)
        if FOLDED.search(data, 0, end.end() if end else len(data)):
            raise h11.RemoteProtocolError("a header line is folded")


def _check_request(request: h11.Request) -> None:
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError(f"HTTP/{request.http_version.decode()} is not spoken here")
    names = {name for name, _ in request.headers}
    if b"transfer-encoding" in names and b"content-length" in names:
        raise h11.RemoteProtocolError("Content-Length beside Transfer-Encoding")
    if b"transfer-encoding" in names and request.http_version < b"1.1":
        raise h11.RemoteProtocolError("Transfer-Encoding in HTTP/1.0")
