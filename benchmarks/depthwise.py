"""The two forms of a depthwise convolution on a TPU, within the feed-forward layer of the diffusion transformer.

    python benchmarks/depthwise.py --target v5e --rows 1 2 4 8 16

Compiled by the TPU's compiler; nothing is run. Cycles are the compiler's own estimate, from which it chooses layouts
and fusions; they are no measurement. Needs `pip install 'blip3o_jax[plan-tpu]'`.
"""

import argparse
import os
import pathlib
import re
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from blip3o_jax.config.presets import preset
from blip3o_jax.nn import conv
from blip3o_jax.nn.mlp import GLUMBConv
from blip3o_jax.plan import program, targets

ESTIMATE = re.compile(r'"estimated_cycles":"(\d{1,12})"')


def main() -> None:
    """Compiles both forms for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="v5e")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--geometry", default="blip3o-next-3b")
    parser.add_argument("--cells", type=int, default=32, help="height and width of the latent")
    args = parser.parse_args()
    dit = preset(args.geometry).dit
    layer = GLUMBConv(round(dit.mlp_ratio * dit.width), dit.width, dtype="bfloat16", param_dtype="bfloat16")
    device = SingleDeviceSharding(targets.open_target(args.target).devices[0])
    print("| rows | form | kernels | peak MB | cycles by the compiler's estimate |\n|---|---|---|---|---|")
    for rows in args.rows:
        x = jax.ShapeDtypeStruct((rows, args.cells, args.cells, dit.width), jnp.bfloat16)
        params = jax.eval_shape(layer.init, jax.random.key(0), x)
        inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), (params, x))
        for name, sublanes in (("convolution", 0), ("multiply-adds", rows + 1)):
            conv.SUBLANES = sublanes  # with more of them than rows, multiply-adds are chosen
            compiled = jax.jit(layer.apply).lower(*inputs).compile()
            found = program.read(compiled)
            cycles = sum(map(int, ESTIMATE.findall(compiled.as_text().partition("\nENTRY")[2])))
            print(f"| {rows} | {name} | {found.kernels} | {found.peak_bytes / 1e6:.0f} | {cycles:,} |", flush=True)


if __name__ == "__main__":
    main()
