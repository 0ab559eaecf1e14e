"""`LowRankArray`: a frozen (maybe quantized) weight plus a trainable product of two thin matrices (LoRA, QLoRA)."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.core.leaf import materialise
from jaxcomp.formats.layout import Layout
from jaxcomp.formats.matrix import MatrixLeaf, register_matrix_leaf
from jaxcomp.formats.quantized import QuantizedArray
from jaxcomp.formats.quantized_matmul import matmul as quantized_matmul


class LowRankArray(MatrixLeaf):
    """W + alpha B A (LoRA, arXiv 2106.09685, eq. 3); the product with x is W x + alpha B (A x), W + BA is never formed.

    Attributes:
      base: float [*batch, N, K], or a `QuantizedArray`; no gradient reaches it.
      down: A, float32 [*batch, r, K].
      up: B, float32 [*batch, N, r]; zero at the start, so that the leaf equals its base.
      layout: where N and K are in the logical array.
      alpha: scaling of the update.
    """

    kind = "low_rank"
    base: Any
    down: jax.Array
    up: jax.Array
    layout: Layout
    alpha: float = eqx.field(static=True, default=1.0)
    dtype_name: str = eqx.field(static=True, default="float32")
    name: str = eqx.field(static=True, default="")

    @classmethod
    def of(cls, w: Any, rank: int, key: jax.Array, contract_axes=None, alpha: float = 1.0) -> LowRankArray:
        """Adds a rank-`rank` update to a dense array (name its `contract_axes`) or to a `QuantizedArray`.

        Raises:
          ValueError: rank outside 1..min(N, K).
        """
        quantized = isinstance(w, QuantizedArray)
        layout = w.layout if quantized else Layout.of(w.shape, contract_axes)
        n, k = layout.matrix_shape
        if not 1 <= rank <= min(n, k):
            raise ValueError(f"rank must be in 1..{min(n, k)} for a {n} x {k} matrix, got {rank}")
        batch = w.shape[: len(w.shape) - len(layout.shape)]
        down = jax.random.normal(key, (*batch, rank, k), jnp.float32) / jnp.sqrt(jnp.float32(k))
        base = w if quantized else layout.to_matrix(w)
        return cls(base, down, jnp.zeros((*batch, n, rank), jnp.float32), layout, alpha, jnp.dtype(w.dtype).name)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""
        return tuple(self.down.shape[:-2])

    def matrix(self) -> jax.Array:
        """W + alpha B A, float32."""
        base = self.base.matrix() if isinstance(self.base, QuantizedArray) else self.base.astype(jnp.float32)
        return lax.stop_gradient(base) + self.alpha * (self.up @ self.down)

    def kernel_name(self, rows: int | None = None) -> str:
        """What `explain` prints for a contraction."""
        inner = self.base.kernel_name(rows) if isinstance(self.base, QuantizedArray) else "dense"
        return f"low_rank_matmul[r{self.down.shape[-2]}]+{inner}"

    def merge(self) -> jax.Array:
        """The dense array with the update folded in."""
        return materialise(self)


def _matmul(x: jax.Array, leaf: LowRankArray) -> jax.Array:
    last = (((x.ndim - 1,), (1,)), ((), ()))
    if isinstance(leaf.base, QuantizedArray):
        y = quantized_matmul(x, dataclasses.replace(leaf.base, scale=lax.stop_gradient(leaf.base.scale)))
    else:
        y = lax.dot_general(x, lax.stop_gradient(leaf.base).astype(x.dtype), last)
    update = lax.dot_general(lax.dot_general(x, leaf.down.astype(x.dtype), last), leaf.up.astype(x.dtype), last)
    return y + leaf.alpha * update


register_matrix_leaf(LowRankArray, _matmul)
