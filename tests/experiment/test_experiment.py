"""Experiments as train.py runs them: configurations, meshes, what a resumed run may change, bad input."""

import json
import re
import shutil
import types

import jax
import pytest

pytest.importorskip("grain")

from blip3o_jax import experiment, sharding, version
from blip3o_jax.errors import UserError
from blip3o_jax.experiment import composition
from blip3o_jax.experiment.start import identities
from blip3o_jax.text.tokenizer import Tokenizer
from blip3o_jax.train import workdir
from configs import grpo, tiny
from support.settings import changed

WATCHED = {
    "loop__num_steps": 60,
    "loop__log_every": 5,
    "loop__save_every": 2,
    "loop__keep": 9,
    "loop__keep_best": 1,
    "loop__profile_start": 7,
    "loop__wandb_project": "tiny",
    "validation__every": 3,
    "validation__batches": 1,
    "validation": None,
    "samples": {"prompts": ["a photo of a star"], "every": 5},
    "score": {"every": 5},
    "export_every": 10,
    "export_ema": True,
    "numerics__remat": "full",
    "optimizer__accumulation": 2,
    "data__num_workers": 4,
    "data__prefetch": 4,
    "data__sources__0__path": "held_out",
    "data__sources__0__options__base_dir": "where/they/were/moved",
    "mesh": {"data": 8},
    "init_from": "where/it/was/moved",
    "tokenizer": "where/it/was/moved",
}


def test_where_and_how_long_a_reward_is_asked_may_change_on_resume_and_what_it_is_may_not(tmp_path):
    settings = grpo.get_config("tiny").to_dict()
    settings["rl"]["rewards"] = [{"name": "remote", "weight": 1.0, "timeout": 5.0, "options": {"url": "http://a"}}]
    workdir.record_settings(tmp_path, settings, {})
    patient = {"name": "remote", "weight": 1.0, "timeout": 50.0, "options": {"url": "http://b"}}
    workdir.record_settings(tmp_path, changed(settings, rl__rewards=[patient], rl__guards={"max_kl": 2.0}), {})
    with pytest.raises(UserError, match="got rl.rewards.0.weight = 2.0"):
        workdir.record_settings(tmp_path, changed(settings, rl__rewards=[{**patient, "weight": 2.0}]), {})


HELD_OUT = {
    "data": {"sources": [{"kind": "prompts", "path": "a.txt"}], "batch_size": 8, "prefetch": 2},
    "rewards": [{"name": "remote", "timeout": 5.0, "options": {"url": "http://a"}}],
    "count": 64,
    "every": 50,
    "max_drop": None,
}


def test_held_out_scores_of_a_run_are_of_the_same_prompts_and_rewards(tmp_path):
    bare = grpo.get_config("tiny").to_dict()
    settings = changed(bare, rl__held_out=HELD_OUT)

    def resume(name, value):
        workdir.record_settings(tmp_path, changed(settings, **{f"rl__held_out__{name}": value}), {})

    workdir.record_settings(tmp_path, bare, {})
    workdir.record_settings(tmp_path, settings, {})
    resume("every", 5)
    resume("max_drop", 0.1)
    resume("data__prefetch", 4)
    resume("rewards__0__timeout", 9.0)
    resume("rewards__0__options__url", "http://b")
    others = {"count": 32, "use_ema": True, "data__sources__0__path": "b.txt", "rewards__0__name": "redness"}
    for name, value in others.items():
        with pytest.raises(UserError, match=f"got rl.held_out.{name.replace('__', '.')} = {value!r}"):
            resume(name, value)
    with pytest.raises(UserError, match="got rl.held_out.data.sources.0.kind = unset"):
        workdir.record_settings(tmp_path, bare, {})


def test_what_ranks_the_best_checkpoints_may_not_change_while_it_does(tmp_path):
    unranked = tiny.get_config("pretrain").to_dict()
    settings = changed(unranked, loop__keep_best=1)
    workdir.record_settings(tmp_path / "later", unranked, {})
    workdir.record_settings(tmp_path / "later", changed(settings, validation__batches=1), {})
    other = changed(settings, validation__batches=1)
    workdir.record_settings(tmp_path, settings, {})
    workdir.record_settings(tmp_path, changed(settings, validation__every=3, score={"every": 5, "count": 8}), {})
    with pytest.raises(UserError, match="got score.count = unset .recorded 8"):
        workdir.record_settings(tmp_path, settings, {})
    with pytest.raises(UserError, match="got validation.batches = 1 .recorded 2"):
        workdir.record_settings(tmp_path, changed(other, score={"every": 5, "count": 8}), {})
    workdir.record_settings(tmp_path, changed(other, loop__keep_best=0), {})
    workdir.record_settings(tmp_path, other, {})


