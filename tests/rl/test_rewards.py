"""Rewards: what they are worth on images that are known, and what becomes of one that misbehaves."""

import base64
import dataclasses
import http.server
import io
import json
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from PIL import Image

from blip3o_jax.config.schema import from_dict
from blip3o_jax.demo import editing
from blip3o_jax.demo.world import edits, prompts
from blip3o_jax.demo.world.render import render
from blip3o_jax.errors import UserError
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.rl.judge import Judge, RewardConfig, judged
from blip3o_jax.rl.rewards import REWARDS, remote
from blip3o_jax.train import distributed
from blip3o_jax.types import RewardInput

NOISE = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def inputs_of(texts, images, metadata=None, references=None):
    """One input for every image."""
    metadata, references = metadata or [{}] * len(texts), references or [()] * len(texts)
    return [RewardInput(*row) for row in zip(texts, images, references, metadata, strict=True)]


NOISY = inputs_of(["a", "b", "c"], NOISE)


def score(name, inputs, **options):
    """What one reward says, checks included."""
    return Judge([RewardConfig(name, options=options)])(inputs)[0]


def with_images(inputs, images):
    """The same prompts with other images."""
    return [dataclasses.replace(one, image=image) for one, image in zip(inputs, images, strict=True)]


def world(task, count=6):
    samples = [prompts.sample(index, 0, {task: 1.0}) for index in range(count)]
    images = np.stack([render(sample.scene) for sample in samples])
    return inputs_of([sample.caption for sample in samples], images, [sample.metadata for sample in samples])


def blank(inputs):
    return with_images(inputs, [np.full_like(one.image, 255) for one in inputs])


@pytest.mark.parametrize("task", ["counting", "position", "color_attr"])
def test_composition_rewards_tell_the_right_image_from_another(task):
    inputs = world(task)
    for name in ("geneval", "geneval_strict", "geneval_official"):
        np.testing.assert_array_equal(score(name, inputs), 1)
    assert score("geneval", blank(inputs)).max() < 0.5
    np.testing.assert_array_equal(score("geneval_strict", blank(inputs)), 0)


def test_text_rewards_read_the_quoted_text():
    inputs = world("text")
    np.testing.assert_array_equal(score("text", inputs), 1)
    np.testing.assert_array_equal(score("text_exact", inputs), 1)
    other = score("text", with_images(inputs, [one.image for one in (*inputs[1:], inputs[0])]))
    assert (other < 1).any() and (other >= 0).all()
    inches = [dataclasses.replace(one, prompt=f'a 12" board beside a 5" one: {one.prompt}') for one in inputs]
    np.testing.assert_array_equal(score("text_exact", inches), 1)
    with pytest.raises(UserError, match="text ' board beside a 5'"):
        score("text_exact", inches, rule="reference")


KINDS = {"recolor": 1.0, "remove": 1.0}


def test_edit_rewards_want_the_change_and_nothing_else():
    made = [edits.sample(index, 3, KINDS) for index in range(6)]
    metadata = [{"edit": {"index": index, "seed": 3, "kinds": KINDS, "split": "train"}} for index in range(6)]
    assert [editing.find(entry["edit"]) for entry in metadata] == made
    texts = [edit.instruction for edit in made]
    after, before = (
        inputs_of(texts, [render(getattr(edit, which)) for edit in made], metadata) for which in ("target", "source")
    )
    np.testing.assert_array_equal(score("edit", after), 1)
    np.testing.assert_array_equal(score("edit", before), 0)
    graded = score("edit_graded", before)
    assert (graded > 0.1).all() and (graded < 1).all()
    np.testing.assert_array_equal(score("edit_graded", after), 1)
    brighter = with_images(after, [np.clip(one.image.astype(int) + 25, 0, 255).astype(np.uint8) for one in after])
    assert (score("edit", brighter) < 1).all()  # done, but the rest is not as it was
    for unharmed in (after, before):
        np.testing.assert_array_equal(score("edit_kept", unharmed), 1)
    assert (score("edit_kept", brighter) < 1).all()
    for name in ("edit_psnr", "edit_ssim"):
        assert (score(name, after) > score(name, brighter)).all()


def photograph():
    """A reference image without a scene behind it."""
    smooth = Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    return np.asarray(smooth.resize((96, 64), Image.Resampling.BICUBIC))


