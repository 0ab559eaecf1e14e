"""Sparse attention in plain jnp, the truth for every other implementation: it stops tiles by masking, so it saves no time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.sparse_attention.rows import own_rows, put_rows, take_rows, valid_rows
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
    """See `spec.Backend`; memory is O(N), for blocks of a size that does not grow with N."""
    q = x.q.astype(jnp.float32) * x.q.shape[-1] ** -0.5
    state = jax.tree.map(lambda a: take_rows(a, x.rows), window(q, x, spec))
    state, blocks, gain = _visit(take_rows(q, x.rows), state, x, spec)
    return Outputs(jax.tree.map(lambda a: put_rows(a, x.rows, x.q), state), blocks, gain)


BACKEND = Backend("reference", lambda spec, x: None, attend)


def window(q: jax.Array, x: Inputs, spec: Spec) -> State:
    """First pass, in natural order: every row sees its own segment, up to itself if causal. q is scaled, float32."""
    group = x.q.shape[0] // x.k.shape[0]
    k, v = (own_rows(a, x.start, spec) for a in (x.k, x.v))
    q = q.reshape(*k.shape[:1], group, *k.shape[1:3], -1)
    i = jnp.arange(spec.segment)
    inside = i[None, :] <= i[:, None] if spec.causal else jnp.ones((spec.segment, spec.segment), bool)

    def one(operands):
        q, k, v, first = operands
        visible = inside if spec.causal else inside & (first + i < spec.length)[None, :]
        scores = jnp.einsum("gid,jd->gij", q, k, precision=lax.Precision.HIGHEST)
        return merge(empty(q), jnp.where(visible[None], scores, MASKED), v)

    first = jnp.arange(spec.segments) * spec.segment
    flat = lambda a: a.reshape(-1, *a.shape[2:])
    state = lax.map(one, (flat(q.swapaxes(1, 2)), flat(k), flat(v), jnp.tile(first, k.shape[0])))
    natural = lambda a: a.reshape(k.shape[0], spec.segments, group, *a.shape[2:]).swapaxes(1, 2)
    return jax.tree.map(lambda a: natural(a).reshape(x.q.shape[0], spec.padded, *a.shape[3:]), state)


def _visit(q: jax.Array, state: State, x: Inputs, spec: Spec) -> tuple[State, jax.Array, jax.Array]:
    """Second pass: listed keys from important to unimportant; tiles that have stopped keep their state."""
    head = jnp.arange(x.order.shape[0]) // (x.order.shape[0] // x.k.shape[0])
    total = jnp.broadcast_to(-(-x.count // spec.block_k)[..., None], x.rows.shape[:-1])
    valid = valid_rows(x.rows, spec)
    total = jnp.where(valid.any(-1), total, 0)

    def look(carry, step):
        state, blocks, gain, active = carry
        place = step * spec.stride + jnp.arange(spec.stride)
        index = lax.dynamic_slice_in_dim(x.order, step * spec.stride, spec.stride, 2)
        listed = (place[None, None] < x.count[..., None])[:, :, None, None, :]
        k, v = (a[head[:, None, None], index].astype(jnp.float32)[:, :, None] for a in (x.k, x.v))
        scores = jnp.einsum("hmtrd,hmowd->hmtrw", q, k, precision=lax.Precision.HIGHEST)
        new = merge(state, jnp.where(listed, scores, MASKED), v)
        gain = jnp.where(active, gain_of(state, new, valid, spec), gain)
        keep = lambda new, old, active=active: jnp.where(jnp.expand_dims(active, range(3, new.ndim)), new, old)
        state = jax.tree.map(keep, new, state)
        blocks = jnp.where(active, jnp.minimum(blocks + spec.check_every, total), blocks)
        active &= goes_on(gain, blocks, total, x.threshold[:, None, None], spec)
        return (state, blocks, gain, active), None

    start = state, jnp.zeros_like(total), jnp.zeros(total.shape), total > 0
    steps = jnp.arange(x.order.shape[-1] // spec.stride)
    return lax.scan(look, start, steps)[0][:3]
