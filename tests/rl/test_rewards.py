"""Rewards: what they are worth on pictures that are known, and what becomes of one that misbehaves."""

import base64
import http.server
import io
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from blip3o_jax.errors import UserError
from blip3o_jax.rl.judge import Judge, RewardConfig
from blip3o_jax.rl.rewards import CHECKS, REWARDS, editing, remote
from blip3o_jax.world import edits, prompts
from blip3o_jax.world.render import render

NOISE = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def world(task, count=6):
    samples = [prompts.sample(index, 0, {task: 1.0}) for index in range(count)]
    pictures = np.stack([render(sample.scene) for sample in samples])
    return [sample.caption for sample in samples], pictures, [sample.metadata for sample in samples]


@pytest.mark.parametrize("task", ["counting", "position", "color_attr"])
def test_composition_rewards_tell_the_right_picture_from_another(task):
    texts, pictures, metadata = world(task)
    for name in ("geneval", "geneval_strict", "geneval_official"):
        np.testing.assert_array_equal(REWARDS[name](texts, pictures, metadata), 1)
    blank = np.full_like(pictures, 255)
    assert REWARDS["geneval"](texts, blank, metadata).max() < 0.5
    np.testing.assert_array_equal(REWARDS["geneval_strict"](texts, blank, metadata), 0)


def test_text_rewards_read_the_quoted_text():
    texts, pictures, metadata = world("text")
    np.testing.assert_array_equal(REWARDS["text"](texts, pictures, metadata), 1)
    np.testing.assert_array_equal(REWARDS["text_exact"](texts, pictures, metadata), 1)
    other = REWARDS["text"](texts, np.roll(pictures, 1, axis=0), metadata)
    assert (other < 1).any() and (other >= 0).all()


def test_edit_rewards_want_the_change_and_nothing_else():
    made = [edits.sample(index, 3, {"recolor": 1.0, "remove": 1.0}) for index in range(6)]
    metadata = [
        {"edit": {"index": index, "seed": 3, "kinds": {"recolor": 1.0, "remove": 1.0}, "split": "train"}}
        for index in range(6)
    ]
    assert [editing.find(entry) for entry in metadata] == made
    texts = [edit.instruction for edit in made]
    after, before = (np.stack([render(getattr(edit, which)) for edit in made]) for which in ("target", "source"))
    np.testing.assert_array_equal(REWARDS["edit"](texts, after, metadata), 1)
    np.testing.assert_array_equal(REWARDS["edit"](texts, before, metadata), 0)
    graded = REWARDS["edit_graded"](texts, before, metadata)
    assert (graded > 0.1).all() and (graded < 1).all()
    np.testing.assert_array_equal(REWARDS["edit_graded"](texts, after, metadata), 1)
    brighter = np.clip(after.astype(int) + 25, 0, 255).astype(np.uint8)
    assert (REWARDS["edit"](texts, brighter, metadata) < 1).all()  # done, but the rest is not as it was
    for unharmed in (after, before):
        np.testing.assert_array_equal(REWARDS["edit_kept"](texts, unharmed, metadata), 1)
    assert (REWARDS["edit_kept"](texts, brighter, metadata) < 1).all()
    assert (REWARDS["edit_psnr"](texts, after, metadata) > REWARDS["edit_psnr"](texts, brighter, metadata)).all()


def test_redness_and_brightness_are_of_the_picture_alone():
    picture = np.zeros((2, 4, 4, 3), np.uint8)
    picture[1, ..., 0] = 255
    np.testing.assert_allclose(REWARDS["redness"](["", ""], picture, [{}, {}]), [0, 1])
    np.testing.assert_allclose(REWARDS["brightness"](["", ""], picture, [{}, {}]), [0, 1 / 3], rtol=1e-6)


def test_a_mixture_is_the_weighted_sum_and_keeps_its_parts():
    judge = Judge([RewardConfig("redness", 2.0), RewardConfig("brightness", -0.5, label="dark")])
    total, parts = judge(["a"] * 3, NOISE, [{}] * 3)
    assert list(parts) == judge.labels == ["redness", "dark"]
    np.testing.assert_allclose(total, 2 * parts["redness"] - 0.5 * parts["dark"], rtol=1e-6)
    assert total.dtype == np.float32


def own(texts, images, metadata, value=1.0):
    """A reward outside of the package."""
    return np.full(len(texts), value, np.float32)


