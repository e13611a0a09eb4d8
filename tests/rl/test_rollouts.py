"""Rollouts: their log-probabilities, exact resumption in the middle of one, devices, what is refused, and learning."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import experiment, sharding, treepath
from blip3o_jax.config.presets import preset
from blip3o_jax.config.schema import from_dict, with_dtype
from blip3o_jax.data.config import DataConfig
from blip3o_jax.data.images import save_png
from blip3o_jax.data.pipeline import positions
from blip3o_jax.data.sources import open_source
from blip3o_jax.demo.world import edits
from blip3o_jax.demo.world.render import render
from blip3o_jax.errors import UserError
from blip3o_jax.generate import ar, stages
from blip3o_jax.generate.engine import Runner
from blip3o_jax.generate.prompts import Prompt
from blip3o_jax.generate.scoring import completion_log_probs, token_log_probs
from blip3o_jax.models import blip3o
from blip3o_jax.objectives import OBJECTIVES, grpo, matching
from blip3o_jax.objectives.policy import reduce_tokens
from blip3o_jax.plan.sampling import plan_rollout
from blip3o_jax.plan.step import rollout_batch
from blip3o_jax.rl.build import make_sampler
from blip3o_jax.rl.config import RenderConfig, RolloutConfig
from blip3o_jax.rl.prompt_stream import PromptStream
from blip3o_jax.rl.rewards import REWARDS, sanity
from blip3o_jax.rl.rollout import RolloutSource
from blip3o_jax.rl.samplers import Samples, TokenSampler, completions
from blip3o_jax.rl.shapes import UpdateLayout, rows_of_prompt
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train import loop
from blip3o_jax.types import Completions, TokenRollout
from configs import grpo as recipes
from support.small import params_of

TINY = preset("tiny")
CHECKPOINT = pathlib.Path(__file__).parents[1] / "golden" / "t2i" / "checkpoint"
STEPS = 5


def settings_of(recipe="tiny", fresh=False, **changes):
    """Plain settings of a recipe; a change is named by its dotted path, with __ for the dots."""
    config = recipes.get_config(recipe)
    if not fresh:
        config.init_from, config.model = str(CHECKPOINT), None  # read faster than made
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    settings = json.loads(json.dumps(config.to_dict()))
    settings["loop"] |= {"tensorboard": False}
    return settings


def build(directory, settings, num_devices=1):
    devices = jax.devices()[:num_devices]
    return experiment.build(experiment.from_settings(settings), settings, str(directory), devices)


def train(directory, settings, num_devices=1):
    """The state after all steps."""
    config = experiment.from_settings(settings)
    state, _ = loop.train(build(directory, settings, num_devices), config.loop, str(directory))
    return jax.device_get(state)


def drawn(run):
    """Parameters of a run before its first step."""
    return treepath.merge(run.init_params(), run.frozen)


def records(directory):
    """What a run wrote at every step."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def params():
    """Of the tiny geometry, made without compiling initialisers."""
    made = {name: params_of(make) for name, make in blip3o.initializers(TINY).items()}
    made["decoder"]["embed"]["table"] *= 0.1  # tied to the head: nothing would be left to chance otherwise
    return made


@pytest.mark.parametrize(
    "sampling",
    [
        ar.TokenSampling(top_k=0, top_p=1.0),
        ar.TokenSampling(temperature=0.7, top_k=20, top_p=0.9),
        ar.TokenSampling(temperature=1.3, top_k=0, top_p=0.8, image_ids_only=False),
    ],
)
def test_log_probs_are_those_of_the_truncated_distribution_that_was_sampled(params, golden_root, sampling):
    tokenizer = Tokenizer.from_directory(golden_root / "t2i" / "checkpoint")
    settings = grpo.Settings(beta=0.0, sampling=sampling)
    sampler = TokenSampler(TINY, tokenizer, settings, RenderConfig(), length=96, max_references=0, mesh=None)
    keys = jax.random.split(jax.random.key(0), 6)
    requests = [Prompt("t2i", "a red cube"), Prompt("t2i", "nothing")]
    made, rollout = sampled(sampler, params, requests, keys)

    def score(sampling):
        return stages.completion_log_probs(TINY, params, rollout, sampling, 7)

    got, entropy = score(sampling)
    np.testing.assert_allclose(got, made.log_probs, atol=2e-5)
    assert np.asarray(entropy).min() >= 0
    full, _ = score(ar.TokenSampling(sampling.temperature, 0, 1.0, sampling.image_ids_only))
    assert (np.abs(full - got).max() > 0.05) == (sampling.top_p < 1)


