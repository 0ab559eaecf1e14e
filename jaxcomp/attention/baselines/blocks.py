"""What block-sparse baselines share: pooled blocks, cumulative selection, the last queries' attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomp.attention.method import per_list

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


def expand(k: Float[Array, "Hk N d"], heads: int) -> Float[Array, "Hq N d"]:
    """Keys of every query head."""
    return jnp.repeat(k, heads // k.shape[0], axis=0)


def blocked(x: Float[Array, "H N *d"], block: int) -> Float[Array, "H M B *d"]:
    """Rows by block, zeros behind the last."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def block_means(x: Float[Array, "H N d"], block: int) -> Float[Array, "H M d"]:
    """Mean of the real rows of every block, float32."""
    parts = blocked(x.astype(jnp.float32), block)
    rows = jnp.minimum(block, x.shape[1] - block * jnp.arange(parts.shape[1]))
    return parts.sum(2) / rows[None, :, None].astype(jnp.float32)


def lower_triangle(count: int) -> Bool[Array, "1 M M"]:
    """Blocks that hold a key visible to a block of queries."""
    return jnp.tril(jnp.ones((count, count), bool))[None]


def pooled_attention(q: Float[Array, "H N d"], k: Float[Array, "H N d"], block: int) -> Float[Array, "H M M"]:
    """softmax over visible blocks of (mean query . mean key / sqrt(d))."""
    queries, keys = block_means(q, block), block_means(k, block)
    logits = jnp.einsum("hxd,hyd->hxy", queries, keys) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(lower_triangle(queries.shape[1]), logits, HIDDEN), axis=-1)


def top_cdf(
    mass: Float[Array, "H *B n"], share: float | Float[Array, "#H"], first: Bool[Array, "H *B n"] | None = None
) -> Bool[Array, "H *B n"]:
    """The largest entries whose predecessors sum to less than `share` of the total; `first` come before all others, and count."""
    share = per_list(share, len(mass)).reshape(-1, *[1] * (mass.ndim - 1))
    key = mass if first is None else jnp.where(first, jnp.inf, mass)
    order = jnp.argsort(-key, axis=-1)
    ranked = jnp.take_along_axis(mass, order, axis=-1)
    before = jnp.cumsum(ranked, axis=-1) - ranked
    kept = before < share * mass.sum(-1, keepdims=True)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return kept if first is None else kept | first


def ranks(score: Float[Array, "*B n"]) -> Array:
    """Place of every entry when sorted from the largest down."""
    return jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)


def last_queries(
    q: Float[Array, "H N d"], k: Float[Array, "H N d"], count: int, *, causal: bool = True
) -> Float[Array, "H R N"]:
    """Attention probabilities of the last `count` queries (all, if there are fewer), float32."""
    rows, keys = q[:, -count:].astype(jnp.float32), k.astype(jnp.float32)
    logits = jnp.einsum("hrd,hnd->hrn", rows, keys) * q.shape[-1] ** -0.5
    if causal:
        seen = jnp.arange(k.shape[1])[None] <= jnp.arange(k.shape[1] - rows.shape[1], k.shape[1])[:, None]
        logits = jnp.where(seen[None], logits, HIDDEN)
    return jax.nn.softmax(logits, axis=-1)


def diagonal_sums(probabilities: Float[Array, "H R N"]) -> Float[Array, "H N"]:
    """Sum over the last R queries of the probability at distance o = 0, 1, ..., N - 1 behind the query."""
    heads, rows, keys = probabilities.shape
    distance = jnp.arange(keys - rows, keys)[:, None] - jnp.arange(keys)[None]
    place = jnp.where(distance >= 0, distance, keys)
    return jnp.zeros((heads, keys + 1)).at[:, place].add(probabilities)[:, :keys]
