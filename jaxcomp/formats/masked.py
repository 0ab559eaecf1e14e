"""`MaskedArray`: a weight under a group mask, for pruning and masked training."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.formats import packing
from jaxcomp.formats.layout import Layout
from jaxcomp.formats.matrix import MatrixLeaf, register_matrix_leaf


class MaskedArray(MatrixLeaf):
    """A dense weight times a mask of one bit per group of consecutive columns. Gradients reach kept weights only.

    Attributes:
      value: float [*batch, N, K].
      mask: uint32 [*batch, N, ceil(K / group_size / 32)], one bit per group, 1 = kept.
      layout: where N and K are in the logical array.
      group_size: columns per mask bit.
    """

    kind = "masked"
    value: jax.Array
    mask: jax.Array
    layout: Layout
    group_size: int = eqx.field(static=True)
    dtype_name: str = eqx.field(static=True, default="float32")
    name: str = eqx.field(static=True, default="")

    def __check_init__(self):
        n, k = self.layout.matrix_shape
        if self.group_size < 1 or k % self.group_size:
            raise ValueError(f"in_dim {k} is not divisible by group_size {self.group_size}")
        want = (n, packing.packed_words(k // self.group_size, 1))
        if tuple(self.value.shape[-2:]) != (n, k) or tuple(self.mask.shape[-2:]) != want:
            raise ValueError(
                f"expected value [..., {n}, {k}] and mask [..., {want}], found {self.value.shape}, {self.mask.shape}"
            )

    @classmethod
    def of(cls, w: jax.Array, keep: jax.Array, contract_axes, group_size: int) -> MaskedArray:
        """Masks a dense array; `keep` is bool [*batch, N, K / group_size]."""
        layout = Layout.of(w.shape, contract_axes)
        mask = packing.pack(keep.astype(jnp.uint8), 1)
        return cls(layout.to_matrix(w), mask, layout, group_size, jnp.dtype(w.dtype).name)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""
        return tuple(self.value.shape[:-2])

    def keep(self) -> jax.Array:
        """bool [*batch, N, K / group_size]."""
        return packing.unpack(self.mask, 1, self.layout.matrix_shape[1] // self.group_size).astype(bool)

    @property
    def density(self) -> jax.Array:
        """Share of kept weights."""
        return self.keep().mean()

    def matrix(self) -> jax.Array:
        """Values with masked groups zero, float32."""
        grouped = self.value.reshape(*self.value.shape[:-1], -1, self.group_size).astype(jnp.float32)
        return jnp.where(self.keep()[..., None], grouped, 0.0).reshape(self.value.shape)

    def kernel_name(self, rows: int | None = None) -> str:
        """What `explain` prints for a contraction."""
        del rows
        return f"masked_matmul[g{self.group_size}]"


def _matmul(x: jax.Array, leaf: MaskedArray) -> jax.Array:
    return lax.dot_general(x, leaf.matrix().astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))


register_matrix_leaf(MaskedArray, _matmul)
