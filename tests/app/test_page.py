"""The page in a real browser: generate, edit twice, walk back, download, wrong file, stop, and a server that ends."""

import json
import re
import shutil

import pytest
from PIL import Image

from support.serving import Server

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("nicegui")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no chromium")]
LIMIT = 120_000  # milliseconds


@pytest.fixture(scope="module")
def server(golden_root, tmp_path_factory):
    checkpoint = golden_root / "edit_both" / "checkpoint"
    steps = "--num_inference_steps=2", "--num_inference_steps=1000"
    server = Server(tmp_path_factory.mktemp("page"), f"--checkpoint={checkpoint}", "--max_batch=1", *steps)
    yield server
    server.kill()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server):
    """A tab; it must load nothing from elsewhere."""
    page, elsewhere = browser.new_page(viewport={"width": 1000, "height": 800}), []
    page.set_default_timeout(LIMIT)
    page.on("request", lambda request: elsewhere.append(request.url))
    page.goto(server.url)
    yield page
    page.close()
    own = (server.url, server.url.replace("http", "ws"), "data:", "blob:")
    assert [url for url in elsewhere if not url.startswith(own)] == []


def paint(page, button, prompt, **fields):
    page.get_by_label("Prompt, or what to change").fill(prompt)
    for label, value in fields.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name=button).click()


def shown(page, label):
    """Waits for the line about the image that is shown."""
    page.locator(".status", has_text=re.compile(f"^{re.escape(label)}$")).wait_for()


def saved(page, path):
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    download.value.save_as(path)
    return Image.open(path)


def test_edits_of_edits_and_the_way_back(page, tmp_path):
    paint(page, "Generate", "a cat", Seed="5")
    shown(page, "1: a cat")
    first = saved(page, tmp_path / "1.png")
    assert json.loads(first.text["blip3o"])["seed"] == 5
    paint(page, "Edit image", "make it blue")
    shown(page, "2 (edit of 1): make it blue")
    paint(page, "Edit image", "add a hat")
    shown(page, "3 (edit of 2): add a hat")
    page.locator(".turn").nth(0).click()
    shown(page, "1: a cat")
    assert saved(page, tmp_path / "again.png").tobytes() == first.tobytes()
    paint(page, "Edit image", "make it red")
    shown(page, "4 (edit of 1): make it red")
    assert json.loads(saved(page, tmp_path / "4.png").text["blip3o"])["task"] == "edit"


def test_uploads_can_be_edited_and_wrong_files_are_told(page, tmp_path):
    (tmp_path / "wrong.png").write_bytes(b"no image")
    Image.linear_gradient("L").save(tmp_path / "right.png")
    assert page.get_by_role("button", name="Edit image").is_disabled()
    page.locator("input[type=file]").set_input_files(tmp_path / "wrong.png")
    page.get_by_text(re.compile("not a readable image")).wait_for()
    page.locator("input[type=file]").set_input_files(tmp_path / "right.png")
    shown(page, "1: right.png")
    paint(page, "Edit image", "make it blue")
    shown(page, "2 (edit of 1): make it blue")


def test_mistakes_are_told_in_one_line(page):
    paint(page, "Generate", " ")
    page.get_by_text(re.compile("prompt: got an empty one")).wait_for()
    paint(page, "Generate", "a cat", Seed="-1")
    page.get_by_text(re.compile("seed: got -1")).wait_for()


def test_work_is_shown_and_can_be_stopped_by_the_button_or_by_leaving(page, server, browser):
    page.get_by_label("Steps").click()
    page.get_by_role("option", name="1000").click()
    paint(page, "Generate", "a cat")
    page.get_by_text(re.compile(r"denoise \d+/1000")).wait_for()
    page.get_by_role("button", name="Stop").click()
    shown(page, "stopped")
    paint(page, "Generate", "a dog")
    page.get_by_text(re.compile(r"denoise \d+/1000")).wait_for()
    page.close()
    other = browser.new_page()
    other.goto(server.url)
    paint(other, "Generate", "a cat")
    shown(other, "1: a cat")
    other.close()


def test_a_server_that_ends_is_told(browser, server):
    page = browser.new_page()
    page.goto(server.url)
    page.get_by_role("button", name="Generate").wait_for()
    assert server.stop() == 0, server.output
    page.get_by_text(re.compile("Connection lost")).wait_for(timeout=LIMIT)
    assert "Traceback" not in server.output
