"""What checksums add to loading a checkpoint: seconds of CPU and of the clock for either, and their ratio.

    python benchmarks/loading.py --gigabytes 6

Layers of a 3B model, in bfloat16 and our own layout, are written to a temporary directory and loaded as
`open_checkpoint` does. Files that were just written are in memory: the ratio is the largest that there can be.
"""

import argparse
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from blip3o_jax import checksums
from blip3o_jax.config.presets import preset
from blip3o_jax.convert import native

WIDTH, PARTS = 2048, 28


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--directory", help="where the checkpoint goes; default a temporary one")
    args = parser.parse_args()
    rows = int(args.gigabytes * 1e9 / 2 / PARTS / WIDTH)
    rng = np.random.default_rng(0)
    leaf = rng.standard_normal((rows, WIDTH), np.float32).astype(ml_dtypes.bfloat16)
    params = {"decoder": {f"layer{i}": leaf for i in range(PARTS)}}
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        path = pathlib.Path(folder, "model")
        native.save_native(path, preset("tiny"), params)
        del params
        checking = measured(lambda: checksums.verify(path))
        loading = measured(lambda: jax.block_until_ready(native.load_native(path, shapes)))  # its files are known
    for name, (clock, cpu) in {"loading": loading, "checksums": checking}.items():
        print(f"{name:10} {clock:7.2f} s  {cpu:7.2f} s of CPU  {args.gigabytes / clock:6.2f} GB/s")
    print(f"checksums / loading: {checking[0] / loading[0]:.1%} of the clock, {checking[1] / loading[1]:.1%} of CPU")


def measured(function) -> tuple[float, float]:
    """Seconds of the clock and of CPU."""
    clock, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - clock, time.process_time() - cpu


if __name__ == "__main__":
    main()