@pytest.mark.parametrize("name", WATCHED)
def test_what_a_run_is_watched_by_may_change_on_resume(tmp_path, name):
    settings = tiny.get_config("pretrain").to_dict()
    workdir.record_settings(tmp_path, settings, {})
    resumed = changed(settings, **{name: WATCHED[name]})
    workdir.record_settings(tmp_path, resumed, {})
    recorded = json.loads((tmp_path / "config.json").read_text())["config"]
    assert recorded == json.loads(json.dumps(resumed)) != json.loads(json.dumps(settings))


@pytest.mark.parametrize(
    ("name", "value"),
    [("loop__seed", 1), ("optimizer__learning_rate", 1.0), ("data__seed", 1),
     ("data__sources__0__weight", 3.0), ("data__sources__0__options", {"size": 64}), ("data__batch_size", 4),
     ("row__length", 161), ("numerics__dtype", "bfloat16"), ("started_from", {"init_from": "other weights"}),
     ("trainable", []), ("model__image_size", 64)],
)  # fmt: skip
def test_what_a_run_is_may_not_change_on_resume(tmp_path, name, value):
    settings = tiny.get_config("pretrain").to_dict()
    workdir.record_settings(tmp_path, settings, {})
    dotted = name.replace("__", r"\.")
    with pytest.raises(UserError, match=f"belongs to another configuration: got {dotted}"):
        workdir.record_settings(tmp_path, changed(settings, **{name: value}), {})


def test_a_tokenizer_is_the_same_wherever_its_files_lie(tmp_path):
    settings = tiny.get_config("pretrain").to_dict()
    settings["tokenizer"] = shutil.copytree(settings["tokenizer"], tmp_path / "moved").as_posix()

    def started_from(settings):
        config = experiment.from_settings(settings)
        return identities(config, experiment.open_start(config))

    first = started_from(tiny.get_config("pretrain").to_dict())
    assert started_from(settings) == first
    workdir.record_settings(tmp_path, settings | {"started_from": {"init_from": None, "reference_from": None}}, {})
    workdir.record_settings(tmp_path, settings | {"started_from": first}, {})  # an earlier version did not say
    with open(tmp_path / "moved" / "tokenizer_config.json", "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match="started_from.tokenizer = .* .recorded "):
        workdir.record_settings(tmp_path, settings | {"started_from": started_from(settings)}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": {"tasks": ("counting",), "use_ema": True}}, "score.use_ema: got True .* set optimizer.ema_decay"),
        (
            {
                "rl": {
                    "rewards": (),
                    "held_out": {"data": tiny.get_config("pretrain").data.to_dict(), "rewards": (), "use_ema": True},
                },
                "objective": "grpo",
            },
            "rl.held_out.use_ema: got True .* set optimizer.ema_decay",
        ),
        (
            {"rl": {"rewards": (), "sample_average": True}, "objective": "grpo"},
            "rl.sample_average: got True .* set optimizer.ema_decay",
        ),
        ({"export_ema": True}, "export_ema: got True .* set optimizer.ema_decay"),
        ({"model": None}, "init_from: not set, nor model - .* --config.init_from=CHECKPOINT"),
        ({"rl": {"rewards": ()}}, "rl: got a section for objective joint - expected one for grpo, .* leave it out"),
        ({"tokenizer": None}, "init_from: not set, nor tokenizer - .* or --config.tokenizer=DIR"),
        ({"loop__nun_steps": 5}, "loop.nun_steps: unknown key - .* did you mean num_steps"),
        ({"data__sources": ()}, "data.sources: got none"),
        ({"objective": "joined"}, "objective: got 'joined' - expected one of"),
    ],
)
def test_a_mistyped_experiment_is_refused_with_the_nearest_name(change, message):
    with pytest.raises(UserError, match=message):
        experiment.from_settings(changed(tiny.get_config("pretrain").to_dict(), **change))


