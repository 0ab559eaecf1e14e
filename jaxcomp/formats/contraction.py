"""`dot_general` with a compressed leaf on either side, brought to one form and handed to the leaf's own rule."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import quax
from jax import lax
from jax.typing import ArrayLike

from jaxcomp.core.leaf import materialise
from jaxcomp.formats.layout import Layout


class Dims(NamedTuple):
    """Dimension numbers of x . leaf with x on the left: contracted and batch axes of both."""

    x: tuple[int, ...]
    leaf: tuple[int, ...]
    x_batch: tuple[int, ...]
    leaf_batch: tuple[int, ...]


Rule = Callable[[jax.Array, object, Dims], jax.Array]


def register_dot_general(leaf_type: type, rule: Rule) -> None:
    """Registers `rule(x, leaf, dims) -> [batch, x free, leaf free]` for both sides of `dot_general`.

    A rule answers NotImplemented for dimension numbers that it does not cover; the leaf is then materialised.
    """

    def call(x, leaf, dimension_numbers, x_first, dtype, fallback):
        (c_lhs, c_rhs), (b_lhs, b_rhs) = dimension_numbers
        dims = Dims(c_lhs, c_rhs, b_lhs, b_rhs) if x_first else Dims(c_rhs, c_lhs, b_rhs, b_lhs)
        if (out := rule(x, leaf, dims)) is NotImplemented:
            return fallback(materialise(leaf, "dot_general"))
        if not x_first:
            batch = len(dims.x_batch)
            free_x = x.ndim - batch - len(dims.x)
            out = jnp.moveaxis(out, range(batch, batch + free_x), range(out.ndim - free_x, out.ndim))
        return out.astype(dtype)

    @quax.register(lax.dot_general_p)
    def _(lhs: ArrayLike, rhs: leaf_type, *, dimension_numbers, preferred_element_type, **params):
        rest = dict(params, dimension_numbers=dimension_numbers, preferred_element_type=preferred_element_type)
        dtype = preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)
        return call(lhs, rhs, dimension_numbers, True, dtype, lambda w: lax.dot_general_p.bind(lhs, w, **rest))

    @quax.register(lax.dot_general_p)
    def _(lhs: leaf_type, rhs: ArrayLike, *, dimension_numbers, preferred_element_type, **params):
        rest = dict(params, dimension_numbers=dimension_numbers, preferred_element_type=preferred_element_type)
        dtype = preferred_element_type or jnp.promote_types(lhs.dtype, rhs.dtype)
        return call(rhs, lhs, dimension_numbers, False, dtype, lambda w: lax.dot_general_p.bind(w, rhs, **rest))


def contract_last(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Moves `axes` to the back in the given order and flattens them: [*free, prod(axes)]."""
    moved = x.transpose([*(a for a in range(x.ndim) if a not in axes), *axes])
    lead = moved.shape[: moved.ndim - len(axes)]
    return moved.reshape(*lead, math.prod(x.shape[a] for a in axes))


def contract(x: jax.Array, leaf, dims: Dims, matmul: Callable) -> jax.Array:
    """Runs `matmul(x [..., K], leaf) -> [..., N]` where `dims` contract exactly the columns of the leaf's layout.

    Leading batch axes of the leaf (`leaf.batch_ndim`) must be batch axes of the product; they are mapped over. Returns [batch, x
    free, leaf free] as `dot_general` does, or NotImplemented.
    """
    batch = leaf.batch_ndim
    order = leaf.layout.contraction_order([a - batch for a in dims.leaf if a >= batch])
    if order is None or sorted(dims.leaf_batch) != list(range(batch)):
        return NotImplemented
    remaining = [a for a in range(x.ndim) if a not in dims.x_batch]
    axes = [remaining.index(dims.x[i]) for i in order]
    mapped = lambda a, w: _restore_rows(matmul(contract_last(a, axes), w), w.layout)
    for _ in range(batch):
        mapped = jax.vmap(mapped)
    by_leaf_axis = [dims.x_batch[dims.leaf_batch.index(i)] for i in range(batch)]
    out = mapped(jnp.moveaxis(x, by_leaf_axis, range(batch)), leaf)
    return out.transpose([*dims.leaf_batch, *range(batch, out.ndim)])


def _restore_rows(y: jax.Array, layout: Layout) -> jax.Array:
    """[..., N] -> [..., *row axes in logical order]."""
    y = y.reshape(*y.shape[:-1], *layout.rows)
    lead = y.ndim - len(layout.rows)
    return y.transpose([*range(lead), *(lead + p for p in layout.perm if p < len(layout.rows))])
