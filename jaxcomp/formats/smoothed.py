"""`SmoothedArray`: a weight whose inputs are divided per channel first, where no layer before it can take the division."""

from __future__ import annotations

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax import lax

from jaxcomp.formats.layout import Layout
from jaxcomp.formats.matrix import MatrixLeaf, register_matrix_leaf


class SmoothedArray(MatrixLeaf):
    """W = base diag(s)^-1; its product with x is base (x / s) (SmoothQuant, arXiv 2211.10438, eq. 3).

    Attributes:
      base: leaf of W diag(s), say a `LowRankArray` over a `QuantizedArray`.
      divisor: s, float32 [*batch, K].
      layout: where N and K are in the logical array.
    """

    kind = "smoothed"
    base: MatrixLeaf
    divisor: jax.Array
    layout: Layout
    dtype_name: str = eqx.field(static=True, default="float32")
    name: str = eqx.field(static=True, default="")

    def __check_init__(self):
        if self.base.layout.matrix_shape != self.layout.matrix_shape:
            raise ValueError(f"base: expected {self.layout.matrix_shape}, found {self.base.layout.matrix_shape}")
        if tuple(self.divisor.shape[-1:]) != self.layout.matrix_shape[1:]:
            raise ValueError(f"divisor: expected [..., {self.layout.matrix_shape[1]}], found {self.divisor.shape}")

    @classmethod
    def of(cls, base: MatrixLeaf, divisor: jax.Array) -> SmoothedArray:
        """Puts the division in front of a leaf."""
        return cls(base, divisor.astype(jnp.float32), base.layout, base.dtype_name)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""
        return self.base.batch_shape

    def matrix(self) -> jax.Array:
        """base diag(s)^-1, float32."""
        return self.base.matrix() / self.divisor[..., None, :]

    def kernel_name(self, rows: int | None = None) -> str:
        """What `explain` prints for a contraction."""
        return f"smoothed+{self.base.kernel_name(rows)}"


def _matmul(x: jax.Array, leaf: SmoothedArray) -> jax.Array:
    n, k = leaf.layout.matrix_shape
    matrix = dataclasses.replace(leaf.base, layout=Layout((n,), (k,), (0, 1)))
    divisor = leaf.divisor.astype(x.dtype).reshape(*[1] * (x.ndim - 1), k)
    product = lambda x, w: lax.dot_general(x, w, (((x.ndim - 1,), (1,)), ((), ())))
    return quax.quaxify(product)(x / divisor, matrix).astype(x.dtype)


register_matrix_leaf(SmoothedArray, _matmul)
