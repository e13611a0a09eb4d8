"""Checkpoints in the released layout: configuration, tied heads, missing parts, and the way there and back."""

import json
import operator
import pathlib
import shutil

import numpy as np
import pytest

from blip3o_jax.config import TokenIds, schema
from blip3o_jax.config.presets import preset
from blip3o_jax.convert import engine, identity, released, safetensors_io, weight_files
from blip3o_jax.convert.checkpoint import import_checkpoint, open_checkpoint
from blip3o_jax.convert.export import export_checkpoint
from blip3o_jax.convert.random_weights import random_checkpoint, write_tokenizer
from blip3o_jax.convert.released_config import read_config
from blip3o_jax.convert.released_write import write_config
from blip3o_jax.convert.sources import TensorInfo, in_memory
from blip3o_jax.convert.tables import IMAGE_TOKENIZER_PREFIX, PARTS
from blip3o_jax.errors import UserError
from blip3o_jax.models.blip3o import abstract_params
from blip3o_jax.text.sequence import check_tokenizer
from blip3o_jax.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> pathlib.Path:
    """A small checkpoint with a separate diffusion folder; tests copy it before they change it."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    random_checkpoint(preset("tiny-edit"), path, seed=1)
    return path


@pytest.fixture
def copy(tiny, tmp_path) -> pathlib.Path:
    return shutil.copytree(tiny, tmp_path / "copy")


def read_json(path):
    return json.loads(path.read_text())


def weights(directory, name="model"):
    source = weight_files.open_weights(directory, name)
    return {key: np.array(tensor.read()) for key, tensor in source.items()}


def rewrite(directory, tensors, name="model"):
    directory.mkdir(exist_ok=True)
    safetensors_io.write_weights(directory, in_memory(tensors), name)


def edit_json(path, **values):
    path.write_text(json.dumps({**read_json(path), **values}))


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert set(first) == set(second)
    for key, value in first.items():
        assert value.dtype == second[key].dtype and value.tobytes() == second[key].tobytes(), key


def test_an_export_of_an_import_has_every_tensor_and_file_back(golden_dir, tmp_path):
    source = golden_dir / "checkpoint"
    plan = import_checkpoint(open_checkpoint(source), tmp_path / "native")
    native = open_checkpoint(tmp_path / "native")
    export_checkpoint(native, tmp_path / "released")
    assert_same_weights(source, tmp_path / "released")
    files = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    for name in files:
        if name.suffix != ".safetensors":
            assert (source / name).read_bytes() == (tmp_path / "released" / name).read_bytes(), name
    assert plan.unused and native.config == open_checkpoint(source).config
    assert native.identity == open_checkpoint(source).identity


def test_the_published_geometry_needs_no_configuration_of_the_diffusion_models(copy):
    shutil.rmtree(copy / "diffusion")
    with pytest.raises(UserError, match="model.sana_vae.encoder.conv_in.weight|by --diffusion"):
        open_checkpoint(copy)


def test_a_checkpoint_of_published_geometry_needs_no_configuration_of_its_parts(tmp_path):
    config = preset("blip3o-next-3b")
    write_config(config, tmp_path)
    leaves = engine.expand(abstract_params(config), PARTS)
    info = {key: TensorInfo(leaf.tensor_shape, leaf.dtype) for leaf in leaves for key in leaf.keys}
    last = IMAGE_TOKENIZER_PREFIX + "encoder.encoder.layers.26.mlp.fc1.weight"  # of the layer that is not run
    info[last] = TensorInfo((4304, 1152), np.dtype(np.float32))
    shutil.rmtree(tmp_path / "diffusion")
    (tmp_path / "ta_tok_args.json").unlink()
    assert schema.differences(read_config(tmp_path, info, True), config) == {}, "the tower is not that of the decoder"
    (tmp_path / "siglip_config.json").unlink()
    assert schema.differences(read_config(tmp_path, info, True), config) == {}


def test_configurations_are_written_as_the_reference_writes_them(golden_dir, tmp_path):
    source = golden_dir / "checkpoint"
    before = {"rope_parameters": {"rope_theta": 5.0}, "dtype": "float32", "note": "kept"}
    (tmp_path / "config.json").write_text(json.dumps(before))
    write_config(open_checkpoint(source).config, tmp_path, tower_layers=4)
    assert before.keys() & read_json(tmp_path / "config.json").keys() == {"note"}
    names = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")]
    assert len(names) == 7
    for name in names:
        theirs, ours = (read_json(folder / name) for folder in (source, tmp_path))
        if name.name == "siglip_config.json":
            theirs, ours = theirs["vision_config"], ours["vision_config"]
        if name.name == "scheduler_config.json":  # the reference replaces the scheduler by ours
            del ours["_class_name"]
        common = ours.keys() & theirs.keys()
        assert common and {key: ours[key] for key in common} == {key: theirs[key] for key in common}, name
    assert read_json(tmp_path / "generation_config.json").keys() == {"_from_model_config", "pad_token_id"}


def test_the_written_tokenizer_has_the_ids_of_the_configuration(tiny):
    tokenizer, ids = Tokenizer.from_directory(tiny), preset("tiny").tokens
    assert tokenizer.encode("<im_start><S0><I5><im_end>") == [320, 322, 330, 321]
    assert tokenizer.pad_id == ids.pad
    assert tokenizer.decode(tokenizer.encode("Ünïcode, twice")) == "Ünïcode, twice"


@pytest.mark.parametrize("name", ["demo", "tiny"])
def test_a_tokenizer_of_any_small_vocabulary_has_the_ids_of_its_preset(tmp_path, name):
    ids = preset(name).tokens
    write_tokenizer(ids, tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    check_tokenizer(tokenizer, ids)
    assert tokenizer.pad_id == ids.pad and tokenizer.vocab_size == ids.image_start + ids.num_image_tokens


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (TokenIds(261, 262, 263, 3, 266, 64, pad=0), "image_start_tag: got 261 - expected 262 or more"),
        (TokenIds(321, 320, 322, 3, 325, 64, pad=0), "got id 322 for <im_end>"),
        (TokenIds(320, 321, 330, 3, 333, 64, pad=0), "got id 322 for <S0> - expected 330"),
        (TokenIds(320, 321, 322, 3, 325, 64, pad=389), "got id 326 for <im_start> - expected 320"),
    ],
)
def test_a_tokenizer_is_not_written_with_other_ids_than_those_of_the_configuration(tmp_path, ids, words):
    with pytest.raises(UserError, match=words):
        write_tokenizer(ids, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        ({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}, 1.0),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, 3.0),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, 1.0),
    ],
)
def test_the_shift_is_what_the_reference_scheduler_takes_from_the_file(copy, scheduler, shift):
    (copy / "diffusion/scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    assert open_checkpoint(copy).config.schedule.shift == shift


@pytest.mark.parametrize(
    ("flags", "expected"),
    [((False, False, False), (False, False)), ((True, True, False), (True, True)), ((True, True, True), (False, True))],
)
def test_editing_flags_decide_where_the_reference_latent_goes(copy, flags, expected):
    names = ("use_und_image_vae", "use_und_image_vae_as_noise", "only_use_und_image_vae_as_noise")
    edit_json(copy / "config.json", **dict(zip(names, flags)))
    edit = open_checkpoint(copy).config.edit
    assert (edit.vae_condition, edit.vae_noise) == expected


@pytest.mark.parametrize("version", [4, 5])
def test_the_padding_id_may_come_from_the_tokenizer_of_either_version_of_transformers(copy, version):
    for name in ("config.json", "generation_config.json"):
        edit_json(copy / name, pad_token_id=None)
    if version == 5:
        config = read_json(copy / "tokenizer_config.json")
        del config["added_tokens_decoder"]
        (copy / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": []}))
    assert open_checkpoint(copy).config.tokens.pad == preset("tiny").tokens.pad


@pytest.mark.parametrize(("tie", "equal"), [(True, True), (True, False), (False, True)])
def test_a_stored_head_is_tied_only_if_it_should_be_and_equals_the_embedding(copy, tmp_path, monkeypatch, tie, equal):
    monkeypatch.setattr(released, "COMPARED_ROWS", 100)
    tensors = weights(copy)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 0 if equal else 1
    rewrite(copy, {**tensors, "lm_head.weight": head})
    edit_json(copy / "config.json", tie_word_embeddings=tie)
    checkpoint = open_checkpoint(copy)
    tied = tie and equal
    assert checkpoint.config.decoder.tie_embeddings == tied
    assert ("lm_head" in checkpoint.load_params(parts=["decoder"])["decoder"]) != tied
    import_checkpoint(checkpoint, tmp_path / "native")
    export_checkpoint(open_checkpoint(tmp_path / "native"), tmp_path / "released")
    assert_same_weights(copy, tmp_path / "released")


def test_missing_parts_are_named_together_with_what_to_pass(copy):
    prefixes = ("model.vision_tower.", "model.sana_vae.", "model.sana.")
    rewrite(copy, {key: value for key, value in weights(copy).items() if not key.startswith(prefixes)})
    with pytest.raises(UserError) as caught:
        open_checkpoint(copy)
    for words in ("--image_tokenizer", "diffusion transformer (--diffusion", "autoencoder (--diffusion"):
        assert words in str(caught.value)
    with pytest.raises(UserError, match=f"{copy.name} has none"):
        open_checkpoint(copy, diffusion=copy)


@pytest.mark.parametrize("prefix", ["model.vision_tower.vision_tower.", "model.sana_vae.", "model.sana."])
def test_a_part_under_another_name_is_not_taken_for_missing(copy, prefix):
    rewrite(copy, {key.replace(prefix, "model.other."): value for key, value in weights(copy).items()})
    with pytest.raises(UserError, match=f"tensor model.other.* - expected the name {prefix}.* - rename"):
        open_checkpoint(copy)


def test_an_export_in_one_file_has_no_index_of_the_shards_before(tmp_path):
    random_checkpoint(preset("tiny"), tmp_path / "shards", shard_bytes=10**6)
    import_checkpoint(open_checkpoint(tmp_path / "shards"), tmp_path / "native")
    export_checkpoint(open_checkpoint(tmp_path / "native"), tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").glob("model.*")] == ["model.safetensors"]
    assert_same_weights(tmp_path / "shards", tmp_path / "one")


def test_diffusion_models_are_taken_from_the_folder_that_is_passed(copy, tmp_path, tiny):
    tensors, folder = weights(copy), tmp_path / "sana"
    shutil.move(copy / "diffusion", folder)
    edit_json(copy / "config.json", diffusion_name_or_path="org/sana")  # a repository
    for prefix, name in (("model.sana.", "transformer"), ("model.sana_vae.", "vae")):
        part = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        rewrite(folder / name, part, "diffusion_pytorch_model")
    rewrite(copy, tensors)
    checkpoint = open_checkpoint(copy, diffusion=folder)
    assert checkpoint.config == open_checkpoint(tiny).config
    import_checkpoint(checkpoint, tmp_path / "native")
    export_checkpoint(open_checkpoint(tmp_path / "native"), tmp_path / "released")
    assert_same_weights(tiny, tmp_path / "released")
    assert open_checkpoint(tmp_path / "released").config == checkpoint.config


def test_an_image_tokenizer_is_taken_with_its_settings_from_the_file_that_is_passed(copy, tmp_path, tiny, monkeypatch):
    tensors, file, prefix = weights(copy), tmp_path / "ta_tok.safetensors", IMAGE_TOKENIZER_PREFIX
    rewrite(
        tmp_path, {key.removeprefix(prefix): tensors.pop(key) for key in [*tensors] if key.startswith(prefix)}, "ta_tok"
    )
    rewrite(copy, tensors)
    with pytest.raises(UserError, match="image_tokenizer: got .*ta_tok.safetensors although .* has one"):
        open_checkpoint(tiny, file)
    assert open_checkpoint(copy, file).config == open_checkpoint(tiny).config
    stored = released.open_image_tokenizer(file)[0], {**read_json(copy / TA_TOK), "pool_scale": 2}  # as in ta_tok.pth
    monkeypatch.setattr(released, "open_image_tokenizer", lambda path: stored)
    assert open_checkpoint(copy, file).config.pool_scale == 1, "the file beside the weights counts"
    (copy / TA_TOK).unlink()
    checkpoint = open_checkpoint(copy, file)
    assert checkpoint.config.pool_scale == 2
    import_checkpoint(checkpoint, tmp_path / "native")
    assert read_json(tmp_path / "native" / "released" / TA_TOK) == stored[1]
    export_checkpoint(open_checkpoint(tmp_path / "native"), tmp_path / "released")
    assert_same_weights(tiny, tmp_path / "released")
    assert open_checkpoint(tmp_path / "released").config == checkpoint.config


def test_weights_of_another_geometry_are_refused_in_one_report(copy):
    edit_json(copy / "config.json", num_hidden_layers=4, intermediate_size=128)
    with pytest.raises(UserError) as caught:
        open_checkpoint(copy).load_params()
    assert "missing: model.layers.3" in str(caught.value)
    assert "model.layers.0.mlp.down_proj.weight got [64, 112] expected [64, 128]" in str(caught.value)


CONFIG, VAE, TRANSFORMER = "config.json", "diffusion/vae/config.json", "diffusion/transformer/config.json"
SCHEDULER, TA_TOK = "diffusion/scheduler/scheduler_config.json", "ta_tok_args.json"
ABSENT = object()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (CONFIG, {"model_type": "qwen3"}, "model_type 'qwen3' - expected one of blip3o_qwen"),
        (CONFIG, {"image_start_tag_id": None}, "config.json.image_start_tag_id: not set - expected int"),
        (CONFIG, {"hidden_act": "gelu"}, "hidden_act is 'gelu' - expected 'silu'"),
        (CONFIG, {"hidden_act": None}, "hidden_act is None - expected 'silu'"),
        (CONFIG, {"attention_bias": True}, "attention_bias is True"),
        (CONFIG, {"layer_types": ["sliding_attention"] * 3}, "layer_types: got .* - expected full_attention in every"),
        (TRANSFORMER, {"out_channels": 16}, "out_channels: got 16"),
        (CONFIG, {"hidden_size": "64"}, "config.json.hidden_size: got '64' - expected int"),
        (CONFIG, {"num_hidden_layers": -1}, "config.json.num_hidden_layers: got -1 - expected 1 to 1,024"),
        (CONFIG, {"tie_word_embeddings": False}, "no lm_head.weight although"),
        (CONFIG, {"image_start_tag_id": ABSENT}, f"{CONFIG}: no image_start_tag_id - expected this field"),
        (VAE, {"scaling_factor": ABSENT}, f"{VAE}: no scaling_factor - expected this field"),
        (TRANSFORMER, {"sample_size": ABSENT}, f"{TRANSFORMER}: no sample_size - expected this field"),
        (TRANSFORMER, {"sample_size": "4"}, "config.json.sample_size: got '4' - expected int"),
        (VAE, {"encoder_layers_per_block": 3}, f"{VAE}.encoder_layers_per_block: got 3 - expected tuple"),
        (TRANSFORMER, {"num_layers": 0}, f"{TRANSFORMER}.num_layers: got 0"),
        (VAE, {"encoder_block_out_channels": 3}, "channels: got 3 - expected list"),
        (SCHEDULER, {"shift": "3"}, "shift: got '3' - expected float"),
        ("generation_config.json", {"token_guidance_scale": "2"}, "token_guidance_scale: got '2' - expected float"),
        ("generation_config.json", {"num_inference_steps": 0}, "config.json.num_inference_steps: got 0"),
        (TA_TOK, {"bottleneck": []}, r"ta_tok_args.json.bottleneck: got \[\] - expected dict"),
        (TA_TOK, {"bottleneck": {"args": 3}}, "ta_tok_args.json.bottleneck.args: got 3 - expected dict"),
        ("siglip_config.json", {"vision_config": {"num_attention_heads": "4"}}, "heads: got '4' - expected int"),
    ],
)
def test_what_does_not_fit_is_named_with_its_file(copy, name, values, words):
    before = read_json(copy / name) if (copy / name).exists() else {}
    values = {key: value for key, value in {**before, **values}.items() if value is not ABSENT}
    (copy / name).write_text(json.dumps(values))
    with pytest.raises(UserError, match=words):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("name", "values", "field", "expected"),
    [
        (TRANSFORMER, {"timestep_scale": ABSENT}, "dit.timestep_scale", 1.0),
        (TRANSFORMER, {"timestep_scale": 1000.0}, "dit.timestep_scale", 1000.0),
        (TRANSFORMER, {"out_channels": ABSENT}, "dit.out_channels", 32),
        (TRANSFORMER, {"sample_size": 8}, "image_size", 32),
        (VAE, {"in_channels": ABSENT}, "autoencoder.in_channels", 3),
        (VAE, {"in_channels": 4}, "autoencoder.in_channels", 4),
        (VAE, {"decoder_qkv_multiscales": [[], [], [3]]}, "autoencoder.decoder_multiscales", ((), (), (3,))),
        (VAE, {"decoder_qkv_multiscales": [[], [], [3]]}, "autoencoder.encoder_multiscales", ((), (), (5,))),
        (SCHEDULER, {"num_train_timesteps": 500}, "schedule.num_train_timesteps", 500),
        (TA_TOK, {"select_layer_id": ABSENT}, "image_tokenizer.encoder.depth", 3),
        (TA_TOK, {"select_layer_id": 2}, "image_tokenizer.encoder.depth", 2),
        (TA_TOK, {"input_size": 29}, "image_tokenizer.image_size", 29),
        (TA_TOK, {"input_size": ABSENT}, "image_tokenizer.image_size", 31),
        (TA_TOK, {"bottleneck": {"args": {"regularizer": {"args": {"stochastic_temperature": 0.5}}}}},
         "image_tokenizer.temperature", 0.5),
        ("siglip_config.json", {"vision_config": {"num_attention_heads": 4, "layer_norm_eps": 0.05}},
         "image_tokenizer.encoder.norm_eps", 0.05),
        (TA_TOK, {"pool_scale": 2}, "pool_scale", 2),
        (CONFIG, {"pad_token_id": 7}, "tokens.pad", 7),
    ],
)  # fmt: skip
def test_a_setting_is_read_from_its_field_or_has_the_default_of_the_library(copy, name, values, field, expected):
    values = {key: value for key, value in {**read_json(copy / name), **values}.items() if value is not ABSENT}
    (copy / name).write_text(json.dumps(values))
    assert operator.attrgetter(field)(open_checkpoint(copy).config) == expected


def test_a_field_that_is_null_has_its_default(copy, tiny):
    edit_json(copy / "generation_config.json", token_guidance_scale=None, edit_token_guidance_scale=None)
    assert open_checkpoint(copy).config == open_checkpoint(tiny).config


def test_the_identity_tells_weights_apart_and_not_how_they_are_stored(copy, tiny):
    before, tensors = open_checkpoint(tiny).identity, weights(copy)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]  # the tied head, stored a second time
    rewrite(copy, tensors)
    edit_json(copy / "config.json", note="other bytes")
    assert open_checkpoint(copy).identity == before
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    rewrite(copy, tensors)
    assert open_checkpoint(copy).identity != before


def test_the_identity_depends_on_every_layer():
    sampled = identity.windows(preset("blip3o-next-3b"))  # of 28 layers
    assert sampled["decoder/layers/mlp/up/kernel"] == (slice(None), slice(-8, None), slice(-8, None))
    assert sampled["decoder/final_norm/scale"] == (slice(-8, None),)


@pytest.mark.parametrize("name", ["..", "../outside", "{absolute}"])
def test_a_configuration_names_no_folder_outside(copy, tmp_path, name):
    shutil.copytree(copy / "diffusion", tmp_path / "outside")
    edit_json(copy / "config.json", diffusion_name_or_path=name.format(absolute=tmp_path / "outside"))
    with pytest.raises(UserError, match="diffusion_name_or_path"):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", ["notes.txt", SCHEDULER])
def test_a_link_out_of_a_checkpoint_is_not_copied(copy, tmp_path, name):
    (tmp_path / "secret.txt").write_text("{}")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(tmp_path / "secret.txt")
    with pytest.raises(UserError, match=f"{name}, a link to"):
        import_checkpoint(open_checkpoint(copy), tmp_path / "native")
    assert not (tmp_path / "native").exists()


@pytest.mark.parametrize(
    ("written", "advice"),
    [(None, "finish the run"), ("model", "give .*/model$"), ("adapter", ".*/adapter as --adapter")],
)
def test_the_directory_of_a_run_is_told_from_that_of_its_model(tmp_path, written, advice):
    (tmp_path / "config.json").write_text("{}")
    for name in filter(None, ("checkpoints", written)):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"the working directory of a run - expected .* - {advice}"):
        open_checkpoint(tmp_path)


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither blip3o_jax.json nor config.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(UserError, match="~nobody-here/x: does not exist"):
        open_checkpoint("~nobody-here/x")
    with pytest.raises(UserError, match="does not exist .* write hf://"):
        open_checkpoint("org/name")
