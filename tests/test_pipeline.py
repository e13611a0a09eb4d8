"""Whole pictures: what one depends on (prompt, references, seed, settings) and what it must not depend on."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from blip3o_jax import Pipeline, reconstruction
from blip3o_jax.config import EditConfig
from blip3o_jax.data import images
from blip3o_jax.errors import UserError
from blip3o_jax.generate import ar, paint, prompts, stages
from blip3o_jax.generate.engine import Runner
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.settings import Settings, check_requests, guides_tokens, make_settings
from blip3o_jax.models import blip3o, tiling
from blip3o_jax.objectives import grpo
from blip3o_jax.rl.config import RenderConfig
from blip3o_jax.rl.samplers import TokenSampler
from blip3o_jax.sharding import make_mesh

TOLERANCE = 2  # of 255, on pixels
FAST = {"num_inference_steps": 3, "guidance_scale": 30.0}  # strong guidance: random weights heed conditions little
MIXED = {"data": 2, "fsdp": 2, "tensor": 2}
MESHES = [MIXED, *(pytest.param({axis: 8}, marks=pytest.mark.slow) for axis in MIXED)]
CAPTIONS = ["a cat", "two dogs", "three red cubes on a table", "a sign that says open", "the sea", "fog", "x " * 40,
            "a long caption, " * 9]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_length():
    """Prompts of every length share their compiled programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "BUCKET", 256)
        yield


def load(golden_root, name, mesh=None) -> Pipeline:
    return Pipeline.from_pretrained(golden_root / name / "checkpoint", "float32", mesh)


@pytest.fixture(scope="module")
def t2i(golden_root) -> Pipeline:
    return load(golden_root, "t2i")


@pytest.fixture(scope="module")
def batch(t2i):
    """All captions at once."""
    return t2i(CAPTIONS, **FAST)


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    """Two smooth pictures of other shapes than the model's."""
    y, x = np.mgrid[0:48, 0:64] / 64
    first = np.stack([x, y, 1 - x], axis=-1)
    second = np.stack([np.sin(9 * x) ** 2, x * y, np.cos(7 * y) ** 2], axis=-1)
    return [Image.fromarray((255 * pixels).astype(np.uint8)) for pixels in (first, second[:, :40])]


def assert_same(output, expected, rows):
    """The pictures of `output` are rows of `expected`."""
    np.testing.assert_array_equal(output.token_ids, expected.token_ids[rows])
    np.testing.assert_allclose(output.log_probs, expected.log_probs[rows], atol=1e-4)
    for picture, row in zip(output.images, rows, strict=True):
        assert distance(picture, expected.images[row]) <= TOLERANCE


def distance(first: Image.Image, second: Image.Image) -> int:
    return int(np.abs(np.asarray(first, np.int32) - np.asarray(second, np.int32)).max())


def test_tokens_of_a_batch_are_guided_if_those_of_one_of_its_tasks_are(t2i):
    captions, edits = (
        dataclasses.replace(t2i.config, **{name: 2.0}) for name in ("token_guidance_scale", "edit_token_guidance_scale")
    )
    assert guides_tokens(captions, None, False) and guides_tokens(edits, None, True)
    assert not guides_tokens(edits, None, False) and not guides_tokens(captions, 1.0, True)


def test_a_picture_is_the_same_with_parameters_laid_out_for_a_gpu(t2i, batch):
    params = paint.laid_out(t2i.config, t2i.params, types.SimpleNamespace(platform="gpu"))
    assert type(params["dit"]["blocks"]["feed_forward"]["expand"]["kernel"]) is list
    assert_same(Pipeline(t2i.config, params, t2i.tokenizer)(CAPTIONS[0], **FAST), batch, [0])
    assert paint.laid_out(t2i.config, params, jax.devices()[0]) is params
    assert paint.laid_out(t2i.config, t2i.params, types.SimpleNamespace(platform="tpu")) is t2i.params


@pytest.mark.parametrize("row", [0, 7])
def test_a_picture_is_the_same_alone_and_among_longer_and_shorter_prompts(t2i, batch, row):
    assert_same(t2i(CAPTIONS[row], **FAST), batch, [row])


