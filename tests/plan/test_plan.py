"""Plans of training steps: what they count, that they are what a run really holds, and what a user sees."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("ml_collections")

from blip3o_jax import experiment, sharding, treepath
from blip3o_jax.cli import plan as cli
from blip3o_jax.config.presets import preset
from blip3o_jax.errors import UserError
from blip3o_jax.models import blip3o
from blip3o_jax.nn.kernels import forced_branch
from blip3o_jax.plan import program, report, sampling, step, suggest, targets
from blip3o_jax.text.tokenizer import Tokenizer
from configs import blip3o_next_3b, grpo, tiny

ROOT = pathlib.Path(__file__).parent.parent.parent
GB = 10**9


def memory(size):
    """Simulated devices of this memory."""
    return targets.simulated(8, size)


def run(*arguments):
    """The command, in a process of its own: it sets up devices before jax is imported."""
    command = [sys.executable, "-m", "blip3o_jax.plan", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def edit_plan():
    return step.plan(tiny.get_config("edit").to_dict(), jax.devices()[:4], rows_per_device=1)


@pytest.fixture(scope="module")
def whole():
    return step.plan(tiny.get_config("tokenizer").to_dict(), jax.devices()[:2])


def test_planned_bytes_are_those_of_a_real_state_and_batch(edit_plan):
    settings = tiny.get_config("edit").to_dict()
    settings["data"]["batch_size"] = 4
    settings["mesh"] = {"fsdp": 4}
    config = experiment.from_settings(settings)
    start = experiment.open_start(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:4])
    tokenizer = Tokenizer.from_directory(start.tokenizer_dir)
    stream = experiment.open_stream(config.data, experiment.row_layout(config, start.model), tokenizer, None)
    batch = sharding.shard_batch(stream.next(), mesh)
    stream.close()
    assert edit_plan.held["batch"] == sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(batch))
    trained, frozen = (sum(column) for column in zip(*edit_plan.parameters.values()))
    assert trained + frozen == sum(leaf.size for leaf in jax.tree.leaves(blip3o.abstract_plain(start.model)))
    assert edit_plan.held["optimizer state"] == pytest.approx(2 * edit_plan.held["parameters"], rel=1e-2)
    assert trained <= edit_plan.held["parameters"] < 1.3 * trained  # 4 bytes on a quarter, but for small leaves


def test_rows_may_be_given_instead_of_the_batch_size_and_micro_batches_need_less_at_a_time(whole):
    settings = tiny.get_config("tokenizer").to_dict()
    again = step.plan(settings, jax.devices()[:2], rows_per_device=4)
    assert (again.rows, again.total) == (whole.rows, whole.total)
    settings["optimizer"]["accumulation"] = 4
    parts = step.plan(settings, jax.devices()[:2])
    assert (whole.rows_per_device, parts.rows_per_device) == (4, 1)
    assert parts.temporaries < whole.temporaries
    assert parts.flops == whole.flops


def test_the_report_adds_up_and_gives_a_verdict(edit_plan):
    values = report.as_dict(edit_plan, memory(GB))
    sizes = dict(values["bytes_per_device"])
    assert sizes.pop("total") == sum(sizes.values()) == edit_plan.total
    assert values["fits"] and not report.as_dict(edit_plan, memory(1000))["fits"]
    assert "does not fit" in report.text(edit_plan, memory(1000), 8)
    assert "vae_connector" in report.text(edit_plan, memory(GB), 8)


def test_forms_for_the_cpu_exchange_hardly_more_than_the_plain_ones():
    """A kernel that is partitioned must not be cut otherwise."""
    settings = tiny.get_config("edit").to_dict()
    settings["mesh"] = {"data": 2, "fsdp": 1, "tensor": 2}

    def exchanges():
        programs = step.plan(settings, jax.devices()[:4], rows_per_device=1).programs.values()
        return sum(collective.count for program in programs for collective in program.collectives)

    count = exchanges()
    with forced_branch("default"):
        assert 0 < count <= 1.05 * exchanges()


@pytest.mark.parametrize(
    "recipe, stages",
    [
        ("tiny", ("decode", "log_probs", "render")),
        ("tiny_flow", ("decode", "render")),
        ("tiny_grpo_nft", ("decode", "log_probs", "render", "velocities")),
    ],
)
def test_rollouts_are_planned_and_count_where_they_take_more_than_the_step(recipe, stages):
    settings = grpo.get_config(recipe).to_dict()
    plan, half = (step.plan(rl_changed(settings, sample_batch_size=size), jax.devices()[:4]) for size in (32, 16))
    assert set(plan.rollout) == set(stages)
    # not the whole of decoding: its prefill has a row for each of two prompts on 4 devices
    assert all(half.rollout[stage] < plan.rollout[stage] for stage in stages[1:])
    assert "log_probs" not in stages or half.programs["tokens"].peak_bytes < plan.programs["tokens"].peak_bytes
    cells = (plan.rows // 4) * experiment.from_settings(settings).model.num_image_tokens
    assert plan.rollout["decode"] > cells * 4 * experiment.from_settings(settings).model.decoder.width
    held = sum(plan.held.values())
    assert plan.total == held + max(plan.temporaries, *plan.rollout.values())
    large = dataclasses.replace(plan, rollout={**plan.rollout, "render": 10 * plan.temporaries})
    assert large.total == held + 10 * plan.temporaries
    text = report.text(large, memory(GB // 1000), 8)
    assert f"sampling: render{10 * plan.temporaries:>22,}" in text
    assert report.as_dict(large, memory(GB))["rollout_bytes_per_device"] == large.rollout


def test_a_step_that_needs_most_of_a_gpu_names_the_setting(whole):
    def text(part, platform):
        return report.text(whole, targets.Target("h100:2", platform, (), int(whole.total / part)), 8)

    assert "set XLA_CLIENT_MEM_FRACTION to 0.81 or more" in text(0.804, "cuda")
    assert not any("XLA_CLIENT" in text(part, kind) for part, kind in ((0.74, "cuda"), (1.1, "cuda"), (0.8, "tpu")))


def rl_changed(settings, **changes):
    return {**settings, "rl": {**settings["rl"], **changes}}


def test_temporaries_are_all_counted():
    """Fusions of CPU libraries and an order for parallel execution would hide and inflate them."""

    def chain(x, y, w):
        for _ in range(3):
            x, y = jnp.tanh(x @ w) + jnp.sin(x), jnp.tanh(y @ w) + jnp.sin(y)
        return x.sum() + y.sum()

    rows, weights = jax.ShapeDtypeStruct((1024, 512), jnp.float32), jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = jax.jit(chain).lower(rows, rows, weights).compile(step.known_options(step.COMPILER_OPTIONS))
    array = 1024 * 512 * 4
    assert 2 * array <= compiled.memory_analysis().temp_size_in_bytes < 3 * array
    assert step.known_options({"xla_no_such_option": 1}) == {}


@pytest.mark.parametrize("stage", ["vae", "tokenizer", "pretrain", "sft", "edit", "edit-precomputed"])
def test_every_released_recipe_can_be_planned_before_its_paths_are_set(stage):
    settings = blip3o_next_3b.get_config(stage).to_dict()
    with pytest.raises(UserError, match=r"data.sources.\w+.path: not set"):
        experiment.from_settings(settings)
    config = experiment.from_settings(step.without_files(settings))
    start = experiment.open_start(config)
    trained, frozen = treepath.partition(blip3o.abstract_params(start.model), config.trainable)
    sizes = step._counts(trained, frozen)
    assert sum(sizes["decoder"]) == 1_854_256_128
    has_pixels = any("pixels" in name for name in experiment.row_layout(config, start.model).fields)
    assert has_pixels == ("precomputed" not in stage)
    if stage not in ("vae", "tokenizer"):
        assert sizes["decoder"][1] == 0 < sizes["dit"][0] < sizes["dit"][1]


def test_a_configuration_without_data_is_refused_by_name():
    settings = tiny.get_config("tokenizer").to_dict()
    del settings["data"]
    with pytest.raises(UserError, match="data: missing - expected DataConfig"):
        step.plan(settings, jax.devices()[:1])


def test_the_command_prints_json_and_says_by_its_exit_code_whether_the_step_fits():
    arguments = ("--config=configs/tiny.py:tokenizer", "--mesh=data:2,fsdp:1", "--json")
    done = run(*arguments, "--device_memory=1MB", "--config.data.batch_size=4")
    assert done.returncode == 1, done.stderr
    values = json.loads(done.stdout)
    assert values["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1} and values["rows_per_device"] == 2
    assert not values["fits"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "plan: got neither --config nor --sample - expected one of them"),
        (("--config=tiny", "--sample=t2i"), "plan: got both --config and --sample - expected one of them"),
        (("--config=configs/tiny.py",), "--target: got none - expected --target, or the number of simulated"),
        (("--sample=t2i", "--preset=tiny"), "add such as --target=v5e:4x8 or --num_devices=8"),
        (("--config=configs/tiny.py", "--num_devices=3"), "data.batch_size: got 8 rows - expected a multiple of 3"),
        (("--config=configs/tiny.py", "--config.rwo.length=2", "--num_devices=1"), "rwo: unknown key"),
    ],
)
def test_a_mistake_ends_in_one_line(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage, devices, rows", [("pretrain", 32, 16), ("sft", 8, 16), ("edit", 64, 8)])
def test_the_3b_steps_are_planned_in_minutes_and_fit_80_gb(stage, devices, rows):
    """Batch sizes are those of the recipes except where they would leave a device fewer rows."""
    config = f"--config=configs/blip3o_next_3b.py:{stage}"
    done = run(config, f"--num_devices={devices}", f"--rows_per_device={rows}", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    values = json.loads(done.stdout)
    assert values["rows"] == devices * rows and values["compile_seconds"] < 600
    assert values["parameters"]["decoder"]["trained"] == 1_854_256_128


def test_every_program_is_named_before_it_is_compiled():
    said = []
    plan = sampling.plan_sampling(preset("tiny"), jax.devices()[:1], say=said.append)
    assert list(dict.fromkeys(said)) == [f"compiling {stage}" for stage in plan.programs]


@pytest.mark.parametrize("devices", [1, 4])
def test_int8_weights_take_less_than_others(devices):
    def planned(dtype):
        return sampling.plan_sampling(preset("tiny"), jax.devices()[:devices], stages=("decode",), dtype=dtype)

    plans = {dtype: planned(dtype) for dtype in ("float32", "bfloat16", "int8")}
    sizes = {dtype: plan.parameters for dtype, plan in plans.items()}
    assert sizes["float32"] == 2 * sizes["bfloat16"] and sizes["int8"] < 0.95 * sizes["bfloat16"]
    target = targets.Target("cpu", "cpu", tuple(jax.devices()[:devices]), GB)
    assert "1 image in int8 on" in report.sampling_text(plans["int8"], target)


def test_what_makes_a_plan_fit_is_compiled_and_keeps_the_global_batch(monkeypatch):
    settings = tiny.get_config("pretrain").to_dict()
    devices = jax.devices()[:2]
    whole, tried = step.plan(settings, devices), []
    target = targets.Target("cpu:2", "cpu", tuple(devices), int(0.8 * whole.total))
    flags, plan = suggest.fitting(settings, target, None, tried.append)
    assert plan.total <= target.memory_bytes and plan.rows == whole.rows
    assert flags.startswith("--config.settings.encode_rows=1") and tried[-2:] == [f"trying {flags}", "compiling update"]
    monkeypatch.setattr(step, "plan", lambda *_: plan)  # of another size, as all that follow
    assert suggest.fitting(settings, dataclasses.replace(target, memory_bytes=1000), None, tried.append) is None
    assert len(tried) > 3


def test_with_reinforcement_learning_fewer_samples_are_drawn_at_a_time():
    settings = grpo.get_config("geneval_3b").to_dict()
    flags = [flags for flags, *_ in suggest.changes(settings, None)]
    assert flags[0] == "--config.optimizer.accumulation=2 --config.rl.sample_batch_size=32"
    assert [each.rpartition("=")[2] for each in flags] == ["32", "16", "16", "16"]  # of which 16 are one group
    settings["rl"]["sample_batch_size"] = None
    *_, (_, last, _) = suggest.changes(settings, None)
    assert last["rl"]["sample_batch_size"] == settings["data"]["batch_size"] // 16
    for _, changed, _ in suggest.changes(settings, None):
        experiment.from_settings(step.without_files(changed))


def test_programs_are_reported_with_kernels_and_the_largest_arrays(edit_plan):
    update = edit_plan.programs["update"]
    assert update.kernels > 100 and update.peak_bytes > update.argument_bytes > 0
    text = report.text(edit_plan, memory(GB), 8)
    assert f"{update.kernels:,} kernels" in text and "an estimate" in text
    assert report.as_dict(edit_plan, memory(GB))["programs"]["update"]["largest"]


def test_an_adapter_needs_no_second_decoder_and_hardly_any_optimizer_state():
    settings = grpo.get_config("tiny").to_dict()
    full, adapted = (step.plan({**settings, "adapter": {"rank": rank}}, jax.devices()[:1]) for rank in (0, 2))
    assert "reference" in full.parameters and "reference" not in adapted.parameters
    trained, frozen = adapted.parameters["decoder"]
    assert trained < full.parameters["decoder"][0] / 4 and frozen >= full.parameters["decoder"][0]
    assert adapted.held["optimizer state"] < full.held["optimizer state"] / 4
    assert adapted.programs.keys() == full.programs.keys() and adapted.total < full.total


@pytest.mark.parametrize("stage", ["pretrain", "sft", "edit-precomputed", "steps", "tokenizer", "vae"])
@pytest.mark.parametrize("machine", blip3o_next_3b.MACHINES)
def test_a_machine_splits_the_same_batch(stage, machine):
    config, own = blip3o_next_3b.get_config(stage), blip3o_next_3b.get_config(f"{stage}@{machine}")
    devices = int(machine.rpartition("-")[2])
    assert own.data.batch_size == config.data.batch_size
    assert own.data.batch_size % (devices * own.optimizer.accumulation) == 0


def test_an_unknown_machine_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="try pretrain@v5e-32"):
        blip3o_next_3b.get_config("pretrain@v5e-23")


def test_sampling_is_planned_stage_by_stage():
    plan = json.loads(run("--sample", "edit", "--preset", "tiny-edit", "--num_devices", "1", "--json").stdout)
    assert (plan["task"], plan["batch_size"], plan["is_estimate"]) == ("edit", 1, True)
    assert set(plan["programs"]) == {"encode references", "prefill", "tokens", "denoise", "decode"}
    assert plan["fits"] and plan["peak_bytes"] > plan["bytes_per_device"]["parameters"] > 0
    done = run("--sample", "edit", "--preset", "tiny-edit", "--num_devices", "1", "--device_memory=1MB")
    assert done.returncode == 1 and "an estimate" in done.stdout
    assert done.stdout.startswith("cpu:1: edit, 1 image in bfloat16 on 1 device\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sample=t2i", "--mesh=fsdp:2"), "--mesh: got fsdp:2 - expected --config beside it"),
        (("--sample=t2i", "--config.loop.keep=2"), "--config.loop.keep=2: got --sample - expected --config"),
        (("--sample=t2i", "--devices_per_host=4"), "--devices_per_host: got 4"),
        (("--config=tiny", "--batch_size=2"), "--batch_size: got 2 - expected --sample beside it"),
        (("--config=tiny", "--preset=tiny"), "--preset: got tiny"),
        (("--config=tiny", "--dtype=int8"), "--dtype: got int8 - expected --sample beside it"),
        (("--sample=t2i", "--preset=tiny", "--dtype=fp8"), "dtype: got 'fp8' - expected float32, bfloat16, int8"),
        (("--config=tiny", "--mesh=fsdp=2"), "--mesh: got 'fsdp=2'"),
        (("--config=tiny", "--device_memory=80"), "--device_memory: got '80'"),
    ],
)
def test_an_option_without_effect_or_of_another_form_is_refused(flags, message, refusal):
    assert message in refusal(cli.main, [*flags, "--num_devices=1"])


def refusing(module):
    """A compiler that refuses the programs of a module, whose figure has the program's arguments in it."""

    def refuse(name, lowered, **options):
        if module in str(lowered.as_text()[:200]):
            raise program.DoesNotFit("RESOURCE_EXHAUSTED: temporaries (46.00G) exceeds available HBM (15.75G)")
        return program.compile_lowered(name, lowered, **options)

    return refuse


