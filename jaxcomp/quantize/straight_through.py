"""Rounding for learning: the numbers of `jaxcomp.formats.grid`, with gradients that survive compilation.

The gradient of `jnp.max` divides by the number of entries that equal the maximum. Compiled code may compute an entry twice, once
with a fused multiply-add, and then none does. Here an extreme passes its gradient to the one entry where it was found.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.formats import Grid
from jaxcomp.formats.grid import fake_quantize


def balanced(grid: Grid) -> Grid:
    """ABQ-LLM's bit balance (arXiv 2408.08554): 2^b + 1 levels for b in {1, 2}, stored in b + 1 bits; other grids as they are."""
    if grid.bits > 2 or grid.levels:
        return grid
    return Grid(grid.bits + 1, 2**grid.bits + 1, grid.symmetric, grid.group_size)


def qparams(
    w: Float[Array, "*b n k"], grid: Grid, low: Array | float = 1.0, high: Array | float = 1.0
) -> tuple[Float[Array, "*b m g"], Float[Array, "*b m g"]]:
    """Scale and zero point as `jaxcomp.formats.grid.qparams`; low and high are factors on minimum and maximum."""
    whole = grid.group_size == -1
    shape = (*w.shape[:-2], 1, 1, -1) if whole else (*w.shape[:-1], grid.groups(w.shape[-1]), -1)
    grouped = w.reshape(shape)
    w_min = jnp.minimum(_entry(grouped, jnp.argmin), 0) * low
    w_max = jnp.maximum(_entry(grouped, jnp.argmax), 0) * high
    if grid.symmetric:
        scale = _positive(jnp.maximum(w_max, -w_min) / ((grid.count - 1) // 2))
        return scale, jnp.full_like(scale, grid.count // 2)
    scale = _positive((w_max - w_min) / (grid.count - 1))
    return scale, jnp.clip(jnp.round(jax.lax.stop_gradient(-w_min / scale)), 0, grid.count - 1)


def fake(x: Float[Array, "*b k"], grid: Grid) -> Float[Array, "*b k"]:
    """x rounded per token (last axis) in float32 and back in its dtype, straight-through."""
    wide = x.astype(jnp.float32)
    return fake_quantize(wide, *qparams(wide, grid), grid).astype(x.dtype)


def _entry(x: Float[Array, "*b k"], find: Callable[..., Array]) -> Float[Array, "*b"]:
    """The entry of the last axis that `find` (argmin or argmax) points at."""
    index = find(jax.lax.stop_gradient(x), axis=-1, keepdims=True)
    return jnp.sum(jnp.where(jax.lax.broadcasted_iota(index.dtype, x.shape, x.ndim - 1) == index, x, 0), axis=-1)


def _positive(scale: Array) -> Array:
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))
