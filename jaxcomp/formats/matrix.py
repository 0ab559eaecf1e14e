"""`MatrixLeaf`: what all leaves share that store a matrix [N, K] behind a `Layout`."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxcomp.core import tape
from jaxcomp.core.leaf import CompressedArray
from jaxcomp.formats.contraction import contract, register_dot_general
from jaxcomp.formats.convolution import register_conv


class MatrixLeaf(CompressedArray):
    """A leaf with the static or nested fields `layout` (a `Layout`), `dtype_name` (logical dtype) and `name`."""

    @property
    @abc.abstractmethod
    def batch_shape(self) -> tuple[int, ...]:
        """Sizes of the leading batch axes."""

    @abc.abstractmethod
    def matrix(self) -> jax.Array:
        """Values as float32 [*batch, N, K]."""

    @abc.abstractmethod
    def kernel_name(self, rows: int | None = None) -> str:
        """What `explain` prints when a contraction with `rows` vectors consumes this leaf without materialising it."""

    @property
    def batch_ndim(self) -> int:
        """Number of leading batch axes."""
        return len(self.batch_shape)

    def aval(self) -> jax.core.ShapedArray:
        """Logical shape and dtype."""
        return jax.core.ShapedArray((*self.batch_shape, *self.layout.shape), jnp.dtype(self.dtype_name))

    def materialise(self) -> jax.Array:
        """The dense array in the logical dtype."""
        return self.layout.to_array(self.matrix()).astype(self.dtype_name)

    def transpose(self, permutation):
        """View under `jnp.transpose`; batch axes must stay in front."""
        batch = self.batch_ndim
        if tuple(permutation[:batch]) != tuple(range(batch)):
            return NotImplemented
        return dataclasses.replace(self, layout=self.layout.transpose([p - batch for p in permutation[batch:]]))

    def reshape(self, shape):
        """View under `reshape` where rows and columns do not mix; a leading batch axis of size 1 may be dropped."""
        batch = self.batch_shape
        if batch and batch[0] == 1 and tuple(shape) == self.shape[1:]:
            return jax.tree.map(lambda a: a[0], self)
        layout = self.layout.reshape(shape[len(batch) :]) if tuple(shape[: len(batch)]) == batch else None
        return NotImplemented if layout is None else dataclasses.replace(self, layout=layout)

    def astype(self, dtype):
        """The same leaf under another floating logical dtype."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return NotImplemented
        return dataclasses.replace(self, dtype_name=jnp.dtype(dtype).name)

    def copy(self):
        """Leaves are immutable: the leaf itself."""
        return self

    def slice_leading(self, start, size: int):
        """`size` entries of the first logical axis from `start` (may be traced), where that is a batch axis."""
        if not self.batch_ndim:
            return self.slice_rows(start, size) if hasattr(self, "slice_rows") else NotImplemented
        return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, 0), self)


def register_matrix_leaf(leaf_type: type, matmul: Callable, partner: Callable | None = None) -> None:
    """Registers `dot_general` and convolution rules of a matrix leaf.

    Args:
      leaf_type: the class.
      matmul: `matmul(x [..., K], leaf) -> [..., N]`.
      partner: `partner(x [samples, features], leaf)`, what is done to the other operand of a convolution.
    """

    def dot(x, leaf, dims):
        out = contract(x, leaf, dims, matmul)
        if out is not NotImplemented:
            rows = x.size // math.prod((*leaf.batch_shape, leaf.layout.matrix_shape[1]))
            tape.event(leaf.name, "dot_general", leaf.kernel_name(rows), leaf.shape)
        return out

    def conv(x, leaf, spec, run, params):
        del params
        if partner is not None:
            lead = x.transpose(spec.lhs_spec)  # [samples, features, *spatial]
            flat = partner(lead.reshape(lead.shape[0], -1), leaf).reshape(lead.shape)
            x = flat.transpose(sorted(range(x.ndim), key=lambda i: spec.lhs_spec[i]))
        tape.event(leaf.name, "conv_general_dilated", f"decode_conv[{leaf.kernel_name()}]", leaf.shape)
        return run(x, leaf.materialise())

    register_dot_general(leaf_type, dot)
    register_conv(leaf_type, conv)