def test_a_stage_of_sampling_that_does_not_fit_is_named_and_counts(monkeypatch):
    monkeypatch.setattr(sampling, "compile_lowered", refusing("decode"))
    plan = sampling.plan_sampling(preset("tiny"), jax.devices()[:1])
    assert "denoise" in plan.programs and "decode" not in plan.programs
    assert plan.refused.startswith("decode: RESOURCE_EXHAUSTED")
    assert plan.stages["decode"] > max(size for stage, size in plan.stages.items() if stage != "decode")
    assert 46 * 2**30 <= plan.total < 46 * 2**30 + plan.parameters  # the decoder's own count once
    assert not report.fits(plan, memory(100 * GB))


@pytest.mark.parametrize(("module", "name"), [("jit_train_step", "update"), ("jit_completion_log_probs", "log_probs")])
def test_what_a_refused_program_needs_counts_once(module, name, monkeypatch):
    monkeypatch.setattr(step, "compile_lowered", refusing(module))
    plan = step.plan(grpo.get_config("tiny").to_dict(), jax.devices()[:1])
    assert plan.refused.startswith(f"{name}: RESOURCE_EXHAUSTED") and not report.fits(plan, memory(100 * GB))
    if name == "update":
        assert plan.total == 46 * 2**30 and plan.held["batch"] > 0
    else:  # beside the optimizer's state, which it does not take
        assert 46 * 2**30 < plan.total < 46 * 2**30 + sum(plan.held.values())
        assert plan.rollout.keys() == {name}
