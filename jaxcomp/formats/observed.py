"""`ObservedArray`: a weight that computes as usual and reports statistics of what it is multiplied with."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax import lax

from jaxcomp.core import tape
from jaxcomp.core.leaf import CompressedArray, is_compressed, materialise
from jaxcomp.formats.contraction import contract_last, register_dot_general
from jaxcomp.formats.convolution import register_conv
from jaxcomp.formats.layout import Layout

STATISTICS = ("count", "sum", "max_abs", "max_value", "min_value", "sum_abs", "sum_sq", "gram")


class ObservedArray(CompressedArray):
    """Wraps an array or compressed leaf; each contraction adds statistics of the partner X [T, K] to the open tape.

    K runs over the contracted axes of the *stored* value in ascending order, whatever transposition the model applied.
    Statistics, all float32: `count` T; `sum`, `sum_abs`, `sum_sq`, `max_abs`, `max_value`, `min_value` [K]; `gram` X^T X [K, K].

    Attributes:
      value: the array or leaf.
      layout: the view of the value that the model holds: rows are all axes of the value, there are no columns.
      needs: which statistics to collect.
    """

    kind = "observed"
    value: Any
    layout: Layout
    needs: tuple[str, ...] = eqx.field(static=True, default=())
    name: str = eqx.field(static=True, default="")

    def __check_init__(self):
        if unknown := sorted(set(self.needs) - set(STATISTICS)):
            raise ValueError(f"unknown statistics {unknown}; known are {STATISTICS}")

    @classmethod
    def of(cls, value: Any, needs: tuple[str, ...] = (), name: str = "", batch_ndim: int = 0) -> ObservedArray:
        """Observes an array or leaf whose `batch_ndim` leading axes are scanned or mapped over by the model."""
        shape = value.shape[batch_ndim:]
        return cls(value, Layout(tuple(shape), (), tuple(range(len(shape)))), tuple(sorted(needs)), name)

    @property
    def _batch_ndim(self) -> int:
        return len(self.value.shape) - len(self.layout.rows)

    def aval(self) -> jax.core.ShapedArray:
        """Shape of the current view, dtype of the value."""
        batch = self.value.shape[: self._batch_ndim]
        return jax.core.ShapedArray((*batch, *self.layout.shape), self.value.dtype)

    def view(self) -> Any:
        """The value as the model sees it: itself where nothing was transposed, else a dense array."""
        if self.layout.shape == self.value.shape[self._batch_ndim :] and self.layout.perm == tuple(
            range(len(self.layout.perm))
        ):
            return self.value
        dense = materialise(self.value, "transpose")
        batch = dense.shape[: self._batch_ndim]
        return self.layout.to_array(dense.reshape(*batch, math.prod(self.layout.rows), 1))

    def materialise(self) -> Any:
        """The current view."""
        return self.view()

    def transpose(self, permutation):
        """View under `jnp.transpose`."""
        if self._batch_ndim:
            return NotImplemented
        return ObservedArray(self.value, self.layout.transpose(permutation), self.needs, self.name)

    def astype(self, dtype):
        """The value under another dtype."""
        value = quax.quaxify(lax.convert_element_type)(self.value, dtype)
        return ObservedArray(value, self.layout, self.needs, self.name)

    def copy(self):
        """Leaves are immutable: the leaf itself."""
        return self

    def take(self, ids: jax.Array):
        """Rows of an observed table: nothing to observe, but the use is recorded."""
        tape.event(self.name, "gather", "observed", self.shape, axes=tuple(self.layout.perm[1:]))
        return quax.quaxify(lambda table: jnp.take(table, ids, axis=0))(self.view())


def statistics(x: jax.Array, needs: tuple[str, ...]) -> dict[str, jax.Array]:
    """The named statistics of x [T, K], in float32."""
    x = x.astype(jnp.float32)
    compute = {
        "count": lambda: jnp.float32(x.shape[0]),
        "sum": lambda: x.sum(0),
        "max_abs": lambda: jnp.abs(x).max(0),
        "max_value": lambda: x.max(0),
        "min_value": lambda: x.min(0),
        "sum_abs": lambda: jnp.abs(x).sum(0),
        "sum_sq": lambda: (x * x).sum(0),
        "gram": lambda: jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST),
    }
    return {name: compute[name]() for name in needs}


def _dot(x, leaf: ObservedArray, dims):
    axes = [leaf.layout.perm[a] for a in dims.leaf]
    tape.event(leaf.name, "dot_general", "observed", leaf.shape, axes=tuple(sorted(axes)))
    if leaf.needs and not dims.leaf_batch:
        order = sorted(range(len(axes)), key=axes.__getitem__)
        flat = contract_last(x, [dims.x[i] for i in order])
        tape.add_stats(leaf.name, statistics(flat.reshape(-1, flat.shape[-1]), leaf.needs))
    numbers = ((dims.x, dims.leaf), (dims.x_batch, dims.leaf_batch))
    product = lambda a, w: lax.dot_general(a, w, numbers)
    return quax.quaxify(product)(x, leaf.view()) if is_compressed(leaf.view()) else product(x, leaf.view())


def _conv(x, leaf: ObservedArray, spec, conv):
    out_axis = spec.rhs_spec[0]
    axes = tuple(sorted(leaf.layout.perm[a] for a in range(len(leaf.shape)) if a != out_axis))
    tape.event(leaf.name, "conv_general_dilated", "observed", leaf.shape, axes=axes)
    return conv(x, materialise(leaf.view(), "conv_general_dilated"))


register_dot_general(ObservedArray, _dot)
register_conv(ObservedArray, _conv)
