"""The HTTP application: paths, limits, the bearer token, and errors as JSON with a reason."""

import asyncio
import hmac
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qlora_rm.bearer import authorization
from qlora_rm.config import ServeConfig
from qlora_rm.serve.batcher import Batcher, Closed, QueueFull, ScoringFailed
from qlora_rm.serve.metrics import Metrics
from qlora_rm.serve.protocols import Asked, Reader, Refused

RETRY_AFTER = {"Retry-After": "1"}
CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; metrics count it, under the number nginx gave it."""


@dataclass(frozen=True)
class Service:
    """One model behind HTTP.

    Attributes:
        about: what `/health` tells of the model.
        token: what requests must carry, None for none.
        tokenizing: a single thread: tokenizers are not made for several, and the interpreter runs one at a time anyway.
    """

    reader: Reader
    batcher: Batcher
    metrics: Metrics
    config: ServeConfig
    about: dict[str, Any]
    token: str | None = None
    tokenizing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))

    def app(self) -> ASGIApp:
        """The application, counting its answers."""
        scored = {"/score": self.reader.score, "/get_reward": self.reader.get_reward, "/classify": self.reader.classify}
        routes = [Route(path, self._scoring(read), methods=["POST"]) for path, read in scored.items()]
        routes += [Route("/health", self._health), Route("/metrics", self._metrics_text)]
        handlers: dict[Any, Any] = {Refused: _refusal, HTTPException: _http_error, Exception: _defect}
        app = Starlette(routes=routes, exception_handlers=handlers)
        return Measured(app, self.metrics, {*scored, "/health", "/metrics"})

    async def _health(self, request: Request) -> Response:
        """200 while requests are served. It needs no token, and is answered only after the golden scores were right."""
        if self.batcher.alive:
            return JSONResponse({"status": "ready", **self.about})
        return JSONResponse({"status": "failed" if self.batcher.death else "stopping"}, 503)

    async def _metrics_text(self, request: Request) -> Response:
        self._authorize(request)
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def _scoring(self, read: Callable[[bytes], Asked]) -> Callable[[Request], Awaitable[Response]]:
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

        return endpoint

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self.token and not hmac.compare_digest(given.encode(), authorization(self.token).encode()):
            raise Refused(
                401, "this server asks for a token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    async def _answer(self, request: Request, read: Callable[[bytes], Asked]) -> dict[str, Any]:
        with self.batcher.expecting():
            body = await self._body(request)
            asked = await asyncio.get_running_loop().run_in_executor(self.tokenizing, read, body)
            try:
                answer = self.batcher.submit(asked.sequences)
            except QueueFull:
                raise Refused(503, "the queue is full; try again", RETRY_AFTER) from None
            except Closed:
                raise Refused(503, "the server is stopping") from None
        try:
            scores = await _unless_gone(request, answer)
        except ScoringFailed as error:
            raise Refused(500, f"the model failed on this request: {error}") from error
        except Closed:
            raise Refused(503, "the model has failed and the server is stopping") from None
        if not all(map(math.isfinite, scores)):
            raise Refused(500, "a score is not a number; check the model by `qlora-rm verify`")
        for score in scores:
            self.metrics.scores.observe(score)
        return asked.answer(scores)

    async def _body(self, request: Request) -> bytes:
        """The body, no more of it read than is allowed."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"the body is {kind or 'of no type'}; send JSON with Content-Type: application/json")
        limit = self.config.max_body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise Refused(413, f"the body is larger than {limit} bytes", {"Connection": "close"})
        return bytes(body)


async def _unless_gone(request: Request, answer: "Future[list[float]]") -> list[float]:
    """The scores; work that is not begun is dropped when its client leaves, or waits too long.

    Raises:
        ClientDisconnect: nobody waits any more.
    """
    scores = asyncio.wrap_future(answer)
    left = asyncio.ensure_future(_departure(request))
    either: set[asyncio.Future[Any]] = {scores, left}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not scores.done():
            raise ClientDisconnect
        return scores.result()
    finally:
        left.cancel()
        scores.cancel()  # of a future that is done, or of work that is begun, this changes nothing


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
    """Counts and times the answers of `app`; paths it does not have are counted as one."""

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
