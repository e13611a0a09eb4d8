"""The server process: application, start and shutdown."""

import functools
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from blip3o_jax.app.api import Api, ApiError, error_of
from blip3o_jax.app.batching import Batcher, Closing, Full, Job
from blip3o_jax.app.guard import Guard, Limits, Metrics
from blip3o_jax.app.service import Made, Service
from blip3o_jax.errors import UserError

MAX_PIXELS = 2**24  # of an upload; Pillow's own limit allows images of half a gigabyte
GRACE = 5  # seconds for the last answers to be sent
KEEP_ALIVE = 75  # seconds; a server must outlast its clients' pools, or it closes connections that they use again
REST = 1, 10  # seconds without a job before larger batches are compiled, and the longest wait for them
HUNG_UP = 499  # status of requests whose client has disconnected, for the metrics
HANDLED = (ApiError, UserError, Full, Closing, HTTPException, ClientDisconnect, Exception)


class Application:
    """Queue, API and page of a service for a model of a given name; `page` adds the page, None: only the API."""

    def __init__(
        self,
        service: Service,
        limits: Limits,
        model: str,
        page: Callable[[FastAPI, Api, int], None] | None = None,
    ):
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many
        self.service = service
        metrics = Metrics(lambda: self.batcher.waiting, lambda: service.batches[-1])

        def run(jobs: Sequence[Job]) -> list[Made]:
            start = time.perf_counter()
            made = service.run(jobs)
            metrics.batches.observe(len(jobs))
            metrics.batch_seconds.inc(time.perf_counter() - start)
            return made

        self.batcher = Batcher(run, service.fits, limits.queue, service.lanes)
        api = Api(service, self.batcher, model, metrics.registry)
        inner = FastAPI(openapi_url=None, exception_handlers=dict.fromkeys(HANDLED, _response_of))
        inner.router.routes.extend(api.routes)
        if page is not None:
            page(inner, api, limits.upload)
        self.asgi = Guard(inner, limits, metrics, [route.path for route in api.routes])


async def _response_of(request: Any, error: Exception) -> Response:
    return Response(status_code=HUNG_UP) if isinstance(error, ClientDisconnect) else error_of(error).response


class _Server(uvicorn.Server):
    """Server that drains its queue on a signal; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, application: Application, ready: Callable[[], None]):
        super().__init__(config)
        self._batcher, self._service, self._ready = application.batcher, application.service, ready

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.should_exit = self.force_exit = self._batcher.closing
        self._batcher.close()
        self._service.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or (self._batcher.closing and self._batcher.join(0))


def bound(host: str, port: int) -> socket.socket:
    """Bind a socket, which does not listen yet; raise UserError if the address is not available."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        place = socket.socket(family, kind, protocol)
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind(address)
    except OSError as error:
        raise _unavailable(f"{host}:{port}", error) from error
    return place


def _unavailable(address: str, error: OSError) -> UserError:
    got = f"{address} ({error.strerror})"
    return UserError("address", got=got, expected="a free one of this machine", do="choose another --port or --host")


def serve(application: Application, place: socket.socket, ready: Callable[[], None]) -> None:
    """Serve on a bound socket until SIGTERM or Ctrl-C, then drain the queue.

    `ready` is called when clients can connect. Larger batches are compiled in the background.

    Raises:
      UserError: another process has listened on the address since it was bound.
    """
    try:
        place.listen()
    except OSError as error:
        raise _unavailable("{}:{}".format(*place.getsockname()), error) from error
    config = uvicorn.Config(
        application.asgi,
        log_level="warning",
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
        lifespan="on",
    )
    rest = functools.partial(application.batcher.rest, *REST)
    growth = threading.Thread(target=application.service.grow, args=(rest,), name="compile", daemon=True)

    def started() -> None:
        ready()
        growth.start()

    _Server(config, application, started).run([place])
    if growth.ident is not None:
        application.service.stop()
        growth.join()  # a process that ends while XLA compiles may crash
