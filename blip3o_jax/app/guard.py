"""Checks of every connection: API key and body size; metrics."""

import asyncio
import base64
import binascii
import dataclasses
import hmac
import logging
import time
from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip3o_jax.app.api import ApiError, error_of
from blip3o_jax.app.batching import Closing
from blip3o_jax.errors import told

DISCARD = 2**28  # most bytes of a rejected body that are read, since a client may miss a response while it sends
LOG = logging.getLogger("blip3o_jax.app")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of the server."""

    queue: int = 64  # queued images
    upload: int = 20 * 2**20  # bytes of a request body
    api_key: str | None = None  # None: no key is required


class Metrics:
    """Metrics of the server."""

    def __init__(self, waiting: Callable[[], int], largest: Callable[[], int]):
        """The functions return the numbers of images in the queue and in the largest compiled batch."""
        self.registry = CollectorRegistry()
        to = {"registry": self.registry}
        sizes = (1, 2, 4, 8, 16, 32)
        self.requests = Counter("blip3o_requests", "Requests answered", ("endpoint", "status"), **to)
        self.seconds = Histogram("blip3o_request_seconds", "Time to the answer", ("endpoint",), **to)
        self.batches = Histogram("blip3o_batch_images", "Images of a batch", buckets=sizes, **to)
        self.batch_seconds = Counter("blip3o_batch_seconds", "Time in batches", **to)
        Gauge("blip3o_queue_images", "Queued images", **to).set_function(waiting)
        Gauge("blip3o_largest_batch", "Images of the largest batch", **to).set_function(largest)
        ProcessCollector(**to)


class Guard:
    """ASGI middleware in front of the whole application."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, endpoints: Sequence[str]):
        self._app, self._limits, self._metrics, self._endpoints = app, limits, metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection."""
        if scope["type"] == "http":
            await self._request(scope, _Body(scope, receive, self._limits.upload), send)
        elif scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _may_pass(self, scope: Scope) -> bool:
        if self._limits.api_key is None or scope["path"] == "/healthz" or scope["path"].startswith("/images/"):
            return True  # names of images cannot be guessed
        header = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, given = header.partition(b" ")
        if kind.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        return hmac.compare_digest(given.strip(), self._limits.api_key.encode())

    async def _request(self, scope: Scope, body: "_Body", send: Send) -> None:
        status, started = 0, time.perf_counter()

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await body.discard()
            await send(message)

        try:
            body.check_length()
            if self._may_pass(scope):
                await self._app(scope, body.receive, watched_send)
            else:
                await _keyless(scope)(scope, body.receive, watched_send)
        except ApiError as error:
            await error.response(scope, body.receive, watched_send)
        except asyncio.CancelledError:  # the server ends before the request is complete
            if not status:
                status = 503
                await error_of(Closing()).response(scope, body.receive, send)
        except Exception as error:  # the client has got a response
            LOG.error("a request failed: %s", told(error), exc_info=error)
        finally:
            endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)


def _keyless(scope: Scope) -> ASGIApp:
    """Build the response to a request without the key; outside /v1 it makes browsers ask for one."""
    message = "api_key: missing or wrong - expected the server's - send it as a Bearer token"
    response = ApiError(401, "invalid_request_error", "invalid_api_key", message).response
    if not scope["path"].startswith("/v1/"):
        response.headers["www-authenticate"] = 'Basic realm="blip3o_jax: any name, the key as password"'
    return response


class _Body:
    """The body of a request, up to a limit."""

    def __init__(self, scope: Scope, receive: Receive, limit: int):
        self._headers, self._receive, self._limit = dict(scope["headers"]), receive, limit
        self._length, self._complete = 0, False

    def check_length(self) -> None:
        """Raise ApiError if the declared length exceeds the limit."""
        length = self._headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        """Receive the next part; raise ApiError if the body exceeds the limit."""
        message = await self._next()
        if self._length > self._limit:
            raise self._too_large()
        return message

    async def discard(self) -> None:
        """Read the rest: closing a connection that still receives would lose the response."""
        waits = b"expect" in self._headers and not self._length  # the client waits for "100 Continue"
        while not self._complete and not waits and self._length < DISCARD:
            await self._next()

    async def _next(self) -> Message:
        message = await self._receive()
        self._length += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        return message

    def _too_large(self) -> ApiError:
        message = f"body: too large - expected at most {self._limit:,} bytes - send fewer or smaller images"
        return ApiError(413, "invalid_request_error", "request_too_large", message)