def test_guided_tokens_are_scored_by_the_guided_distribution(params, golden_root):
    tokenizer = Tokenizer.from_directory(golden_root / "t2i" / "checkpoint")
    sampling = ar.TokenSampling(top_k=0, top_p=0.9)
    settings = grpo.Settings(beta=0.0, sampling=sampling, token_guidance_scale=3.0)
    sampler = TokenSampler(TINY, tokenizer, settings, RenderConfig(), 96, 0, None)
    keys = jax.random.split(jax.random.key(0), 6)
    made, rollout = sampled(sampler, params, [Prompt("t2i", "a red cube"), Prompt("t2i", "nothing")], keys)

    def score(rollout):
        return stages.completion_log_probs(TINY, params, rollout, sampling, 7)[0]

    np.testing.assert_allclose(score(rollout), made.log_probs, atol=2e-5)
    assert np.abs(score(rollout.replace(base=None)) - made.log_probs).max() > 0.05
    _, without = sampled(sampler, params, [Prompt("t2i", "a red cube"), Prompt("t2i", "nothing")], keys, half=1)
    assert without.valid.sum() < rollout.valid.sum()
    np.testing.assert_allclose(stages.completion_hidden(TINY, params, without), rollout.base, atol=2e-5)


def sampled(sampler, params, requests, keys, half=0):
    """Image tokens, and the rows that an update would have of them."""
    engine = sampler.engine(params, Runner())
    rows, made = sampler.decode(engine, sampler.arrays(requests), keys)
    return made, completions(rows, made, len(keys) // len(requests), False, 1, half)


@pytest.mark.parametrize("remat, unroll", [("none", False), ("full", True)])
def test_rows_that_share_the_reading_of_a_prompt_are_scored_as_rows_of_their_own(params, remat, unroll):
    config = with_dtype(TINY, dtype="float32", param_dtype="float32", remat=remat, unroll=unroll)
    count, samples, length = 2, 6, 20 + config.num_image_tokens
    rng, start = np.random.default_rng(0), config.tokens.image_start
    slot = np.full((count, length), -1)
    slot[:, 5:-15] = config.num_image_tokens + np.arange(config.num_image_tokens)  # a reference
    prompt = {"tokens": rng.integers(5, 50, slot.shape), "image_slot": slot, "valid": np.ones(slot.shape, bool)}
    prompt["valid"][1, :4] = False
    codes = rng.integers(0, 9, (count, 1, config.num_image_tokens))
    prompt, codes = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), (prompt, codes))
    completion = start + rng.integers(0, 9, (count * samples, config.num_image_tokens))
    weights = rng.normal(size=completion.shape)

    @functools.partial(jax.jit, static_argnums=1)
    def score(decoder, rows):
        rollout = Completions(**prompt, completion=completion, ref_codes=codes, prompt_rows=rows)
        sampling = ar.TokenSampling(top_k=0, top_p=0.9)
        log_probs, _ = completion_log_probs(config, {"decoder": decoder}, rollout, sampling, 7)
        return (log_probs * weights).sum(), log_probs

    alone, once, some = (jax.value_and_grad(score, has_aux=True)(params["decoder"], rows) for rows in (1, 6, 3))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone[1]))
    for other in (once, some):
        np.testing.assert_allclose(other[0][1], alone[0][1], atol=2e-5)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5 * largest), other[1], alone[1])


@pytest.mark.parametrize(
    "samples, rows, devices, accumulation, expected",
    [(8, 64, 1, 1, 8), (16, 256, 32, 1, 8), (8, 64, 1, 2, 4), (8, 64, 4, 4, 2), (8, 72, 1, 3, 1), (8, 8, 3, 1, 2)],
)
def test_how_many_rows_share_a_prompt(monkeypatch, samples, rows, devices, accumulation, expected):
    monkeypatch.setattr(sharding, "batch_devices", lambda mesh: mesh)
    got = rows_of_prompt(samples, rows, devices, accumulation)
    assert got == expected
    owner = np.repeat(np.arange(rows // samples), samples)
    if rows % accumulation == 0:
        parts = owner.reshape(-1, accumulation).T.reshape(-1, got)  # of micro-batches, as train.step takes them
        assert (parts == parts[:, :1]).all()


def test_guidance_towards_the_same_prompt_changes_nothing_and_sends_no_gradient_back():
    rng = np.random.default_rng(0)
    hidden, rows = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 5, 8), (11, 8)))
    ids = rng.integers(0, 11, (2, 5))
    sampling = ar.TokenSampling(top_k=0, top_p=1.0)

    def score(hidden, without, scale=2.5):
        return token_log_probs(hidden, rows, ids, sampling, 2, (without, np.array([scale, 1.0], np.float32)))[0]

    unguided = token_log_probs(hidden, rows, ids, sampling, 2)[0]
    np.testing.assert_allclose(score(hidden, hidden), unguided, atol=1e-5)
    other = rng.normal(size=hidden.shape).astype(np.float32)
    logits = np.stack([other[0] + 2.5 * (hidden[0] - other[0]), hidden[1]]) @ rows.T
    expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(score(hidden, other), expected, atol=1e-5)
    assert np.abs(jax.grad(lambda x: score(hidden, x).sum())(other)).max() == 0


