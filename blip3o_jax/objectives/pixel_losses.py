"""Distances between images in [-1, 1], one number per image.

B batch, Y X pixels, C channels.

A perceptual distance in the sense of LPIPS is the difference of features of a network trained on photographs; it
cannot be had without that network's weights. The Laplacian pyramid needs none: it weighs the error of every octave of
detail alike, so that edges and textures, which hold little of the plain error, count as much as areas do.

Source: Burt & Adelson 1983; Bojanowski et al. 2018 (arXiv 1707.05776), the Lap1 loss.
"""

import jax
import jax.numpy as jnp

HUBER_DELTA = 0.1  # errors below are squared: a twentieth of the range
PYRAMID_LEVELS = 5
SMALLEST_LEVEL = 4  # pixels; smaller images are not halved again
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)


def _huber(error: jax.Array) -> jax.Array:
    size = jnp.abs(error)
    return jnp.where(size < HUBER_DELTA, 0.5 * jnp.square(error) / HUBER_DELTA, size - 0.5 * HUBER_DELTA)


DISTANCES = {"l1": jnp.abs, "l2": jnp.square, "huber": _huber}
"""Name -> distance of one value; Huber's grows with slope 1 beyond HUBER_DELTA, as l1 does."""


def pixel_distance(kind: str, pixels: jax.Array, target: jax.Array) -> jax.Array:
    """f32[B], mean over an image of one of `DISTANCES`, for f32[B Y X C] images."""
    return DISTANCES[kind](pixels - target).mean(axis=(1, 2, 3))


def laplacian_distance(pixels: jax.Array, target: jax.Array) -> jax.Array:
    """f32[B], mean absolute difference of the levels of both Laplacian pyramids, every level alike."""
    error = pixels - target  # the pyramid is linear: that of the difference is the difference of both
    levels = []
    while len(levels) < PYRAMID_LEVELS and min(error.shape[1:3]) >= 2 * SMALLEST_LEVEL:
        smooth = _blur(error)
        levels.append(error - smooth)
        error = smooth[:, ::2, ::2]
    levels.append(error)
    return sum(jnp.abs(level).mean(axis=(1, 2, 3)) for level in levels) / len(levels)


def psnr(pixels: jax.Array, target: jax.Array) -> jax.Array:
    """f32[B] peak signal-to-noise ratio in dB of images f32[B Y X C], clipped to [-1, 1]."""
    squared = jnp.square(jnp.clip(pixels, -1, 1) - target).mean(axis=(1, 2, 3))
    return 10 * jnp.log10(4 / jnp.maximum(squared, 1e-10))


def _blur(x: jax.Array) -> jax.Array:
    for axis in (1, 2):
        pad = [(2, 2) if i == axis else (0, 0) for i in range(x.ndim)]
        padded, size = jnp.pad(x, pad, mode="edge"), x.shape[axis]
        taps = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(len(BINOMIAL)))
        x = sum(weight * tap for weight, tap in zip(BINOMIAL, taps, strict=True))
    return x