def test_what_is_kept_is_measured_on_a_real_reference():
    reference = photograph()
    local, drifted = reference.copy(), np.clip(reference.astype(int) + 30, 0, 255).astype(np.uint8)
    local[10:40, 5:50] = (255, 0, 0)  # a quarter of the image
    other = np.random.default_rng(2).integers(0, 256, reference.shape, dtype=np.uint8)
    references = [(reference, other)] * 4  # the first one counts
    inputs = inputs_of(["make it red"] * 4, [reference, local, drifted, other], references=references)
    kept, decibels, similar = (score(name, inputs) for name in ("edit_kept", "edit_psnr", "edit_ssim"))
    np.testing.assert_allclose(kept[:2], 1)
    np.testing.assert_allclose(decibels[:2], 60)
    np.testing.assert_allclose(similar[:2], 1, atol=1e-6)
    assert 0.2 < kept[2] < 0.6 and kept[3] < 0.2 and similar[3] < 0.5
    assert decibels[2] == pytest.approx(20 * np.log10(255 / 30), abs=0.5)
    assert score("edit_kept", inputs, untouched=0.9)[1] < 1  # an edit was to change a tenth at most


def test_a_reference_of_another_size_is_fitted_as_the_model_sees_it():
    reference = photograph()
    fitted = np.asarray(Image.fromarray(reference).resize((192, 128), Image.Resampling.BICUBIC))
    square = fitted[:, 32:160]
    got = score("edit_psnr", inputs_of(["x"], [square], references=[(reference,)]))
    assert got[0] > 40


def test_an_edit_of_a_real_reference_is_judged_by_what_metadata_ask_of_the_result():
    sample = prompts.sample(0, 0, {"colors": 1.0})
    image = render(sample.scene)
    inputs = inputs_of(["x"] * 2, [image, np.full_like(image, 255)], [sample.metadata] * 2, [(image,)] * 2)
    np.testing.assert_array_equal(score("edit", inputs), [1, 0])


def test_redness_and_brightness_are_of_the_image_alone():
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 255
    np.testing.assert_allclose(score("redness", inputs_of(["", ""], images)), [0, 1])
    np.testing.assert_allclose(score("brightness", inputs_of(["", ""], images)), [0, 1 / 3], rtol=1e-6)


def test_a_mixture_is_the_weighted_sum_and_keeps_its_parts():
    judge = Judge([RewardConfig("redness", 2.0), RewardConfig("brightness", -0.5, label="dark")])
    total, parts = judge(NOISY)
    assert list(parts) == judge.labels == ["redness", "dark"]
    np.testing.assert_allclose(total, 2 * parts["redness"] - 0.5 * parts["dark"], rtol=1e-6)
    assert total.dtype == np.float32


def test_a_reward_that_fails_on_one_process_fails_on_all(monkeypatch):
    gathered = []

    def process_allgather(failed):
        gathered.append(bool(failed))
        return np.array([failed, True])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", process_allgather)
    for name, message in (("redness", "rewards: another process has failed"), (f"{__name__}:broken", "raised OSError")):
        images = np.zeros((2, 4, 4, 3), np.uint8)
        with pytest.raises(UserError, match=message):
            judged(Judge([RewardConfig(name)]), [Prompt("t2i", "a")] * 2, images, jax.random.split(jax.random.key(0)))
    assert gathered == [False, True]


def test_every_process_scores_its_share_and_gets_all_scores(monkeypatch):
    scored, sent = [], []

    def reward(inputs):
        scored.append([one.prompt for one in inputs])
        return [len(one.prompt) + one.image.mean() for one in inputs]

    def gather(values, tiled):  # in turn the sums and the scores of each process
        sent.append(values)
        return np.concatenate(sent[1 - len(sent) % 2 :: 2])

    monkeypatch.setitem(REWARDS, "own", reward)
    asked = [Prompt("t2i", "a" * (1 + number)) for number in range(5)]
    images, keys = np.arange(5, dtype=np.uint8).repeat(12).reshape(5, 2, 2, 3), jax.random.split(jax.random.key(0), 5)
    inputs = Judge([RewardConfig("own", 0.5)]), asked, images, keys
    expected, parts = judged(*inputs)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(distributed, "raise_together", lambda what, error: None)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", gather)
    for process in range(3):  # the last one, for which the others have sent theirs, sees all
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        total, found = judged(*inputs)
    assert [len(texts) for texts in scored] == [5, 2, 2, 1] and sum(scored[1:], []) == scored[0]
    np.testing.assert_array_equal([total, found["own"]], [expected, parts["own"]])


def broken(inputs):
    raise OSError("no connection")