def test_a_token_that_leaves_the_support_keeps_a_probability():
    hidden = np.eye(4, dtype=np.float32)[None]
    rows = np.diag([9.0, 9.0, 9.0, 9.0]).astype(np.float32) + np.arange(4)
    ids = np.array([[0, 1, 3, 0]])  # the last one is not among the two likeliest
    sampling = ar.TokenSampling(top_k=1)
    log_probs, entropy = token_log_probs(hidden, rows.T, ids, sampling, chunk=3)
    assert np.isfinite(log_probs).all() and np.isfinite(entropy).all()
    np.testing.assert_allclose(log_probs[0, :2], 0, atol=1e-6)
    assert log_probs[0, 3] < -1
    gradient = jax.grad(lambda x: token_log_probs(x, rows.T, ids, sampling, 2)[0].sum())(hidden)
    assert np.isfinite(gradient).all() and np.abs(gradient[0, 3]).max() > 0


def test_bfloat16_gradients_of_the_head_are_added_up_in_float32():
    rng = np.random.default_rng(0)
    hidden, rows = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((8, 13, 6), (37, 6)))
    ids, sampling = rng.integers(0, 37, (8, 13)), ar.TokenSampling(top_k=0, top_p=1.0)

    def gradient(chunk):
        return jax.grad(lambda rows: token_log_probs(hidden, rows, ids, sampling, chunk)[0].sum())(rows)

    whole, single = (np.asarray(gradient(chunk), np.float32) for chunk in (13, 1))
    assert np.abs(whole - single).max() <= np.abs(whole).max() * 2**-8


def test_the_entropy_is_that_of_the_truncated_distribution_and_sends_no_gradient_back():
    rng = np.random.default_rng(0)
    hidden, rows = rng.normal(size=(2, 5, 8)), rng.normal(size=(11, 8))
    logits = hidden @ rows.T / 0.7
    kept = np.where(logits >= np.sort(logits)[..., -4:-3], np.exp(logits), 0)
    share = kept / kept.sum(axis=-1, keepdims=True)
    expected = -(share * np.log(np.where(share, share, 1))).sum(axis=-1)

    def entropy(hidden):
        ids, sampling = logits.argmax(axis=-1), ar.TokenSampling(0.7, top_k=4, top_p=1.0)
        return token_log_probs(hidden, rows.astype(np.float32), ids, sampling, 2)[1]

    np.testing.assert_allclose(entropy(hidden.astype(np.float32)), expected, rtol=1e-4)
    assert not np.any(jax.grad(lambda hidden: entropy(hidden).sum())(hidden.astype(np.float32)))


def through_a_file(state):
    """A position as a checkpoint keeps it: JSON, and arrays beside it."""
    arrays = {name: np.array(array) for name, array in state["arrays"].items()}
    return json.loads(json.dumps({name: value for name, value in state.items() if name != "arrays"})) | {
        "arrays": arrays
    }


@pytest.mark.parametrize(
    "recipe, scale, drawn_anew",
    [
        ("tiny", 2.0, "old_log_probs"),
        ("tiny_flow", 1.0, "old_log_probs"),
        ("tiny_nft", 1.0, "level"),
        ("tiny_grpo_nft", 2.0, "level"),
    ],
)
def test_the_source_continues_in_the_middle_of_a_rollout_bit_for_bit(tmp_path, recipe, scale, drawn_anew):
    settings = settings_of(recipe, data__batch_size=16, settings__token_guidance_scale=scale)
    settings["rl"] |= {"epochs": 2, "minibatches": 2}
    run = build(tmp_path, settings)
    params, source = drawn(run), run.source
    batches = [source.next(params, jax.random.key(0)) for _ in range(3)]
    assert_planned(batches[0], settings)
    state = through_a_file(source.state())
    rest = [source.next(params, jax.random.key(step)) for step in range(2)]
    again = build(tmp_path, settings).source
    again.restore(state)
    for batch, expected in zip([again.next(params, jax.random.key(step)) for step in range(2)], rest, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, expected)
    assert {"seconds_decode", "seconds_update", "reward_std"} <= again.measured.keys()
    values = [getattr(batch, drawn_anew) for batch in (*batches, rest[1])]
    rows = {tuple(row) for value in values[:2] for row in value.tolist()}
    assert len(rows) > 24  # some samples are equal
    assert {tuple(row) for row in values[2].tolist()} < rows  # the second epoch
    assert not np.array_equal(values[2], values[0])
    assert {tuple(row) for row in values[3].tolist()}.isdisjoint(rows)  # the second rollout
    other = settings | {"rl": settings["rl"] | {"minibatches": 1}}
    with pytest.raises(UserError, match="expected 4, as in the checkpoint"):
        build(tmp_path, other).source.restore(state)


