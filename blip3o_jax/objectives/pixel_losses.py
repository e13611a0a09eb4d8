"""Distances between images in [-1, 1], one number per image.

B batch, Y X pixels, C channels.

The Laplacian pyramid replaces a perceptual distance such as LPIPS, which requires the weights of a network trained on
photographs. It weights every octave of detail equally; edges and textures contribute little to a plain pixel error.

Source: Laplacian pyramid of Burt & Adelson (1983), Lap1 loss of arXiv 1707.05776.
"""

import jax
import jax.numpy as jnp
import optax

HUBER_DELTA = 0.1  # largest error that is squared: 5 % of the range
PYRAMID_LEVELS = 5
SMALLEST_LEVEL = 4  # pixels on a side of the coarsest level
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)

DISTANCES = {
    "l1": jnp.abs,
    "l2": jnp.square,
    "huber": lambda error: optax.huber_loss(error, delta=HUBER_DELTA) / HUBER_DELTA,
}
"""Name -> elementwise distance of an error; beyond HUBER_DELTA, `huber` has the slope 1 of `l1`."""


def pixel_distance(kind: str, pixels: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the mean distance f32[B] of images f32[B Y X C]; `kind` is a key of DISTANCES."""
    return DISTANCES[kind](pixels - target).mean(axis=(1, 2, 3))


def laplacian_distance(pixels: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the mean absolute difference f32[B] of the Laplacian pyramids of f32[B Y X C], averaged over levels."""
    error = pixels - target  # the pyramid is linear, so one suffices
    levels = []
    while len(levels) < PYRAMID_LEVELS and min(error.shape[1:3]) >= 2 * SMALLEST_LEVEL:
        smooth = _blur(error)
        levels.append(error - smooth)
        error = smooth[:, ::2, ::2]
    levels.append(error)
    return sum(jnp.abs(level).mean(axis=(1, 2, 3)) for level in levels) / len(levels)


def psnr(pixels: jax.Array, target: jax.Array) -> jax.Array:
    """Returns the peak signal-to-noise ratio f32[B] in dB of images f32[B Y X C], `pixels` clipped to [-1, 1]."""
    squared = jnp.square(jnp.clip(pixels, -1, 1) - target).mean(axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(squared, 1e-10))


def _blur(x: jax.Array) -> jax.Array:
    for axis in (1, 2):
        pad = [(2, 2) if i == axis else (0, 0) for i in range(x.ndim)]
        padded, size = jnp.pad(x, pad, mode="edge"), x.shape[axis]
        taps = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(len(BINOMIAL)))
        x = sum(weight * tap for weight, tap in zip(BINOMIAL, taps, strict=True))
    return x
