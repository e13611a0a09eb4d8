"""OpenAI's image API: `POST /v1/images/generations`, `POST /v1/images/edits`, `GET /v1/models`.

Accepted are the arguments of `service.Ask` and those of `Options`, whose only values are the ones that change nothing.
Everything else is refused by name, including `mask`.
"""

import asyncio
import base64
import collections
import dataclasses
import hashlib
import hmac
import re
import secrets
import time
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import prometheus_client
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from blip3o_jax.app.batching import Batcher, Closing, Full, Job
from blip3o_jax.app.service import MAX_REFERENCES, Ask, Made, Service
from blip3o_jax.command_line import value_of
from blip3o_jax.config.schema import OneOf, from_dict
from blip3o_jax.data.images import load_image
from blip3o_jax.errors import UserError, require, told
from blip3o_jax.files import parse_json

RETRY_AFTER = 1  # seconds, in responses of a full or closing server
MAX_MESSAGE = 1000  # characters
ROOM = 2**28  # bytes of images that can be fetched for a while
PLACES = ("image", "image[]")  # names of uploads


@dataclasses.dataclass(frozen=True)
class Options(Ask):
    """Arguments of a request."""

    model: str | None = None  # the served one
    response_format: Annotated[str, OneOf("b64_json", "url")] = "b64_json"
    output_format: Annotated[str, OneOf("png")] = "png"
    quality: Annotated[str, OneOf("auto", "standard")] = "auto"
    background: Annotated[str, OneOf("auto", "opaque")] = "auto"
    moderation: Annotated[str, OneOf("auto", "low")] = "auto"
    stream: Annotated[bool, OneOf(False)] = False
    user: str | None = None


FIELDS = typing.get_type_hints(Options, include_extras=True)


class ApiError(Exception):
    """An error response to a client."""

    def __init__(self, status: int, kind: str, code: str, message: str, param: str | None = None):
        super().__init__(" ".join(message.encode("utf-8", "replace").decode().split())[:MAX_MESSAGE])
        self.status, self.kind, self.code, self.param = status, kind, code, param

    @property
    def response(self) -> Response:
        """Build the response in OpenAI's form."""
        body = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        headers = {"retry-after": str(RETRY_AFTER)} if self.status in (429, 503) else {}
        return JSONResponse({"error": body}, self.status, headers)


