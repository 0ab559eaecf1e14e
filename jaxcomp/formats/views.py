"""Primitives that only look at a leaf differently: `transpose`, `reshape`, `squeeze`, slicing, dtype conversion.

A leaf type that offers a view implements the method of the same name and returns a new leaf, or NotImplemented; it is then
materialised by the default rule, which says so on the tape.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import quax
from jax import lax
from jax.typing import ArrayLike

from jaxcomp.core.leaf import CompressedArray


def _view(primitive, method: str, argument: Callable[..., tuple]) -> None:
    @quax.register(primitive)
    def _(leaf: CompressedArray, **params):
        out = getattr(leaf, method)(*argument(leaf, **params)) if hasattr(leaf, method) else NotImplemented
        return CompressedArray.default(primitive, [leaf], params) if out is NotImplemented else out


def _squeezed(leaf, dimensions):
    dims = {d % len(leaf.shape) for d in dimensions}
    return (tuple(n for i, n in enumerate(leaf.shape) if i not in dims),)


_view(lax.transpose_p, "transpose", lambda leaf, permutation: (permutation,))
_view(lax.reshape_p, "reshape", lambda leaf, new_sizes, **_: (new_sizes,))
_view(lax.squeeze_p, "reshape", _squeezed)
_view(lax.convert_element_type_p, "astype", lambda leaf, new_dtype, **_: (jnp.dtype(new_dtype),))
_view(lax.copy_p, "copy", lambda leaf: ())


@quax.register(lax.broadcast_in_dim_p)
def _broadcast(leaf: CompressedArray, *dynamic: ArrayLike, shape, broadcast_dimensions, **params):
    kept = tuple(n for i, n in enumerate(shape) if i in broadcast_dimensions)
    only_ones = all(n == 1 for i, n in enumerate(shape) if i not in broadcast_dimensions)
    out = leaf.reshape(shape) if only_ones and kept == leaf.shape and hasattr(leaf, "reshape") else NotImplemented
    if out is not NotImplemented:
        return out
    params = dict(params, shape=shape, broadcast_dimensions=broadcast_dimensions)
    return CompressedArray.default(lax.broadcast_in_dim_p, [leaf, *dynamic], params)


@quax.register(lax.slice_p)
def _slice(leaf: CompressedArray, *, start_indices, limit_indices, strides):
    whole = [(s, e) == (0, n) for s, e, n in zip(start_indices, limit_indices, leaf.shape, strict=True)]
    unit = strides is None or all(s == 1 for s in strides)
    if hasattr(leaf, "slice_leading") and unit and all(whole[1:]):
        out = leaf.slice_leading(start_indices[0], limit_indices[0] - start_indices[0])
        if out is not NotImplemented:
            return out
    params = {"start_indices": start_indices, "limit_indices": limit_indices, "strides": strides}
    return CompressedArray.default(lax.slice_p, [leaf], params)


@quax.register(lax.dynamic_slice_p)
def _dynamic_slice(leaf: CompressedArray, *starts: ArrayLike, slice_sizes):
    if hasattr(leaf, "slice_leading") and tuple(slice_sizes[1:]) == leaf.shape[1:]:
        out = leaf.slice_leading(starts[0], slice_sizes[0])
        if out is not NotImplemented:
            return out
    return CompressedArray.default(lax.dynamic_slice_p, [leaf, *starts], {"slice_sizes": slice_sizes})


@quax.register(lax.gather_p)
def _gather(leaf: CompressedArray, indices: ArrayLike, *, dimension_numbers, slice_sizes, mode, **params):
    """Rows of a table (`jnp.take(table, ids, axis=0)`, Flax's Embed); any other gather materialises."""
    d = dimension_numbers
    takes_rows = (
        tuple(d.collapsed_slice_dims) == tuple(d.start_index_map) == (0,)
        and tuple(slice_sizes) == (1, *leaf.shape[1:])
        and not d.operand_batching_dims
        and tuple(d.offset_dims) == tuple(range(indices.ndim - 1, indices.ndim - 2 + len(leaf.shape)))
    )
    if hasattr(leaf, "take") and takes_rows:
        ids = indices[..., 0]
        out = leaf.take(jnp.clip(ids, 0, leaf.shape[0] - 1))
        if out is not NotImplemented:
            inside = ((ids >= 0) & (ids < leaf.shape[0])).reshape(*ids.shape, *(1,) * (len(leaf.shape) - 1))
            fills = mode in (lax.GatherScatterMode.FILL_OR_DROP, None)
            return jnp.where(inside, out, jnp.full_like(out, jnp.nan)) if fills else out
    params = dict(params, dimension_numbers=dimension_numbers, slice_sizes=slice_sizes, mode=mode)
    return CompressedArray.default(lax.gather_p, [leaf, indices], params)
