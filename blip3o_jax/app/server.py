"""The process that serves: guards of every request, metrics, start and end."""

import base64
import binascii
import dataclasses
import hmac
import logging
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import prometheus_client
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from blip3o_jax.app.api import Api, ApiError, Gone, error_of
from blip3o_jax.app.batching import Batcher, Closing, Full, Job
from blip3o_jax.app.service import Made, Service
from blip3o_jax.errors import UserError, told

MAX_PIXELS = 2**24  # of an upload: half a gigabyte would be decoded of what Pillow allows by itself
GRACE = 5  # seconds for the last answers to be sent
HUNG_UP = 499  # counted as the status of requests whose clients did not wait
TOLD = (ApiError, UserError, Full, Closing, HTTPException, Gone, Exception)
LOG = logging.getLogger("blip3o_jax.app")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the server takes."""

    queue: int = 64  # images that wait
    upload: int = 20 * 2**20  # bytes of a request
    api_key: str | None = None  # None: everybody may ask


class Metrics:
    """What /metrics tells."""

    def __init__(self, waiting: Callable[[], int]):
        """
        Args:
          waiting: images in the queue.
        """
        self.registry = registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "blip3o_requests", "Requests answered", ("endpoint", "status"), registry=registry
        )
        self.seconds = prometheus_client.Histogram(
            "blip3o_request_seconds", "Time to the answer", ("endpoint",), registry=registry
        )
        self.batches = prometheus_client.Histogram(
            "blip3o_batch_images", "Images of a batch", buckets=(1, 2, 4, 8, 16, 32), registry=registry
        )
        self.batch_seconds = prometheus_client.Counter("blip3o_batch_seconds", "Time in batches", registry=registry)
        queue = prometheus_client.Gauge("blip3o_queue_images", "Images that wait", registry=registry)
        queue.set_function(waiting)
        prometheus_client.ProcessCollector(registry=registry)


def counted(run: Callable[[Sequence[Job]], list[Made]], metrics: Callable[[], Metrics]) -> Callable:
    """`run`, with its batches counted."""

    def count(jobs: Sequence[Job]) -> list[Made]:
        start = time.perf_counter()
        made = run(jobs)
        metrics().batches.observe(len(jobs))
        metrics().batch_seconds.inc(time.perf_counter() - start)
        return made

    return count


class Guard:
    """Stands before the whole application: key, size of the body, errors in OpenAI's form, metrics."""

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, endpoints: Sequence[str]):
        self.app, self._limits, self._metrics, self._endpoints = app, limits, metrics, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one connection."""
        if scope["type"] == "lifespan" or self._may_pass(scope):
            handled = self._limited if scope["type"] == "http" else self.app
            await handled(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            message = "api_key: missing or wrong - expected the server's - send it as a Bearer token"
            error = ApiError(401, "invalid_request_error", "invalid_api_key", message)
            response = error.response
            if not scope["path"].startswith("/v1/"):
                response.headers["www-authenticate"] = 'Basic realm="blip3o_jax: any name, the key as password"'
            await response(scope, receive, send)
            self._metrics.requests.labels(self._endpoint(scope), 401).inc()

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

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        left, status, started = self._limits.upload, 0, time.perf_counter()

        async def counted_receive() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _too_large(self._limits.upload)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if not length.isdigit() or int(length) > self._limits.upload:
                raise _too_large(self._limits.upload)
            await self.app(scope, counted_receive, watched_send)
        except ApiError as error:
            await error.response(scope, receive, watched_send)
        except Exception as error:  # the client was told
            LOG.error("a request failed: %s", told(error), exc_info=error)
        finally:
            endpoint = self._endpoint(scope)
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)

    def _endpoint(self, scope: Scope) -> str:
        return scope["path"] if scope["path"] in self._endpoints else "other"


def _too_large(limit: int) -> ApiError:
    message = f"body: too large - expected at most {limit:,} bytes - send fewer or smaller images"
    return ApiError(413, "invalid_request_error", "request_too_large", message)


class Application:
    """Everything behind the socket.

    Args:
      service: the model.
      limits: see there.
      model: its name.
      page: adds the page to the application; None: the API alone.
    """

    def __init__(
        self,
        service: Service,
        limits: Limits,
        model: str,
        page: Callable[[FastAPI, Api, int], None] | None = None,
    ):
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow warns from there on, and refuses twice as many
        self.batcher = Batcher(counted(service.run, lambda: metrics), service.choices.batches[-1], limits.queue)
        metrics = Metrics(lambda: self.batcher.waiting)
        api = Api(service, self.batcher, model, metrics.registry)
        inner = FastAPI(openapi_url=None, exception_handlers=dict.fromkeys(TOLD, _told))
        inner.router.routes.extend(api.routes)
        if page is not None:
            page(inner, api, limits.upload)
        self.asgi = Guard(inner, limits, metrics, [route.path for route in api.routes])


async def _told(request: Any, error: Exception) -> Response:
    return Response(status_code=HUNG_UP) if isinstance(error, Gone) else error_of(error).response


class _Server(uvicorn.Server):
    """Answers what waits before it ends; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, batcher: Batcher, ready: Callable[[], None]):
        super().__init__(config)
        self._batcher, self._ready = batcher, ready

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.should_exit = self.force_exit = self._batcher.closing
        self._batcher.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (self._batcher.closing and self._batcher.join(0))


def bound(host: str, port: int) -> socket.socket:
    """A socket that clients cannot reach yet.

    Raises:
      UserError: an address that cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        raise UserError(
            "address", got=f"{host}:{port} ({error.strerror})", expected="a free one", do="choose another --port"
        ) from error
    return place


def serve(application: Application, place: socket.socket, ready: Callable[[], None]) -> None:
    """Serves until SIGTERM or Ctrl-C, then answers what waits.

    Args:
      place: a bound socket.
      ready: called when clients can connect.
    """
    config = uvicorn.Config(
        application.asgi, log_level="warning", timeout_graceful_shutdown=GRACE, server_header=False, lifespan="on"
    )
    _Server(config, application.batcher, ready).run([place])