def test_a_machine_without_git_trains_all_the_same(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert version.git_hash() is None


def test_a_mesh_that_does_not_fit_the_devices_is_refused_before_anything_is_loaded(tmp_path):
    settings = changed(tiny.get_config("pretrain").to_dict(), mesh={"data": 3})
    with pytest.raises(UserError, match="mesh: got .* expected sizes whose product is 8, the devices"):
        experiment.build(experiment.from_settings(settings), settings, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_single_device_needs_no_mesh_but_no_nonsense_either(tmp_path):
    def build(settings):
        return experiment.build(experiment.from_settings(settings), settings, str(tmp_path), jax.devices()[:1])

    settings = tiny.get_config("vae").to_dict()
    assert build(settings).mesh is None
    with pytest.raises(UserError, match="mesh.tensr: unknown axis"):
        build(changed(settings, mesh={"tensr": 1}))


@pytest.mark.parametrize(
    ("steps", "said"), [(5, "note: optimizer.warmup_steps: 5 steps of 5: .* 80% of its peak"), (6, "$")]
)
def test_a_run_that_ends_while_the_learning_rate_rises_is_noted(tmp_path, capsys, steps, said):
    change = {"loop__num_steps": steps, "optimizer__warmup_steps": 5}
    settings = changed(tiny.get_config("vae").to_dict(), **change)
    experiment.build(experiment.from_settings(settings), settings, str(tmp_path), jax.devices()[:1])
    assert re.match(said, capsys.readouterr().err)


NOWHERE = {"kind": "folder", "path": "no_such_folder"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation__data__sources": (NOWHERE,)}, "no_such_folder: not a directory"),
        ({"validation__data__batch_size": 3}, "validation.data.batch_size: got 3 rows - expected a multiple of 2"),
        ({"samples": {"prompts": ("x",), "num_inference_steps": 0}}, "num_inference_steps: got 0"),
        ({"samples": {"prompts": ("x", "word " * 2000)}}, "prompt: got .* tokens from 'word word"),
        ({"samples": {"prompts": ("x", " ")}}, "prompt: got an empty one"),
        ({"score": {"guidance_scale": float("inf")}}, "guidance_scale: got inf"),
    ],
)
def test_an_evaluation_that_cannot_run_is_refused_before_the_first_step(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        config = experiment.from_settings(changed(tiny.get_config("pretrain").to_dict(), **change))
        start = experiment.open_start(config)
        layout, tokenizer = experiment.row_layout(config, start.model), Tokenizer.from_directory(start.tokenizer_dir)
        two = sharding.make_mesh({"data": 2}, jax.devices()[:2])
        run = types.SimpleNamespace(loss_fn=None, frozen={}, reparametrise=None, mesh=two)
        parts = types.SimpleNamespace(start=start, layout=layout, tokenizer=tokenizer)
        composition._hooks(config, parts, run, str(tmp_path))


@pytest.mark.parametrize(("devices", "sizes"), [(1, [4, 4, 2]), (2, [4, 4, 2]), (4, [4, 4])])
def test_validation_evaluates_items_of_a_small_set_equally_often(monkeypatch, devices, sizes):
    monkeypatch.setattr(composition.monitor, "validation_hook", lambda run, *given: given)
    data = {"batch_size": 4, "sources": ({"kind": "world", "path": "held_out", "options": {"size": 32, "count": 5}},)}
    change = {"validation": {"data": data, "every": 7, "batches": 3, "use_ema": True}, "optimizer__ema_decay": 0.9}
    config = experiment.from_settings(changed(tiny.get_config("pretrain").to_dict(), **change))
    start = experiment.open_start(config)
    layout, tokenizer = experiment.row_layout(config, start.model), Tokenizer.from_directory(start.tokenizer_dir)
    mesh = None if devices == 1 else sharding.make_mesh({"data": devices}, jax.devices()[:devices])
    parts, run = types.SimpleNamespace(layout=layout, tokenizer=tokenizer), types.SimpleNamespace(mesh=mesh)
    batches, *how = composition._held_out_hook(config.validation, parts, run, 5)
    assert how == [7, 5, True]
    assert [[len(batch.tokens) for batch in batches()] for _ in range(2)] == [sizes, sizes]


def test_rows_are_laid_out_as_the_configuration_says():
    row = {"length": 150, "max_references": 2, "loss_on": "assistant", "crop_before_tokenizing": True}
    config = experiment.from_settings(changed(tiny.get_config("pretrain").to_dict(), row=row | {"precomputed": True}))
    layout = experiment.row_layout(config, experiment.open_start(config).model)
    assert {name: getattr(layout, name) for name in row} == row
    assert {"target_codes", "target_latent"} <= set(layout.fields)


def test_an_unreadable_data_set_is_refused_before_the_first_step(tmp_path):
    source = {"kind": "folder", "path": str(tmp_path / "nothing"), "task": "t2i", "weight": 1.0, "options": {}}
    settings = changed(tiny.get_config("pretrain").to_dict(), data__sources=(source,), mesh={"data": 8})
    config = experiment.from_settings(settings)
    start = experiment.open_start(config)
    layout, tokenizer = experiment.row_layout(config, start.model), Tokenizer.from_directory(start.tokenizer_dir)
    with pytest.raises(UserError, match="nothing: "):
        experiment.open_stream(config.data, layout, tokenizer, None)


def test_rows_that_the_devices_do_not_divide_are_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(composition, "Parameters", lambda *_: pytest.fail("read"))
    settings = changed(tiny.get_config("vae").to_dict(), data__batch_size=12, mesh={"data": 8})
    with pytest.raises(UserError, match="data.batch_size: got 12 rows - expected a multiple of 8"):
        composition.load_parts(experiment.from_settings(settings))
    settings = changed(settings, data__batch_size=16, optimizer__accumulation=3)
    with pytest.raises(UserError, match="data.batch_size: got 16 rows - expected a multiple of 24"):
        composition.load_parts(experiment.from_settings(settings))