def test_padding_changes_nothing(t2i, batch, monkeypatch):
    monkeypatch.setattr(prompts, "BUCKET", 64)
    assert_same(t2i(CAPTIONS[0], **FAST), batch, [0])


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_eight_devices_paint_what_one_paints(golden_root, batch, shape):
    assert_same(load(golden_root, "t2i", make_mesh(shape))(CAPTIONS, **FAST), batch, range(8))


def test_prompts_beyond_a_batch_are_painted_in_a_further_one(t2i, batch):
    parts = list(t2i.stream([Prompt("t2i", text) for text in (*CAPTIONS, CAPTIONS[3])], **FAST))
    assert [len(part.images) for part in parts] == [8, 1]
    assert_same(parts[1], batch, [3])


def test_images_of_a_prompt_do_not_depend_on_how_they_are_batched(t2i, batch):
    together = t2i([CAPTIONS[0], CAPTIONS[7]], num_images_per_prompt=4, **FAST)
    assert len({tuple(row) for row in together.token_ids}) == 8
    for row, sample in ((0, 0), (4, 7)):
        np.testing.assert_array_equal(together.token_ids[row], batch.token_ids[sample])
        assert distance(together.images[row], batch.images[sample]) <= TOLERANCE
    singly = t2i(CAPTIONS[0], num_images_per_prompt=3, batch_size=1, **FAST)
    assert_same(singly, together, range(3))
    beyond = t2i(CAPTIONS[0], num_images_per_prompt=9, **FAST)
    assert len(beyond.images) == 9
    np.testing.assert_array_equal(beyond.token_ids[:4], together.token_ids[:4])
    assert distance(beyond.images[3], together.images[3]) <= TOLERANCE


def test_the_seed_changes_tokens_and_noise(t2i, batch):
    other = t2i(CAPTIONS[0], seed=2**32 - 1, **FAST)
    assert (other.token_ids != batch.token_ids[:1]).any()
    greedy = [t2i(CAPTIONS[0], seed=seed, temperature=0, **FAST) for seed in (0, 1)]
    np.testing.assert_array_equal(greedy[0].token_ids, greedy[1].token_ids)
    assert distance(greedy[0].images[0], greedy[1].images[0]) > 2 * TOLERANCE


def test_the_most_likely_token_alone_is_greedy_decoding(t2i):
    greedy = t2i(CAPTIONS[0], temperature=0, **FAST)
    np.testing.assert_array_equal(t2i(CAPTIONS[0], top_k=1, **FAST).token_ids, greedy.token_ids)
    assert (greedy.log_probs < 0).all()


def test_guidance_one_is_the_condition_alone(t2i, batch):
    settings = {**FAST, "guidance_scale": 1}
    alone = t2i(CAPTIONS[0], **settings).images[0]
    assert distance(t2i(CAPTIONS[0], **{**FAST, "guidance_scale": 1 + 1e-6}).images[0], alone) <= 1
    assert distance(batch.images[0], alone) > 2 * TOLERANCE


def test_a_negative_prompt_takes_the_place_of_the_null_condition(t2i, batch):
    steered = t2i(CAPTIONS[0], negative_prompt="blurry", **FAST)
    np.testing.assert_array_equal(steered.token_ids, batch.token_ids[:1])
    assert distance(steered.images[0], batch.images[0]) > TOLERANCE
    greedy = {**FAST, "temperature": 0}
    against_itself = t2i(CAPTIONS[0], negative_prompt=CAPTIONS[0], **greedy).images[0]
    assert distance(against_itself, t2i(CAPTIONS[0], **{**greedy, "guidance_scale": 1}).images[0]) <= 1


def test_token_guidance_steers_the_tokens_away_from_those_without_the_text(t2i, batch):
    guided = {**FAST, "token_guidance_scale": 3.0}
    together = t2i(CAPTIONS[:3], **guided)
    assert (together.token_ids != batch.token_ids[:3]).any(axis=1).all()
    assert_same(t2i(CAPTIONS[2], **guided), together, [2])
    against_itself = t2i(CAPTIONS[0], negative_prompt=CAPTIONS[0], **guided)
    np.testing.assert_array_equal(against_itself.token_ids, batch.token_ids[:1])
    negative = t2i(CAPTIONS[0], negative_prompt="blurry", **guided)
    assert (negative.token_ids != together.token_ids[:1]).any()


