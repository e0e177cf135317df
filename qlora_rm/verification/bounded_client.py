"""An HTTP client for untrusted servers: every answer has limits on time and size, and no redirect is followed."""

import json
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self

import httpx2

from qlora_rm.errors import first_line

CONNECT_SECONDS, ANSWER_SECONDS, ALL_SECONDS = 10.0, 120.0, 1800.0
"""Time limits for a connection, for a complete answer, and for all answers together."""
ANSWER_BYTES = 8_000_000
"""Largest answer, after decompression. The scores of the largest request take less than 1 MB."""


class NoAnswer(Exception):
    """The server gave no scores; the message gives the reason and a remedy."""


@dataclass(frozen=True)
class Answer:
    """A complete answer.

    Attributes:
        location: target of a redirect.
    """

    status: int
    phrase: str
    location: str | None
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode("utf-8", errors="replace")

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            ValueError: it is not JSON, or too deeply nested.
        """
        try:
            return json.loads(self.content.decode("utf-8"))
        except RecursionError:
            raise ValueError("too deeply nested") from None


class BoundedClient:
    """A client of one server, for use in a `with` block.

    Arguments:
        root: paths are relative to this URL.
    """

    def __init__(self, root: httpx2.URL, headers: dict[str, str]) -> None:
        timeout = httpx2.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        self._client = httpx2.Client(base_url=root, headers=headers, timeout=timeout, follow_redirects=False)
        self._end = time.monotonic() + ALL_SECONDS
        self._stuck = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if not self._stuck:  # another thread, which ends with the process, still uses the connection
            self._client.close()

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """Return the server's answer; `body` is sent as JSON.

        Raises:
            NoAnswer: there is no answer, or it is too late or too large.
        """
        seconds = min(ANSWER_SECONDS, self._end - time.monotonic())
        if seconds <= 0:
            raise NoAnswer(f"{path}: the server took {ALL_SECONDS:g} s for all answers so far; it is too slow to check")
        answer: Future[Answer] = Future()
        threading.Thread(target=self._run, args=(answer, method, path, body), daemon=True).start()
        try:
            return answer.result(seconds)  # the library's timeouts apply to each read, not to the answer
        except (TimeoutError, httpx2.TimeoutException):
            self._stuck = not answer.done()
            raise NoAnswer(f"{path}: no answer in time") from None
        except httpx2.HTTPError as error:
            raise NoAnswer(f"{path}: {first_line(error)}; is the server running there?") from None

    def _run(self, answer: "Future[Answer]", method: str, path: str, body: Any) -> None:
        try:
            answer.set_result(self._asked(method, path, body))
        except BaseException as error:  # raised again by `ask`
            answer.set_exception(error)

    def _asked(self, method: str, path: str, body: Any) -> Answer:
        with self._client.stream(method, path, json=body) as response:
            content = bytearray()
            for part in response.iter_bytes():
                content += part
                if len(content) > ANSWER_BYTES:
                    raise NoAnswer(f"{path}: the answer is larger than {ANSWER_BYTES} bytes")
            location = response.headers.get("location") if response.is_redirect else None
            return Answer(response.status_code, response.reason_phrase, location, bytes(content))
