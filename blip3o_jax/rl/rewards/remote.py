"""A reward behind HTTP: JSON with PNG pictures out, JSON with numbers back.

Request: POST {"prompts": [str], "images": [base64 of PNG], "metadata": [object]}, at most `batch_size` of each.
Response: {"rewards": [number]}, as many, in order. Nothing that is received is executed.
"""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip3o_jax.errors import UserError

BACKOFF = 1.0  # seconds before the first repetition, doubled for every further one


def remote(
    prompts: Sequence[str],
    images: np.ndarray,
    metadata: Sequence[Mapping[str, Any]],
    url: str,
    batch_size: int = 32,
    timeout: float = 60.0,
    retries: int = 3,
) -> np.ndarray:
    """Asks a service.

    Args:
      prompts, images, metadata: as for every reward.
      url: of the service, http or https.
      batch_size: pictures of a request.
      timeout: seconds until a request is given up.
      retries: repetitions of a request that failed.

    Raises:
      UserError: the service does not answer, or answers something else.
    """
    if not url.startswith(("http://", "https://")):
        raise UserError("remote reward", got=f"url {url!r}", expected="http:// or https://", do="correct it")
    values: list[float] = []
    for first in range(0, len(prompts), batch_size):
        part = slice(first, first + batch_size)
        body = {
            "prompts": list(prompts[part]),
            "images": [_png(image) for image in images[part]],
            "metadata": [dict(entry) for entry in metadata[part]],
        }
        values += _ask(url, json.dumps(body).encode(), len(body["prompts"]), timeout, retries)
    return np.array(values, np.float32)


def _png(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _ask(url: str, body: bytes, count: int, timeout: float, retries: int) -> list[float]:
    for attempt in range(retries + 1):
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return _parsed(response.read(), url, count)
        except (OSError, urllib.error.URLError) as error:
            if attempt == retries:
                raise UserError(
                    f"remote reward {url}: {error} after {retries + 1} requests",
                    expected=f"an answer within {timeout:g} s",
                    do="look at the service, or raise timeout or retries",
                ) from error
            time.sleep(BACKOFF * 2**attempt)
    raise AssertionError("unreachable")


def _parsed(answer: bytes, url: str, count: int) -> list[float]:
    try:
        values = json.loads(answer)["rewards"]
        good = isinstance(values, list) and len(values) == count
        good = good and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        shown = answer[:100].decode(errors="replace")
        raise UserError(
            f"remote reward {url}",
            got=f"{shown!r}",
            expected=f'{{"rewards": [...]}} with {count} numbers',
            do="mend it",
        )
    return values