def test_captions_and_edits_have_the_token_guidance_of_the_checkpoint_and_reconstructions_none(golden_root, photos):
    plain, guided = load(golden_root, "edit_both"), load(golden_root, "edit_both")
    guided.config = dataclasses.replace(guided.config, token_guidance_scale=3.0, edit_token_guidance_scale=2.0)
    photo, several = tuple(photos[:1]), {**FAST, "num_images_per_prompt": 2}
    caption, edit = Prompt("t2i", CAPTIONS[0]), Prompt("edit", "make it blue", photo)
    copy = Prompt("reconstruct", "", photo)
    together = guided.answer([caption, edit, copy], **several)
    assert_same(guided.answer([caption], **several), together, [0, 1])
    for index, (request, scale) in enumerate([(caption, 3.0), (edit, 2.0), (copy, 1.0)]):
        expected = plain.answer([request], token_guidance_scale=scale, **several)
        assert_same(expected, together, [2 * index, 2 * index + 1])
    off = guided.answer([caption], token_guidance_scale=1.0, **several)
    assert_same(off, plain.answer([caption], **several), [0, 1])
    assert (off.token_ids != together.token_ids[:2]).any()


def test_token_guidance_encodes_the_references_of_an_edit_once(golden_root, photos, monkeypatch):
    pipeline, encoded, encode = load(golden_root, "edit_both"), [], stages.encode_images
    guided, edit = {**FAST, "token_guidance_scale": 3.0}, Prompt("edit", "make it blue", tuple(photos[:1]))
    monkeypatch.setattr(stages, "encode_images", lambda *inputs: encoded.append(inputs[2].shape[0]) or encode(*inputs))
    steered = pipeline.answer([edit], **guided)
    assert encoded == [1]
    against_itself = pipeline.answer([edit], negative_prompt="make it blue", **guided)
    plain = pipeline.answer([edit], **FAST)
    np.testing.assert_array_equal(against_itself.token_ids, plain.token_ids)
    assert (steered.token_ids != plain.token_ids).any()


def test_a_negative_prompt_too_long_beside_the_reference_is_refused_before_anything_is_computed(golden_root, photos):
    pipeline, edit = load(golden_root, "edit_both"), Prompt("edit", "make it blue", tuple(photos[:1]))
    room = pipeline.config.decoder.max_length - pipeline.config.num_image_tokens
    alone = next(n for n in range(room) if "got" in refusal(pipeline, "a cat", "no " * (n + 1))) * "no "
    assert "got" in refusal(pipeline, edit, alone, token_guidance_scale=3.0)
    assert not refusal(pipeline, edit, alone, token_guidance_scale=1.0)


def refusal(pipeline, request, negative, **settings) -> str:
    """What stops a request with a negative prompt before anything is computed; "" where nothing does."""
    request = Prompt("t2i", request) if isinstance(request, str) else request
    made = make_settings(negative_prompt=negative, **settings)
    try:
        check_requests(pipeline.config, pipeline.tokenizer, [request], made)
    except UserError as error:
        return str(error)
    return ""


def test_token_guidance_of_a_reconstruction_is_against_a_conversation_without_text(golden_root, photos):
    pipeline = load(golden_root, "edit_both")
    keep = "Keep the image unchanged."
    asked, edit = Prompt("reconstruct", "", tuple(photos[:1])), Prompt("edit", keep, tuple(photos[:1]))
    plain, steered = (pipeline.answer([asked], token_guidance_scale=scale, **FAST) for scale in (1.0, 5.0))
    assert (steered.token_ids != plain.token_ids).any()
    np.testing.assert_array_equal(
        pipeline.answer([edit], token_guidance_scale=5.0, **FAST).token_ids, steered.token_ids
    )


