"""The endpoints on a live socket: what they answer, what they refuse and how, and clients that leave."""

import base64
import io
import json
import os
import random
import socket
import threading
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("nicegui")  # of the extra [app]; it brings what follows
import httpx

from blip3o_jax import Pipeline
from blip3o_jax.app import server
from blip3o_jax.app.service import Choices, Service
from fuzz import mutate

LIMIT = 60  # seconds for what takes one
KEY = "a key"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


class Gated(Service):
    """A service whose batches wait for a gate, one at a time, and fail for one prompt."""

    lanes = 1

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gate, self.running = threading.Event(), threading.Event()
        self.gate.set()

    def run(self, jobs):
        self.running.set()
        assert self.gate.wait(LIMIT)
        if any("fail" in job.what.prompts[0].prompt.text for job in jobs):
            raise RuntimeError("secret path")
        return super().run(jobs)


class Live:
    """A server in a thread."""

    def __init__(self, service, **limits):
        service.gate.set()
        service.running.clear()
        self.service = service
        self.application = server.Application(service, server.Limits(**limits), "golden")
        place, ready = server.bound("127.0.0.1", 0), threading.Event()
        self.url = f"http://127.0.0.1:{place.getsockname()[1]}"
        self._thread = threading.Thread(target=server.serve, args=(self.application, place, ready.set))
        self._thread.start()
        assert ready.wait(LIMIT)
        self.client = httpx.Client(base_url=self.url, timeout=LIMIT)

    def close(self):
        self.service.gate.set()
        self.application.batcher.close()
        self._thread.join(LIMIT)
        assert not self._thread.is_alive()

    def generate(self, **body):
        return self.client.post(GENERATIONS, json={"prompt": "a cat", "seed": 1} | body)

    def edit(self, files, **fields):
        return self.client.post(EDITS, files=files, data={"prompt": "make it blue"} | fields)

    def connection(self):
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)))

    def until(self, condition):
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture(scope="module")
def service(golden_root):
    pipeline = Pipeline.from_pretrained(golden_root / "edit_both" / "checkpoint", "float32")
    side = pipeline.config.image_size
    return Gated(pipeline, {"checkpoint": "golden"}, Choices(((side, side), (side, side // 2)), (2, 3), (2,)))


@pytest.fixture(scope="module")
def live(service):
    running = Live(service, upload=100_000)
    yield running
    running.close()


@pytest.fixture
def make(service):
    """Servers of other limits."""
    made = []

    def start(**limits):
        made.append(Live(service, **limits))
        return made[-1]

    yield start
    for each in made:
        each.close()


def png(side=32, **arguments):
    content = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(content, "PNG", **arguments)
    return content.getvalue()


def image_of(entry):
    return Image.open(io.BytesIO(base64.b64decode(entry["b64_json"])))


def error(response, status):
    """The error of an answer, which has OpenAI's form."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert "\n" not in found["message"] and len(found["message"]) <= 1000
    return found


def test_more_images_than_the_queue_ever_holds_are_refused_for_good(make):
    found = error(make(queue=2).generate(n=3), 400)
    assert found["param"] == "n" and "at most 2" in found["message"]


def test_generations_are_the_images_of_the_pipeline(live, service):
    body = live.generate(n=2, seed=4, num_inference_steps=3, quality=None).json()
    alone = service.pipeline("a cat", seed=4, num_images_per_prompt=2, num_inference_steps=3)
    assert body["size"] == "x".join(map(str, alone.images[0].size))
    for entry, image in zip(body["data"], alone.images, strict=True):
        assert entry["seed"] == 4
        assert np.abs(np.asarray(image_of(entry), int) - np.asarray(image, int)).max() <= 2
        assert json.loads(image_of(entry).text["blip3o"])["prompt"] == "a cat"


def test_edits_take_one_image_or_several_under_either_name(live, service):
    photo = Image.open(io.BytesIO(png()))
    [one] = live.edit({"image": png()}, seed="4").json()["data"]
    alone = service.pipeline("make it blue", image=photo, seed=4, num_inference_steps=2).images[0]
    assert np.abs(np.asarray(image_of(one), int) - np.asarray(alone, int)).max() <= 2
    [two] = live.edit([("image[]", png()), ("image[]", png(16))], n="1").json()["data"]
    assert image_of(two).size == alone.size


def test_an_image_can_be_fetched_from_its_address(live):
    [entry] = live.generate(response_format="url").json()["data"]
    fetched = live.client.get(entry["url"])
    assert fetched.headers["content-type"] == "image/png" and Image.open(io.BytesIO(fetched.content)).format == "PNG"
    error(live.client.get(entry["url"].replace("images/", "images/0")), 404)


def test_models_and_health(live):
    assert [model["id"] for model in live.client.get("/v1/models").json()["data"]] == ["golden"]
    assert live.client.get("/v1/models/golden").json()["object"] == "model"
    assert error(live.client.get("/v1/models/dall-e-3"), 404)["code"] == "model_not_found"
    assert live.client.get("/healthz").json() == {"status": "ok"}


REFUSED = [
    ({"prompt": 3}, "prompt"), ({"prompt": None}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": ["a"]}, "prompt"),
    ({"prompt": "x " * 2000}, "prompt"), ({"prompt": "x" * 50_000}, "prompt"), ({"prompt": "a\ud800"}, "prompt"),
    ({"n": 0}, "n"), ({"n": 11}, "n"), ({"n": 1.5}, "n"), ({"n": "2"}, "n"), ({"n": True}, "n"), ({"n": 10**30}, "n"),
    ({"size": "1024x1024"}, "size"), ({"size": 64}, "size"), ({"size": ""}, "size"),
    ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"), ({"seed": 0.5}, "seed"),
    ({"num_inference_steps": 30}, "num_inference_steps"), ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"guidance_scale": 1e9}, "guidance_scale"), ({"guidance_scale": "2"}, "guidance_scale"),
    ({"token_guidance_scale": [2]}, "token_guidance_scale"), ({"negative_prompt": 7}, "negative_prompt"),
    ({"quality": "hd"}, "quality"), ({"background": "transparent"}, "background"), ({"user": 3}, "user"),
    ({"response_format": "png"}, "response_format"), ({"output_format": "jpeg"}, "output_format"),
    ({"style": "vivid"}, "style"), ({"stream": True}, "stream"), ({"temperature": 0.5}, "temperature"),
    ({"sampler": "a:b"}, "sampler"), ({"a b": 1}, None), ({"best_of": 2}, "best_of"),
]  # fmt: skip


@pytest.mark.parametrize("change, param", REFUSED, ids=[f"{change}"[:40] for change, _ in REFUSED])
def test_wrong_arguments_are_told_by_name(live, change, param):
    body, headers = json.dumps({"prompt": "a cat"} | change), {"content-type": "application/json"}
    told = error(live.client.post(GENERATIONS, content=body, headers=headers), 400)
    assert told["type"] == "invalid_request_error" and told["param"] == param
    assert told["message"].startswith(next(iter(change)))


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b"null", b'"a"', b"\xff\xfe", b'{"prompt": NaN}', b'{"n": 1, "n": 1}', b"[" * 90_000,
     b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "guidance_scale": 1e999}',
     b'{"prompt": "a", "\\ud800": 1}', b'{"prompt": "a", "a\\nb": 1}', b'{"size": "' + b"9" * 9000 + b'"}'],
    ids=range(15),
)  # fmt: skip
def test_bodies_that_are_no_request_are_refused(live, content):
    error(live.client.post(GENERATIONS, content=content, headers={"content-type": "application/json"}), 400)


def test_mutated_requests_are_answered_or_refused_by_name(live):
    rng = random.Random(int(os.environ.get("FUZZ_SEED", "0")))
    body = {"prompt": "a cat", "n": 1, "size": "auto", "seed": 3, "guidance_scale": 2.0, "num_inference_steps": 2}
    form = live.client.build_request("POST", EDITS, files={"image": png()}, data={"prompt": "make it blue", "n": "1"})
    for number in range(200):
        if number % 2:
            path, kind, content = GENERATIONS, "application/json", mutate.json_text(rng, body)
        else:
            path, kind, content = EDITS, form.headers["content-type"], mutate.content(rng, form.read())
        content = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        response = live.client.post(path, content=content, headers={"content-type": kind})
        if response.status_code != 200:
            error(response, response.status_code)
            assert response.status_code in (400, 404), (number, content, response.text)


@pytest.mark.parametrize(
    "files, fields, param",
    [
        ({}, {}, None),
        ({"image": b""}, {}, "image"),
        ({"image": b"no image at all"}, {}, "image"),
        ({"image": png()[: len(png()) // 2]}, {}, "image"),
        ({"image": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"}, {}, "image"),
        ({"image": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, {}, "image"),
        ({"mask": png(), "image": png()}, {}, "mask"),
        ([("image", png())] * 5, {}, "image"),
        ([("image", png())] * 9, {}, None),
        ({"image": png()}, {"n": "two"}, "n"),
        ({"image": png()}, {"n": "99"}, "n"),
        ({"image": png()}, {"seed": "1.5"}, "seed"),
        ({"image": png()}, {"seed": ["1", "2"]}, "seed"),
        ({"image": png()}, {"prompt": ""}, "prompt"),
        ({"image": png()}, {"colour": "red"}, "colour"),
        ({"prompt": png(), "image": png()}, {}, "prompt"),
    ],
)
def test_wrong_uploads_are_refused(live, files, fields, param):
    assert error(live.edit(files, **fields), 400)["param"] == param


@pytest.mark.parametrize("size", [(20_000, 2_000), (600_000, 1)])
def test_an_image_of_too_many_pixels_or_extreme_aspect_is_refused(live, size):
    content = io.BytesIO()
    Image.new("1", size).save(content, "PNG")
    assert error(live.edit({"image": content.getvalue()}), 400)["param"] == "image"


@pytest.mark.parametrize("width, status", [(4096, 200), (4097, 400)])
def test_an_upload_has_at_most_the_pixels_of_a_square_of_4096(make, width, status):
    content = io.BytesIO()
    Image.new("1", (width, 4096)).save(content, "PNG")
    assert make().edit({"image": content.getvalue()}).status_code == status


@pytest.mark.parametrize(
    "content", [lambda: bytes(200_000), lambda: (bytes(20_000) for _ in range(10))], ids=["length", "chunks"]
)
@pytest.mark.parametrize("path, kind", [(GENERATIONS, "application/json"), (EDITS, "multipart/form-data; boundary=x")])
def test_a_body_that_is_too_large_is_refused(live, path, kind, content):
    response = live.client.post(path, content=content(), headers={"content-type": kind})
    told = error(response, 413 if response.status_code == 413 else 400)  # 400: no form from the first chunk on
    assert told["code"] in ("request_too_large", "http_error")
    assert live.client.get("/healthz").status_code == 200


@pytest.mark.parametrize("path", [GENERATIONS, EDITS, "/v1/models"])
def test_a_client_that_sends_far_too_much_still_gets_its_answer(live, path):
    """Closing a connection whose buffers are not empty resets it."""
    for content in (bytes(30_000_000), (bytes(1_000_000) for _ in range(30))):
        headers = {"content-type": "application/json" if path == GENERATIONS else "multipart/form-data; boundary=x"}
        response = live.client.post(path, content=content, headers=headers)
        assert response.status_code in (400, 405, 413)


@pytest.mark.parametrize(
    "method, path, status",
    [
        ("GET", GENERATIONS, 405),
        ("DELETE", EDITS, 405),
        ("DELETE", "/v1/models/golden", 405),
        ("POST", "/images/00.png", 405),
        ("POST", "/v1/images/variations", 404),
        ("GET", "/v1/", 404),
    ],
)
def test_other_paths_and_methods_are_told(live, method, path, status):
    told = error(live.client.request(method, path), status)["message"]
    assert ("/v1/models/{name} or" in told) == (status == 404)


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_other_content_types_are_refused(live, kind):
    for path in (GENERATIONS, EDITS):
        headers = {"content-type": kind} if kind else {}
        told = error(live.client.post(path, content=b"prompt=a", headers=headers), 400)["message"]
        assert (
            path == EDITS or told == f"content-type: got {kind or 'none'} - expected application/json - set this header"
        )


def test_with_a_key_only_health_and_named_images_are_for_all(make):
    guarded = make(api_key=KEY)
    right = {"authorization": f"Bearer {KEY}"}
    for wrong in (None, "Bearer wrong", f"Basic {KEY}", "Bearer"):
        headers = {"authorization": wrong} if wrong else {}
        for path in ("/v1/models", "/metrics", "/"):
            assert error(guarded.client.get(path, headers=headers), 401)["code"] == "invalid_api_key"
        error(guarded.client.post(GENERATIONS, json={"prompt": "a"}, headers=headers), 401)
    assert guarded.client.get("/healthz").status_code == 200
    assert guarded.client.get("/v1/models", headers=right).status_code == 200
    assert guarded.client.get("/metrics", auth=("anyone", KEY)).status_code == 200  # as browsers send it
    asked = guarded.client.post(GENERATIONS, json={"prompt": "a", "response_format": "url"}, headers=right)
    assert guarded.client.get(asked.json()["data"][0]["url"]).status_code == 200


class Background:
    """Requests that are under way."""

    def __init__(self, live, count, **body):
        self.answers = []
        ask = lambda: self.answers.append(live.generate(**body))  # noqa: E731
        self._threads = [threading.Thread(target=ask) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def join(self):
        for thread in self._threads:
            thread.join(LIMIT)
        return [answer.status_code for answer in self.answers]


@pytest.fixture
def held(make, service):
    """A server with one request at work and room for three more images."""
    running = make(queue=3)
    service.gate.clear()
    first = Background(running, 1)
    assert service.running.wait(LIMIT)
    return running, first


def test_a_full_queue_is_told_and_nothing_else_is_lost(held, service):
    live, first = held
    waiting = Background(live, 3)
    live.until(lambda: live.application.batcher.waiting == 3)
    refused = live.generate()
    assert error(refused, 429)["code"] == "queue_full" and refused.headers["retry-after"] == "1"
    error(live.generate(n=2), 429)
    service.gate.set()
    assert first.join() + waiting.join() == [200] * 4


def head(path, kind, length):
    lines = f"POST {path} HTTP/1.1", "host: x", f"content-type: {kind}", f"content-length: {length}", "", ""
    return "\r\n".join(lines).encode()


def test_a_client_that_hangs_up_frees_its_places(held, service):
    live, first = held
    body = json.dumps({"prompt": "a cat", "n": 3}).encode()
    with live.connection() as place:
        place.sendall(head(GENERATIONS, "application/json", len(body)) + body)
        live.until(lambda: live.application.batcher.waiting == 3)
    live.until(lambda: live.application.batcher.waiting == 0)
    after = Background(live, 3)
    live.until(lambda: live.application.batcher.waiting == 3)
    service.gate.set()
    assert first.join() + after.join() == [200] * 4
    assert 'status="499"} 1.0' in live.client.get("/metrics").text


@pytest.mark.parametrize("path, kind", [(GENERATIONS, "application/json"), (EDITS, "multipart/form-data; boundary=x")])
def test_a_client_that_hangs_up_within_its_body_is_no_error(live, caplog, path, kind):
    with live.connection() as place:
        place.sendall(head(path, kind, 100) + b"--x")
        time.sleep(0.2)
    counted = f'endpoint="{path}",status="499"}} 1.0'
    live.until(lambda: counted in live.client.get("/metrics").text)
    assert not caplog.records


def test_a_connection_stays_open_longer_than_the_pools_of_clients(live):
    """httpx, and with it the openai client, uses a connection again that was idle for up to 5 seconds."""
    with httpx.Client(base_url=live.url, limits=httpx.Limits(keepalive_expiry=60)) as client:
        network = client.get("/healthz").extensions["network_stream"]
        time.sleep(6)
        assert client.get("/healthz").extensions["network_stream"] is network


def test_a_closing_server_answers_what_waits_and_takes_no_more(held, service):
    live, first = held
    waiting = Background(live, 2)
    live.until(lambda: live.application.batcher.waiting == 2)
    live.application.batcher.close()
    assert error(live.generate(), 503)["code"] == "shutting_down"
    error(live.client.get("/healthz"), 503)
    service.gate.set()
    assert first.join() + waiting.join() == [200] * 3
    live.close()
    with pytest.raises(httpx.TransportError):
        live.client.get("/healthz")


def test_a_fault_is_told_without_its_inside_and_spoils_no_neighbour(held, service):
    live, first = held
    good, bad = Background(live, 1), Background(live, 1, prompt="fail")
    live.until(lambda: live.application.batcher.waiting == 2)
    service.gate.set()
    assert first.join() + good.join() + bad.join() == [200, 200, 500]
    assert error(bad.answers[0], 500)["type"] == "server_error"


def test_metrics_count_requests_and_batches(make):
    live = make()
    live.generate(n=2)
    live.generate(n=99)
    text = live.client.get("/metrics").text
    counts = {200: 1, 400: 1}
    lines = [f'blip3o_requests_total{{endpoint="{GENERATIONS}",status="{code}"}} {n}.0' for code, n in counts.items()]
    for line in (*lines, "blip3o_batch_images_sum 2.0", "blip3o_batch_images_count 1.0", "blip3o_queue_images 0.0"):
        assert line in text


def test_openai_s_client_works_unchanged(live):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
    options = {"n": 2, "size": "auto", "stream": False, "extra_body": {"seed": 3}}
    made = client.images.generate(model="golden", prompt="a cat", **options)
    assert len(made.data) == 2 and made.created and made.output_format == "png"
    content = base64.b64decode(made.data[0].b64_json)
    address = {"response_format": "url", "stream": False}  # of a form, where False is text
    edited = client.images.edit(image=("a.png", content), prompt="make it blue", **address)
    assert edited.data[0].url.startswith(live.url)
    assert len(client.images.edit(image=[content, content], prompt="join them").data) == 1
    assert [model.id for model in client.models.list()] == ["golden"]
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a", n=20)
    assert refused.value.param == "n" and refused.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="a", model="dall-e-3")


def test_a_client_that_has_not_sent_its_body_is_told_of_the_shutdown(make, monkeypatch, caplog):
    monkeypatch.setattr(server, "GRACE", 0.2)
    live = make()
    with live.connection() as place:
        place.sendall(head(GENERATIONS, "application/json", 100) + b"{")
        time.sleep(0.2)
        live.close()
        assert place.recv(1000).startswith(b"HTTP/1.1 503")
    assert not [record for record in caplog.records if record.exc_info]


def test_an_address_that_another_server_took_meanwhile_is_told_before_ready(service):
    first = server.bound("127.0.0.1", 0)
    second = server.bound("127.0.0.1", first.getsockname()[1])  # possible until one of them listens
    first.listen()
    application, ready = server.Application(service, server.Limits(), "golden"), threading.Event()
    with first, second, pytest.raises(server.UserError, match="address: got 127.0.0.1:"):
        server.serve(application, second, ready.set)
    assert not ready.is_set()
    application.batcher.close()


def test_an_address_in_use_is_one_line(live):
    with pytest.raises(server.UserError, match="address: got 127.0.0.1:"):
        server.bound("127.0.0.1", int(live.url.rpartition(":")[2]))