def error_of(error: Exception, asked: bool = True) -> ApiError:
    """Translate an exception for the client; unless `asked`, a UserError is about the result, not the request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Full):
        return ApiError(429, "rate_limit_error", "queue_full", "queue: full - expected room - try again shortly")
    if isinstance(error, Closing):
        return ApiError(503, "server_error", "shutting_down", "server: shutting down - expected a running one - retry")
    if isinstance(error, UserError) and asked:
        name = str(error).split(":")[0].split("[")[0]
        unknown = str(error).startswith(f"{name}: unknown key") and re.fullmatch(r"\w+", name, re.ASCII)
        param = name if name in (*FIELDS, "image") or unknown else None
        return ApiError(400, "invalid_request_error", "invalid_value", str(error), param)
    if isinstance(error, HTTPException):
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return ApiError(error.status_code, kind, "http_error", str(error.detail))
    return ApiError(500, "server_error", "failed", told(error))


class Shelf:
    """Store of PNGs under unguessable names that evicts the oldest ones."""

    def __init__(self, room: int = ROOM):
        self._room, self._secret = room, secrets.token_bytes()
        self._kept: collections.OrderedDict[str, bytes] = collections.OrderedDict()

    def put(self, png: bytes) -> str:
        """Store a PNG and return its name, which depends on its bytes alone."""
        name = hmac.new(self._secret, png, hashlib.sha256).hexdigest()[:32]
        self._kept[name] = png
        self._kept.move_to_end(name)
        while sum(map(len, self._kept.values())) > self._room and len(self._kept) > 1:
            self._kept.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        """Return the PNG of a name, or None if it was evicted."""
        return self._kept.get(name)


class Api:
    """Endpoints of the HTTP API for a model of a given name; `metrics` are shown at /metrics."""

    def __init__(self, service: Service, batcher: Batcher, model: str, metrics: prometheus_client.CollectorRegistry):
        self.service, self.batcher, self.model, self._metrics = service, batcher, model, metrics
        self.shelf = Shelf()
        self._created = int(time.time())
        self.routes = [
            Route("/v1/images/generations", self.generations, methods=["POST"]),
            Route("/v1/images/edits", self.edits, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/images/{name}.png", self.image),
            Route("/healthz", self.health),
            Route("/metrics", self.measures),
        ]
        known = tuple(self.routes)

        async def unknown(request: Request) -> Response:
            methods = [route.methods for route in known if route.matches(request.scope)[0] is Match.PARTIAL]
            got = f"{request.method} {request.url.path[:100]}"
            expected = " or ".join(methods[0] if methods else (route.path_format for route in known))
            raise HTTPException(405 if methods else 404, f"path: got {got} - expected {expected} - correct it")

        for path in ("/v1/{rest:path}", "/images/{rest:path}", "/models"):  # the last two: a base URL without /v1
            self.routes.append(Route(path, unknown, methods=["DELETE", "GET", "PATCH", "POST", "PUT"]))

    async def generations(self, request: Request) -> Response:
        """Generate images of a prompt."""
        _check_content_type(request, "application/json")
        values = parse_json(await request.body(), "body")
        return await self._answer(request, self._options(values), [])

    async def edits(self, request: Request) -> Response:
        """Edit uploaded images."""
        _check_content_type(request, "multipart/form-data")
        async with request.form(max_files=MAX_REFERENCES + 1, max_fields=len(FIELDS)) as form:
            values, uploads = _divided(form)
            options = self._options(values)
            images = [await run_in_threadpool(_image, await upload.read()) for upload in uploads]
        return await self._answer(request, options, images)

    async def models(self, request: Request) -> Response:
        """List the served model."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        """Describe a model by name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._described())

    async def image(self, request: Request) -> Response:
        """Send an image that an earlier response named."""
        png = self.shelf.get(request.path_params["name"])
        if png is None:
            raise HTTPException(404, "image: not kept any more - expected a recent one - make it again from its seed")
        return Response(png, media_type="image/png", headers={"cache-control": "private, max-age=3600"})

    async def health(self, request: Request) -> Response:
        """Say whether requests are accepted."""
        if self.batcher.closing or not self.batcher.works:
            raise error_of(Closing())
        return JSONResponse({"status": "ok"})

    async def measures(self, request: Request) -> Response:
        """Send the metrics in Prometheus' format."""
        text = prometheus_client.generate_latest(self._metrics)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    def _options(self, values: Mapping[str, Any]) -> Options:
        options = from_dict(Options, {name: value for name, value in values.items() if value is not None})
        self._check_model(options.model)
        return options

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.model):
            message = f"model: got {name[:100]!r} - expected {self.model} - use it, or leave it out"
            raise ApiError(404, "invalid_request_error", "model_not_found", message, "model")

    def _described(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self._created, "owned_by": "blip3o_jax"}

    async def _answer(self, request: Request, options: Options, references: Sequence[Image.Image]) -> Response:
        jobs = await run_in_threadpool(self.service.jobs, options, references)
        made = await until_gone(request, answers(self.batcher, jobs))
        pngs = await run_in_threadpool(lambda: [one.png for one in made])
        width, height = made[0].image.size
        if options.response_format == "url":
            data = [{"url": f"{request.base_url}images/{self.shelf.put(png)}.png"} for png in pngs]
        else:
            data = [{"b64_json": base64.b64encode(png).decode()} for png in pngs]
        data = [each | {"seed": one.record["seed"]} for each, one in zip(data, made)]
        fixed = {"background": "opaque", "output_format": "png", "quality": "standard"}
        return JSONResponse({"created": int(time.time()), "data": data, "size": f"{width}x{height}", **fixed})


async def answers(batcher: Batcher, jobs: Sequence[Job]) -> list[Made]:
    """Queue jobs and wait for them; drop them when cancelled or when one of them fails.

    Raises:
      Full, Closing: they were not queued.
      ApiError: one of them failed.
    """
    batcher.submit(jobs)
    try:
        return list(await asyncio.gather(*(asyncio.wrap_future(job.answer) for job in jobs)))
    except Exception as error:
        raise error_of(error, asked=False) from error
    finally:
        for job in jobs:
            job.drop()


async def until_gone(request: Request, work: Any) -> Any:
    """Await a coroutine; cancel it and raise ClientDisconnect when the client hangs up."""
    work, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_content_type(request: Request, expected: str) -> None:
    got = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if got != expected:
        message = f"content-type: got {got[:100] or 'none'} - expected {expected} - set this header"
        raise ApiError(400, "invalid_request_error", "content_type", message)


def _image(content: bytes) -> Image.Image:
    try:
        return load_image(content)
    except UserError as error:
        raise ApiError(400, "invalid_request_error", "invalid_image", str(error), "image") from error


def _divided(form: FormData) -> tuple[dict[str, Any], list[UploadFile]]:
    """Split a form into arguments and uploads.

    Raises:
      UserError: no upload, one in another field, an argument that is given twice or has another type.
    """
    values: dict[str, Any] = {}
    uploads = []
    for name, value in form.multi_items():
        if name in PLACES:
            require(isinstance(value, UploadFile), "image", "text", "a file", "upload one")
            uploads.append(value)
            continue
        shown, is_file = name[:100], isinstance(value, UploadFile)
        got, expected = "a file" if is_file else value[:100], "an argument of this endpoint"
        require(name in FIELDS, f"{shown}: unknown key", got, expected, "leave it out")
        require(not is_file, shown, got, "text", "send it as a field of its own")
        require(name not in values, shown, "two values", "one", "leave one out")
        values[name] = value_of(FIELDS[name], value, name)
    require(bool(uploads), "image", "none", "1 or more files", "upload one")
    return values, uploads