def test_files_of_references_are_read_once_when_their_batch_comes(golden_root, photos, tmp_path, monkeypatch):
    pipeline, read, load_image = load(golden_root, "edit_both"), [], images.load_image
    for number, photo in enumerate(photos):
        photo.save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in (0, 0, 1)]
    monkeypatch.setattr(images, "load_image", lambda source: read.append(source) or load_image(source))
    requests = [Prompt("edit", "make it blue", (file,)) for file in files]
    parts = pipeline.stream(requests, batch_size=2, **FAST)
    first = next(parts)
    assert read == files[:1]
    outputs = [first, *parts]
    assert read == [files[0], files[2]]
    pictures = pipeline.answer([Prompt("edit", "make it blue", (photo,)) for photo in photos], batch_size=2, **FAST)
    np.testing.assert_array_equal(outputs[0].token_ids[:1], pictures.token_ids[:1])
    np.testing.assert_array_equal(outputs[1].token_ids, pictures.token_ids[1:])


def test_tiling_reaches_the_encoder_and_every_panel_of_a_reconstruction(golden_root, photos, monkeypatch):
    pipeline, tiled = load(golden_root, "edit_both"), []

    def recorded(work, name):
        return lambda function, x: tiled.append(name) or work(function, x)

    whole = reconstruction.reconstruct(pipeline, photos[0], **FAST)
    for name in ("tiled_encode", "tiled_decode"):
        monkeypatch.setattr(tiling, name, recorded(getattr(tiling, name), name))
    in_tiles = reconstruction.reconstruct(pipeline, photos[0], tiling=True, **FAST)
    assert sorted(tiled) == ["tiled_decode"] * 3 + ["tiled_encode"] * 2  # the codes alone need no latent
    for got, expected in zip(in_tiles, whole, strict=True):
        assert np.abs(got.image.astype(int) - expected.image).max() <= TOLERANCE


def test_the_sampler_is_the_one_asked_for(t2i, batch):
    other = t2i(CAPTIONS[0], sampler="heun", **FAST)
    np.testing.assert_array_equal(other.token_ids, batch.token_ids[:1])
    assert distance(other.images[0], batch.images[0]) > 0


def test_sizes_must_be_multiples_of_a_latent_cell(t2i):
    for size, near in ((17, 16), (19, 20), (1, 4)):
        with pytest.raises(UserError, match=rf"height: got {size} - expected a multiple of 4 pixels - try {near}"):
            t2i(CAPTIONS[0], height=size)


SLOW_FORMS = [pytest.param(name, marks=pytest.mark.slow) for name in ("edit_cross", "edit_noise", "edit_siglip")]


@pytest.mark.parametrize("name", ["edit_both", *SLOW_FORMS])
def test_captions_and_edits_of_any_size_may_share_a_batch(golden_root, photos, name):
    pipeline, settings = load(golden_root, name), {**FAST, "height": 8, "width": 24, "num_images_per_prompt": 2}
    requests = [Prompt("t2i", "a cat"), Prompt("edit", "make it blue", tuple(photos[:1])),
                Prompt("edit", "put both together", tuple(photos))]  # fmt: skip
    together = pipeline.answer(requests, **settings)
    assert {picture.size for picture in together.images} == {(24, 8)}
    for row, request in enumerate(requests):
        assert_same(pipeline.answer([request] * 3, **settings), together, [2 * row, 2 * row + 1] * 3)
    other = pipeline(["make it blue"] * 3, photos[1], **settings)
    assert distance(other.images[0], together.images[2]) > TOLERANCE


def test_prompts_become_rows_padded_on_the_left(t2i, photos):
    requests = [Prompt("t2i", "a cat"), Prompt("edit", "make it blue", tuple(photos))]
    config = dataclasses.replace(t2i.config, edit=EditConfig(vae_condition=True))
    rows = [prompts.make_request(config, t2i.tokenizer, request) for request in requests]
    arrays = prompts.prepare(config, rows, 8, 24)
    assert arrays.has_ref.tolist() == [False, True] and arrays.has_image
    assert arrays.ref_pixels.shape == (2, 8, 24, 3) and not arrays.ref_pixels[0].any()
    assert arrays.tokenizer_pixels.shape[:2] == (2, 3) and not arrays.tokenizer_pixels[:, 0].any()
    assert (arrays.tokens[~arrays.valid] == config.tokens.pad).all() and arrays.valid[:, -1].all()
    assert (arrays.window_start == arrays.tokens.shape[1] - 1).all()
    np.testing.assert_array_equal(np.unique(arrays.image_slot[1]), [-1, *range(16, 48)])
    guided = prompts.make_request(config, t2i.tokenizer, requests[0], 0.5, "")
    assert len(guided.unguided) < len(guided.row)
    arrays = prompts.prepare(config, [guided, prompts.make_request(config, t2i.tokenizer, requests[0], 1.0, "")], 8, 24)
    assert arrays.token_guidance_scale.tolist() == [0.5, 1.0]
    assert arrays.valid.sum(axis=1).tolist() == [len(guided.row)] * 2 + [len(guided.unguided)] * 2


