"""MATLAB's `imresize(..., 'bicubic')`: Keys' kernel (a = -1/2), antialiased when shrinking, borders mirrored."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def cubic(t: Float[np.ndarray, "*n"]) -> Float[np.ndarray, "*n"]:
    """Keys' cubic convolution kernel with a = -1/2 (Keys, 1981)."""
    t = np.abs(t)
    inner = 1.5 * t**3 - 2.5 * t**2 + 1
    outer = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return np.where(t <= 1, inner, np.where(t <= 2, outer, 0))


@functools.lru_cache(maxsize=64)
def taps(size: int, scale: Fraction) -> tuple[Int[np.ndarray, "out taps"], Float[np.ndarray, "out taps"]]:
    """Input index and float64 weight of every tap of every output pixel, ceil(size * scale) of them."""
    shrink = min(float(scale), 1.0)
    width = 4 / shrink
    centre = (np.arange(math.ceil(size * scale)) + 0.5) / float(scale) - 0.5
    left = np.floor(centre - width / 2).astype(np.int64)
    index = left[:, None] + np.arange(math.ceil(width) + 2)
    weight = cubic((centre[:, None] - index) * shrink)
    weight /= weight.sum(axis=1, keepdims=True)
    used = np.any(weight != 0, axis=0)
    period = index[:, used] % (2 * size)  # mirrored symmetrically, the edge pixel repeated
    return np.minimum(period, 2 * size - 1 - period), weight[:, used]


def imresize(image: Float[Array, "H W C"], scale: Fraction | float) -> Float[Array, "h w C"]:
    """Resized float image, not clipped and not rounded; h = ceil(H * scale). Agrees with MATLAB in double precision.

    `jax.image.resize` renormalises at borders instead of mirroring and Pillow rounds between its passes: both are
    several grey levels off there.

    Raises:
      ValueError: `scale` is not positive or the image not [H, W, C] and floating.
    """
    scale = Fraction(scale).limit_denominator(1_000_000)
    if scale <= 0:
        raise ValueError(f"expected a positive scale, found {scale}")
    image = jnp.asarray(image)
    if image.ndim != 3 or not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"expected a float image [H, W, C], found {image.dtype} {image.shape}; convert it first")
    return _resize_rows(_resize_rows(image, scale).swapaxes(0, 1), scale).swapaxes(0, 1)


def _resize_rows(image: Float[Array, "H W C"], scale: Fraction) -> Float[Array, "h W C"]:
    index, weight = taps(image.shape[0], scale)
    return _gather_rows(image, jnp.asarray(index.T), jnp.asarray(weight.T, image.dtype))


@jax.jit
def _gather_rows(image: Array, index: Int[Array, "taps out"], weight: Float[Array, "taps out"]) -> Array:
    return sum(w[:, None, None] * image[i] for i, w in zip(index, weight, strict=True))
