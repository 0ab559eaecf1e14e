"""Natural-order attention that skips the values of a block whose scores all lie far below the running maximum."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.attention.baselines.blocks import HIDDEN, blocked, expand
from jaxcomp.attention.method import SparseAttention, per_list
from jaxcomp.attention.statistics import Statistics, density


def skipping(mask_of, margin: float | Float[Array, "H"], *, block_q: int, block_k: int) -> SparseAttention:
    """Visits the key blocks of `mask_of(q, k) -> bool [H, M, nk]`, skips values by the rule, and counts both.

    A block is skipped when every row's maximum in it lies more than `margin` (nats) below the row's running maximum.
    """

    def core(q, k, v, start):
        expanded = expand(k, q.shape[0]), expand(v, q.shape[0])
        mask = mask_of(q, expanded[0])
        out, scored, valued = attend(q, *expanded, mask, margin, block_q, block_k)
        shape = (q.shape[0], -(-q.shape[1] // block_q), 1)
        share = lambda blocks: density(
            blocks.sum(1).astype(jnp.float32) * float(block_q * block_k), q.shape[1], k.shape[1], block_q, block_q,
            causal=True, start=0,
        )  # fmt: skip
        zeros = jnp.zeros(shape)
        return out, Statistics(share(scored), share(valued), valued.reshape(shape), zeros, jnp.zeros(shape[:1]))

    return SparseAttention(core, block_q, block_q, block_k)


def attend(
    q: Float[Array, "H N d"],
    k: Float[Array, "H N d"],
    v: Float[Array, "H N d"],
    mask: Bool[Array, "H M n"],
    margin: float | Array,
    block_q: int,
    block_k: int,
) -> tuple[Float[Array, "H N d"], Int[Array, "H M"], Int[Array, "H M"]]:
    """(output, history blocks scored, history blocks whose values were read); the own block of queries is always visited."""
    heads, length, depth = q.shape
    margins = jnp.broadcast_to(per_list(margin, heads), (heads,))
    queries = blocked(q.astype(jnp.float32) * depth**-0.5, block_q)
    keys, values = (blocked(x.astype(jnp.float32), block_k) for x in (k, v))

    def tile(operands):
        h, x = operands
        query, place = queries[h, x], x * block_q + jnp.arange(block_q)

        def visit(y, carry):
            state, scored, valued = carry
            slot = y * block_k + jnp.arange(block_k)
            own = (y + 1) * block_k > x * block_q

            def score(state):
                scores = jnp.where(slot[None] <= place[:, None], query @ keys[h, y].T, HIDDEN)
                far = (scores.max(-1) < state[0] - margins[h]).all() & ~own
                return lax.cond(far, lambda s: s, lambda s: _merge(s, scores, values[h, y]), state), ~far

            state, read = lax.cond(mask[h, x, y] | own, score, lambda s: (s, jnp.array(False)), state)
            count = lambda visited: (visited & ~own).astype(jnp.int32)
            return state, scored + count(mask[h, x, y]), valued + count(read)

        zero = jnp.int32(0)
        empty = jnp.full(block_q, HIDDEN), jnp.zeros(block_q), jnp.zeros((block_q, depth))
        last = jnp.minimum((x + 1) * block_q, length)
        (_, norm, acc), scored, valued = lax.fori_loop(0, -(-last // block_k), visit, (empty, zero, zero))
        return acc / norm[:, None], scored, valued

    count = queries.shape[1]
    pairs = jnp.repeat(jnp.arange(heads), count), jnp.tile(jnp.arange(count), heads)
    out, scored, valued = lax.map(tile, pairs)
    return (
        out.reshape(heads, -1, depth)[:, :length].astype(q.dtype),
        scored.reshape(heads, -1),
        valued.reshape(heads, -1),
    )


def _merge(state, scores: Float[Array, "B b"], values: Float[Array, "b d"]):
    top, norm, acc = state
    new = jnp.maximum(top, scores.max(-1))
    alpha, p = jnp.exp(top - new), jnp.exp(scores - new[:, None])
    return new, alpha * norm + p.sum(-1), alpha[:, None] * acc + p @ values
