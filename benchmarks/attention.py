"""The decoder's attention on a TPU, with its gradient: our forms and jax's fused kernel (splash attention).

    python benchmarks/attention.py --target v5e --rows 1 4 16

Compiled by the TPU's compiler; nothing is run, so it tells what the forms hold, not how long they take. The last line
compares the kernel with ours in Pallas' interpreter. Needs `pip install 'blip3o_jax[plan-tpu]'`.
"""

import argparse
import functools
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import SingleDeviceSharding

from blip3o_jax.config.presets import preset
from blip3o_jax.models.decoder import causal_bias
from blip3o_jax.nn import attention
from blip3o_jax.plan import program, targets


def ours(form, q, k, v, valid):
    """Attends by a form of `nn.attention`; arguments as there, and bool[B T], False for padding."""
    return form(q, k, v, causal_bias(valid))


def splash(q, k, v, valid, interpret=False):
    """Does the same in the fused kernel; queries of padding attend to padding."""
    batch, length, kv_heads, groups, width = q.shape
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * kv_heads * groups)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask, interpret=interpret)
    queries = q.transpose(0, 2, 3, 1, 4).reshape(batch, -1, length, width) * width**-0.5
    rows = splash_attention_kernel.SegmentIds(*(valid.astype(jnp.int32),) * 2)
    out = jax.vmap(kernel)(queries, *(jnp.repeat(x, groups, axis=1) for x in (k, v)), rows)
    return out.reshape(batch, kv_heads, groups, length, width).transpose(0, 3, 1, 2, 4)


FORMS = {
    "all heads": functools.partial(ours, attention._all_heads),
    "by key head": functools.partial(ours, attention._by_key_head),
    "splash attention": splash,
}


def main() -> None:
    """Compiles the forms for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="v5e")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--geometry", default="blip3o-next-3b")
    parser.add_argument("--length", type=int, default=1024, help="positions")
    args = parser.parse_args()
    c = preset(args.geometry).decoder
    device = SingleDeviceSharding(targets.open_target(args.target).devices[0])
    print("| rows | form | peak MB |\n|---|---|---|")
    for rows in args.rows:
        query = rows, args.length, c.num_kv_heads, c.num_heads // c.num_kv_heads, c.head_dim
        key = rows, c.num_kv_heads, args.length, c.head_dim
        shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=device) for shape in (query, key, key)]
        shapes.append(jax.ShapeDtypeStruct((rows, args.length), bool, sharding=device))
        for name, form in FORMS.items():
            compiled = jax.jit(jax.value_and_grad(functools.partial(total, form), (0, 1, 2))).lower(*shapes).compile()
            print(f"| {rows} | {name} | {program.read(compiled).peak_bytes / 1e6:.0f} |", flush=True)
    print(f"largest difference of splash attention in the interpreter: {difference():.1e}")


def total(form, *operands):
    """Sums what a form returns, so that it has a gradient."""
    return form(*operands).astype(jnp.float32).sum()


def difference() -> float:
    """Largest difference of the kernel from ours in float32, for two rows of which one has padding."""
    random = np.random.default_rng(0)
    shapes = (2, 256, 2, 2, 128), (2, 2, 256, 128), (2, 2, 256, 128)
    operands = [jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes]
    valid = jnp.arange(256) >= jnp.asarray([[0], [40]])
    with jax.default_matmul_precision("highest"):
        right, got = FORMS["all heads"](*operands, valid), splash(*operands, valid, interpret=True)
    return float(jnp.abs(jnp.where(valid[:, :, None, None, None], got - right, 0)).max())


if __name__ == "__main__":
    main()
