"""A short run of the tiny model with the edit stage's mixture: what the tests of the real training stack train.

Also a configuration of train.py: `--config=tests/support/real.py:NUM_WORKERS`, of the data layer.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from configs import tiny


def get_config(num_workers: str = "0"):
    """Mixed rows of three tasks, all parts of the decoder and the diffusion transformer training, average kept."""
    config = tiny.get_config("edit")
    # heads as wide as the released model's: with 8 numbers a head, queries without a positive number are common, and
    # linear attention jumps where a query becomes one of them, so that rounding alone would tell meshes apart.
    config.model.dit.update({"num_heads": 4, "head_dim": 32, "num_cross_heads": 4, "cross_head_dim": 32})
    config.trainable = ((r"^(decoder|(vae_|siglip_)?connector|dit)/", True), (r"", False))
    config.loop.update({"num_steps": 20, "save_every": 3, "log_every": 1, "tensorboard": False})
    config.optimizer.update({"ema_decay": 0.9, "warmup_steps": 5, "learning_rate": 1e-3})
    config.data.num_workers = int(num_workers)
    return config
