"""Build the HTTP application: paths, limits, the bearer token, and JSON errors with a reason."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_rm.bearer import is_authorized
from qlora_rm.config import ServeConfig
from qlora_rm.serving.batcher import Batcher, Closed, QueueFull, ScoringFailed
from qlora_rm.serving.bodies import Bodies, read_body
from qlora_rm.serving.fair import client_of
from qlora_rm.serving.hosts import AllowedHosts
from qlora_rm.serving.lanes import SHORT, Lanes
from qlora_rm.serving.metrics import Metrics
from qlora_rm.serving.protocols import Asked, Reader
from qlora_rm.serving.sizes import Long, Refused

T = TypeVar("T")

RETRY_AFTER = {"Retry-After": "1"}
CLIENT_CLOSED_REQUEST = 499
"""Status of a request whose client disconnected, as in nginx. No client sees it; metrics count it."""


@dataclass(frozen=True)
class Service:
    """One model behind HTTP.

    Attributes:
        about: what `/health` reports of the model.
        token: the token that requests must carry; None for none.
        lanes: the threads that parse and tokenize.
        bodies: the count of bytes of large bodies in memory.
        hosts: allowed names in Host and Origin; None where they are not checked.
    """

    reader: Reader
    batcher: Batcher
    metrics: Metrics
    config: ServeConfig
    about: dict[str, Any]
    lanes: Lanes
    bodies: Bodies
    token: str | None = None
    hosts: AllowedHosts | None = None

    def app(self) -> ASGIApp:
        """Return the application, which counts its answers."""
        scored = {"/score": self.reader.score, "/get_reward": self.reader.get_reward, "/classify": self.reader.classify}
        routes = [Route(path, self._scoring(read), methods=["POST"]) for path, read in scored.items()]
        routes += [Route("/health", self._health), Route("/metrics", self._metrics_text)]
        handlers: dict[Any, Any] = {Refused: _refusal, HTTPException: _http_error, Exception: _defect}
        app = Starlette(routes=routes, exception_handlers=handlers)
        guarded = app if self.hosts is None else self.hosts.guard(app)
        return Measured(guarded, self.metrics, {*scored, "/health", "/metrics"})

    async def _health(self, request: Request) -> Response:
        """Answer 200 while requests are served. Needs no token. Is reachable only after the golden scores matched."""
        if self.batcher.alive:
            return JSONResponse({"status": "ready", **self.about})
        return JSONResponse({"status": "failed" if self.batcher.death else "stopping"}, 503)

    async def _metrics_text(self, request: Request) -> Response:
        self._authorize(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _scoring(self, read: Callable[[bytes, int | None], Asked]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            self._authorize(request)
            try:
                async with asyncio.timeout(self.config.request_timeout):
                    return JSONResponse(await self._answer(request, read))
            except TimeoutError:
                raise Refused(503, f"no answer within {self.config.request_timeout:g} s", RETRY_AFTER) from None
            except ClientDisconnect:
                self.metrics.abandoned.inc()
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            except asyncio.CancelledError:  # `stop_timeout` is over
                return _error(503, "the server stopped before there was an answer", {"Connection": "close"})

        return endpoint

    def _authorize(self, request: Request) -> None:
        if self.token and not is_authorized(request.headers.getlist("authorization"), self.token):
            raise Refused(
                401, "this server asks for a token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    async def _answer(self, request: Request, read: Callable[[bytes, int | None], Asked]) -> dict[str, Any]:
        client = client_of(request.client.host) if request.client else ""
        with self.batcher.expecting(), self.bodies.of(client) as held:
            body = await read_body(request, self.config.max_body_bytes, held)
            asked = await self._read(request, read, body, client)
            try:
                answer = self.batcher.submit(asked.sequences, client)
            except QueueFull:
                raise _queue_full() from None
            except Closed:
                raise Refused(503, "the server is stopping") from None
            del body
        try:
            scores = await _unless_gone(request, answer)
        except ScoringFailed as error:
            raise Refused(500, f"the model failed on this request: {error}") from error
        except QueueFull:  # displaced by a client with less queued work
            raise _queue_full() from None
        except Closed:
            raise Refused(503, "the model has failed and the server is stopping") from None
        if not all(map(math.isfinite, scores)):
            raise Refused(500, "a score is not a number; check the model by `qlora-rm verify`")
        for score in scores:
            self.metrics.scores.observe(score)
        return asked.answer(scores)

    async def _read(
        self, request: Request, read: Callable[[bytes, int | None], Asked], body: bytes, client: str
    ) -> Asked:
        """Read the sequences of a request. The body's size picks the lane; more than `SHORT` to tokenize moves it to the long one."""
        try:
            return await _unless_gone(request, self.lanes.submit(partial(read, body, SHORT), client, len(body)))
        except Long as long:
            return await _unless_gone(request, self.lanes.submit(partial(read, body, None), client, long.cost))


def _queue_full() -> Refused:
    return Refused(503, "the queue is full; try again", RETRY_AFTER)


async def _unless_gone(request: Request, answer: "Future[T]") -> T:
    """Return the result of `answer`. Queued work is dropped when its client disconnects or waits too long.

    Raises:
        ClientDisconnect: the client has disconnected.
    """
    result = asyncio.wrap_future(answer)
    left = asyncio.ensure_future(_departure(request))
    either: set[asyncio.Future[Any]] = {result, left}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        left.cancel()
        result.cancel()  # no effect on a future that is done


async def _departure(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refusal(request: Request, refused: Refused) -> Response:
    return _error(refused.status, refused.reason, refused.headers)


async def _http_error(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail, error.headers)


async def _defect(request: Request, error: Exception) -> Response:
    return _error(500, "a defect of the server; its log has the traceback")


def _error(status: int, reason: str, headers: Any = None) -> JSONResponse:
    return JSONResponse({"error": reason}, status, headers)


class Measured:
    """Counts and times the answers of `app`. All unknown paths are counted as one."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: set[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"] if scope["path"] in self.paths else "other"
        began = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(path=path, status=message["status"]).inc()
                self.metrics.seconds.labels(path=path).observe(time.perf_counter() - began)
            await send(message)

        return await self.app(scope, receive, counted)