def test_rewards_of_kinds_score_only_prompts_of_these_kinds(capsys):
    signs, edit = world("text", 2), dataclasses.replace(NOISY[0], task="edit", references=(NOISE[1],))
    inputs = [signs[0], edit, signs[1]]
    judge = Judge([RewardConfig("text_exact", 0.5, kinds=("text",)), RewardConfig("edit_kept", 2.0, kinds=("edit",))])
    total, parts = judge(inputs)
    np.testing.assert_array_equal(parts["text_exact"], [1, np.nan, 1])
    np.testing.assert_array_equal(np.isnan(parts["edit_kept"]), [True, False, True])
    np.testing.assert_allclose(total, [0.5, 2 * parts["edit_kept"][1], 0.5], rtol=1e-6)
    with pytest.raises(UserError, match="prompt 'b': got no reward for its kind, t2i"):
        judge([*inputs, NOISY[1]])
    with pytest.raises(UserError, match="edit reward: prompt 'a': got .* 0 references"):  # only of what it scores
        judge.check([signs[0], dataclasses.replace(edit, references=())])
    judge.warn_unused(inputs)
    assert capsys.readouterr().err == ""
    judge.warn_unused(signs)
    assert capsys.readouterr().err == "warning: reward edit_kept scores prompts of kind edit; found: text\n"


def own(inputs, value=1.0, scale=1, shift=0):
    """A reward outside of the package."""
    return np.full(len(inputs), value, np.float32) * scale + shift


def old(prompts, images, metadata, value=0.0):
    """A reward as they were before they saw references."""
    assert images.shape == NOISE.shape and not images.flags.writeable and metadata == [{}] * 3
    return [len(prompts[0]) + value] * 3


class Own:
    """A reward with a check."""

    def __init__(self, least=0):
        self.least = least

    def check(self, inputs):
        if any(len(one.references) < self.least for one in inputs):
            raise UserError("own reward", got="no reference", expected="one", do="give it")

    def __call__(self, inputs):
        return [one.references[0].mean() for one in inputs]


def test_a_reward_of_ones_own_is_named_by_its_module(tmp_path, monkeypatch):
    _, parts = Judge([RewardConfig(f"{__name__}:own", options={"value": 3.0})])(NOISY)
    np.testing.assert_array_equal(parts["own"], 3)
    np.testing.assert_array_equal(score(f"{__name__}:old", NOISY, value=1.5), 2.5)
    seen = inputs_of(["a"], NOISE[:1], references=[(np.full((2, 2, 3), 9, np.uint8),)])
    np.testing.assert_array_equal(score(f"{__name__}:Own", seen, least=1), 9)
    with pytest.raises(UserError, match="own reward: got no reference"):
        score(f"{__name__}:Own", NOISY, least=1)
    (tmp_path / "of_mine.py").write_text("def reward(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for config, message in (
        (RewardConfig(f"{__name__}:nothing"), "nothing"),
        (RewardConfig("of_mine:reward"), "reward of_mine:reward: got SyntaxError"),
        (RewardConfig("rednes"), "did you mean redness"),
        (RewardConfig("redness", options={"hue": 1}), "reward redness: got .*'hue'"),
        (RewardConfig("text", options={"reeder": "world"}), "reward text: got .*'reeder'"),
        (RewardConfig("remote"), "reward remote: missing a required argument: 'url'"),
        (RewardConfig(f"{__name__}:own", options={"volume": 1}), "got .*'volume'"),
        (RewardConfig(f"{__name__}:anything"), "got a function of other arguments - expected \\(inputs\\)"),
        (RewardConfig("geneval", options={"detector": "yolo"}), "detector: got 'yolo'"),
        (RewardConfig("text", options={"reader": "tesseract"}), "reader: got 'tesseract'"),
        (RewardConfig("text", options={"rule": "quotes"}), "rule of quotations: got 'quotes'"),
        (RewardConfig("edit_kept", options={"untouched": 2}), "untouched: got 2.0"),
    ):
        with pytest.raises(UserError, match=message):
            Judge([config])
    with pytest.raises(UserError, match="none"):
        Judge([])
    with pytest.raises(UserError, match="no two alike"):
        Judge([RewardConfig("redness"), RewardConfig("redness")])


def anything(*arguments):
    """A function that may be a reward of either form."""


