"""S2O with one of its ideas taken away: key-wise granularity, the order of keys, the history."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxcomp.attention.method import SparseAttention, planned
from jaxcomp.attention.plan import Plan, history
from pallas_kernels.sparse_attention.rank import key_scores, packed_order, pooled_queries, query_order


def granules(threshold: float, *, granule: int, segment: int, block_q: int, block_k: int) -> SparseAttention:
    """Runs of `granule` consecutive keys move together, ranked by their summed weight: `granule` = `block_k` is block sparsity.

    Raises:
      ValueError: granule does not divide segment.
    """
    if segment % granule:
        raise ValueError(f"granule={granule} must divide segment={segment}: histories hold whole granules")

    def plan(q, k, start):
        earlier = history(q.shape[1], segment, k.shape[1])
        pooled = pooled_queries(q, segment=segment, pool=None, heads=q.shape[0], rows=None)

        def one(operands):
            means, seen = operands
            score = jnp.where(seen[None], key_scores(means, k, seen), -jnp.inf)
            score = jnp.pad(score, ((0, 0), (0, -score.shape[1] % granule)), constant_values=-jnp.inf)
            weight = jax.nn.logsumexp(score.reshape(score.shape[0], -1, granule), axis=-1)
            order = packed_order(jnp.maximum(weight, -1e30), jnp.isfinite(weight))
            keys = order[..., None] * granule + jnp.arange(granule, dtype=jnp.int32)
            return keys.reshape(score.shape)

        order = lax.map(one, (pooled.swapaxes(0, 1), earlier)).swapaxes(0, 1)
        return Plan(order, None, query_order(q, k, segment=segment))

    return planned(plan, segment=segment, block_q=block_q, block_k=block_k, threshold=threshold)


def unranked(threshold: float, *, segment: int, block_q: int, block_k: int) -> SparseAttention:
    """Keys from the newest to the oldest, stopped by gain."""

    def plan(q, k, start):
        earlier = history(q.shape[1], segment, k.shape[1])
        order = packed_order(jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.float32), earlier.shape), earlier)
        return Plan(jnp.broadcast_to(order, (q.shape[0], *order.shape)), None, query_order(q, k, segment=segment))

    return planned(plan, segment=segment, block_q=block_q, block_k=block_k, threshold=threshold)


def local_window(*, segment: int, block_q: int, block_k: int) -> SparseAttention:
    """The own segment and nothing else: the first pass alone."""

    def plan(q, k, start) -> Plan:
        lists = (q.shape[0], -(-q.shape[1] // segment))
        return Plan(jnp.zeros((*lists, 1), jnp.int32), jnp.zeros(lists, jnp.int32))

    return planned(plan, segment=segment, block_q=block_q, block_k=block_k)