@pytest.mark.parametrize("recipe, field", [("tiny", "mask"), ("tiny_flow", "states")])
def test_rows_that_another_version_saved_are_replaced_by_a_new_rollout(tmp_path, capsys, recipe, field):
    settings = settings_of(recipe, data__batch_size=16, rl__minibatches=2)
    run = build(tmp_path, settings)
    params, source = drawn(run), run.source
    source.next(params, jax.random.key(0))
    state = through_a_file(source.state())
    _, expected = (source.next(params, jax.random.key(0)) for _ in range(2))  # the second is of the next rollout
    if field == "mask":
        state["arrays"]["mask"] = np.repeat(state["arrays"]["mask"][:, None], 16, axis=1)  # as it was, one per token
    else:
        del state["arrays"][field]
    source.restore(state)
    jax.tree.map(np.testing.assert_array_equal, source.next(params, jax.random.key(0)), expected)
    told = capsys.readouterr().err
    assert told.count("rollout 1 of the checkpoint was saved by a version with other rows") == 1
    assert "a new one replaces its last 1 updates" in told


def test_each_half_learns_from_a_common_rollout_as_it_would_alone(tmp_path):
    changes = {"data__batch_size": 8, "rl__group_size": 4, "settings__velocity_beta": 0.5, "settings__beta": 0.1}
    settings = settings_of("tiny_grpo_nft", **changes)
    config, run = experiment.from_settings(settings), build(tmp_path, settings)
    params, own = drawn(run), from_dict(OBJECTIVES["grpo_nft"].Settings, config.settings)
    batch = run.source.next(params, jax.random.key(0))
    params = jax.tree.map(lambda leaf: 1.02 * leaf, params)  # off the policy and the reference
    model = experiment.open_start(config).model

    def gradients(make, settings):
        @jax.jit
        def value(parts):
            terms, _ = make(model, settings)({**params, **parts}, batch, None)
            return sum(term.coefficient * term.sum / term.weight for term in terms.values())

        return jax.grad(value)({part: params[part] for part in ("decoder", "dit")})

    both, tokens, painting = (
        gradients(*pair)
        for pair in ((OBJECTIVES["grpo_nft"].make, own), (grpo.make, own), (matching.nft, own.painting))
    )
    for part, alone, other in (("decoder", tokens, painting), ("dit", painting, tokens)):
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone[part])) > 0
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(other[part]))
        jax.tree.map(lambda *leaves: np.testing.assert_allclose(*leaves, atol=1e-6), both[part], alone[part])


