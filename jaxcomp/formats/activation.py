"""How the partner of a quantized weight is quantized at run time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcomp.core.leaf import Parts
from jaxcomp.formats import grid as g


class ActivationQuantizer(Parts):
    """Activation quantization: dynamic per token (scale and zero from each row of x), or static per tensor.

    Attributes:
      scale: None for dynamic; else float32 [*batch], the calibrated step of the whole tensor.
      zero_point: static asymmetric grids only, float32 [*batch] holding an integer code.
      grid: bits, levels, symmetric; its group_size is ignored (the scale spans the contracted axis).
    """

    kind = "activation_quantizer"
    grid: g.Grid
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None

    def qparams(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(scale, zero) of x [..., K], each [..., 1] in float32."""
        if self.scale is None:
            return g.qparams(x.astype(jnp.float32), g.Grid(self.grid.bits, self.grid.levels, self.grid.symmetric))
        ones = jnp.ones((*x.shape[:-1], 1), jnp.float32)
        zero = self.grid.count // 2 if self.zero_point is None else self.zero_point
        return ones * self.scale, ones * jnp.asarray(zero, jnp.float32)

    def fake(self, x: jax.Array) -> jax.Array:
        """x after quantization, straight-through, same shape and dtype; the last axis is the contracted one."""
        scale, zero = self.qparams(x)
        return g.fake_quantize(x.astype(jnp.float32), scale, zero, self.grid).astype(x.dtype)

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(codes uint8 [..., K], scale [..., 1], zero [..., 1])."""
        scale, zero = self.qparams(x)
        return g.encode(x.astype(jnp.float32), scale, zero, self.grid), scale, zero
