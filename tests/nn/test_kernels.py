"""Every branch of every kernel: forced, compared with the plain form, and in the programs of its own platform only."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip3o_jax import sharding
from blip3o_jax.nn import attention, conv, kernels
from blip3o_jax.nn.attention import MASKED, relu_linear_attention, softmax_attention


def random(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def layer(carry, weight, element, shared):
    carry = jnp.tanh(kernels.matmul(carry, weight, weight.dtype) + element + shared).astype(carry.dtype)
    return carry, carry * 2


def scan(stack, elements, carry, shared):
    return kernels.scan_layers(layer, (stack, elements), carry, shared)


def split(stack):
    return [jnp.sin(element * (i + 1)) for i, element in enumerate(kernels.unstack(stack))]


def attend(q, k, v, valid):
    return softmax_attention(q, k, v, jnp.where(valid > 0, 0.0, MASKED))


IDS = np.array([[3, 60], [3, 0]])
PADS = ((1, 1), (1, 0))
HEADS = random(2, 70, 6, 8), random(2, 3, 66, 8, seed=1), random(2, 3, 66, 8, seed=2)
TABLE, STACK = random(64, 8, dtype="bfloat16"), random(3, 8, 8, dtype="bfloat16")
CASES = {
    # function, operands, whether it is the gradient that has branches, what only the program for CPU holds; that of a
    # depthwise convolution is for a GPU, too
    "rows": (lambda table: kernels.take_rows(table, IDS), [random(64, 8)], False, "optimization_barrier"),
    "rows, bfloat16": (
        lambda table: kernels.take_rows(table, IDS),
        [TABLE],
        False,
        "bitcast",
    ),
    "largest": (lambda x: x[jnp.arange(3), kernels.largest(x)], [random(3, 50)], False, "top_k"),
    "elements, bfloat16": (split, [STACK], False, "bitcast"),
    "scan, bfloat16": (
        scan,
        [STACK, random(3, 8), random(2, 8), random(8)],
        False,
        "bitcast",
    ),
    "scan": (scan, [random(3, 8, 8), random(3, 8), random(2, 8), random(8)], False, "optimization_barrier"),
    "product": (
        lambda x, kernel: kernels.matmul(x, kernel, "float32"),
        [random(2, 5, 16), random(16, 8)],
        True,
        "optimization_barrier",
    ),
    "product, bfloat16": (
        lambda x, kernel: kernels.matmul(x, kernel, "bfloat16"),
        [random(2, 64, 16), random(16, 8)],
        True,
        "optimization_barrier",
    ),
    "product of one row, bfloat16": (
        lambda x, kernel: kernels.matmul(x, kernel, "bfloat16"),
        [random(1, 16), random(16, 8)],
        False,
        "concatenate",
    ),
    "product of groups": (  # wider than a block
        kernels.grouped_matmul,
        [random(2, 3, 96), random(2, 48, 48)],
        False,
        "concatenate",
    ),
    "product of groups, bfloat16": (
        kernels.grouped_matmul,
        [random(2, 3, 80, dtype="bfloat16"), random(5, 16, 16, dtype="bfloat16")],
        False,
        "concatenate",
    ),
    "bias": (lambda vector: kernels.spread(vector, random(4, 8)), [random(8)], True, "dot_general"),
    "attention": (softmax_attention, HEADS, False, "while"),
    "attention, masked": (attend, [*HEADS, random(2, 1, 1, 70, 66)], False, "while"),
    "linear attention": (relu_linear_attention, [random(2, 30, 3, 8, seed=i) for i in range(3)], False, "reduce"),
    "convolution, bfloat16": (
        lambda x, kernel: conv.convolve(x, kernel, PADS),
        [random(1, 6, 5, 64, dtype="bfloat16"), random(3, 2, 64, 4, dtype="bfloat16") / 16],
        False,
        "bitcast",
    ),
    "convolution of few channels, bfloat16": (
        lambda x, kernel: conv.convolve(x, kernel, ((1, 1), (1, 1))),
        [random(2, 4, 6, 3, dtype="bfloat16"), random(3, 3, 3, 4, dtype="bfloat16") / 4],
        False,
        "bitcast",
    ),
    "convolution of few channels, 2x2, bfloat16": (
        lambda x, kernel: conv.convolve(x, kernel, ((1, 0), (0, 1))),
        [random(1, 4, 6, 8, dtype="bfloat16"), random(2, 2, 8, 3, dtype="bfloat16") / 4],
        False,
        "bitcast",
    ),
    "depthwise": (conv.depthwise, [random(8, 5, 6, 8), random(3, 3, 8)], False, "multiply"),
    "depthwise, 5x5": (conv.depthwise, [random(9, 5, 6, 8), random(5, 5, 8)], False, "multiply"),
    "depthwise, bfloat16": (
        conv.depthwise,
        [random(8, 5, 6, 8, dtype="bfloat16"), random(3, 3, 8, dtype="bfloat16")],
        False,
        "bitcast",
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "MANY_SCORES", 64 * 64)
    monkeypatch.setattr(kernels, "BLOCK", 32)


def loss_of(function):
    def loss(*operands):
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(function(*operands))]
        return sum((leaf * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape)).sum() for leaf in leaves), leaves

    return loss


def value_and_gradient(function, operands):
    """Values by themselves, then those beside a gradient, which another form may compute, and the gradients."""
    _, alone = jax.jit(lambda *x: loss_of(function)(*x))(*operands)
    (_, value), gradient = jax.jit(jax.value_and_grad(loss_of(function), range(len(operands)), has_aux=True))(*operands)
    return [*alone, *value, *(leaf.astype(jnp.float32) for leaf in gradient)]


@pytest.mark.parametrize("case", CASES)
def test_branches_agree_in_values_and_gradients(case):
    function, operands, *_ = CASES[case]
    with kernels.forced_branch("cpu"):
        ours = value_and_gradient(function, operands)
    with kernels.forced_branch("default"):
        plain = value_and_gradient(function, operands)
    tolerance = 2e-2 if "bfloat16" in case else 2e-6
    for got, expected in zip(ours, plain, strict=True):
        assert np.abs(got - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-3)
    assert any(np.abs(leaf).max() > 0 for leaf in plain)
    jax.tree.map(np.testing.assert_array_equal, value_and_gradient(function, operands), ours)  # this is a CPU


@pytest.mark.parametrize(
    "case", ["rows, bfloat16", "scan, bfloat16", "product, bfloat16", "convolution, bfloat16", "depthwise, bfloat16"]
)
def test_plain_forms_have_forward_derivatives(case):
    function, operands, *_ = CASES[case]
    tangents = [random(*leaf.shape, seed=9, dtype=leaf.dtype) for leaf in operands]

    def value(*operands):
        return loss_of(function)(*operands)[0]

    with kernels.forced_branch(kernels.PLAIN):
        _, forward = jax.jit(lambda *x: jax.jvp(value, x, tuple(tangents)))(*operands)
    gradient = jax.jit(jax.grad(value, range(len(operands))))(*operands)
    terms = np.concatenate([np.ravel(a.astype(jnp.float32) * b) for a, b in zip(gradient, tangents, strict=True)])
    assert forward == pytest.approx(terms.sum(), abs=float(0.05 * np.linalg.norm(terms)))


@pytest.mark.parametrize(
    ("rows", "mesh", "convolutions"), [(7, None, 0), (8, None, 1), (8, {"data": 2}, 0), (16, {"fsdp": 2}, 1)]
)
def test_a_tpu_convolves_depthwise_where_a_device_has_a_row_for_every_sublane(rows, mesh, convolutions):
    inputs = random(rows, 4, 4, 6), random(3, 3, 6)
    with sharding.use_mesh(mesh and sharding.make_mesh(mesh, jax.devices()[:2])):
        program = jax.jit(conv.depthwise).trace(*inputs).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("stablehlo.convolution") == convolutions


def test_groups_that_are_partitioned_stay_on_their_devices():
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    x, kernel = random(4, 3, 128), random(8, 16, 16)
    axes = ("data", None, "tensor"), ("tensor",)
    shardings = [jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names)) for names in axes]
    with jax.set_mesh(mesh):
        program = jax.jit(kernels.grouped_matmul, in_shardings=tuple(shardings)).lower(x, kernel).compile().as_text()
    assert "f32[1,3,64]" in program  # a row and half of the groups
    assert not re.findall("all-reduce|all-gather|all-to-all|collective-permute", program)


@pytest.mark.parametrize("branch", ["cpu", "default"])
def test_scores_of_bfloat16_attention_are_not_rounded(branch):
    q, k, v = (x.astype(jnp.bfloat16) for x in (16 * HEADS[0], *HEADS[1:]))
    with kernels.forced_branch(branch):
        got, exact = softmax_attention(q, k, v), softmax_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), exact, atol=0.03)


@pytest.mark.parametrize("branch", ["cpu", "default"])
def test_a_masked_key_has_no_weight_however_high_its_score(branch):
    q, k, v = HEADS
    valid = jnp.arange(66) < 60
    with kernels.forced_branch(branch):
        got = attend(q, jnp.where(valid[:, None], k, 1e6 * k), v, valid[None, None, None, None])
        np.testing.assert_allclose(got, softmax_attention(q, k[:, :, :60], v[:, :, :60]), atol=1e-6)


@pytest.mark.parametrize("branch", ["cpu", "default"])
def test_linear_attention_does_not_depend_on_the_size_of_queries_and_keys_and_is_zero_without_any(branch):
    q, k, v = (random(1, 9, 2, 8, seed=i) for i in range(3))
    with kernels.forced_branch(branch):
        np.testing.assert_allclose(
            relu_linear_attention(1e-5 * q, 1e-5 * k, v), relu_linear_attention(q, k, v), rtol=1e-3
        )
        assert not np.any(relu_linear_attention(-jnp.abs(q), k, v))


@pytest.mark.parametrize("branch", ["cpu", "default"])
def test_linear_attention_has_the_highest_precision_whatever_the_default(branch):
    with kernels.forced_branch(branch), jax.default_matmul_precision("default"):
        program = jax.jit(relu_linear_attention).lower(*(random(1, 9, 2, 8, seed=i) for i in range(3))).as_text()
    assert program.count("precision = [HIGHEST, HIGHEST]") == program.count("stablehlo.dot_general") > 1


@pytest.mark.parametrize("case", CASES)
def test_what_is_for_cpu_is_in_no_other_program(case):
    function, operands, in_gradient, only = CASES[case]
    program = jax.grad(lambda *x: loss_of(function)(*x)[0], range(len(operands))) if in_gradient else function

    def text(platform):
        return jax.jit(program).trace(*operands).lower(lowering_platforms=(platform,)).as_text()

    assert only in text("cpu")
    assert only not in text("tpu")
    assert (only in text("cuda")) == case.startswith("depthwise")


@pytest.mark.parametrize("branch", ["cpu", "default"])
def test_the_largest_element_is_the_first_of_equal_ones(branch):
    x = jnp.array([[1.0, 7, 7, 7], [-jnp.inf, -2, -3, -2], [-jnp.inf] * 4, [-0.0, 0.0, -1, 0.0]])
    with kernels.forced_branch(branch):
        np.testing.assert_array_equal(jax.jit(kernels.largest)(x), [1, 1, 0, 0])


def test_forms_for_bfloat16_are_right_in_float32_too():
    convolution = [random(1, 36, 130, 8), random(3, 2, 8, 4) / 7]  # two strips
    stacks = [(random(3, 8, 8), random(3, 8)), random(2, 8), random(8)]
    pairs = [
        (conv._convolve_strips, conv._convolution, PADS, convolution),
        (kernels._scan_on_cpu, kernels._scan, layer, stacks),
    ]
    for ours, plain, first, operands in pairs:
        got = value_and_gradient_of_trees(functools.partial(ours, first), operands)
        run = functools.partial(plain, padding=PADS) if first is PADS else functools.partial(plain, first)
        for a, b in zip(got, value_and_gradient_of_trees(run, operands), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


def value_and_gradient_of_trees(function, operands):
    leaves, structure = jax.tree.flatten(operands)
    return value_and_gradient(lambda *leaves: function(*structure.unflatten(leaves)), leaves)


def test_a_gpu_with_cudnn_gets_its_attention_where_it_takes_the_arrays(monkeypatch):
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    q, k, v = (x.astype(jnp.bfloat16) for x in HEADS)

    def text(q, k, v, platform="cuda"):
        bias = jnp.zeros((1, 1, 1, 70, k.shape[2]))
        program = jax.jit(lambda *x: softmax_attention(*x, bias))  # a program of its own
        return program.trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()

    assert "fmha" not in text(q, k, v)  # no cuDNN here
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    assert "fmha" in text(q, k, v)
    assert "fmha" not in text(q, k, v, "cpu") and "fmha" not in text(q, k, v, "tpu")
    assert "fmha" not in text(*HEADS)  # float32
    assert "fmha" not in text(*(x[..., :5] for x in (q, k, v)))  # heads of five numbers
    assert "fmha" not in text(q, k[:, :, :65], v[:, :, :65])  # cuDNN has no gradient of an odd length
    with kernels.forced_branch(kernels.PLAIN):
        assert "fmha" not in text(q, k, v)
    for axes, expected in ({"data": 2}, True), ({"fsdp": 2}, True), ({"tensor": 2}, False), ({"data": 3}, False):
        with sharding.use_mesh(sharding.make_mesh(axes, jax.devices()[: math.prod(axes.values())])):
            assert ("fmha" in text(q, k, v)) == expected


@pytest.mark.parametrize("axes", [None, {"data": 2}])
@pytest.mark.parametrize("rows", [None, 1, 2])
def test_the_fused_kernel_of_a_gpu_gets_what_the_plain_form_gets(monkeypatch, rows, axes):
    fused = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *operands, implementation: fused(*operands))
    bias = None if rows is None else random(rows, 1, 1, 70, 66, seed=3)

    def kernel(q, k, v):
        return attention._cudnn(q.reshape(2, 70, 3, 2, 8), k, v, bias).reshape(q.shape)

    expected = value_and_gradient(lambda *operands: softmax_attention(*operands, bias), HEADS)
    with sharding.use_mesh(axes and sharding.make_mesh(axes, jax.devices()[:2])):
        for got, right in zip(value_and_gradient(kernel, HEADS), expected, strict=True):
            np.testing.assert_allclose(got, right, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "spare", "loops"),
    [({"data": 2}, 0, True), ({"data": 2}, 1, False), ({"data": 1, "tensor": 2}, 0, False), (None, 0, False)],
)
def test_several_devices_loop_over_key_heads_that_they_do_not_share_if_scores_are_large(
    monkeypatch, mesh, spare, loops
):
    devices = 1 if mesh is None else 2
    monkeypatch.setattr(attention, "LARGE_SCORES", 4 * 2 * 6 * 70 * 66 // devices + spare)
    program = jax.jit(lambda *operands: softmax_attention(*operands))  # a program of its own
    with sharding.use_mesh(mesh and sharding.make_mesh(mesh, jax.devices()[:2])):
        assert ("while" in program.trace(*HEADS).lower(lowering_platforms=("tpu",)).as_text()) == loops


@pytest.mark.parametrize("case", ["attention", "attention, masked"])
def test_large_scores_are_held_for_one_key_head_at_a_time(case, monkeypatch):
    function, operands, *_ = CASES[case]
    with kernels.forced_branch("default"):
        whole = value_and_gradient(function, operands)
    monkeypatch.setattr(attention, "LARGE_SCORES", 0)
    monkeypatch.setattr(attention, "one_device", lambda: False)
    program = jax.jit(lambda *operands: function(*operands))  # a program of its own
    assert "while" in program.trace(*operands).lower(lowering_platforms=("tpu",)).as_text()
    with kernels.forced_branch("default"):
        for got, expected in zip(value_and_gradient(function, operands), whole, strict=True):
            np.testing.assert_allclose(got, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("branch", ["cpu", "cuda", "tpu"])
@pytest.mark.parametrize(
    "axes", [{"data": 4, "tensor": 2}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
)
def test_devices_with_the_same_rows_count_once_in_the_gradient_of_a_depthwise_kernel(branch, axes):
    x, kernel = random(2 * axes["data"], 5, 6, 8), random(3, 3, 8, seed=1)
    mesh = sharding.make_mesh(axes, jax.devices()[:8])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def gradients(x, kernel):
        with kernels.forced_branch(branch):
            return jax.grad(lambda x, kernel: (conv.depthwise(x, kernel) ** 2).sum(), (0, 1))(x, kernel)

    for got, expected in zip(jax.jit(gradients)(jax.device_put(x, rows), kernel), gradients(x, kernel)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)