@pytest.mark.parametrize(
    "wrong", [{"weight": float("nan")}, {"weight": 1e39}, {"timeout": 0.0}, {"timeout": -1.0}, {"name": "blueness"}]
)
def test_values_out_of_range_are_refused_where_the_configuration_is_read(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        from_dict(RewardConfig, {"name": "redness", **wrong})


BROKEN = {
    "nan": (lambda inputs: np.array([0, np.nan, 1]), "got nan for image 1"),
    "huge": (lambda inputs: [0, 1e300, 1], "got inf for image 1"),
    "short": (lambda inputs: np.zeros(2), r"got shape \(2,\)"),
    "column": (lambda inputs: np.zeros((3, 1)), r"got shape \(3, 1\)"),
    "complex": (lambda inputs: np.zeros(3, complex), "got values of complex128"),
    "words": (lambda inputs: ["a", "b", "c"], "got values of <U1"),
    "nothing": (lambda inputs: None, "got values of object"),
    "error": (lambda inputs: 1 / 0, "raised ZeroDivisionError"),
    "exit": (lambda inputs: sys.exit(1), "raised SystemExit"),
    "paint": (lambda inputs: inputs[0].image.fill(0), "raised ValueError"),
    "hang": (lambda inputs: time.sleep(5), "no answer in 0.2 s"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_reward_that_misbehaves_is_named(kind, monkeypatch):
    function, message = BROKEN[kind]
    monkeypatch.setitem(REWARDS, kind, function)
    with pytest.raises(UserError, match=f"reward {kind}: {message}"):
        Judge([RewardConfig(kind, timeout=0.2)])(NOISY)


HANGING = """
import concurrent.futures, time, numpy as np
from blip3o_jax.errors import reported
from blip3o_jax.rl.judge import Judge, RewardConfig
from blip3o_jax.rl.rewards import REWARDS
from blip3o_jax.types import RewardInput
pool = concurrent.futures.ThreadPoolExecutor(1)
with reported():
    REWARDS["slow"] = lambda inputs: pool.submit(time.sleep, 60).result()
    Judge([RewardConfig("slow", timeout=0.2)])([RewardInput("a", np.zeros((2, 2, 3), np.uint8))])
"""


def test_a_reward_that_hangs_in_threads_of_its_own_does_not_hold_the_process():
    done = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=50)
    assert done.returncode == 2 and done.stderr.startswith("error: reward slow: no answer in 0.2 s")


def clause(label, **more):
    return {"tag": "counting", "prompt": "p", "include": [{"class": label, "count": 1, **more}]}


UNKNOWN = {
    "text": [
        ("a sign without quotes", {}, "expected a text in double quotes"),
        ('a man of 5\'10" beside a 12" plate', {}, "expected a text in double quotes"),
        ('a sign that says "Zug 7"', {}, "got the character '7', which the reader world cannot read .*rapidocr"),
        ("a sign “ÉTÉ”", {}, "got the character 'é'.*blip3o_jax\\[ocr\\]"),
        ('"CONGRATULATIONS"', {}, "got 15 characters, which the reader world"),
    ],
    "geneval": [
        ("p", {"tag": "counting"}, "GenEval metadata: got no include"),
        (
            "p",
            clause("bench"),
            "got class 'bench', which the detector verifier .*mask2former.*blip3o_jax\\[detector\\]",
        ),
        ("p", clause("star", color="white"), "got color 'white', which the detector verifier .* of your own"),
    ],
    "edit": [
        ("p", {"kind": "recolor"}, "0 references .* expected a reference image"),
        ("p", {"edit": "make it red"}, "expected a reference image"),
    ],
    "edit_graded": [("p", {}, "expected an edit of the demo world - use edit_kept")],
    "edit_kept": [("p", {}, "expected a reference image")],
}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in UNKNOWN.items() for case in cases])
def test_what_a_reward_cannot_judge_is_refused_before_anything_is_sampled(name, case):
    prompt, metadata, message = case
    with pytest.raises(UserError, match=message):
        Judge([RewardConfig(name)]).check([RewardInput(prompt, None, (), metadata)])


def test_an_edit_whose_outcome_nobody_knows_is_refused_by_the_reward_that_needs_it_alone():
    one = RewardInput("make the sky purple", None, (photograph(),))
    Judge([RewardConfig("edit_kept")]).check([one])
    with pytest.raises(UserError, match="'make the sky purple': .*use edit_kept with a reward that judges"):
        Judge([RewardConfig("edit")]).check([one])


