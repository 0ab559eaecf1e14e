"""Both passes in plain XLA with early stops: the default without a kernel.

One segment of one list at a time, so that stopped work is never computed: a while loop under vmap would run until its last lane
has stopped. Keys are gathered in whole rows, and a segment's tiles are few and large, as products on CPU want them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_attention.rows import own_rows, take_rows, valid_rows
from pallas_kernels.sparse_attention.spec import (
    MASKED,
    Backend,
    Inputs,
    Outputs,
    Spec,
    State,
    empty,
    gain_of,
    goes_on,
    merge,
)


def attend(x: Inputs, spec: Spec) -> Outputs:
    """See `spec.Backend`."""
    return jax.custom_batching.sequential_vmap(functools.partial(_attend, spec=spec))(x)


BACKEND = Backend("xla", lambda spec, x: None, attend)


def _attend(x: Inputs, spec: Spec) -> Outputs:
    lists, share = x.order.shape[0], x.q.shape[0] // x.order.shape[0]
    q = (x.q.astype(jnp.float32) * x.q.shape[-1] ** -0.5).reshape(lists, share, spec.segments, spec.segment, -1)
    own = jax.tree.map(lambda a: own_rows(a, x.start, spec), (x.k, x.v))

    def segment(at):
        h, m = at // spec.segments, at % spec.segments
        head = h // (lists // x.k.shape[0])
        rows, inside = x.rows[h, m], valid_rows(x.rows[h, m], spec)
        mine = jnp.moveaxis(q, 2, 1)[h, m]
        own_k, own_v = (a[head, m] for a in own)
        state = window(mine, own_k, own_v, spec.length - m * spec.segment, spec)
        local = rows // spec.padded % share * spec.segment + rows % spec.segment
        take = lambda a: take_rows(a, local)
        tiles = jax.tree.map(take, (mine, state))
        tile = functools.partial(_tile, x.k[head], x.v[head], x.order[h, m], x.count[h, m], x.threshold[h], spec)
        state, blocks, gain = lax.map(lambda a: tile(*a), (*tiles, inside))
        back = jnp.argsort(local.reshape(-1))
        place = lambda a: a.reshape(-1, *a.shape[2:])[back].reshape(share, spec.segment, *a.shape[2:])
        return jax.tree.map(place, state), blocks, gain

    state, blocks, gain = lax.map(segment, jnp.arange(lists * spec.segments, dtype=jnp.int32))
    natural = lambda a: jnp.moveaxis(a.reshape(lists, spec.segments, *a.shape[1:]), 2, 1)
    state = jax.tree.map(lambda a: natural(a).reshape(*x.q.shape[:2], *a.shape[3:]), state)
    return Outputs(state, blocks.reshape(x.rows.shape[:3]), gain.reshape(x.rows.shape[:3]))


def window(q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array, spec: Spec) -> State:
    """First pass over one segment: q [heads, S, d] by tiles, each with the keys [S, d] up to its end."""

    def tile(t):
        first, end = t * spec.block_q, (t + 1) * spec.block_q if spec.causal else spec.segment
        rows = q[:, first : first + spec.block_q].reshape(-1, q.shape[-1])
        i, j = jnp.arange(rows.shape[0]) % spec.block_q + first, jnp.arange(end)
        visible = j[None, :] <= i[:, None] if spec.causal else jnp.broadcast_to(j < length, (i.size, end))
        scores = jnp.where(visible, rows @ k[:end].T, MASKED)
        return jax.tree.map(
            lambda a: a.reshape(q.shape[0], spec.block_q, *a.shape[1:]), merge(empty(rows), scores, v[:end])
        )

    tiles = [tile(t) for t in range(spec.tiles)]
    return jax.tree.map(lambda *a: jnp.concatenate(a, 1), *tiles)


def _tile(k, v, order, count, threshold, spec: Spec, q, state: State, valid):
    """Second pass of one tile [R, d]: (state, blocks, gain)."""
    total = jnp.where(valid.any(), -(-count // spec.block_k), 0)
    place = jnp.arange(spec.stride)

    def look(carry):
        state, step, _ = carry
        index = lax.dynamic_slice_in_dim(order, step * spec.stride, spec.stride)
        keys, values = (a.at[index].get(mode="promise_in_bounds").astype(jnp.float32) for a in (k, v))
        listed = (step * spec.stride + place < count)[None]
        new = merge(state, jnp.where(listed, q @ keys.T, MASKED), values)
        return new, step + 1, gain_of(state, new, valid, spec)

    def unfinished(carry):
        _, step, gain = carry
        visited = step * spec.check_every
        return (total > 0) & ((step == 0) | goes_on(gain, visited, total, threshold, spec))

    state, steps, gain = lax.while_loop(unfinished, look, (state, jnp.int32(0), jnp.float32(0)))
    return state, jnp.minimum(steps * spec.check_every, total), gain