def test_rows_leave_room_for_the_tokens_to_decode(t2i, monkeypatch):
    monkeypatch.setattr(prompts, "BUCKET", 2**20)
    room = t2i.config.decoder.max_length - t2i.config.num_image_tokens
    row = prompts.make_request(t2i.config, t2i.tokenizer, Prompt("t2i", "a cat"))
    assert prompts.prepare(t2i.config, [row], 8, 8).tokens.shape == (1, room)
    texts = ("a cat" + "x" * number for number in range(room))
    rows = (prompts.make_request(t2i.config, t2i.tokenizer, Prompt("t2i", text)).row for text in texts)
    with pytest.raises(UserError, match=f"prompt: got {room + 1} tokens .* expected at most {room} of"):
        lengths = [len(row) for row in rows]
        pytest.fail(f"rows of up to {max(lengths)} tokens")


def test_only_references_that_are_cropped_have_a_limited_aspect(t2i):
    prompt = Prompt("edit", "make it blue", (Image.new("RGB", (60_000, 1)),))
    prompts.check_references(t2i.config, prompt, 64, 64)  # the image tokenizer scales both sides
    config = dataclasses.replace(t2i.config, edit=EditConfig(vae_noise=True))
    with pytest.raises(UserError, match="60000x1"):
        prompts.check_references(config, prompt, 64, 64)


def test_codes_that_are_given_are_those_of_the_picture(t2i, photos):
    requests = [Prompt("t2i", "", target=photo) for photo in (photos[0], photos[1], photos[0])]
    outputs = list(t2i.render(requests, batch_size=2, **FAST))
    side = t2i.config.image_tokenizer.image_size
    pixels = np.stack([images.tokenizer_pixels(request.target, side) for request in requests])
    codes, _ = blip3o.encode_tokens(t2i.config, t2i.params, pixels)
    got = np.concatenate([output.token_ids for output in outputs])
    np.testing.assert_array_equal(got - t2i.config.tokens.image_start, codes)
    first, second, again = (np.asarray(picture, int) for output in outputs for picture in output.images)
    assert np.abs(first - again).max() <= 2 and np.abs(first - second).max() > 2


def test_a_prompt_may_have_a_seed_of_its_own(t2i):
    requests = [Prompt("t2i", "a cat", seed=3), Prompt("t2i", "a cat")]
    together = t2i.answer(requests, seed=9, num_images_per_prompt=2, **FAST)
    alone = [t2i("a cat", seed=seed, num_images_per_prompt=2, **FAST) for seed in (3, 9)]
    np.testing.assert_array_equal(together.token_ids, np.concatenate([output.token_ids for output in alone]))
    pictures = [np.asarray(picture, int) for output in alone for picture in output.images]
    for got, expected in zip(together.images, pictures, strict=True):
        assert np.abs(np.asarray(got, int) - expected).max() <= 2
    assert np.abs(pictures[0] - pictures[2]).max() > 2


def test_a_reconstruction_shows_what_every_stage_keeps(t2i, photos, monkeypatch):
    answer, answers = Pipeline.answer, []
    monkeypatch.setattr(Pipeline, "answer", lambda *args, **kw: answers.append(answer(*args, **kw)) or answers[-1])
    panels = reconstruction.reconstruct(t2i, photos[0], num_images_per_prompt=3, **FAST)
    assert [len(output.images) for output in answers] == [1], "one panel shows one image"
    assert [panel.name for panel in panels] == ["original", "autoencoder", "image tokens", "whole model"]
    for panel in panels:
        assert panel.image.shape == panels[0].image.shape
        assert panel.psnr == images.psnr(panels[0].image, panel.image)
    own = stages.round_trip(t2i.config, t2i.params, images.target_pixels(photos[0], 16, 16)[None])
    np.testing.assert_allclose(panels[1].image, images.to_uint8(np.asarray(own[0])), atol=1)
    sheet = reconstruction.sheet(panels)
    assert sheet.width > 4 * sheet.height * 0.8
    assert reconstruction.table(panels).count("\n") == 3