def test_a_reward_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
    judge = Judge([RewardConfig(f"{__name__}:own", options={"value": 3.0})])
    total, parts = judge(["a"] * 3, NOISE, [{}] * 3)
    np.testing.assert_array_equal(parts["own"], 3)
    with pytest.raises(UserError, match="nothing"):
        Judge([RewardConfig(f"{__name__}:nothing")])
    (tmp_path / "of_mine.py").write_text("def reward(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"reward of_mine:reward: SyntaxError .* - expected an importable function"):
        Judge([RewardConfig("of_mine:reward")])
    with pytest.raises(UserError, match="did you mean redness"):
        Judge([RewardConfig("rednes")])
    with pytest.raises(UserError, match="none"):
        Judge([])
    with pytest.raises(UserError, match="no two alike"):
        Judge([RewardConfig("redness"), RewardConfig("redness")])


BROKEN = {
    "nan": (lambda *_: np.array([0, np.nan, 1]), "got nan for picture 1"),
    "short": (lambda *_: np.zeros(2), r"got shape \(2,\)"),
    "column": (lambda *_: np.zeros((3, 1)), r"got shape \(3, 1\)"),
    "words": (lambda *_: ["a", "b", "c"], "got values of <U1"),
    "nothing": (lambda *_: None, "got values of object"),
    "error": (lambda *_: 1 / 0, "raised ZeroDivisionError"),
    "exit": (lambda *_: sys.exit(1), "raised SystemExit"),
    "paint": (lambda prompts, images, _: images.fill(0), "raised ValueError"),
    "hang": (lambda *_: time.sleep(5), "no answer in 0.2 s"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_reward_that_misbehaves_is_named(kind):
    function, message = BROKEN[kind]
    judge = Judge([RewardConfig(kind, timeout=0.2)], {kind: function})
    with pytest.raises(UserError, match=f"reward {kind}: {message}"):
        judge(["a"] * 3, NOISE, [{}] * 3)


HANGING = """
import concurrent.futures, time, numpy as np
from blip3o_jax.errors import reported
from blip3o_jax.rl.judge import Judge, RewardConfig
pool = concurrent.futures.ThreadPoolExecutor(1)
with reported():
    rewards = {"slow": lambda *_: pool.submit(time.sleep, 60).result()}
    Judge([RewardConfig("slow", timeout=0.2)], rewards)(["a"], np.zeros((1, 2, 2, 3), np.uint8), [{}])
"""


def test_a_reward_that_hangs_in_threads_of_its_own_does_not_hold_the_process():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=50)
    assert done.returncode == 2 and done.stderr.startswith("error: reward slow: no answer in 0.2 s")


def test_prompts_that_cannot_be_judged_are_refused():
    for name, metadata in (("text", {}), ("geneval", {"tag": "counting"}), ("edit", {"kind": "recolor"})):
        with pytest.raises(UserError, match="a sign without quotes"):
            Judge([RewardConfig(name)]).check(["a sign without quotes"], [metadata])
    assert CHECKS.keys() <= REWARDS.keys()


class Service(http.server.BaseHTTPRequestHandler):
    """Answers with the mean of every picture; `plan` says how often it fails first."""

    plan: list[str] = []
    sizes: list[int] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        action = self.plan.pop(0) if self.plan else "answer"
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in body["images"]]
        self.sizes.append(len(pictures))
        if action == "hang":
            time.sleep(1)
            return
        answer = {"rewards": [float(picture.mean()) for picture in pictures]}
        answer = {"short": {"rewards": []}, "words": {"rewards": ["a"] * len(pictures)}}.get(action, answer)
        self.send_response(500 if action == "fail" else 200)
        self.end_headers()
        self.wfile.write(b"<html>" if action == "html" else json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Service.plan, Service.sizes = [], []
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def ask(url, **options):
    return REWARDS["remote"](["a"] * 3, NOISE, [{"n": 1}] * 3, url=url, **options)


def test_a_service_gets_pictures_in_batches_and_is_asked_again(service):
    Service.plan = ["fail", "hang"]
    np.testing.assert_allclose(ask(service, batch_size=2, timeout=0.5), NOISE.mean(axis=(1, 2, 3)), rtol=1e-6)
    assert sorted(Service.sizes) == [1, 2, 2, 2]


@pytest.mark.parametrize("answer", ["short", "words", "html"])
def test_an_answer_of_another_kind_is_shown(service, answer):
    Service.plan = [answer]
    with pytest.raises(UserError, match=r"remote reward http://127.*with 3 numbers"):
        ask(service)


def test_a_service_that_fails_is_given_up(service):
    Service.plan = ["fail"] * 5
    with pytest.raises(UserError, match="after 2 requests"):
        ask(service, retries=1)
    with pytest.raises(UserError, match="expected http"):
        ask("file:///etc/passwd")