def assert_planned(batch, settings):
    """The batch has the shapes that planning assumes."""
    config, mesh = experiment.from_settings(settings), sharding.make_mesh(None, jax.devices()[:1])
    own, start = from_dict(OBJECTIVES[config.objective].Settings, config.settings), experiment.open_start(config)
    params = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
        blip3o.abstract_plain(start.model),
    )
    params["reference"] = params["decoder"]
    sizes = (config.row.length, config.row.max_references, mesh)
    sampler = make_sampler(config.objective, own, config.rl, start.model, None, *sizes)
    size, rows = config.rl.group_size, config.data.batch_size
    *_, arrays = plan_rollout(sampler, 2 * size, size, params, lambda _, program: program.compile())
    expected = rollout_batch(UpdateLayout(config.objective, size, rows, mesh), arrays)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), batch)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), expected)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The state of a short run; its steps 3 and 4, 5 and 6 share a rollout."""
    return train(tmp_path_factory.mktemp("whole"), settings_of(loop__num_steps=STEPS, loop__save_every=3))


def fail(inputs):
    """A reward that raises."""
    raise RuntimeError("no electricity")


def test_a_run_that_fails_in_the_middle_of_a_rollout_resumes_bit_equal(tmp_path, uninterrupted, monkeypatch):
    settings = settings_of(loop__num_steps=STEPS, loop__save_every=3)
    calls = []

    def third_time(inputs):
        calls.append(1)
        return fail(inputs) if len(calls) == 3 else sanity.redness(inputs)

    monkeypatch.setitem(REWARDS, "redness", third_time)
    with pytest.raises(UserError, match=r"reward redness: raised RuntimeError \(no electricity\)"):
        train(tmp_path, settings)
    assert {path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")} == {"3", "4"}  # one for what was learnt
    half, whole = (tmp_path / "checkpoints" / step for step in ("3", "4"))
    assert (half / "arrays").is_dir() and not (whole / "arrays").exists()
    assert len((half / "meta" / "metadata").read_bytes()) < 20_000  # the rows of the rollout are no text
    shutil.rmtree(whole)  # the other holds half of a rollout
    state = train(tmp_path, settings)
    jax.tree.map(np.testing.assert_array_equal, state, uninterrupted)
    assert len(calls) == 4  # the rollout of steps 3 and 4 was not made again


def by_order(inputs):
    """A reward that the last bit of a pixel does not change: group by group, it prefers later samples."""
    return np.arange(len(inputs)) % 8 / 8


@pytest.mark.slow
def test_eight_devices_learn_what_one_learns(tmp_path):
    changes = {"loop__num_steps": STEPS, "optimizer__learning_rate": 1e-4}
    changes["rl__rewards"] = ({"name": f"{__name__}:by_order"},)
    train(tmp_path / "one", settings_of(**changes))
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    train(tmp_path / "eight", settings_of(mesh=mesh, **changes), num_devices=8)
    for record, expected in zip(records(tmp_path / "eight"), records(tmp_path / "one"), strict=True):
        for name in ("loss", "loss_kl", "grad_norm", "entropy", "kl", "clip_fraction", "ratio_p01", "ratio_max"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), (record["step"], name)


@pytest.mark.parametrize(
    "recipe, least",
    [
        ("tiny", 0.03),
        *(pytest.param(name, 0.05, marks=pytest.mark.slow) for name in ("tiny_flow", "tiny_awm", "tiny_grpo_nft")),
    ],
)
def test_a_sanity_reward_rises(tmp_path, recipe, least):
    train(tmp_path, settings_of(recipe, fresh=True, loop__num_steps=16))
    written = records(tmp_path)
    rewards = [record["reward"] for record in written]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:2]) + least, rewards
    expected = {"kl", "clip_fraction", "ratio_p99", "zero_advantage", "reward/redness", "seconds_render"}
    assert expected <= written[-1].keys()


def test_mistakes_are_named_before_anything_is_sampled(tmp_path):
    cases = [
        ({"rl__group_size": 5}, "rl.group_size: got 5 for data.batch_size 32"),
        ({"row__length": 16}, "row.length: got 16"),
        ({"settings__beta": -1.0}, "settings.beta: got -1.0"),
        (
            {"objective": "joint"},
            "rl: got a section for objective joint - expected one for grpo, flow_grpo, nft, awm, grpo_nft alone",
        ),
        ({"data__sources__prompts__without_text": True}, "data.sources: got one without_text"),
        ({"rl__group_size": 1}, "rl.group_size: got 1 - expected 2 to 65,536"),
        ({"rl__minibatches": 0}, "rl.minibatches: got 0"),
        *(({"rl__sample_batch_size": size}, f"rl.sample_batch_size: got {size}") for size in (4, 12, 24)),
        ({"rl__token_window": 1000}, "token_window: got 1000"),
        ({"rl__render__num_inference_steps": 10**6}, "rl.render.num_inference_steps: got 1000000"),
        ({"rl__render__sampler": "eular"}, "rl.render.sampler: got 'eular'.* did you mean euler"),
        ({"rl__advantages": "ppo"}, "rl.advantages: got 'ppo'"),
    ]
    judged = {"data": settings_of()["data"], "rewards": ({"name": "redness"},) * 2, "count": 2}
    cases += [
        ({"rl__held_out": judged}, "rl.held_out.rewards: got the labels redness, redness"),
        ({"rl__guards": {"action": "raise_kl"}, "settings__beta": 0.0}, "rl.guards.action: got raise_kl"),
        ({"rl__guards": {"max_kl": 1.0}, "settings__beta": 0.0}, "rl.guards.max_kl: got 1.0"),
    ]
    for changes, message in cases:
        with pytest.raises(UserError, match=message):
            build(tmp_path, settings_of(**changes))
    settings = settings_of()
    settings["rl"]["rewards"] = ({"name": "text"},)
    with pytest.raises(UserError, match="text reward: got .* double quotes"):
        build(tmp_path, settings)
    settings = settings_of()
    settings["rl"] = None
    with pytest.raises(UserError, match="rl: got no section for objective grpo"):
        build(tmp_path, settings)


class Judging:
    """Rewards by number; the first judgement fails where `fails`."""

    def __init__(self, fails=False):
        self.fails = fails

    def check(self, inputs):
        """Takes everything."""

    warn_unused = check

    def __call__(self, inputs):
        self.inputs = inputs
        self.fails, failed = False, self.fails
        if failed:
            raise UserError("reward", got="nothing", expected="a number", do="look at it")
        return np.arange(len(inputs), dtype=np.float32), {}


class Plain(UpdateLayout):
    """Updates as they come."""

    def batch(self, rows, arrays):
        return arrays


def numbered_source(judge=None, settings=None, parts=1, kl=(), **options):
    """Rollouts without a model: rows know their number and their prompt's length; `kl` is that of the rows in turn."""
    settings = settings or settings_of()

    def sample(params, requests, keys):
        each = len(keys) // len(requests)
        lengths = np.repeat([len(request.text) for request in requests], each)
        arrays = {"number": np.arange(len(keys)), "prompt": lengths, "key": jax.random.key_data(keys)}
        facts = {"sampled_kl": np.resize(np.float32(kl), len(keys))} if kl else {}
        return Samples(np.zeros((len(keys), 2, 2, 3), np.uint8), arrays, facts, {"decode": 1.0})

    config, data = from_dict(RolloutConfig, settings["rl"], "rl"), from_dict(DataConfig, settings["data"], "data")
    layout = Plain("grpo", config.group_size, data.batch_size, parts=parts)
    return RolloutSource(config, layout, PromptStream(data), judge or Judging(), sample, **options)


