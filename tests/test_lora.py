"""Low-rank adapters beside the kernels of linear layers and merged into them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import LogicallyPartitioned, meta

from blip3o_jax import lora, sharding, treepath
from blip3o_jax.config.presets import preset
from blip3o_jax.models.connector import Connector
from blip3o_jax.models.decoder import Decoder
from blip3o_jax.nn.linear import Linear
from support.small import params_of

MODEL = preset("tiny")
RNG = np.random.default_rng(0)
SITES = {
    "plain": lora.Site((3, 3, 3), (6.0, 6.0, 6.0)),
    "patterns": lora.Site((3, 1, 2), (6.0, 1.0, 0.5)),
    "rslora": lora.Site((3, 3, 3), (6.0, 6.0, 6.0), rslora=True),
    "dora": lora.Site((3, 3, 3), (6.0, 6.0, 6.0), dora=True),
}
PATHS = ("decoder/layers/attention/query", "decoder/layers/mlp/down")
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)


def decoder(key):
    return Decoder(MODEL.decoder).init(key, jnp.zeros((1, 2), jnp.int32), method="init_all")["params"]


@pytest.fixture(scope="module")
def params():
    return {"decoder": jax.tree.map(jnp.asarray, params_of(decoder))}


@pytest.fixture(scope="module")
def kernels():
    boxed = treepath.flatten({"decoder": jax.eval_shape(decoder, jax.random.key(0))})
    return {path: boxed[f"{path}/kernel"] for path in PATHS}


def values(sites, kernels):
    """Random leaves; layers of lower ranks are filled up with zeros."""
    leaves = {}
    for path, leaf in treepath.flatten(lora.shapes(sites, kernels)).items():
        site, array = sites[path.rpartition("/")[0]], RNG.normal(size=meta.unbox(leaf).shape).astype(np.float32)
        for i, rank in enumerate(site.ranks):
            if path.endswith("lora_a"):
                array[i, :, rank:] = 0
            if path.endswith("lora_b"):
                array[i, rank:] = 0
        leaves[path] = array * 0.1 + (1 if path.endswith("magnitude") else 0)
    return leaves


@jax.jit
def logits(params):
    return Decoder(MODEL.decoder).apply({"params": params["decoder"]}, IDS, method="init_all")


def beside(params, sites, leaves):
    return treepath.merge(params, treepath.unflatten(leaves), lora.scales(sites))


@pytest.mark.parametrize("kind", SITES)
def test_merged_kernels_compute_what_the_layers_do(kind, params, kernels):
    sites = dict.fromkeys(PATHS, SITES[kind])
    leaves = values(sites, kernels)
    by_layers = logits(beside(params, sites, leaves))
    merged = lora.merge(params, [(lora.Adapter(sites, leaves), 1.0)])
    assert np.abs(by_layers - logits(params)).max() > 0.1
    np.testing.assert_allclose(logits(merged), by_layers, atol=2e-5 * np.abs(by_layers).max())
    site, path = sites[PATHS[0]], PATHS[0]
    for i, (rank, alpha) in enumerate(zip(site.ranks, site.alphas)):  # the formula, written out
        kernel, a, b = (tree[i] for tree in (treepath.flatten(params)[f"{path}/kernel"],
                                             leaves[f"{path}/lora_a"], leaves[f"{path}/lora_b"]))  # fmt: skip
        expected = np.float64(kernel) + alpha / (rank**0.5 if site.rslora else rank) * np.float64(a) @ np.float64(b)
        if site.dora:
            expected *= leaves[f"{path}/lora_magnitude"][i] / np.linalg.norm(expected, axis=0)
        np.testing.assert_allclose(treepath.flatten(merged)[f"{path}/kernel"][i], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_starts_as_the_model_bit_for_bit(dtype, params, kernels):
    sites = dict.fromkeys(PATHS, SITES["plain"])
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    first = lora.first_values(sites, lora.shapes(sites, kernels), params, jax.random.key(0))
    assert float(jnp.abs(treepath.flatten(first)[f"{PATHS[0]}/lora_a"]).max()) > 0
    np.testing.assert_array_equal(logits(treepath.merge(params, first, lora.scales(sites))), logits(params))
    merged = lora.merge(params, [(lora.Adapter(sites, treepath.flatten(first)), 1.0)])
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_a_starts_uniform_within_the_bound_of_peft_and_differs_between_layers(kernels):
    sites, kernel = dict.fromkeys(("first", "second"), SITES["plain"]), kernels[PATHS[1]]
    abstract = lora.shapes(sites, dict.fromkeys(sites, kernel))
    first, second = (site["lora_a"] for site in lora.first_values(sites, abstract, {}, jax.random.key(0)).values())
    bound = meta.unbox(kernel).shape[-2] ** -0.5
    assert 0.95 * bound < np.abs(first).max() <= bound
    assert np.all(np.any(first != second, axis=(1, 2)))


def test_the_norms_of_dora_are_constant_in_the_gradient_and_columns_of_zeros_stay():
    kernel, a, b, x = (RNG.normal(size=shape).astype(np.float32) for shape in [(8, 5), (8, 2), (2, 5), (3, 8)])
    kernel[:, 0] = b[:, 0] = 0
    magnitude, weights = (RNG.normal(size=shape).astype(np.float32) for shape in [5, (3, 5)])
    frozen = {"kernel": kernel, "lora_scale": np.float32(0.5), "lora_a": a, "lora_magnitude": magnitude}

    def loss(b):
        y = Linear(5, (None, None), use_bias=False).apply({"params": {**frozen, "lora_b": b}}, x)
        return (y * weights).sum(), y

    gradient, y = jax.grad(loss, has_aux=True)(b)
    norms = np.linalg.norm(np.float64(kernel) + 0.5 * a @ b, axis=0)[1:]
    np.testing.assert_array_equal(y[:, 0], 0)
    np.testing.assert_allclose(gradient[:, 1:], 0.5 * (x @ a).T @ (weights[:, 1:] * magnitude[1:] / norms), rtol=1e-4)
    site = lora.Site((2,), (1.0,), stacked=False, dora=True)
    adapter = lora.Adapter({"l": site}, {"l/lora_a": a, "l/lora_b": b, "l/lora_magnitude": magnitude})
    merged = lora.merge({"l": {"kernel": jnp.asarray(kernel)}}, [(adapter, 1.0)])["l"]["kernel"]
    np.testing.assert_allclose(x @ merged, y, atol=1e-5)


def test_magnitudes_start_as_the_norms_of_the_columns(params, kernels):
    sites = {PATHS[0]: SITES["dora"]}
    first = treepath.flatten(lora.first_values(sites, lora.shapes(sites, kernels), params, jax.random.key(0)))
    norms = np.linalg.norm(treepath.flatten(params)[f"{PATHS[0]}/kernel"], axis=-2)
    np.testing.assert_allclose(first[f"{PATHS[0]}/lora_magnitude"], norms, rtol=1e-6)


def test_a_scale_multiplies_the_change_and_layers_left_out_stay(params, kernels):
    site = lora.Site((3, 0, 3), (6.0, 0.0, 6.0))
    leaves, path = values({PATHS[0]: site}, kernels), PATHS[0]
    adapter, kernel = lora.Adapter({path: site}, leaves), treepath.flatten(params)[f"{path}/kernel"]
    whole, half, none = (
        treepath.flatten(lora.merge(params, [(adapter, w)]))[f"{path}/kernel"] for w in (1.0, 0.5, 0.0)
    )
    np.testing.assert_allclose(half - kernel, (whole - kernel) / 2, atol=1e-6)
    np.testing.assert_array_equal(none, kernel)
    np.testing.assert_array_equal(whole[1], kernel[1])
    assert np.abs(whole - kernel)[[0, 2]].max(axis=(1, 2)).min() > 0.01


def test_kernels_of_low_precision_are_rounded_once(params, kernels):
    """The change is a third of the distance to the next number of bfloat16: one is lost, two are not."""
    site, path = lora.Site((1, 1, 1), (1.0, 1.0, 1.0)), PATHS[0]
    shape = treepath.flatten(params)[f"{path}/kernel"].shape
    ones = {f"{path}/kernel": jnp.ones(shape, jnp.bfloat16)}
    leaves = {f"{path}/lora_a": np.full((*shape[:2], 1), 2**-7 / 3, np.float32),
              f"{path}/lora_b": np.ones((shape[0], 1, shape[2]), np.float32)}  # fmt: skip
    once, twice = (
        treepath.flatten(lora.merge(treepath.unflatten(ones), [(lora.Adapter({path: site}, leaves), 1.0)] * count))
        for count in (1, 2)
    )
    np.testing.assert_array_equal(once[f"{path}/kernel"], ones[f"{path}/kernel"])
    np.testing.assert_array_equal(twice[f"{path}/kernel"], np.float32(1 + 2**-7))
    assert twice[f"{path}/kernel"].dtype == jnp.bfloat16
    low = (jnp.asarray(leaf, jnp.bfloat16) for leaf in leaves.values())
    assert lora.low_rank(*low).dtype == jnp.float32


def test_layers_without_a_stack_are_adapted_too():
    config = MODEL.connector
    make = lambda key: Connector(config).init(key, jnp.zeros((1, config.in_width)))["params"]  # noqa: E731
    boxed = {"connector": jax.eval_shape(make, jax.random.key(0))}
    params = {"connector": jax.tree.map(jnp.asarray, params_of(make))}
    sites = {"connector/out": lora.Site((2,), (4.0,), stacked=False)}
    shapes = lora.shapes(sites, {"connector/out": boxed["connector"]["out"]["kernel"]})
    leaves = {path: RNG.normal(size=meta.unbox(leaf).shape).astype(np.float32) for path, leaf in
              treepath.flatten(shapes).items()}  # fmt: skip
    x = RNG.normal(size=(3, config.in_width)).astype(np.float32)
    run = lambda tree: Connector(config).apply({"params": tree["connector"]}, x)  # noqa: E731
    expected = run(lora.merge(params, [(lora.Adapter(sites, leaves), 1.0)]))
    np.testing.assert_allclose(run(beside(params, sites, leaves)), expected, atol=1e-4)


def test_references_are_the_model_in_the_same_memory(params, kernels):
    sites = dict.fromkeys(PATHS, SITES["plain"])
    whole = lora.with_references({"reference": "decoder"})(beside(params, sites, values(sites, kernels)))
    before, reference = treepath.flatten(params["decoder"]), treepath.flatten(whole["reference"])
    assert before.keys() == reference.keys()
    assert all(reference[path] is leaf for path, leaf in before.items())


def test_leaves_lie_where_their_kernel_does(kernels):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    boxed = treepath.flatten(lora.shapes(dict.fromkeys(PATHS, SITES["dora"]), kernels))
    specs = {path: sharding.shardings_of({"x": leaf}, mesh)["x"].spec for path, leaf in boxed.items()}
    assert all(isinstance(leaf, LogicallyPartitioned) for leaf in boxed.values())
    query = "decoder/layers/attention/query/lora_"
    assert tuple(specs[f"{query}a"]) == (None, "fsdp", None)
    assert tuple(specs[f"{query}b"]) == (None, None, "tensor")
    assert tuple(specs[f"{query}magnitude"]) == (None, "tensor")


def test_the_gradients_of_frozen_kernels_are_not_computed(params):
    """Counted by the compiler: a forward pass, its way back to the inputs, and hardly anything else."""
    sites = {path.removesuffix("/kernel"): lora.Site((1, 1, 1), (1.0, 1.0, 1.0))
             for path in treepath.flatten(params) if path.endswith("/kernel")}  # fmt: skip
    kernels = {path: treepath.flatten(params)[f"{path}/kernel"] for path in sites}
    leaves = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), meta.unbox(lora.shapes(sites, kernels)))
    frozen = treepath.merge(params, lora.scales(sites))

    def flops(trained, frozen):
        def loss(trained):
            tree = {"params": treepath.merge(trained, frozen)["decoder"]}
            positions = jnp.broadcast_to(jnp.arange(16), (2, 16))
            x = jnp.ones((2, 16, MODEL.decoder.width))
            return Decoder(MODEL.decoder).apply(tree, x, positions, jnp.ones((2, 16), bool)).sum()

        return jax.jit(jax.grad(loss)).lower(trained).cost_analysis()["flops"]

    def split(tree, kernels):
        flat = treepath.flatten(tree)
        return treepath.unflatten({path: leaf for path, leaf in flat.items() if path.endswith("/kernel") is kernels})

    adapter = flops(leaves, frozen)
    full = flops(split(params, True), split(params, False))
    assert adapter < 0.8 * full
