"""The server as a process: from the command line to an exit code, with OpenAI's client and a signal in between."""

import base64
import concurrent.futures
import io
import signal
import socket
import subprocess
import sys

import pytest
from PIL import Image

from support.processes import ROOT
from support.serving import LIMIT, Server

pytest.importorskip("nicegui")
pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path, "--max_batch=2", "--num_inference_steps=4", "--api_key=a key")
    yield server
    server.kill()


def run(*flags, **options):
    command = [sys.executable, "-m", "blip3o_jax.app", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False, **options)


def test_sigterm_answers_what_waits_and_ends_with_0(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="a key", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="expected /v1/images/generations"):
        openai.OpenAI(base_url=server.url, api_key="a key", max_retries=0).images.generate(prompt="a")
    made = client.images.generate(prompt="a photo of a red circle", extra_body={"seed": 1})
    image = base64.b64decode(made.data[0].b64_json)
    assert Image.open(io.BytesIO(image)).size == (64, 64)
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(client.images.edit, image=image, prompt="change the red circle to blue") for _ in range(6)]
        while 'endpoint="/v1/images/edits",status="200"' not in metrics(client):
            assert not all(one.done() for one in asked)
        server.process.send_signal(signal.SIGTERM)
        assert [len(one.result().data) for one in asked] == [1] * 6
    assert server.process.wait(LIMIT) == 0
    assert "Traceback" not in server.output


def metrics(client):
    return client._client.get(str(client.base_url).replace("/v1/", "/metrics"), headers=client.auth_headers).text


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--port=70000"], "--port: got 70000"),
        (["--port="], "--port: got ''"),
        (["--max_batch=0"], "--max_batch: got 0"),
        (["--host=no.such.host.invalid"], "address: got no.such.host.invalid:7860"),
        (["--port=0", "--size=63x64"], "size: got '63x64'"),
        (["--port=0", "--checkpoint=/nowhere"], "/nowhere"),
        (["--api_keys=a"], "did you mean --api_key?"),
    ],
)
def test_mistakes_are_one_line(flags, told):
    done = run(*flags)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert told in done.stderr


def test_a_port_in_use_is_told_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = run(f"--port={other.getsockname()[1]}")
    assert done.returncode == 2 and "in use" in done.stderr and done.stdout == ""


def test_without_the_extra_it_says_what_to_install(tmp_path):
    (tmp_path / "nicegui.py").write_text("raise ModuleNotFoundError(\"No module named 'nicegui'\", name='nicegui')")
    path = f"{tmp_path}:{ROOT}"
    done = run("--port=0", env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)})
    assert done.returncode == 2 and "no nicegui - expected the extra [app]" in done.stderr