def test_readers_of_a_mesh_share_an_update_in_its_order():
    whole, *halves = (numbered_source(reader=reader).next({}, jax.random.key(0)) for reader in ((0, 1), (0, 2), (1, 2)))
    assert len(whole["number"]) == 32
    np.testing.assert_array_equal(np.concatenate([half["number"] for half in halves]), whole["number"])
    with pytest.raises(UserError, match="data.batch_size: got 32 for 5 processes that share a batch"):
        numbered_source(reader=(0, 5))


def test_a_rollout_drawn_in_parts_is_that_drawn_at_once():
    whole, parts = (
        numbered_source(settings=settings_of(rl__minibatches=1, rl__sample_batch_size=size)) for size in (None, 8)
    )
    expected, batch = (source.next({}, jax.random.key(0)) for source in (whole, parts))
    for name in ("key", "prompt", "advantage"):
        np.testing.assert_array_equal(batch[name], expected[name])
    assert len(np.unique(batch["key"], axis=0)) == 32 and set(batch["number"]) == set(range(8))
    assert (whole.measured["seconds_decode"], parts.measured["seconds_decode"]) == (1.0, 4.0)
    assert not any(name.startswith("seconds") for name in parts.state()["measured"])  # they differ between processes


def test_advantages_are_clipped_and_the_weight_of_the_divergence_reaches_the_rows():
    guards = {"max_kl": 1.0, "patience": 1, "action": "raise_kl", "factor": 4.0}
    changes = {"rl__advantages": "dr_grpo", "rl__clip_advantage": 2.0, "rl__minibatches": 1, "rl__guards": guards}
    batch = numbered_source(settings=settings_of(**changes), kl=(2.0,)).next({}, jax.random.key(0))
    assert batch["advantage"].reshape(4, 8).tolist() == [[-2, -2, -1.5, -0.5, 0.5, 1.5, 2, 2]] * 4
    assert (batch["kl_scale"] == 4).all()


def test_groups_are_shuffled_anew_in_every_epoch_and_rollout_and_by_the_seed():
    def orders(**options):
        source = numbered_source(settings=settings_of(rl__minibatches=8, rl__epochs=2), **options)
        return [source.next({}, jax.random.key(0))["number"].tolist() for _ in range(32)]

    numbers = orders()
    epochs = [sum(numbers[first : first + 8], []) for first in (0, 8, 16, 24)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == list(range(256)) for epoch in epochs)
    assert orders(seed=1) != numbers == orders()


def test_prompts_are_checked_before_they_are_sampled(monkeypatch):
    judge = Judging()
    source = numbered_source(judge)
    monkeypatch.setattr(judge, "check", fail)
    monkeypatch.setattr(source, "_sample", lambda *inputs: pytest.fail("sampled"))
    with pytest.raises(RuntimeError, match="no electricity"):
        source.next({}, jax.random.key(0))