def test_progress_reaches_the_end_of_both_loops(t2i, monkeypatch):
    seen = {}
    monkeypatch.setattr("blip3o_jax.generate.engine.STRETCHES", 3)
    settings = {**FAST, "progress": lambda stage, done, total: seen.setdefault(stage, []).append((done, total))}
    t2i(CAPTIONS[0], token_decoding="sequential", **settings)
    assert seen["denoise"] == [(1, 3), (2, 3), (3, 3)]
    assert seen["tokens"] == [(6, 16), (12, 16), (16, 16)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"guidance": 3}, "guidance: unknown key .* did you mean guidance_scale"),
        ({"seed": [1, 2]}, r"seed: got \[1, 2\] - expected int"),
        ({"height": 16.0}, "height: got 16.0 - expected int"),
        ({"sampler": "ddim"}, "sampler: got 'ddim' - expected one of dpmpp_2m, euler, heun"),
        ({"sampler": "nowhere:at_all"}, "sampler nowhere:at_all: got ModuleNotFoundError"),
        ({"temperature": 1e-9}, r"temperature: got 1e-09 - expected 0 \(greedy\) or 0.0001 to 10000"),
        ({"temperature": -1.0}, r"temperature: got -1.0 - expected 0 \(greedy\) or 0.0001 to 10000"),
        ({"temperature": 1e39}, "temperature: got 1e\\+39 - expected a number that is finite in float32"),
        ({"guidance_scale": 1e30}, "guidance_scale: got 1e.30 - expected -1000 to 1000"),
        ({"negative_prompt": "no " * 500}, "prompt: got .* tokens"),
        ({"task": "edit"}, "reference images: got 0 for task edit"),
        ({"task": "paint"}, "task: got 'paint'"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_computed(t2i, values, words):
    with pytest.raises(UserError, match=words):
        t2i("a cat", progress=lambda *_: pytest.fail("computed"), **values)


def test_a_target_is_refused_where_tokens_are_decoded_and_needed_where_its_codes_are(t2i):
    requests = [Prompt("t2i", "a cat"), Prompt("t2i", "a cat", target=Image.new("RGB", (8, 8)))]
    with pytest.raises(UserError, match=r"prompt: got a target .* call Pipeline.render"):
        t2i.answer(requests, **FAST)
    with pytest.raises(UserError, match=r"prompt: got no target .* call Pipeline.answer"):
        next(t2i.render(requests, **FAST))


@pytest.mark.parametrize("requests", ["a cat", ["a cat"], Prompt("t2i", "a cat"), None])
def test_what_is_no_list_of_prompts_is_refused(t2i, requests):
    with pytest.raises(UserError, match="requests: got .* a list of generate.prompts.Prompt"):
        t2i.answer(requests, **FAST)


@pytest.mark.parametrize("image", ["photo.png", Image.new("RGB", (8, 8))])
def test_references_of_a_prompt_are_several(image):
    with pytest.raises(UserError, match=r"references: got an? \w+ - expected a tuple of images - write \(image,\)"):
        Prompt("edit", "make it blue", image)


def test_one_bad_prompt_among_many_is_found_before_anything_is_computed(t2i):
    for bad, words in (
        (Prompt("t2i", " "), "prompt: got an empty one"),
        (Prompt("t2i", "word " * 500), "prompt: got .* tokens from 'word word"),
        (Prompt("t2i", "a dog", seed=-1), "seed: got -1"),
        (Prompt("t2i", "a dog", seed=2**32), "seed: got 4294967296"),
    ):
        with pytest.raises(UserError, match=words):
            next(t2i.stream([Prompt("t2i", "a cat"), bad], lambda *_: pytest.fail("x"), batch_size=1))
    with pytest.raises(UserError, match="top_p: got 2.0"):
        Settings(top_p=2.0)


@pytest.mark.parametrize("name, scale", [("t2i", 1.0), ("edit_both", 2.0), ("edit_both", None)])
def test_rollouts_are_bit_for_bit_what_the_pipeline_makes(golden_root, photos, name, scale):
    pipeline = load(golden_root, name)
    if scale is None:  # the checkpoint's own: captions are guided, edits are not
        pipeline.config = dataclasses.replace(pipeline.config, token_guidance_scale=2.0)
    requests = [Prompt("t2i", "a cat"), Prompt("t2i", "two dogs")]
    if name == "edit_both":
        requests[1] = Prompt("edit", "make it blue", tuple(photos[:1]))
    render = RenderConfig(num_inference_steps=2, guidance_scale=3.0, shared_noise=False)
    sampling, length = ar.TokenSampling(top_k=40), pipeline.config.decoder.max_length - pipeline.config.num_image_tokens
    policy = grpo.Settings(beta=0.0, sampling=sampling, token_guidance_scale=scale, chunk=16)
    sampler = TokenSampler(
        pipeline.config, pipeline.tokenizer, policy, render, min(length, prompts.BUCKET), name == "edit_both", None
    )
    keys = stages.image_keys([5, 5], range(2))
    rollout = sampler(pipeline.params, requests, keys)
    engine = sampler.engine(pipeline.params, Runner())
    rows, made = sampler.decode(engine, sampler.arrays(requests), keys)

    settings = make_settings(
        seed=5, num_images_per_prompt=2, num_inference_steps=2, guidance_scale=3.0, token_guidance_scale=scale, top_k=40
    )
    output = pipeline.answer(check_requests(pipeline.config, pipeline.tokenizer, requests, settings))
    np.testing.assert_array_equal(output.token_ids, rollout.arrays["completion"])
    np.testing.assert_array_equal(output.log_probs, made.log_probs)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in output.images]), rollout.images)

    checked = check_requests(pipeline.config, pipeline.tokenizer, requests, settings)
    own = pipeline.engine(settings, checked.size)
    own_rows = own.read(prompts.prepare(pipeline.config, prompts.loaded(checked.prompts), *checked.size))
    own_made = own.decode(own_rows, keys, settings.sampling)
    np.testing.assert_array_equal(own_made.hidden, made.hidden)
    latents = [
        each.paint(tokens.hidden, keys, settings.denoising, 3.0, read.reference)
        for each, tokens, read in ((own, own_made, own_rows), (engine, made, rows))
    ]
    np.testing.assert_array_equal(*latents)


