"""What both sides of benchmarks/train_step.py train on: a random checkpoint, a batch of captioned pictures, noise.

B rows, T positions, N codes of a picture, y x latent cells, C latent channels.
"""

import dataclasses
import functools
import io
import pathlib
import tarfile

import numpy as np
from PIL import Image

from blip3o_jax.config import Blip3oConfig
from blip3o_jax.config.presets import preset
from blip3o_jax.data.config import DataConfig, Layout, SourceConfig
from blip3o_jax.data.pipeline import BatchStream
from blip3o_jax.text import sequence
from blip3o_jax.text.tokenizer import Tokenizer

CAPTION = "a red cube on a wooden table, seen from above, in the light of the afternoon"
LEARNING_RATE, BETAS, EPS, CLIP_NORM = 5e-5, (0.9, 0.999), 1e-8, 1.0
TRAINABLE = ((r"^decoder/", True), (r"^connector/", True), (r"^dit/caption_(projection|norm)/", True), (r"", False))
ITEMS = 32  # pictures in the shard


@dataclasses.dataclass(frozen=True)
class TrainWorkload:
    """A training step's worth of work.

    Attributes:
      checkpoint: directory in the released layout.
      shard: tar of captioned JPEGs as large as the model's pictures.
      geometry: name of the preset.
      dtype: float32 | bfloat16, of the activations; what trains is float32.
      rows: B.
      length: T.
      unroll: our layers one by one, not as a loop.
    """

    checkpoint: pathlib.Path
    shard: pathlib.Path
    geometry: str
    dtype: str
    rows: int
    length: int
    unroll: bool = False

    @property
    def config(self) -> Blip3oConfig:
        return preset(self.geometry)

    def layout(self, precomputed: bool = False) -> Layout:
        """Of a row: with the pictures, or with their codes and latents."""
        config = self.config
        fields = ("target_codes", "target_latent") if precomputed else ("target_tokenizer_pixels", "target_pixels")
        return Layout(
            fields=fields,
            height=config.image_size,
            width=config.image_size,
            tokenizer_size=config.image_tokenizer.image_size,
            num_image_tokens=config.num_image_tokens,
            tokens=config.tokens,
            length=self.length,
            pool_scale=config.pool_scale,
            latent_shape=(config.latent_size, config.latent_size, config.autoencoder.latent_channels),
        )

    def stream(self) -> BatchStream:
        """The data layer on the shard, in the calling thread: its whole cost shows."""
        source = SourceConfig("webdataset", str(self.shard))
        data = DataConfig((source,), self.rows, num_threads=0)
        return BatchStream(data, self.layout(), Tokenizer.from_directory(self.checkpoint))

    @functools.cached_property
    def batch(self):
        """The first batch, `types.Batch` with pictures; the same whenever it is asked for."""
        stream = self.stream()
        batch = stream.next()
        stream.close()
        return batch

    @functools.cached_property
    def draws(self) -> dict[str, np.ndarray]:
        """Noise levels f32[B], noise f32[B y x C]; codes i32[B N] and latents in place of precomputed ones."""
        config, random = self.config, np.random.default_rng(0)
        cells = (self.rows, config.latent_size, config.latent_size, config.autoencoder.latent_channels)
        return {
            "u": random.random(self.rows, np.float32),
            "noise": random.standard_normal(cells, np.float32),
            "codes": random.integers(0, config.tokens.num_image_tokens, (self.rows, config.num_image_tokens), np.int32),
            "latent": random.standard_normal(cells, np.float32),
        }


def row_length(checkpoint: pathlib.Path, config: Blip3oConfig) -> int:
    """Positions of a row with CAPTION and its picture, rounded up to a multiple of 8."""
    tokenizer = Tokenizer.from_directory(checkpoint)
    row = sequence.build("t2i", CAPTION, tokenizer, config.tokens, config.num_image_tokens)
    return -len(row) // 8 * -8


def write_shard(path: pathlib.Path, side: int) -> None:
    """Writes ITEMS JPEGs of coarse noise, which decode as photographs do, with captions."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(ITEMS):
            coarse = random.integers(0, 256, (side // 16, side // 16, 3), np.uint8)
            out = io.BytesIO()
            Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
            for name, content in ((f"{number:05d}.jpg", out.getvalue()), (f"{number:05d}.txt", CAPTION.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
