"""Training an adapter: what trains, what is saved and exported, resuming on a mesh, and what is refused."""

import dataclasses
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("grain")

from blip3o_jax import experiment, files, lora, treepath
from blip3o_jax.convert import adapters, native
from blip3o_jax.convert.checkpoint import open_checkpoint
from blip3o_jax.errors import UserError
from blip3o_jax.experiment import composition
from blip3o_jax.experiment.adapter import adapter_of
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.train import loop
from configs import grpo, tiny
from support.settings import changed

RULES = (("attention/(key|value)$", 0, None), ("connector/", 2, 1.0))


@pytest.fixture(scope="module")
def base(golden_root):
    return str(golden_root / "t2i" / "checkpoint")


def settings_of(base, config=None, **changes):
    settings = (config or tiny.get_config("sft")).to_dict()
    settings |= {"model": None, "init_from": base, "tokenizer": None, "validation": None}
    quick = {"loop__tensorboard": False, "optimizer__schedule": "constant", "optimizer__warmup_steps": 0}
    return changed(settings, **quick, **{"adapter": {"rank": 3, "rules": RULES}, **changes})


def train(settings, directory, devices=1):
    config = experiment.from_settings(settings)
    run = experiment.build(config, settings, str(directory), jax.devices()[:devices])
    return run, loop.train(run, config.loop, str(directory))[0]


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A run of two steps: its directory, and the state at its end."""
    directory = tmp_path_factory.mktemp("adapter")
    run, state = train(settings_of(base, loop__num_steps=2), directory)
    return directory, run, state


def test_only_the_adapter_trains_and_is_saved(base, trained):
    directory, run, state = trained
    paths = list(treepath.flatten(state.params))
    assert all(path.rpartition("/")[2] in ("lora_a", "lora_b") for path in paths)
    layers = {path.rpartition("/")[0]: leaf.shape[-1] for path, leaf in treepath.flatten(state.params).items()
              if path.endswith("lora_a")}  # fmt: skip
    assert layers["decoder/layers/attention/query"] == 3 and layers["connector/out"] == 2
    assert not [path for path in layers if "key" in path or "value" in path or "blocks" in path]
    assert "dit/caption_projection/in" in layers  # as the recipe's `trainable` says
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(directory / "checkpoints" / "2" / "state").item_metadata.tree
    assert sorted(treepath.flatten(saved["params"])) == sorted(paths)
    before = Pipeline.from_pretrained(base).params
    now = treepath.flatten(lora.without(run.whole(state.params)))
    jax.tree.map(np.testing.assert_array_equal, now, treepath.flatten(before))
    assert all(float(abs(leaf).max()) > 0 for path, leaf in treepath.flatten(state.params).items() if path[-1] == "b")


def test_the_exported_adapter_makes_the_trained_model_of_its_base(base, trained):
    directory, run, state = trained
    pipeline = Pipeline.from_pretrained(base, adapters=directory / "adapter")
    stored = adapters.load_adapter(directory / "adapter", pipeline.config)
    own = lora.Adapter(stored.adapter.sites, treepath.flatten(state.params))
    wanted = lora.merge(lora.without(run.whole(state.params)), [(own, 1.0)])
    jax.tree.map(np.testing.assert_array_equal, pipeline.params, wanted)
    assert pipeline.name.startswith(Pipeline.from_pretrained(base).name + "+") and pipeline.name.endswith("*1")
    assert not (directory / "model").exists()


def test_an_adapter_is_written_again_if_it_is_gone_or_its_average_is_wanted(base, tmp_path, capsys):
    settings = settings_of(base, loop__num_steps=1, optimizer__ema_decay=0.5)
    train(settings, tmp_path)
    train(settings, tmp_path)
    assert "up to date: the model of checkpoint 1" in capsys.readouterr().out
    last = tmp_path / "adapter" / adapters.PEFT
    before = last.read_bytes()
    train(changed(settings, export_ema=True), tmp_path)
    assert last.read_bytes() != before
    shutil.rmtree(tmp_path / "adapter")
    train(settings, tmp_path)
    assert last.read_bytes() == before


def test_a_run_goes_on_on_a_mesh(base, trained, tmp_path):
    directory, _, _ = trained
    longer = settings_of(base, loop__num_steps=3)
    _, expected = train(longer, tmp_path / "whole")
    _, resumed = train(changed(longer, mesh={"fsdp": 2, "tensor": 2}), directory, 4)
    assert int(resumed.step) == 3
    for path, leaf in treepath.flatten(resumed.params).items():
        other = treepath.flatten(expected.params)[path]
        np.testing.assert_allclose(leaf, other, atol=2e-4, err_msg=path)  # a tenth of what a step changes
    query = resumed.params["decoder"]["layers"]["attention"]["query"]
    assert tuple(query["lora_b"].sharding.spec) == (None, None, "tensor")


def parts_of(settings):
    config = experiment.from_settings(settings)
    return composition.load_parts(config, jax.devices()[:1])


TOKENS, PAINTING = {"reference": "decoder"}, {"reference_dit": "dit", "reference_connector": "connector"}


@pytest.mark.parametrize(
    ("recipe", "copies"), [("tiny", TOKENS), ("tiny_flow", PAINTING), ("tiny_grpo_nft", TOKENS | PAINTING)]
)
def test_the_reference_policy_is_the_same_arrays_with_the_adapter_off(base, recipe, copies):
    parts = parts_of(settings_of(base, grpo.get_config(recipe)))
    assert not set(copies) & set(parts.frozen)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), jax.tree.map(
        lambda leaf: leaf.unbox(), parts.split.trainable, is_leaf=lambda leaf: hasattr(leaf, "unbox")))  # fmt: skip
    whole = parts.split.reparametrise(treepath.merge(zeros, parts.frozen))
    for name, part in copies.items():
        own, reference = treepath.flatten(parts.frozen[part]), treepath.flatten(whole[name])
        assert reference and all(leaf is own[path] for path, leaf in reference.items())


def test_another_reference_is_a_copy_of_its_own(base, tmp_path):
    opened = open_checkpoint(base)
    params = opened.load_params(param_dtype="float32")
    params["decoder"]["final_norm"]["scale"] += 1
    native.save_native(tmp_path / "other", opened.config, params, opened.origin())
    parts = parts_of(settings_of(base, grpo.get_config("tiny"), reference_from=str(tmp_path / "other")))
    reference, own = (parts.frozen[name]["final_norm"]["scale"] for name in ("reference", "decoder"))
    np.testing.assert_allclose(reference, own + 1)


def test_the_first_rule_that_matches_a_layer_decides_its_rank_and_scale(base):
    rules = (("attention/query$", 2, None), ("attention/", 1, 5.0), ("attention/query$", 0, None))
    sites = parts_of(settings_of(base, adapter={"rank": 3, "alpha": 6.0, "rslora": True, "rules": rules})).split.sites
    got = {name: (sites[name].ranks[0], sites[name].alphas[0]) for name in sites}
    assert got["decoder/layers/attention/query"] == (2, 2.0) and got["decoder/layers/attention/out"] == (1, 5.0)
    assert got["connector/out"] == (3, 6.0)
    assert all(site.rslora and not site.dora for site in sites.values())
    sites = parts_of(settings_of(base, adapter={"rank": 0, "rules": (("connector/out", 2, None),)})).split.sites
    assert list(sites) == ["connector/out"]


def test_an_adapter_is_written_in_the_dtype_of_the_activations(base):
    settings = changed(settings_of(base), numerics__dtype="bfloat16")
    parts = parts_of(settings)
    params = lora.first_values(parts.split.sites, parts.split.trainable, parts.frozen, jax.random.key(0))
    state = dataclasses.make_dataclass("State", ["params", "ema"])(params, None)
    written = adapter_of(experiment.from_settings(settings), parts.split, state)
    assert {leaf.dtype.name for leaf in written.leaves.values()} == {"bfloat16"}


NONE = ((r"^decoder/layers/.*norm", True), (r"", False))
REFUSED = {
    "no linear layer": ({"trainable": NONE}, "adapter: got 0 linear layers"),
    "all left out": ({"adapter": {"rank": 2, "rules": (("", 0, None),)}}, "none of which its rules adapt"),
    "too high a rank": (
        {"adapter": {"rules": (("attention/key$", 50, None),)}},
        "adapter.rank of decoder/layers/attention/key: got 50 - expected at most 48, the smaller side of its kernel",
    ),
    "a negative rank": ({"adapter": {"rank": -1}}, "adapter.rank: got -1"),
    "an alpha of 0": ({"adapter": {"rank": 2, "alpha": 0.0}}, "adapter.alpha: got 0"),
    "a pattern that is none": ({"adapter": {"rank": 2, "rules": (("(", 1, None),)}}, "a regular expression"),
    "DoRA without a rank": ({"adapter": {"dora": True}}, "adapter.dora: got True without a rank - expected one"),
    "rsLoRA without a rank": ({"adapter": {"rank": 0, "rslora": True}}, "adapter.rslora: got True without a rank"),
    "a misspelt field": ({"adapter": {"rnk": 2}}, "adapter.rnk: unknown key .* did you mean rank"),
    "no leaf that trains": ({"trainable": ((r"", False),)}, "trainable: got no parameter"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused(base, what):
    change, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        parts_of(settings_of(base, **change))


def test_an_adapter_of_parts_that_the_checkpoint_lacks_is_refused(base):
    settings = settings_of(base, tiny.get_config("edit"))
    settings["model"] = tiny.get_config("edit").model.to_dict()
    with pytest.raises(UserError, match="adapter: got a model with vae_connector beside that of init_from"):
        parts_of(settings)
    settings = changed(settings, model__edit={"vae_noise": True})
    with pytest.raises(UserError, match="adapter: got a model with another editing mode beside that of init_from"):
        parts_of(settings)


def test_a_trained_model_is_written_with_its_average_and_all_else_of_the_model_before(base, tmp_path):
    settings = settings_of(base, adapter={"rank": 0}, optimizer__ema_decay=0.5, export_ema=True, export_every=3)
    settings["numerics"] |= {"dtype": "bfloat16", "frozen_dtype": "bfloat16"}
    config = experiment.from_settings(settings)
    run = experiment.build(config, settings, str(tmp_path), jax.devices()[:1])
    params = run.init_params()
    for tree in (params, run.abstract_params):
        assert {leaf.dtype.name for leaf in jax.tree.leaves(tree)} == {"float32"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.frozen)} == {"bfloat16"}
    export, average = run.hooks[-1], jax.tree.map(lambda leaf: leaf + 1, params)
    export.run(3, dataclasses.make_dataclass("State", ["params", "ema"])(params, average), None)
    assert export.every == 3
    assert files.read_json(tmp_path / "model" / composition.EXPORTED, "export")["last"] is False
    before, after = open_checkpoint(base), open_checkpoint(tmp_path / "model")
    norm = after.load_params(parts=["decoder"])["decoder"]["final_norm"]["scale"]
    np.testing.assert_array_equal(norm, average["decoder"]["final_norm"]["scale"])
    assert after.config == before.config and after.origin().dtypes == before.origin().dtypes


def test_without_rank_what_is_named_trains_itself(base):
    parts = parts_of(settings_of(base, adapter={"rank": 0}))
    assert "decoder/layers/attention/query/kernel" in treepath.flatten(parts.split.trainable)
    assert not parts.split.sites


def test_an_adapter_of_fresh_parameters_is_written_as_a_model(tmp_path):
    settings = changed(tiny.get_config("sft").to_dict(), adapter={"rank": 2}, validation=None, loop__num_steps=1)
    config = experiment.from_settings(settings)
    run = experiment.build(config, settings, str(tmp_path), jax.devices()[:1])
    state = dataclasses.make_dataclass("State", ["params", "ema"])(run.init_params(), None)
    export = run.hooks[-1]
    assert not export.exported(1)
    export.run(1, state, None)
    assert export.exported(1) and not export.exported(2)
    assert files.read_json(tmp_path / "model" / composition.EXPORTED, "export")["last"] is True
    merged = Pipeline.from_pretrained(tmp_path / "model").params["decoder"]["layers"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(merged, run.frozen["decoder"]["layers"]["attention"]["query"]["kernel"])
