"""A reward served over HTTP with JSON.

Request: POST {"prompts": [str], "images": [base64 of PNG], "metadata": [object]}, at most `batch_size` of each; if
prompts have reference images, also "references": [[base64 of PNG]].
Response: {"rewards": [number]}, one per image, in order. Redirections are not followed, and at most MAX_BYTES are read.
"""

import base64
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Annotated

import numpy as np
from PIL import Image

from blip3o_jax.config.schema import FLOAT32_MAX, Count, Positive, Range, convert_value
from blip3o_jax.errors import UserError
from blip3o_jax.files import parse_json
from blip3o_jax.types import RewardInput

BACKOFF = 1.0  # seconds before the first retry, doubled for every further one
MAX_BYTES = 2**20  # of a response
_PART = 2**16


class Remote:
    """Client of a reward service.

    Args:
      url: http or https address of the service.
      batch_size: maximum number of images per request.
      timeout: seconds per request.
      retries: retries of a failed request, at most 20.

    Raises:
      UserError: invalid arguments, no response, or an invalid response.
    """

    def __init__(self, url: str, batch_size: int = 32, timeout: float = 60.0, retries: int = 3):
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise UserError("remote reward", got=f"url {url!r}", expected="http:// or https://", do="correct it")
        self._url = url
        self._batch_size = convert_value(Count, batch_size, "remote reward: batch_size")
        self._timeout = convert_value(Positive, timeout, "remote reward: timeout")
        self._retries = convert_value(Annotated[int, Range(0, 20)], retries, "remote reward: retries")
        self._opener = urllib.request.build_opener(_NoRedirection)

    def __call__(self, inputs: Sequence[RewardInput]) -> np.ndarray:
        parts = (inputs[first : first + self._batch_size] for first in range(0, len(inputs), self._batch_size))
        return np.array([value for part in parts for value in self._ask(part)], np.float32)

    def _ask(self, inputs: Sequence[RewardInput]) -> list[float]:
        body = {
            "prompts": [one.prompt for one in inputs],
            "images": [_png(one.image) for one in inputs],
            "metadata": [dict(one.metadata) for one in inputs],
        }
        if any(one.references for one in inputs):
            body["references"] = [[_png(image) for image in one.references] for one in inputs]
        content = json.dumps(body).encode()
        for attempt in range(self._retries + 1):
            try:
                return self._parsed(self._post(content), len(inputs))
            except (OSError, http.client.HTTPException) as error:
                if attempt == self._retries:
                    raise UserError(
                        f"remote reward {self._url}: {error} after {attempt + 1} requests",
                        expected=f"an answer within {self._timeout:g} s",
                        do="look at the service, or raise timeout or retries",
                    ) from error
                time.sleep(BACKOFF * 2**attempt)
        raise AssertionError("unreachable")

    def _post(self, content: bytes) -> bytes:
        """Returns the body of the response, cut one byte after MAX_BYTES."""
        end = time.monotonic() + self._timeout
        try:
            request = urllib.request.Request(self._url, content, {"Content-Type": "application/json"})
        except ValueError as error:
            raise UserError(
                "remote reward", got=f"url {self._url!r} ({error})", expected="a URL", do="correct it"
            ) from error
        with self._opener.open(request, timeout=self._timeout) as response:
            body = b""
            while len(body) <= MAX_BYTES and (part := response.read1(min(_PART, MAX_BYTES + 1 - len(body)))):
                body += part
                if time.monotonic() > end:  # the timeout of the socket applies to each read
                    raise TimeoutError("the answer took too long")
        return body

    def _parsed(self, answer: bytes, count: int) -> list[float]:
        where, shown = f"remote reward {self._url}", answer[:100].decode(errors="replace")
        if len(answer) > MAX_BYTES:
            raise UserError(where, got=f"more than {MAX_BYTES:,} bytes, {shown!r} ...", expected="less", do="fix it")
        values = parse_json(answer, f"{where}: {shown!r}").get("rewards")
        if not (isinstance(values, list) and len(values) == count and all(map(_is_number, values))):
            raise UserError(
                where, got=f"{shown!r}", expected=f'{{"rewards": [...]}} with {count} finite numbers', do="fix it"
            )
        return values


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def http_error_302(self, request, file, code, message, headers):
        raise UserError(
            f"remote reward {request.full_url}",
            got=f"a redirection to {str(headers.get('Location'))[:200]!r}",
            expected="an answer",
            do="give the service's own url",
        )

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