@pytest.mark.parametrize("part, what", [("decoder", "log-probabilities of image tokens"), ("autoencoder", "pixels")])
def test_values_that_are_not_finite_end_in_one_line(golden_root, part, what):
    pipeline = load(golden_root, "t2i")
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), pipeline.params[part])
    pipeline.params = {**pipeline.params, part: broken}
    with pytest.raises(UserError, match=f"image: got NaN or infinite {what} in float32 - expected finite ones"):
        pipeline("a cat", **FAST)


@pytest.mark.parametrize(
    "extreme",
    [
        {"temperature": 1e-4},
        {"temperature": 1e4, "top_k": 0, "top_p": 1.0},
        {"top_p": 1e-6, "token_guidance_scale": 1e3},
        {"token_guidance_scale": -1e3, "temperature": 1e-4},
    ],
)
def test_the_ends_of_every_range_give_finite_log_probs(t2i, extreme):
    output = t2i(CAPTIONS[0], num_inference_steps=1, guidance_scale=1.0, **extreme)
    assert np.isfinite(output.log_probs).all() and (output.log_probs <= 0).all()


@pytest.mark.parametrize("prompt", [None, 3, {"a": 1}, [3], ["a cat", None]])
def test_prompts_are_texts(t2i, prompt):
    with pytest.raises(UserError, match="^prompt: got "):
        t2i(prompt)


def test_requests_that_were_checked_bring_their_settings(t2i, batch):
    requests = [Prompt("t2i", CAPTIONS[0])]
    checked = check_requests(t2i.config, t2i.tokenizer, requests, make_settings(**FAST))
    assert_same(t2i.answer(checked), batch, [0])
    with pytest.raises(UserError, match="settings: got seed - expected those of the checked requests alone"):
        t2i.answer(checked, seed=1)
