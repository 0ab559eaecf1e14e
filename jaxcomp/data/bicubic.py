"""MATLAB's `imresize(..., 'bicubic')`: Keys' kernel (a = -1/2), antialiased when shrinking, borders mirrored."""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num


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


def imresize(image: Num[Array, "H W C"], scale: Fraction | float) -> Num[Array, "h w C"]:
    """MATLAB's bicubic `imresize`, rows first; h = ceil(H * scale). The result has the dtype of the image.

    As in MATLAB, uint8 is rounded (half up) and clipped after each of the two passes; floats are neither. Sums are
    float32 for uint8. `jax.image.resize` renormalises at borders instead of mirroring, by up to 12 grey levels.

    Raises:
      ValueError: `scale` is not positive, or the image is not [H, W, C] of uint8 or a float dtype.
    """
    scale = Fraction(scale).limit_denominator(1_000_000)
    if scale <= 0:
        raise ValueError(f"expected a positive scale, found {scale}")
    image = jnp.asarray(image)
    if image.ndim != 3 or not (image.dtype == jnp.uint8 or jnp.issubdtype(image.dtype, jnp.floating)):
        raise ValueError(f"expected an image [H, W, C], uint8 or float, found {image.dtype} {image.shape}")
    for _ in range(2):  # rows, then columns
        index, weight = taps(image.shape[0], scale)
        image = _resize_rows(image, jnp.asarray(index.T, jnp.int32), jnp.asarray(weight.T, jnp.float32)).swapaxes(0, 1)
    return image


@jax.jit
def _resize_rows(
    image: Num[Array, "H W C"], index: Int[Array, "taps h"], weight: Float[Array, "taps h"]
) -> Num[Array, "h W C"]:
    wide = jnp.float32 if image.dtype == jnp.uint8 else image.dtype
    rows = sum(w[:, None, None].astype(wide) * image[i].astype(wide) for i, w in zip(index, weight, strict=True))
    return jnp.floor(jnp.clip(rows, 0, 255) + 0.5).astype(jnp.uint8) if image.dtype == jnp.uint8 else rows
