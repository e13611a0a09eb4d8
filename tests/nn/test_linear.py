"""Products in float32 and bfloat16, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax.nn import int8
from blip3o_jax.nn.kernels import matmul, spread
from blip3o_jax.nn.linear import Embedding, Linear, chunk_size


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(4, 64, 32), (3, 5, 32), (1, 32), (32,)])  # positions tiles divide or not, one, none
def test_gradients_of_bfloat16_products_are_those_of_float32_but_for_rounding(shape, transposed):
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (48, 32) if transposed else (32, 48))

    def gradients(dtype):
        def loss(x, kernel):
            return jnp.sin(matmul(x, kernel, dtype, transposed) / 8).sum()

        return jax.jit(jax.grad(loss, (0, 1)))

    for low, exact in zip(gradients("bfloat16")(x, kernel), gradients("float32")(x, kernel), strict=True):
        assert low.dtype == jnp.float32
        np.testing.assert_allclose(low, exact, atol=0.01 * np.abs(exact).max())
    low = jax.eval_shape(gradients("bfloat16"), x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))
    assert [leaf.dtype for leaf in low] == [jnp.bfloat16] * 2
    program = gradients("bfloat16").lower(x, kernel).as_text()
    operands = [line.rpartition("->")[0] for line in program.splitlines() if "dot_general" in line]
    assert operands and all(line.count("xbf16>") == 2 for line in operands)


def test_the_gradient_of_a_float32_kernel_is_not_rounded_to_bfloat16():
    x, kernel = jax.random.normal(jax.random.key(0), (128, 8)), jnp.ones((8, 8))
    gradient = jax.grad(lambda kernel: matmul(x, kernel, "bfloat16").sum())(kernel)
    assert (gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32)).any()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("widths", [(8, 24), (24, 8)])
def test_gradients_of_float32_products_are_those_of_the_plain_form(widths, transposed):
    x = jax.random.normal(jax.random.key(0), (3, 5, widths[0]))
    kernel = jax.random.normal(jax.random.key(1), widths[::-1] if transposed else widths)

    def gradients(product):
        return jax.grad(lambda x, kernel: jnp.sin(product(x, kernel)).sum(), (0, 1))

    plain = gradients(lambda x, kernel: jnp.einsum("...D,FD->...F" if transposed else "...D,DF->...F", x, kernel))
    ours = gradients(lambda x, kernel: matmul(x, kernel, "float32", transposed))
    for got, expected in zip(ours(x, kernel), plain(x, kernel), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    # the operand that is summed over its rows, and copied for it, is the narrower one
    program = jax.make_jaxpr(ours)(x, kernel)
    *_, last = [equation for equation in program.eqns if equation.primitive.name == "dot_general"]
    assert last.params["dimension_numbers"][0] == ((0, 1), (0, 1)) and last.invars[0].aval.shape[-1] == min(widths)


@pytest.mark.parametrize(
    ("most", "length", "size"), [(8, 9, 5), (128, 928, 116), (128, 1024, 128), (64, 13, 13), (1, 3, 1)]
)
def test_chunks_are_of_one_size_that_fills_up_little(most, length, size):
    assert chunk_size(most, length) == size


def test_bfloat16_parameters_are_those_of_float32_rounded():
    x = jnp.zeros((1, 64))
    low, exact = (
        Linear(64, dtype="float32", param_dtype=dtype, axes=(None, None)).init(jax.random.key(0), x)["params"]
        for dtype in ("bfloat16", "float32")
    )
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), low, exact)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_spread_vector_is_a_broadcast_one_whose_gradient_is_summed_in_float32(dtype):
    vector = jnp.linspace(-1, 1, 24)
    weights = jax.random.normal(jax.random.key(0), (6, 50, 24)).astype(dtype) + jnp.asarray(1, dtype)

    def loss(vector):
        return (spread(vector, weights) * weights).astype(jnp.float32).sum()

    np.testing.assert_array_equal(spread(vector, weights), jnp.broadcast_to(vector.astype(dtype), weights.shape))
    got = jax.jit(jax.grad(loss))(vector)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(weights, np.float64).sum((0, 1)), rtol=1e-6)
    assert jax.grad(lambda v: loss(v))(vector.astype(dtype)).dtype == dtype


def test_int8_kernels_err_by_half_a_step_of_their_column_at_most():
    kernel = np.random.default_rng(0).normal(size=(2, 32, 48)).astype(np.float32) * np.linspace(0.01, 3, 48)
    kernel[0, :, 5] = 0
    made = int8.quantize({"a": {"kernel": jnp.asarray(kernel)}, "b": {"kernel": jnp.asarray(kernel)}}, ["a", "none"])
    quantized, scale = made["a"]["kernel"], made["a"]["kernel_scale"]
    assert quantized.dtype == jnp.int8 and scale.shape == (2, 48) and made["b"]["kernel"].dtype == jnp.float32
    assert np.all(np.abs(quantized * scale[:, None] - kernel) <= scale[:, None] * 0.501)
    assert float(jnp.abs(quantized[:, :, :5]).max()) == 127 and scale.min() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_multiplies_by_an_int8_kernel_and_passes_its_gradient_on(dtype):
    x, kernel = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(5, 32), (32, 48)]))
    layer = Linear(48, (None, None), use_bias=False, dtype=jnp.dtype(dtype))
    params = int8.quantize({"layer": {"kernel": kernel}}, ["layer"])["layer"]
    rounded = {"kernel": params["kernel"] * params["kernel_scale"]}

    def run(params):
        return jax.value_and_grad(lambda x: jnp.sin(layer.apply({"params": params}, x).astype(jnp.float32)).sum())(x)

    tolerance = 1e-5 if dtype == "float32" else 0.05
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * 20), run(params),
                 run(rounded))  # fmt: skip


def test_a_frequent_row_has_its_whole_gradient_in_bfloat16():
    module, ids = Embedding(3, 2, dtype=jnp.bfloat16), jnp.array([1] + [2] * 4096)
    params = {"params": {"table": jnp.ones((3, 2))}}
    gradient = jax.grad(lambda params: module.apply(params, ids).astype(jnp.float32).sum())(params)["params"]["table"]
    np.testing.assert_array_equal(gradient[:, 0], [0, 1, 4096])
