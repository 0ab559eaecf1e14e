"""`QuantizedArray`: a weight as densely packed integer codes, scales and zero points."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from jaxcomp.core import tape
from jaxcomp.formats import grid as g
from jaxcomp.formats import storage as stores
from jaxcomp.formats.activation import ActivationQuantizer
from jaxcomp.formats.layout import Layout
from jaxcomp.formats.matrix import MatrixLeaf, register_matrix_leaf
from jaxcomp.formats.quantized_matmul import kernel_name, matmul
from pallas_kernels.arbitrary_bit_matmul import BY_ROWS


class QuantizedArray(MatrixLeaf):
    """A quantized array: value = (u - zero) * scale, u unsigned codes of `grid.bits` bits.

    Attributes:
      packed: the codes, uint32 [*batch, N, ceil(K bits / 32)] unless `storage` says otherwise.
      scale: float [*batch, N, G], or [*batch, 1, 1] per tensor; G scales along K.
      zero_point: uint8 [*batch, N, G] (or [*batch, 1, 1]); None for symmetric grids, where zero = levels // 2.
      act: how the partner in a contraction is quantized; None keeps it in floating point.
      layout: where rows N and columns K are in the logical array.
      grid: bits, levels, symmetry, group size.
      dtype_name: logical dtype.
      storage: the layout of `packed`, see `jaxcomp.formats.storage`.
    """

    kind = "quantized"
    packed: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    act: ActivationQuantizer | None
    layout: Layout
    grid: g.Grid
    dtype_name: str = eqx.field(static=True, default="float32")
    storage: str = eqx.field(static=True, default=stores.DENSE)
    name: str = eqx.field(static=True, default="")

    @classmethod
    def quantize(
        cls,
        w: jax.Array,
        grid: g.Grid,
        contract_axes: tuple[int, ...],
        act: ActivationQuantizer | None = None,
        scale_dtype=None,
    ) -> QuantizedArray:
        """Round-to-nearest quantization of a dense array. For stacked layers, `jax.vmap` it.

        Args:
          w: array of any shape.
          grid: target grid.
          contract_axes: axes that contractions sum over.
          act: optional activation quantizer.
          scale_dtype: dtype of the stored scales, float32 by default. Codes are computed with the rounded scales.
        """
        layout = Layout.of(w.shape, contract_axes)
        matrix = layout.to_matrix(w.astype(jnp.float32))
        scale, zero = g.qparams(matrix, grid)
        return cls.encode(matrix, scale, zero, grid, layout, w.dtype, act, scale_dtype)

    @classmethod
    def encode(cls, matrix, scale, zero, grid, layout, dtype, act=None, scale_dtype=None) -> QuantizedArray:
        """Codes of a float32 matrix [*batch, N, K] on given scales and zeros, packed."""
        scale = scale.astype(scale_dtype or jnp.float32)
        codes = g.encode(matrix, scale.astype(jnp.float32), zero, grid)
        return cls.from_codes(codes, scale, zero, grid, layout, dtype, act)

    @classmethod
    def from_codes(cls, codes, scale, zero, grid, layout, dtype, act=None) -> QuantizedArray:
        """Packs unsigned codes uint8 [*batch, N, K] with their scales and zeros."""
        zero_point = None if grid.symmetric else jnp.asarray(zero).astype(jnp.uint8)
        return cls(stores.pack(codes, grid), scale, zero_point, act, layout, grid, jnp.dtype(dtype).name)

    def __check_init__(self):
        n, k = self.layout.matrix_shape
        stores.check(self.grid, self.storage)
        one = stores.stored(self.grid, self.storage, (n, k))
        batch = tuple(self.packed.shape[: self.packed.ndim - one.ndim])
        if tuple(self.packed.shape) != (*batch, *one.shape) or self.packed.dtype != one.dtype:
            sizes = ", ".join(map(str, one.shape))
            raise ValueError(
                f"packed: expected {one.dtype} [..., {sizes}], found {self.packed.dtype} {self.packed.shape}"
            )
        rows = 1 if self.grid.group_size == -1 else n
        want = (*batch, rows, self.grid.groups(k))
        if tuple(self.scale.shape) != want:
            raise ValueError(f"scale: expected shape {want}, found {tuple(self.scale.shape)}")
        if (self.zero_point is None) != self.grid.symmetric:
            raise ValueError("zero_point must be given for asymmetric grids and only for them")
        if self.zero_point is not None and (tuple(self.zero_point.shape) != want or self.zero_point.dtype != jnp.uint8):
            raise ValueError(
                f"zero_point: expected uint8 {want}, found {self.zero_point.dtype} {self.zero_point.shape}"
            )

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""
        return tuple(self.scale.shape[:-2])

    def codes(self) -> jax.Array:
        """Unsigned codes, uint8 [*batch, N, K]."""
        return stores.unpack(self.packed, self.grid, self.storage, self.layout.matrix_shape)

    def stored_as(self, storage: str) -> QuantizedArray:
        """The same values in another layout of the codes. Raises ValueError if it cannot hold them."""
        if storage == self.storage:
            return self
        return dataclasses.replace(self, packed=stores.pack(self.codes(), self.grid, storage), storage=storage)

    def zero(self) -> jax.Array | int:
        """Zero point as codes: an array like `scale`, or the middle level of a symmetric grid."""
        return self.grid.count // 2 if self.zero_point is None else self.zero_point

    def matrix(self) -> jax.Array:
        """Values as float32 [*batch, N, K]."""
        return g.decode(self.codes(), self.scale, self.zero())

    def kernel_name(self, rows: int | None = None) -> str:
        """What `explain` prints for a contraction with `rows` vectors."""
        return kernel_name(self, rows)

    def slice_rows(self, start, size: int):
        """`size` entries of the first logical axis from `start` (may be traced), where that is the only row axis."""
        if not self.is_table:
            return NotImplemented
        return self._rows(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, 0), size)

    def take(self, ids: jax.Array):
        """Dense rows `table[ids]`, [*ids.shape, *shape[1:]], reading only those rows."""
        if self.batch_ndim or not self.is_table:
            return NotImplemented
        tape.event(self.name, "gather", f"take_rows[w{self.grid.bits}]", self.shape)
        flat = ids.reshape(-1)
        rows = self._rows(lambda a: a[flat], flat.shape[0]).materialise()
        return rows.reshape(*ids.shape, *rows.shape[1:])

    @property
    def is_table(self) -> bool:
        """Whether the first logical axis is the only row axis, and rows are stored one by one."""
        return len(self.layout.rows) == 1 and self.layout.perm[0] == 0 and self.storage in BY_ROWS

    def _rows(self, select: Callable, count: int) -> QuantizedArray:
        per_row = lambda a: a if a is None or self.grid.group_size == -1 else select(a)
        return dataclasses.replace(
            self,
            packed=select(self.packed),
            scale=per_row(self.scale),
            zero_point=per_row(self.zero_point),
            layout=Layout((count,), self.layout.cols, self.layout.perm),
        )


register_matrix_leaf(QuantizedArray, matmul, lambda x, leaf: x if leaf.act is None else leaf.act.fake(x))
