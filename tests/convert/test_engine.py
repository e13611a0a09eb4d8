"""The conversion engine on a toy table: proof, windows, casts, export."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from blip3o_jax.convert import engine
from blip3o_jax.convert.rules import TRANSFORMS, Rule, Unused
from blip3o_jax.convert.sources import in_memory
from blip3o_jax.convert.tables import Part
from blip3o_jax.errors import UserError
from blip3o_jax.sharding import make_mesh, shardings_of
from blip3o_jax.treepath import flatten

TORCH_SHAPES = {
    "identity": (8, 4),
    "linear": (8, 16),
    "conv": (8, 4, 3, 2),
    "pointwise": (8, 16, 1, 1),
    "depthwise": (8, 1, 3, 2),
    "grouped": (32, 4, 1, 1),
}
PARTS = {
    "toy": Part(
        "net.",
        (
            Rule("embed.weight", "embed/table", "identity"),
            Rule("layers.{i}.up.weight", "layers/up/kernel", "linear", surplus="the last layer is not run"),
            Rule("stage.{s}.conv.weight", "stage_{s}/conv/kernel", "conv"),
        ),
        (Unused(r"pooling\..*", "nothing reads it"),),
    ),
    "extra": Part("net.extra.", (Rule("weight", "kernel", "linear"),)),
}


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def abstract():
    return {
        "toy": {
            "embed": {"table": boxed((16, 8), ("vocab", "embed"))},
            "layers": {"up": {"kernel": boxed((2, 8, 24), ("layers", "embed", "mlp"))}},
            "stage_0": {"conv": {"kernel": boxed((3, 3, 4, 8), (None, None, "conv_in", "conv_out"))}},
        }
    }


def tensors(dtype=np.float32):
    generator = np.random.default_rng(0)
    shapes = {
        "net.embed.weight": (16, 8),
        "net.layers.0.up.weight": (24, 8),
        "net.layers.1.up.weight": (24, 8),
        "net.layers.2.up.weight": (24, 8),
        "net.stage.0.conv.weight": (8, 4, 3, 3),
        "net.pooling.probe": (3,),
    }
    return {key: generator.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}


def planned(source):
    return engine.plan(abstract(), source, PARTS)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_undone_by_its_inverse(name):
    x = np.arange(np.prod(TORCH_SHAPES[name])).reshape(TORCH_SHAPES[name])
    np.testing.assert_array_equal(TRANSFORMS[name].inverse(TRANSFORMS[name].forward(x)), x)


def test_transforms_give_the_layouts_that_the_layers_multiply_with():
    x = np.arange(6 * 4 * 3 * 2).reshape(6, 4, 3, 2)
    assert TRANSFORMS["conv"].forward(x)[2, 1, 3, 5] == x[5, 3, 2, 1]
    x = np.arange(32 * 4).reshape(32, 4, 1, 1)
    assert TRANSFORMS["grouped"].forward(x)[3, 1, 2] == x[3 * 4 + 2, 1, 0, 0]
    x = np.arange(8 * 3 * 2).reshape(8, 1, 3, 2)
    assert TRANSFORMS["depthwise"].forward(x)[2, 1, 7] == x[7, 0, 2, 1]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_window_of_a_leaf_is_read_from_its_tensors(name, stacked):
    generator = np.random.default_rng(1)
    keys = ("a", "b", "c") if stacked else ("a",)
    source = in_memory({key: generator.standard_normal(TORCH_SHAPES[name]).astype(np.float32) for key in keys})
    elements = [TRANSFORMS[name].forward(source[key].read()) for key in keys]
    whole = np.stack(elements) if stacked else elements[0]
    rule = Rule("{i}" if stacked else "a", "x", name)
    leaf = engine.Leaf("toy/x", whole.shape, np.dtype(np.float32), keys, stacked, rule)
    for _ in range(10):
        bounds = [sorted(generator.integers(0, size + 1, 2)) for size in whole.shape]
        index = tuple(slice(int(start), int(stop)) for start, stop in bounds)
        np.testing.assert_array_equal(engine.read_window(leaf, index, source, np.dtype(np.float32)), whole[index])


def test_a_leaf_takes_its_tensors_and_the_rest_is_kept_aside_with_its_reason():
    source = in_memory(tensors())
    plan = planned(source)
    assert plan.unused == {
        "net.layers.2.up.weight": "the last layer is not run",
        "net.pooling.probe": "nothing reads it",
    }
    params = engine.load(plan, source)["toy"]
    np.testing.assert_array_equal(params["layers"]["up"]["kernel"][1], source["net.layers.1.up.weight"].read().T)
    assert params["stage_0"]["conv"]["kernel"].shape == (3, 3, 4, 8)


def test_every_problem_is_in_one_report():
    broken = tensors()
    del broken["net.layers.1.up.weight"]
    broken["net.embed.weight"] = broken["net.embed.weight"][:8]
    broken["net.stage.0.conv.weight"] = broken["net.stage.0.conv.weight"].astype(np.int32)
    broken["net.layers.0.up.weight"] = broken["net.layers.0.up.weight"].astype(np.float64)
    broken["net.surprise"] = np.ones(1, np.float32)
    words = (r"5 of its tensors.*missing: net.layers.1.up.weight.*net.embed.weight got \[8, 8\] expected \[16, 8\].*"
             "net.layers.0.up.weight got float64 expected at most float32.*"
             "net.stage.0.conv.weight got int32.*unknown: net.surprise")  # fmt: skip
    with pytest.raises(UserError, match=words):
        planned(in_memory(broken))


def test_a_surplus_layer_needs_a_stated_reason_and_a_part_that_the_configuration_lacks_has_one():
    parts = {"toy": Part("net.", tuple(Rule(r.source, r.target, r.transform) for r in PARTS["toy"].rules))}
    with pytest.raises(UserError, match="unknown: net.layers.2.up.weight, net.pooling.probe"):
        engine.plan(abstract(), in_memory(tensors()), parts)
    source = in_memory({**tensors(), "net.extra.weight": np.ones((2, 3), np.float32)})
    assert planned(source).unused["net.extra.weight"] == "the configuration has no extra"
    with pytest.raises(UserError, match="unknown: net.extra.surprise"):
        planned({**source, **in_memory({"net.extra.surprise": np.ones(1, np.float32)})})


def test_a_table_that_misses_a_leaf_is_an_error_of_its_author():
    parts = {"toy": Part("net.", PARTS["toy"].rules[:-1])}
    with pytest.raises(AssertionError, match="stage_0/conv/kernel: 0 rules"):
        engine.expand(abstract(), parts)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(stored, bad):
    source = in_memory(tensors(stored))
    source["net.layers.1.up.weight"].read()[3, 4] = bad
    with pytest.raises(UserError, match=r"net.layers.1.up.weight in memory: 1 of 192 values are NaN or infinite"):
        engine.load(planned(source), source)
    engine.load(planned(source), source, check_finite=False)


def test_the_largest_finite_weights_pass_the_check():
    source = in_memory(tensors(ml_dtypes.bfloat16))
    largest = np.array([1, -1]) * float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    source["net.embed.weight"].read()[0, :2] = largest
    table = engine.load(planned(source), source)["toy"]["embed"]["table"]
    np.testing.assert_array_equal(np.asarray(table[0, :2], np.float64), largest)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", None])
def test_loading_casts_as_numpy_does(stored, wanted):
    source = in_memory(tensors(stored))
    params = engine.load(planned(source), source, param_dtype=wanted)["toy"]
    expected = source["net.embed.weight"].read().astype(jnp.dtype(wanted or stored))
    got = np.asarray(params["embed"]["table"])
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_tensors_of_two_types_are_stacked_without_loss():
    mixed = tensors(ml_dtypes.bfloat16)
    mixed["net.layers.0.up.weight"] = tensors(np.float16)["net.layers.0.up.weight"]
    source = in_memory(mixed)
    kernel = engine.load(planned(source), source)["toy"]["layers"]["up"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel[0], mixed["net.layers.0.up.weight"].T)


def test_loading_on_eight_devices_equals_one_and_reads_windows():
    source = in_memory(tensors())
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    shardings = shardings_of(abstract(), mesh)
    single, sharded = engine.load(planned(source), source), engine.load(planned(source), source, shardings)
    for path, leaf in flatten(sharded).items():
        np.testing.assert_array_equal(leaf, flatten(single)[path])
        assert leaf.sharding == flatten(shardings)[path]
    kernel = sharded["toy"]["layers"]["up"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4, 6)}


def test_export_is_the_table_read_backwards():
    stored = tensors(ml_dtypes.bfloat16)
    source = in_memory(stored)
    plan = planned(source)
    params = flatten(engine.load(plan, source, param_dtype="float32"))
    dtypes = {key: value.dtype for key, value in stored.items()}
    exported = engine.export_tensors(plan.leaves, lambda path: np.asarray(params[path]), dtypes)
    assert set(exported) == set(stored) - set(plan.unused)
    for key, tensor in exported.items():
        assert (tensor.shape, tensor.dtype) == (stored[key].shape, stored[key].dtype)
        np.testing.assert_array_equal(tensor.read().view(np.uint16), stored[key].view(np.uint16))


def test_memory_of_a_leaf_is_let_go_before_the_next():
    released = []
    source = {
        key: dataclasses.replace(tensor, release=functools.partial(released.append, key))
        for key, tensor in in_memory(tensors()).items()
    }
    engine.load(planned(source), source)
    assert set(released) == set(source) - {"net.layers.2.up.weight", "net.pooling.probe"}
