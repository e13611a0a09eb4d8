"""train.py as one host of several on one machine: `host.py FOLDER [flags of train.py]`.

The names and the rows of every batch that it reads lie in FOLDER/PROCESS-BATCH.npz. Only process 0 compiles.
"""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
os.environ["JAX_SHARE_BINARY_BETWEEN_HOSTS"] = "1"

from blip3o_jax.cli import train
from blip3o_jax.compilation import keep_programs
from blip3o_jax.data.pipeline import BatchStream


def share_programs() -> None:
    """Makes JAX name a program alike on all processes: its names of simulated CPU devices include their process."""
    keep_programs()
    from jax._src import cache_key

    cache_key._hash_accelerator_config = cache_key._hash_devices


def keep_rows(folder: pathlib.Path) -> None:
    """Makes streams of batches write what they hand out."""
    following = BatchStream.next

    def following_kept(stream, *arguments):
        import jax
        import numpy as np

        batch = following(stream, *arguments)
        rows = {name: value for name, value in vars(batch).items() if value is not None}
        np.savez(folder / f"{jax.process_index()}-{stream.state()['next_batch']}.npz", names=stream.names, **rows)
        return batch

    BatchStream.next = following_kept


if __name__ == "__main__":
    share_programs()
    keep_rows(pathlib.Path(sys.argv[1]))
    train.main(sys.argv[2:])
