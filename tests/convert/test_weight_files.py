"""Weights under the names that tools give them, and safetensors files whose layout is damaged."""

import json
import struct

import numpy as np
import pytest

from blip3o_jax.convert import safetensors_io
from blip3o_jax.convert.sources import in_memory
from blip3o_jax.convert.weight_files import open_weights, unwrapped
from blip3o_jax.errors import UserError

ANCHOR = "model.embed_tokens.weight"
NAMES = (ANCHOR, "model.layers.0.mlp.up_proj.weight")


def source(names):
    return in_memory({name: np.full(1, i, np.float32) for i, name in enumerate(names)})


def write(directory, name):
    directory.mkdir(exist_ok=True)
    safetensors_io.write_weights(directory, source(NAMES), name)


PREFIXES = ["", "module.", "_orig_mod.", "base_model.model.", "model.", "module._orig_mod.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize(
    "names",
    [
        *(
            [prefix + name for name in NAMES]
            for prefix in [*PREFIXES, "base_model.model.model.", "_forward_module.module."]
        ),
        [ANCHOR, "model.layers.0._orig_mod.mlp.module.up_proj.weight"],
    ],
)
def test_what_tools_put_before_or_into_names_is_taken_off(names):
    got = unwrapped(source(names), ANCHOR, "here")
    assert [got[name].read()[0] for name in NAMES] == [0, 1] and set(got) == set(NAMES)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["foo.x"], "its names are such as foo.x"),
        (["foo." + ANCHOR], "it under foo.model.embed_tokens.weight"),
        ([ANCHOR, "module." + ANCHOR], "got model.embed_tokens.weight and module.model.embed_tokens.weight"),
        ([ANCHOR, "model.layers.0.q_proj.lora_A.default.weight"], "tensors of an adapter"),
    ],
)
def test_other_names_are_told(names, words):
    with pytest.raises(UserError, match=words):
        unwrapped(source(names), ANCHOR, "here")


@pytest.mark.parametrize("variant", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["model", "diffusion_pytorch_model"])
def test_a_variant_is_read_and_the_plain_file_before_it(tmp_path, name, variant):
    write(tmp_path, f"{name}.{variant}")
    assert set(open_weights(tmp_path, name)) == set(NAMES)
    write(tmp_path, name)
    assert open_weights(tmp_path, name)[ANCHOR].origin == str(tmp_path / f"{name}.safetensors")
    write(tmp_path / "two", f"{name}.bf16")
    write(tmp_path / "two", f"{name}.fp16")
    with pytest.raises(UserError, match=f"both {name}.bf16.safetensors and {name}.fp16.safetensors"):
        open_weights(tmp_path / "two", name)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
)
def test_an_adapter_is_told_from_a_model(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(UserError, match="an adapter .*give it as --adapter beside"):
        open_weights(tmp_path)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", 3, None, "", ["x"], "."])
def test_an_index_names_plain_files(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError):
        open_weights(tmp_path)


def entry(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DAMAGED = {
    "overlap": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "an overlap"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "a hole"),
    "first bytes free": ({"a": entry(4, 8)}, 8, "a hole"),
    "trailing": ({"a": entry(0, 4)}, 8, "announced"),
    "short": ({"a": entry(0, 4)}, 3, "announced"),
    "bool": ({"a": entry(0, 4, [True])}, 4, "without dtype"),
    "float": ({"a": entry(0, 4, [1.0])}, 4, "without dtype"),
    "negative": ({"a": entry(0, 4, [-1, -1])}, 4, "without dtype"),
    "wraps": ({"a": entry(0, 0, [2**32, 2**32])}, 0, "bytes at"),
    "dtype": ({"a": entry(0, 4, dtype="F99")}, 4, "of type F99"),
    "dimensions": ({"a": entry(0, 4, [1] * 40)}, 4, "40 dimensions"),
    "metadata": ({"__metadata__": {"a": 1}, "a": entry(0, 4)}, 4, "__metadata__"),
    "list": ({"a": [1]}, 4, "without dtype"),
    "twice": ('{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)),) * 2), 4, "occurs twice"),
    "no object": ("[]", 0, "JSON of type list"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_layout_is_refused(tmp_path, case):
    header, size, words = DAMAGED[case]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(UserError, match=words):
        safetensors_io.open_file(path)
