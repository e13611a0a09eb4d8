"""Files of adapters: what is read and written, and what is refused."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from blip3o_jax.cli import convert
from blip3o_jax.config.presets import preset
from blip3o_jax.convert import adapters, checkpoint, identity, safetensors_io
from blip3o_jax.convert.sources import in_memory
from blip3o_jax.errors import UserError
from blip3o_jax.sharding import make_mesh

MODEL = preset("tiny")
WIDTH, QUERY = MODEL.decoder.width, MODEL.decoder.num_heads * MODEL.decoder.head_dim
NAME = "base_model.model.model.layers.1.self_attn.q_proj"
A, B = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"
HIDDEN = adapters.linear_layers(MODEL)["dit/blocks/feed_forward/expand"].shape[-1]
RNG = np.random.default_rng(0)


def matrix(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def write(directory, tensors, file=adapters.PEFT, metadata=None, **settings):
    directory.mkdir(exist_ok=True)
    stem = file.removesuffix(".safetensors")
    safetensors_io.write_weights(directory, in_memory(tensors), stem, metadata=metadata)
    if file == adapters.PEFT:
        (directory / adapters.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}))
    return directory


def good():
    return {A: matrix(2, WIDTH), B: matrix(QUERY, 2)}


def test_the_decoder_layer_that_a_tensor_names_is_adapted(tmp_path):
    tensors = good()
    stored = adapters.load_adapter(write(tmp_path / "a", tensors), MODEL)
    site = stored.adapter.sites["decoder/layers/attention/query"]
    assert site.ranks == tuple(2 if i == 1 else 0 for i in range(MODEL.decoder.depth)) and site.scale[1] == 2
    np.testing.assert_array_equal(stored.adapter.leaves["decoder/layers/attention/query/lora_a"][1], tensors[A].T)
    assert stored.base is None and len(stored.identity) == 12
    off = adapters.load_adapter(write(tmp_path / "b", good(), lora_alpha=0), MODEL).adapter
    assert off.sites["decoder/layers/attention/query"].scale[1] == 0


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({}, 4 / 2),
        ({"lora_alpha": None}, 8 / 2),  # PEFT's default
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"alpha_pattern": {"q_proj": 6}}, 6 / 2),
        ({"alpha_pattern": {r"layers\.\d\.self_attn\.q_proj": 6, "q_proj": 7}}, 6 / 2),  # the first one
        ({"alpha_pattern": {"proj": 6, "self_attn": 6, "layers.1": 6}}, 4 / 2),  # whole parts, up to the end
    ],
)
def test_the_scale_of_a_layer_is_that_of_peft(tmp_path, settings, scale):
    stored = adapters.load_adapter(write(tmp_path / "a", good(), **settings), MODEL)
    assert stored.adapter.sites["decoder/layers/attention/query"].scale[1] == pytest.approx(scale)


def test_settings_without_a_rank_mean_the_default_of_peft(tmp_path):
    write(tmp_path / "a", good())
    (tmp_path / "a" / adapters.CONFIG).write_text('{"peft_type": "LORA"}')
    with pytest.raises(UserError, match="rank of .*: got 2 - expected 8"):
        adapters.load_adapter(tmp_path / "a", MODEL)


def test_layers_of_different_ranks_and_scales_are_written_as_they_were(tmp_path):
    shapes = {
        "0.self_attn.q_proj": (3, QUERY),
        "1.self_attn.q_proj": (2, QUERY),
        "1.mlp.up_proj": (2, MODEL.decoder.mlp_dim),
    }
    tensors = {}
    for layer, (rank, columns) in shapes.items():
        name = f"base_model.model.model.layers.{layer}"
        tensors |= {f"{name}.lora_A.weight": matrix(rank, WIDTH), f"{name}.lora_B.weight": matrix(columns, rank)}
    patterns = {"rank_pattern": {"layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 2}}
    stored = adapters.load_adapter(write(tmp_path / "a", tensors, **patterns), MODEL)
    adapters.save_adapter(tmp_path / "b", stored.adapter, MODEL)
    written = safetensors_io.open_file(tmp_path / "b" / adapters.PEFT)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(written[key].read(), tensor)
    said, odd = json.loads((tmp_path / "b" / adapters.CONFIG).read_text()), "model.layers.0.self_attn.q_proj"
    assert (said["r"], said["lora_alpha"]) == (2, 4)
    assert (said["rank_pattern"], said["alpha_pattern"]) == ({odd: 3}, {odd: 2})
    assert dict(adapters.load_adapter(tmp_path / "b", MODEL).adapter.sites) == dict(stored.adapter.sites)
    adapters.save_adapter(tmp_path / "c", stored.adapter, MODEL, settings=stored.settings)
    configs = [json.loads((tmp_path / name / adapters.CONFIG).read_text()) for name in "ac"]
    assert configs[0] == configs[1], "settings that were read are kept"


def test_the_identity_of_an_adapter_tells_its_settings(tmp_path):
    tensors = good()
    made = [adapters.load_adapter(write(tmp_path / str(alpha), tensors, lora_alpha=alpha), MODEL) for alpha in (4, 8)]
    again = adapters.load_adapter(tmp_path / "4", MODEL)
    assert made[0].identity == again.identity != made[1].identity
    names = [adapters.identity_with("base", [(made[0], scale)]) for scale in (0.5, 1.0)]
    assert names == [f"base+{again.identity}*0.5", f"base+{again.identity}*1"]


@pytest.mark.parametrize(
    "name",
    ["base_model.model.layers.1.self_attn.q_proj", "base_model.model.module.model.layers.1.self_attn.q_proj",
     "model.layers.1.self_attn.q_proj", "model.layers.1._orig_mod.self_attn.q_proj"],
)  # fmt: skip
def test_names_that_tools_wrap_are_recognised(tmp_path, name):
    tensors = {f"{name}.lora_A.default.weight": matrix(2, WIDTH), f"{name}.lora_B.default.weight": matrix(QUERY, 2)}
    stored = adapters.load_adapter(write(tmp_path / "a", tensors), MODEL)
    assert "decoder/layers/attention/query" in stored.adapter.sites


def test_all_parts_are_written_and_read_back(tmp_path):
    """Connectors and decoder as PEFT, the diffusion transformer as diffusers."""
    width = MODEL.dit.width
    tensors = good() | {
        "base_model.model.model.diffusion_connector.0.lora_A.weight": matrix(3, MODEL.connector.in_width),
        "base_model.model.model.diffusion_connector.0.lora_B.weight": matrix(MODEL.connector.width, 3),
        "base_model.model.model.sana.transformer_blocks.0.ff.conv_inverted.lora_A.weight": matrix(2, width, 1, 1),
        "base_model.model.model.sana.transformer_blocks.0.ff.conv_inverted.lora_B.weight": matrix(HIDDEN, 2, 1, 1),
    }
    patterns = {"rank_pattern": {"diffusion_connector.0": 3}, "alpha_pattern": {"conv_inverted": 1}}
    stored = adapters.load_adapter(write(tmp_path / "a", tensors, **patterns), MODEL)
    adapters.save_adapter(tmp_path / "b", stored.adapter, MODEL, base="0123", base_name="here")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        adapters.CONFIG, adapters.PEFT, adapters.DIFFUSERS]  # fmt: skip
    again = adapters.load_adapter(tmp_path / "b", MODEL, "0123")
    assert again.base == "0123" and dict(again.adapter.sites) == dict(stored.adapter.sites)
    for path, leaf in stored.adapter.leaves.items():
        np.testing.assert_array_equal(again.adapter.leaves[path], leaf)
    with pytest.raises(UserError, match="trained on weights 0123: got a checkpoint of weights 4567"):
        adapters.load_adapter(tmp_path / "b", MODEL, "4567")
    with pytest.raises(UserError, match="exists already"):
        adapters.save_adapter(tmp_path / "b", stored.adapter, MODEL)
    for kept, lost in ((adapters.PEFT, adapters.DIFFUSERS), (adapters.DIFFUSERS, adapters.PEFT)):
        half = tmp_path / kept
        shutil.copytree(tmp_path / "b", half)
        (half / lost).unlink()
        with pytest.raises(UserError, match=f"got {kept} alone - expected {lost} beside it"):
            adapters.load_adapter(half, MODEL)
    later = {path: leaf + 1 for path, leaf in stored.adapter.leaves.items()}
    adapters.save_adapter(tmp_path / "c", dataclasses.replace(stored.adapter, leaves=later), MODEL)
    shutil.copy(tmp_path / "c" / adapters.PEFT, tmp_path / "b")
    with pytest.raises(UserError, match="got files of two adapters - expected of one, as they were saved together"):
        adapters.load_adapter(tmp_path / "b", MODEL)


def test_the_base_of_an_adapter_is_recognised_in_either_layout_and_any_shards(tmp_path, golden_root):
    """By the hash that a native checkpoint records and that is computed from a released one."""
    opened = checkpoint.open_checkpoint(golden_root / "edit_both" / "checkpoint")
    checkpoint.import_checkpoint(opened, tmp_path / "native")
    native = checkpoint.open_checkpoint(tmp_path / "native")
    for name, flags in (("same", []), ("shards", ["--shard_gb", "0.0001"]), ("wide", ["--dtype", "float32"])):
        convert.main(["export", str(native.path), str(tmp_path / name), *flags])
        assert checkpoint.open_checkpoint(tmp_path / name).identity == native.identity == opened.identity
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    params = opened.load_params(mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    assert identity.identity_of(opened.config, params) == opened.identity
    changed = params["dit"]["blocks"]["feed_forward"]["expand"]["kernel"]
    params["dit"]["blocks"]["feed_forward"]["expand"]["kernel"] = changed.at[0, -1, -1].add(1)  # of the first layer
    assert identity.identity_of(opened.config, params) != opened.identity


OTHER = "base_model.model.model.layers.1.self_attn.qkv_proj.lora_A.weight"
DEEP = f"base_model.model.model.layers.{MODEL.decoder.depth}.self_attn.q_proj"
REFUSED = {
    "an unknown layer": (good() | {OTHER: matrix(2, WIDTH)}, {}, "unknown targets: got .*qkv_proj"),
    "a layer too deep": (
        {f"{DEEP}.lora_A.weight": matrix(2, WIDTH), f"{DEEP}.lora_B.weight": matrix(QUERY, 2)}, {},
        f"unknown targets: got .*layers.{MODEL.decoder.depth}"),
    "an embedding": (
        good() | {"base_model.model.model.embed_tokens.lora_embedding_A": matrix(2, 9)}, {}, "unknown targets"),
    "a norm": (good() | {"base_model.model.model.norm.weight": matrix(WIDTH)}, {}, "unknown targets: got .*norm"),
    "nothing": ({}, {}, "got no tensor"),
    "another width": ({A: matrix(2, WIDTH + 1), B: matrix(QUERY, 2)}, {}, r"lora_A.* expected \[2, "),
    "another output": ({A: matrix(2, WIDTH), B: matrix(QUERY + 2, 2)}, {}, r"lora_B.* expected \["),
    "two ranks": ({A: matrix(2, WIDTH), B: matrix(QUERY, 3)}, {}, "lora_B"),
    "two names of a layer": (good() | {key.split("model.")[-1]: x for key, x in good().items()}, {}, "two"),
    "rank 0": ({A: matrix(0, WIDTH), B: matrix(QUERY, 0)}, {}, "lora_A.* expected a rank of 1 or more"),
    "whole numbers": ({A: matrix(2, WIDTH).astype(np.int8), B: matrix(QUERY, 2)}, {}, "int8"),
    "half of a pair": ({A: matrix(2, WIDTH)}, {}, "got lora_a - expected lora_a, lora_b"),
    "not a number": ({A: np.full((2, WIDTH), np.nan, np.float32), B: matrix(QUERY, 2)}, {}, "NaN"),
    "another rank than said": (good(), {"r": 4}, "rank of .*: got 2 - expected 4"),
    "an alpha of text": (good(), {"lora_alpha": "big"}, "alpha of .*: got 'big'"),
    "a pattern that is none": (good(), {"alpha_pattern": {"(": 2}}, "alpha_pattern: got"),
    "a pattern that repeats a group": (good(), {"rank_pattern": {"(q_proj)*": 2}}, "rank_pattern: got .* of a group"),
    "a pattern of many repeats": (good(), {"alpha_pattern": {"q*w*e*r*": 2}}, "at most 3 repeats"),
    "patterns of another type": (good(), {"rank_pattern": [1]}, "adapter_config.json.rank_pattern: got"),
    "a rank of text": (good(), {"r": "2"}, "adapter_config.json.r: got '2' - expected int"),
    "magnitudes missing": (good(), {"use_dora": True}, "lora_magnitude"),
    "magnitudes unannounced": (
        good() | {f"{NAME}.lora_magnitude_vector": matrix(QUERY)}, {}, "expected lora_a, lora_b"),
    "another method": (good(), {"peft_type": "LOHA"}, "peft_type: got LOHA - expected LORA"),
    "biases": (good(), {"bias": "all"}, "bias: got all"),
    "saved modules": (good(), {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "a changed base": (good(), {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: got pissa_niter_4"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_by_name(tmp_path, what):
    tensors, settings, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        adapters.load_adapter(write(tmp_path / "a", tensors, **settings), MODEL)


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "got no such file"), ({"adapter_model.bin": "x"}, "got adapter_model.bin .* save it as safetensors"),
     ({"config.json": "{}"}, "got config.json"), ({adapters.PEFT: "x"}, "do not start with a header")],
)  # fmt: skip
def test_a_directory_that_is_no_adapter_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        adapters.load_adapter(tmp_path, MODEL)


def test_the_directory_of_a_run_is_told_from_that_of_its_adapter(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    write(tmp_path / "adapter", good())
    with pytest.raises(UserError, match=f"got config.json - .* - give {tmp_path / 'adapter'}"):
        adapters.load_adapter(tmp_path, MODEL)


def test_a_layer_in_both_files_is_refused(tmp_path):
    name = "transformer_blocks.0.attn1.to_q"
    pair = {f"{name}.lora_A.weight": matrix(2, MODEL.dit.width), f"{name}.lora_B.weight": matrix(MODEL.dit.width, 2)}
    write(tmp_path / "a", {f"base_model.model.{key}": value for key, value in pair.items()})
    write(tmp_path / "a", {f"transformer.{key}": value for key, value in pair.items()}, adapters.DIFFUSERS)
    with pytest.raises(UserError, match="dit/blocks/self_attention/query in both files"):
        adapters.load_adapter(tmp_path / "a", MODEL)


def test_scales_belong_to_adapters():
    assert adapters.weighted("a") == (("a", 1.0),)
    assert adapters.weighted(["a", "b"], [0.5]) == (("a", 0.5), ("b", 0.5))
    assert adapters.weighted({"a": 0.5, "b": -1}) == (("a", 0.5), ("b", -1.0))
    assert adapters.weighted(()) == ()
    for paths, scales, message in (
        (["a", "b"], [1.0, 2.0, 3.0], "got 3 of them"),
        ([], [0.5], "got 0.5 - expected none without an adapter"),
        (["a"], [float("nan")], "adapter_scale of a"),
        (["a"], [1e9], "adapter_scale of a"),
        (["a", "a"], [], "got a twice"),
        (["a", "./b/../a/"], [], "got a twice"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.weighted(paths, scales)


def attention(index, dtype=np.float32):
    """Tensors of a layer of the diffusion transformer, as diffusers names them."""
    name, width = f"transformer.transformer_blocks.{index}.attn1.to_q", MODEL.dit.width
    pair = {"lora_A": matrix(2, width), "lora_B": matrix(width, 2)}
    return {f"{name}.{side}.weight": value.astype(dtype) for side, value in pair.items()}


def test_layers_of_a_stack_may_have_different_sixteen_bit_types(tmp_path):
    tensors = attention(0, np.float16) | attention(1, ml_dtypes.bfloat16)
    stored = adapters.load_adapter(write(tmp_path / "a", tensors, adapters.DIFFUSERS), MODEL)
    leaf = stored.adapter.leaves["dit/blocks/self_attention/query/lora_a"]
    for index in (0, 1):
        expected = tensors[f"transformer.transformer_blocks.{index}.attn1.to_q.lora_A.weight"].T
        np.testing.assert_array_equal(leaf[index], expected.astype(np.float32))


def test_magnitudes_of_some_layers_alone_are_refused_by_name(tmp_path):
    magnitude = {"transformer.transformer_blocks.0.attn1.to_q.lora_magnitude_vector": matrix(MODEL.dit.width)}
    write(tmp_path / "a", attention(0) | attention(1) | magnitude, adapters.DIFFUSERS)
    with pytest.raises(UserError, match=r"blocks\.1\.attn1\.to_q: got lora_a, lora_b - expected .*lora_magnitude"):
        adapters.load_adapter(tmp_path / "a", MODEL)


def test_a_checkpoint_of_low_precision_keeps_a_small_change_in_float32_only(tmp_path):
    convert.main(["random", "tiny", str(tmp_path / "base"), "--dtype=bfloat16"])
    write(tmp_path / "small", {A: np.full((2, WIDTH), 1e-4, np.float32), B: np.full((QUERY, 2), 1e-3, np.float32)})

    def query(name):
        params = checkpoint.open_checkpoint(tmp_path / name).load_params(parts=["decoder"])
        return params["decoder"]["layers"]["attention"]["query"]["kernel"][1]

    before = query("base")
    for name, flags in {"as_it_was": [], "wide": ["--dtype=float32"]}.items():
        paths = [str(tmp_path / each) for each in ("base", name, "small")]
        convert.main(["merge", *paths[:2], "--adapter", paths[2], "--adapter_scale=0.5", *flags])
    rounded, wide = query("as_it_was"), query("wide")
    assert before.dtype == rounded.dtype == "bfloat16" and wide.dtype == "float32"
    np.testing.assert_allclose(wide - before.astype("float32"), 2e-7, rtol=1e-2, atol=1e-8)
    np.testing.assert_array_equal(rounded, wide.astype("bfloat16"))
    assert (np.asarray(rounded) == np.asarray(before)).mean() > 0.9, "most of the change is lost"
