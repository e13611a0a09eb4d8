"""What one of two processes, of a device each, makes of a batch and of sample pictures: `spanning.py JSON-options`."""

import json
import os
import pathlib
import sys
import types

os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="1", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blip3o_jax import monitor, sharding
from blip3o_jax.pipeline import Pipeline
from blip3o_jax.train import distributed

OPTIONS = json.loads(sys.argv[1])
ROWS = np.arange(8.0, dtype=np.float32)


def batch_sum(shape: dict[str, int]) -> float:
    """Sum over the rows of a global batch, of which this process has read its part."""
    mesh = sharding.make_mesh(shape)
    index, parts = sharding.reader(mesh)
    with sharding.use_mesh(mesh):
        rows = sharding.shard_batch(np.split(ROWS, parts)[index], mesh)
        total = jax.jit(lambda x: (x * ROWS).sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    return float(total.addressable_data(0))


def draw_samples(directory: str) -> None:
    """A sheet of two pictures, whose rows lie on both processes."""
    mesh = sharding.make_mesh({"fsdp": 2})
    pipeline = Pipeline.from_pretrained(OPTIONS["checkpoint"], mesh=mesh, dtype="float32")
    samples = monitor.SamplesConfig(("a red star", "a blue square"), 1, num_inference_steps=1, guidance_scale=1.0)
    run = types.SimpleNamespace(whole=lambda trained: pipeline.params, mesh=mesh)
    hook = monitor.samples_hook(samples, pipeline.config, run, pipeline.tokenizer, directory)
    with sharding.use_mesh(mesh):
        hook.run(1, types.SimpleNamespace(params=None), type("Reporter", (), {"image": lambda *_: None}))


if __name__ == "__main__":
    distributed.initialize(f"127.0.0.1:{OPTIONS['port']}", 2, OPTIONS["process"])
    sums = {axis: batch_sum({axis: 2}) for axis in ("tensor", "fsdp")}
    draw_samples(OPTIONS["directory"])
    print(json.dumps(sums))
