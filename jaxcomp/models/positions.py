"""Where tokens and diffusion steps are told to a transformer: sine tables, rotary angles over several axes."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def timestep_features(t: Float[Array, "*B"], size: int, shift: float = 0.0) -> Float[Array, "*B size"]:
    """[cos, sin] of t times `size`/2 frequencies from 1 down to 1e-4, in float32; t is on a scale of 1000.

    Frequency i is 10000^(-i / (size/2 - shift)): `shift` 0 as DiT's authors and Wan, 1 as DDPM's.
    """
    half = size // 2
    frequency = np.exp(-math.log(10_000) * np.arange(half) / (half - shift)).astype(np.float32)
    angle = t.astype(jnp.float32)[..., None] * jnp.asarray(frequency).reshape(*[1] * t.ndim, half)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def sincos_table(grid: Sequence[int], size: int) -> Float[np.ndarray, "L size"]:
    """Fixed position embedding of a grid of tokens: `size`/n features per axis, [sin, cos], the last axis first (DiT, MAE).

    Raises:
      ValueError: `size` is not a multiple of twice the number of axes.
    """
    if size % (2 * len(grid)):
        raise ValueError(f"a sine table over {len(grid)} axes needs a multiple of {2 * len(grid)}, found {size}")
    half = size // len(grid) // 2
    omega = 10_000.0 ** (-np.arange(half) / half)
    axes = [coordinate.reshape(-1, 1) * omega for coordinate in np.indices(grid)[::-1]]
    return np.concatenate([f(angle) for angle in axes for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def rope_angles(grid: Sequence[int], head_dim: int, theta: float = 10_000.0) -> Float[np.ndarray, "L head_dim/2"]:
    """Rotary angles of a grid of tokens; every axis turns a share of the pairs, the first axis what is left (Wan).

    Raises:
      ValueError: `head_dim` is odd or leaves an axis without pairs.
    """
    share = 2 * (head_dim // (2 * len(grid)))
    if head_dim % 2 or share == 0:
        raise ValueError(f"rotary embedding over {len(grid)} axes needs an even head_dim, at least {2 * len(grid)}")
    sizes = [head_dim - share * (len(grid) - 1), *[share] * (len(grid) - 1)]
    turns = [theta ** (-np.arange(0, size, 2) / size) for size in sizes]
    axes = [coordinate.reshape(-1, 1) * turn for coordinate, turn in zip(np.indices(grid), turns, strict=True)]
    return np.concatenate(axes, axis=1).astype(np.float32)


def rotate_pairs(x: Float[Array, "B L H d"], angles: Float[Array, "#B L d/2"]) -> Float[Array, "B L H d"]:
    """Turns the neighbours (2i, 2i + 1) of every head by angle i, in float32; returns x.dtype."""
    cos, sin = (f(angles)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    first, second = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    turned = jnp.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