def test_a_missing_extra_is_told_before_anything_is_sampled(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    judge = Judge([RewardConfig("geneval", options={"detector": "mask2former", "model": None})])
    with pytest.raises(UserError, match=r"pip install 'blip3o_jax\[detector\]'"):
        judge.check([RewardInput("p", None, (), clause("bench"))])


def test_a_detector_with_the_classes_is_named_before_it_is_loaded():
    mouse = clause("mouse")
    with pytest.raises(UserError, match="expected computer mouse - leave the prompt out, or name a detector"):
        Judge([RewardConfig("geneval", options={"detector": "mask2former"})]).check([RewardInput("p", None, (), mouse)])


TEXTS = {
    "html": b"<html>",
    "nan": b'{"rewards": [NaN, 0, 0]}',
    "infinite": b'{"rewards": [1e999, 0, 0]}',
    "large": b'{"rewards": [1e39, 0, 0]}',
    "digits": b'{"rewards": [' + b"9" * 5000 + b", 0, 0]}",
    "bool": b'{"rewards": [true, 0, 0]}',
    "null": b'{"rewards": [null, 0, 0]}',
    "list": b"[0, 0, 0]",
    "deep": b"[" * 100_000,
    "more": b'{"rewards": [0, 0, 0, 0]}',
}


class Service(http.server.BaseHTTPRequestHandler):
    """Answers with the mean of every picture; `plan` says how often it fails first."""

    plan: list[str] = []
    sizes: list[int] = []
    bodies: list[dict] = []
    sent = 0

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        action = self.plan.pop(0) if self.plan else "answer"
        pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in body["images"]]
        self.sizes.append(len(pictures))
        self.bodies.append(body)
        if action == "hang":
            time.sleep(1)
            return
        answer = {"rewards": [float(picture.mean()) for picture in pictures]}
        answer = {"short": {"rewards": []}, "words": {"rewards": ["a"] * len(pictures)}}.get(action, answer)
        if action in ("file:///etc/hostname", "/elsewhere"):
            self.send_response(302)
            self.send_header("Location", action)
            return self.end_headers()
        self.send_response(500 if action == "fail" else 200)
        self.end_headers()
        if action == "endless":
            while not self.wfile.write(b" " * 65536) == 0:
                Service.sent += 65536
        if action == "drip":
            for _ in range(20):
                self.wfile.write(b" ")
                time.sleep(0.1)
        self.wfile.write(TEXTS.get(action) or json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Service.plan, Service.sizes, Service.bodies, Service.sent = [], [], [], 0
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def ask(url, **options):
    return score("remote", inputs_of(["a"] * 3, NOISE, [{"n": 1}] * 3), url=url, **options)


def test_a_service_gets_images_in_batches_and_is_asked_again(service):
    Service.plan = ["fail", "hang"]
    np.testing.assert_allclose(ask(service, batch_size=2, timeout=0.5), NOISE.mean(axis=(1, 2, 3)), rtol=1e-6)
    assert sorted(Service.sizes) == [1, 2, 2, 2] and "references" not in Service.bodies[0]


def test_a_service_gets_the_references_of_edits(service):
    score("remote", inputs_of(["a", "b"], NOISE[:2], references=[(NOISE[2],), ()]), url=service)
    (first,), none = Service.bodies[0]["references"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(first)))), NOISE[2])
    assert none == []


@pytest.mark.parametrize("answer", ["short", "words", *TEXTS])
def test_an_answer_of_another_kind_is_shown(service, answer):
    Service.plan = [answer]
    with pytest.raises(UserError, match=r"remote reward http://127.*(with 3 finite numbers|a JSON object)"):
        ask(service)


@pytest.mark.parametrize("place", ["file:///etc/hostname", "/elsewhere"])
def test_a_redirection_is_not_followed(service, place):
    Service.plan = [place]
    with pytest.raises(UserError, match=f"got a redirection to .*{place}"):
        ask(service)


def test_of_an_endless_answer_no_more_than_the_limit_is_read(service):
    Service.plan = ["endless"]
    with pytest.raises(UserError, match="got more than 1,048,576 bytes"):
        ask(service)
    assert Service.sent < 2**25  # what the sockets between hold


def test_an_answer_that_drips_is_given_up(service):
    Service.plan = ["drip"]
    with pytest.raises(UserError, match="took too long after 1 requests"):
        ask(service, timeout=0.3, retries=0)


def test_a_service_that_fails_is_given_up(service):
    Service.plan = ["fail"] * 5
    with pytest.raises(UserError, match="after 2 requests"):
        ask(service, retries=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "file:///etc/passwd"}, "expected http"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"timeout": -1}, "timeout: got -1"),
        ({"retries": 1000}, "retries: got 1000"),
    ],
)
def test_options_of_a_service_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ask(**{"url": "http://127.0.0.1:9/", **options})
