"""Rows of queries: into tiles of permuted or grouped rows and back, and the keys of their own segments."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sparse_attention.spec import Spec


def row_numbers(
    query_order: Int[Array, "hq m s"] | None, heads: int, lists: int, spec: Spec
) -> Int[Array, "h m tiles r"]:
    """Row of the flat queries at every place of every tile; the heads of a group that shares a list share its tiles."""
    offset = jnp.arange(spec.segment, dtype=jnp.int32)[None, None] if query_order is None else query_order
    head = jnp.arange(heads, dtype=jnp.int32)[:, None, None] * spec.padded
    first = jnp.arange(spec.segments, dtype=jnp.int32)[None, :, None] * spec.segment
    rows = head + first + jnp.broadcast_to(offset, (heads, spec.segments, spec.segment))
    rows = rows.reshape(lists, heads // lists, spec.segments, spec.tiles, spec.block_q)
    return rows.transpose(0, 2, 3, 1, 4).reshape(lists, spec.segments, spec.tiles, -1)


def take_rows(x: Float[Array, "hq n *f"], rows: Int[Array, "*shape"]) -> Float[Array, "*shape *f"]:
    """Rows of all heads, by flat number."""
    return x.reshape(-1, *x.shape[2:]).at[rows].get(mode="promise_in_bounds")


def put_rows(
    tiles: Float[Array, "h m tiles r *f"], rows: Int[Array, "h m tiles r"], like: Float[Array, "hq n d"]
) -> jax.Array:
    """The inverse of `take_rows` for rows that occur once each: [Hq, padded, *f]."""
    flat = jnp.zeros((rows.size, *tiles.shape[4:]), tiles.dtype)
    flat = flat.at[rows.reshape(-1)].set(tiles.reshape(-1, *tiles.shape[4:]), unique_indices=True)
    return flat.reshape(*like.shape[:2], *tiles.shape[4:])


def valid_rows(rows: Int[Array, "*shape"], spec: Spec) -> Bool[Array, "*shape"]:
    """Whether a row is no padding."""
    return rows % spec.padded < spec.length


def own_rows(
    x: Float[Array, "hk t d"], start: Int[Array, ""], spec: Spec, dtype=jnp.float32
) -> Float[Array, "hk m s d"]:
    """Keys or values that stand where the queries stand, by segments; zeros behind the last one."""
    own = lax.dynamic_slice_in_dim(x, start, spec.length, 1).astype(dtype)
    own = jnp.pad(own, ((0, 0), (0, spec.padded - spec.length), (0, 0)))
    return own.reshape(x.shape[0], spec.segments, spec.segment, -1)
