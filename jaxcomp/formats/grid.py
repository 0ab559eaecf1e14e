"""Uniform quantization grids: scale and zero point from data, codes, values, and the straight-through form.

    u    = clip(round(w / scale) + zero, 0, levels - 1)      stored unsigned code
    what = (u - zero) * scale

Symmetric grids fix zero = levels // 2 and scale = max|w| / ((levels - 1) // 2). Asymmetric grids take scale = (max - min) /
(levels - 1) and zero = round(-min / scale) with min <= 0 <= max, so that zero is a code (ABQ-LLM, arXiv 2408.08554, section
2, with the range forced to include 0: a constant row would otherwise be reconstructed wrongly).
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jaxcomp.core.leaf import Parts


class Grid(Parts):
    """A quantization grid.

    Attributes:
      bits: stored bits per code, 1..8.
      levels: number of codes in use, 2..2**bits (0 means 2**bits); 5 levels in 3 bits is ABQ-LLM's W2*.
      symmetric: zero point fixed in the middle, none stored.
      group_size: columns that share a scale; 0 means one scale per row ("channel"), -1 one per matrix ("tensor").
    """

    kind = "grid"
    bits: int = eqx.field(static=True)
    levels: int = eqx.field(static=True, default=0)
    symmetric: bool = eqx.field(static=True, default=True)
    group_size: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be in 1..8, got {self.bits}")
        if self.levels and not 2 <= self.levels <= 2**self.bits:
            raise ValueError(f"levels must be in 2..{2**self.bits} for {self.bits} bits, got {self.levels}")
        if self.symmetric and self.count < 3:
            raise ValueError("a symmetric grid needs at least 3 levels; use symmetric=False for 1 bit")
        if self.group_size < -1:
            raise ValueError(f"group_size must be positive, 0 (per channel) or -1 (per tensor), got {self.group_size}")

    @property
    def count(self) -> int:
        """Number of levels."""
        return self.levels or 2**self.bits

    def groups(self, k: int) -> int:
        """Number of scales along k columns. Raises ValueError if the group size does not divide k."""
        if self.group_size <= 0:
            return 1
        if k % self.group_size:
            divisors = [g for g in range(1, k + 1) if k % g == 0]
            near = min(divisors, key=lambda g: abs(g - self.group_size))
            raise ValueError(
                f"in_dim {k} is not divisible by group_size {self.group_size}; use group_size={near} or 0 (per channel)"
            )
        return k // self.group_size


def qparams(
    w: Float[Array, "*b n k"], grid: Grid, low: jax.Array | None = None, high: jax.Array | None = None
) -> tuple[Float[Array, "*b m g"], Float[Array, "*b m g"]]:
    """Scale and zero point (integers as floats) of a matrix; m = 1 per tensor, else n. Differentiable in w, low and high.

    Args:
      w: matrix [*batch, N, K].
      grid: the grid.
      low: optional factor in (0, 1] on the minimum, [*batch, N, G] (learned weight clipping, OmniQuant eq. 2).
      high: the same for the maximum.
    """
    grouped = w.reshape(*w.shape[:-1], grid.groups(w.shape[-1]), -1)
    axes = (-3, -1) if grid.group_size == -1 else (-1,)
    wmax = jnp.maximum(grouped.max(axes, keepdims=True)[..., 0], 0)
    wmin = jnp.minimum(grouped.min(axes, keepdims=True)[..., 0], 0)
    wmax = wmax if high is None else wmax * high
    wmin = wmin if low is None else wmin * low
    if grid.symmetric:
        scale = jnp.maximum(wmax, -wmin) / ((grid.count - 1) // 2)
        return _positive(scale), jnp.full_like(scale, grid.count // 2)
    scale = _positive((wmax - wmin) / (grid.count - 1))
    zero = jnp.clip(jnp.round(jax.lax.stop_gradient(-wmin / scale)), 0, grid.count - 1)
    return scale, zero


def encode(w: Float[Array, "*b n k"], scale: jax.Array, zero: jax.Array, grid: Grid) -> UInt8[Array, "*b n k"]:
    """Unsigned codes of a matrix."""
    grouped = w.reshape(*w.shape[:-1], scale.shape[-1], -1)
    u = jnp.clip(jnp.round(grouped / scale[..., None]) + zero[..., None], 0, grid.count - 1)
    return u.astype(jnp.uint8).reshape(w.shape)


def decode(codes: UInt8[Array, "*b n k"], scale: jax.Array, zero: jax.Array | int) -> Float[Array, "*b n k"]:
    """Values (u - zero) * scale in float32."""
    scale = scale.astype(jnp.float32)
    zero = jnp.asarray(zero, jnp.float32)
    zero = zero[..., None] if zero.ndim else zero
    grouped = codes.reshape(*codes.shape[:-1], scale.shape[-1], -1).astype(jnp.float32)
    return ((grouped - zero) * scale[..., None]).reshape(codes.shape)


def fake_quantize(w: jax.Array, scale: jax.Array, zero: jax.Array, grid: Grid) -> jax.Array:
    """decode(encode(w)) with the straight-through gradient of round; the clip passes gradient only inside the range."""
    grouped = w.reshape(*w.shape[:-1], scale.shape[-1], -1)
    scale, zero = scale[..., None], zero[..., None]
    u = jnp.clip(round_ste(grouped / scale) + zero, 0, grid.count - 1)
    return ((u - zero) * scale).reshape(w.shape)


def round_ste(x: jax.Array) -> jax.Array:
    """Round half to even with identity gradient."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def _positive(scale: jax.Array) -> jax.Array:
    """Scales of all-zero groups become 1, so that they decode to exact zeros."""
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))