class Teaching(Judging):
    """Some groups of eight have equal rewards; a further reward scores only the first half of the samples."""

    def __init__(self, *teaching):
        super().__init__()
        self.teaching = teaching

    def __call__(self, inputs):
        group, sample = np.divmod(np.arange(len(inputs)), 8)
        known = np.where(np.arange(len(inputs)) < len(inputs) // 2, 3.0, np.nan)
        return np.isin(group, self.teaching) * sample.astype(np.float32), {"half": known, "none": known * np.nan}


@pytest.mark.parametrize(
    "teaching, parts, expected",
    [((5, 1), 4, {1, 5}), ((5, 1), 2, {0, 1, 2, 5}), ((5, 1), 1, set(range(8))),
     ((0, 1, 6), 4, {0, 1, 6, 2}), ((), 4, {0, 1})],
)  # fmt: skip
def test_an_update_leaves_out_groups_that_teach_nothing(teaching, parts, expected):
    settings = settings_of(data__batch_size=64, rl__minibatches=1)
    source = numbered_source(Teaching(*teaching), settings, parts)
    batch = source.next({}, jax.random.key(0))
    assert set(batch["number"] // 8) == expected
    assert {number // 8 for number in batch["number"][batch["mask"]]} == set(teaching)
    measured = source.measured
    assert measured["update_share"] == len(expected) / 8 == len(batch["mask"]) / 64
    assert measured["images"] == 64 and measured["zero_advantage"] == 1 - len(teaching) / 8
    assert measured["reward/half"] == 3 and "reward/none" not in measured
    assert measured["reward_group_std"] == pytest.approx(np.std(np.arange(8)) * len(teaching) / 8)


@pytest.mark.parametrize(
    "rows, devices, accumulation, parts, expected",
    [(64, 1, 1, 4, (16, 32, 48, 64)), (64, 8, 1, 4, (16, 32, 48, 64)), (64, 16, 2, 4, (32, 64)),
     (48, 1, 1, 4, (24, 48)), (64, 64, 1, 8, (64,)), (64, 1, 1, 1, (64,)), (8, 1, 1, 4, (8,)),
     (24, 1, 1, 64, (8, 16, 24))],
)  # fmt: skip
def test_an_update_has_whole_groups_and_equal_shares_of_devices(
    monkeypatch, rows, devices, accumulation, parts, expected
):
    monkeypatch.setattr(sharding, "batch_devices", lambda mesh: mesh)
    assert UpdateLayout("nft", 8, rows, devices, accumulation, parts).sizes == expected


def test_rows_that_are_left_out_stay_in_the_mean_of_every_micro_batch():
    rows, layout = np.ones((16, 3), np.float32), UpdateLayout("grpo", 8, 64, accumulation=2)
    names = (field.name for field in dataclasses.fields(TokenRollout) if field.default is dataclasses.MISSING)
    batch = layout.batch(16, dict.fromkeys(names, rows) | {"mask": rows > 0})
    parts = [reduce_tokens("dr_grpo", rows[part::2], batch.mask[part::2], batch.mean_rows) for part in range(2)]
    assert sum(float(weight) for _, weight in parts) == 64 * 3 and sum(float(total) for total, _ in parts) == 16 * 3


@pytest.mark.parametrize("reduction", ["grpo", "bnpo", "dr_grpo"])
def test_leaving_out_what_teaches_nothing_changes_no_update(tmp_path, monkeypatch, reduction):
    monkeypatch.setitem(REWARDS, "redness", lambda inputs: Teaching(2)(inputs)[0])
    changes = {"data__batch_size": 32, "rl__minibatches": 1, "loop__num_steps": 2, "optimizer__accumulation": 2}
    changes |= {"settings__reduction": reduction, "optimizer__learning_rate": 1e-4}
    states = [train(tmp_path / str(parts), settings_of(rl__update_parts=parts, **changes)) for parts in (4, 1)]
    few, all_rows = (records(tmp_path / str(parts)) for parts in (4, 1))
    assert [record["update_share"] for record in (*few, *all_rows)] == [0.25, 0.25, 1.0, 1.0]
    for record, expected in zip(few, all_rows, strict=True):
        for name in ("loss", "grad_norm", "entropy", "kl", "reward"):
            assert record[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    for got, expected in zip(*map(jax.tree.leaves, (states[0].params, states[1].params)), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_a_reward_that_fails_leaves_the_position_where_it_was():
    source, unharmed = numbered_source(Judging(fails=True)), numbered_source()
    before = source.state()
    with pytest.raises(UserError, match="reward: got nothing"):
        source.next({}, jax.random.key(0))
    assert source.state() == before
    again, expected = (each.next({}, jax.random.key(0)) for each in (source, unharmed))
    np.testing.assert_array_equal(again["prompt"], expected["prompt"])


def test_a_constant_reward_stops_the_run_before_it_learns_from_it_for_long():
    class Constant(Judging):
        def __call__(self, inputs):
            return np.zeros(len(inputs), np.float32), {"geneval": np.zeros(len(inputs), np.float32)}

    source = numbered_source(Constant())  # two updates learn from a rollout
    for _ in range(6):
        source.next({}, jax.random.key(0))
    with pytest.raises(UserError, match="reward geneval 0 for all samples of the first 8 updates"):
        source.next({}, jax.random.key(0))


@pytest.mark.parametrize("kl", [(0.5, np.inf), (np.inf,)])
def test_a_guard_sees_an_infinite_divergence_which_no_record_averages(kl):
    def after_one(action):
        guards = {"max_kl": 1.0, "patience": 1, "action": action}
        source = numbered_source(settings=settings_of(rl__guards=guards), kl=kl)
        source.next({}, jax.random.key(0))
        return source.measured

    assert after_one("warn").get("sampled_kl") == (0.5 if len(kl) > 1 else None)
    with pytest.raises(UserError, match="rollout 0: sampled_kl inf is beyond rl.guards.max_kl 1"):
        after_one("stop")


@pytest.mark.parametrize("averaged", [False, True])
def test_the_averaged_policy_samples_if_the_configuration_says_so(tmp_path, averaged):
    settings = settings_of()
    settings["rl"]["sample_average"], settings["optimizer"]["ema_decay"] = averaged, 0.9
    assert build(tmp_path, settings).average_to_source == averaged


def test_a_reference_of_another_geometry_is_refused(tmp_path, golden_root):
    settings = settings_of()
    settings["reference_from"] = str(golden_root / "edit_both" / "checkpoint")
    with pytest.raises(UserError, match="reference_from: .*edit_both.* differs from the model in"):
        build(tmp_path, settings)


def test_prompts_come_from_files_with_their_metadata(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"a photo of {n} stars", "tag": "counting", "include": [{"class": "star", "count": n}]}
             for n in range(2, 12)]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = settings_of()
    settings["data"]["sources"] = ({"kind": "prompts", "path": str(path)},)
    settings["rl"]["rewards"] = ({"name": "geneval"},)
    source = build(tmp_path, settings).source
    drawn = source._prompts.draw(20)
    assert sorted(one.text for one in drawn[:10]) == sorted(line["prompt"] for line in lines)
    assert drawn[0].metadata["include"][0]["class"] == "star"
    assert [one.text for one in drawn[:10]] != [one.text for one in drawn[10:]]
    path.write_text('{"prompt": "a dog"}\n')
    with pytest.raises(UserError, match="'a dog': GenEval metadata"):
        build(tmp_path, settings)
    lines = [{**lines[0], "prompt": str(number)} for number in range(300)]
    lines[299]["include"] = [{"class": "dog", "count": 1}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match="prompt '299': got class 'dog', which the detector verifier does not know"):
        build(tmp_path, settings)


def test_prompts_that_no_row_holds_are_found_before_sampling_and_passed_over(tmp_path):
    path = tmp_path / "prompts.txt"
    lines = ["a red circle", "a blue star", "a very long description " * 40, "two green rings"]
    path.write_text("".join(f"{line}\n" for line in lines))
    settings = settings_of()
    settings["data"]["sources"] = ({"kind": "prompts", "path": str(path)},)
    message = r"1 of 4 items read are broken, the last .*prompts.txt:3 of .*: prompt: got \d+ tokens"
    with pytest.raises(UserError, match=message):
        build(tmp_path, settings)
    edits = tmp_path / "edits.jsonl"
    (tmp_path / "bad.png").write_bytes(b"no image")
    for image, told in ((None, "reference images: got 0 for task edit"), ("bad.png", "bad.png")):
        line = {"prompt": "make it blue", "task": "edit"} | ({"image": image} if image else {})
        edits.write_text(f'{{"prompt": "a red circle"}}\n{json.dumps(line)}\n')
        settings["data"]["sources"] = ({"kind": "prompts", "path": str(edits)},)
        with pytest.raises(UserError, match=f"1 of 2 items read are broken, the last .*edits.jsonl:2 of .*{told}"):
            build(tmp_path, settings)
    settings["data"]["sources"] = ({"kind": "prompts", "path": str(path)},)
    settings["data"]["max_broken_share"] = 0.5
    settings["rl"]["held_out"] = {"data": settings["data"], "rewards": ({"name": "redness"},), "count": 4}
    source = build(tmp_path, settings).source
    assert {one.text for one in source._prompts.draw(8)} == {*lines} - {lines[2]}
    state = source.state()
    for name in ("options", "without_text"):  # as earlier versions saved it
        del state["prompts"][name]
    build(tmp_path, settings).source.restore(state)


def test_rewards_check_a_list_of_edits_without_holding_all_of_its_references(tmp_path):
    save_png(np.zeros((2, 2, 3), np.uint8), tmp_path / "a.png")
    lines = [{"prompt": f"edit {n}", "task": "edit", "image": "a.png"} for n in range(150)]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings, calls = settings_of(), []
    settings["data"]["sources"] = ({"kind": "prompts", "path": str(tmp_path / "edits.jsonl")},)

    class Counting(Judging):
        def check(self, inputs):
            calls.append([one.prompt for one in inputs if one.references])

    numbered_source(Counting(), settings)
    assert [name for call in calls for name in call] == [line["prompt"] for line in lines]
    assert max(map(len, calls)) <= 64
    calls.clear()
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps({"prompt": str(n)}) + "\n" for n in range(150)))
    numbered_source(Counting(), settings)
    assert calls == [[]], "prompts without references are checked at once, and counted in one message"


def test_prompts_are_drawn_as_rows_of_training_are(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.write_text("".join(f"{path.stem}{number}\n" for number in range(7)))
    sources = tuple(
        {"kind": "prompts", "path": str(path), "weight": 1.0 + 2 * number} for number, path in enumerate(paths)
    )
    config = from_dict(DataConfig, {"sources": sources, "batch_size": 4, "seed": 3})
    opened = [open_source(source) for source in config.sources]
    rows = [opened[source][item].text for source, item in (positions(config, opened)[row] for row in range(24))]
    stream = PromptStream(config)
    assert [one.text for part in (5, 19) for one in stream.draw(part)] == rows
    assert sum(text.startswith("b") for text in rows) == 18
    again = PromptStream(config)
    again.restore(json.loads(json.dumps(stream.state())))
    assert [one.text for one in again.draw(9)] == [one.text for one in stream.draw(9)]
    other = PromptStream(dataclasses.replace(config, seed=4))
    for state, message in (
        (stream.state(), "data.seed: got 4 - expected 3, as in the checkpoint"),
        ([1, 2], "a data position of an earlier version"),
    ):
        with pytest.raises(UserError, match=message):
            other.restore(state)


def test_rewards_see_references_metadata_and_a_seed_of_every_sample(tmp_path):
    settings = settings_of(data__batch_size=8)
    settings["data"]["sources"] = ({"kind": "world", "path": "train", "task": "edit"},)
    judge = Judging()
    numbered_source(judge, settings=settings).next({}, jax.random.key(0))
    inputs = judge.inputs
    assert len(inputs) == 16 and len({one.seed for one in inputs}) == 16
    assert inputs[0].task == "edit" and inputs[0].metadata["edit"]["index"] >= 0
    first = edits.sample(**{**inputs[0].metadata["edit"]})
    np.testing.assert_array_equal(inputs[0].references[0], render(first.source))
