"""`FakeQuantizedArray`: a float weight that computes as its quantized self, with straight-through gradients."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.formats import grid as g
from jaxcomp.formats.activation import ActivationQuantizer
from jaxcomp.formats.layout import Layout
from jaxcomp.formats.matrix import MatrixLeaf, register_matrix_leaf
from jaxcomp.formats.quantized import QuantizedArray


class FakeQuantizedArray(MatrixLeaf):
    """A trainable weight on a grid: the forward pass sees decode(encode(value)), the gradient goes straight through round.

    Attributes:
      value: float32 [*batch, N, K], the latent weight.
      clip: optional learned clipping, float32 [*batch, N, G, 2], factors in (0, 1] on (min, max); differentiable.
      act: activation quantizer of the partner, straight-through as well.
      layout: where N and K are in the logical array.
      grid: the grid.
    """

    kind = "fake_quantized"
    value: jax.Array
    clip: jax.Array | None
    act: ActivationQuantizer | None
    layout: Layout
    grid: g.Grid
    dtype_name: str = eqx.field(static=True, default="float32")
    name: str = eqx.field(static=True, default="")

    @classmethod
    def of(
        cls, w: jax.Array, grid: g.Grid, contract_axes, act: ActivationQuantizer | None = None
    ) -> FakeQuantizedArray:
        """Wraps a dense array of any shape; `contract_axes` are what contractions sum over."""
        layout = Layout.of(w.shape, contract_axes)
        return cls(layout.to_matrix(w.astype(jnp.float32)), None, act, layout, grid, jnp.dtype(w.dtype).name)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""
        return tuple(self.value.shape[:-2])

    def qparams(self) -> tuple[jax.Array, jax.Array]:
        """Scale and zero point of the latent weight, with the learned clipping."""
        low, high = (None, None) if self.clip is None else (self.clip[..., 0], self.clip[..., 1])
        return g.qparams(self.value, self.grid, low, high)

    def matrix(self) -> jax.Array:
        """Values on the grid."""
        return g.fake_quantize(self.value, *self.qparams(), self.grid)

    def kernel_name(self, rows: int | None = None) -> str:
        """What `explain` prints for a contraction."""
        del rows
        return f"fake_matmul[w{self.grid.bits}{f'a{self.act.grid.bits}' if self.act else ''}]"

    def quantize(self, scale_dtype=None) -> QuantizedArray:
        """The packed leaf with the same codes."""
        scale, zero = self.qparams()
        return QuantizedArray.encode(
            self.value, scale, zero, self.grid, self.layout, self.dtype_name, self.act, scale_dtype
        )


def _partner(x: jax.Array, leaf: FakeQuantizedArray) -> jax.Array:
    return x if leaf.act is None else leaf.act.fake(x)


def _matmul(x: jax.Array, leaf: FakeQuantizedArray) -> jax.Array:
    w = leaf.matrix().astype(x.dtype)
    return lax.dot_general(_partner(x, leaf), w, (((x.ndim - 1,), (1,)), ((), ())))


register_matrix_leaf(FakeQuantizedArray, _matmul, _partner)
