"""Dense attention in the interface of the others: every key of the history is listed and visited."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcomp.attention.method import SparseAttention, planned
from jaxcomp.attention.plan import Plan


def dense(*, block: int = 64, **options) -> SparseAttention:
    """All keys in natural order, in blocks, float32 accumulation; density 1."""

    def plan(q, k, start):
        count = -(-q.shape[1] // block)
        return Plan(jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), (q.shape[0], count, k.shape[1])))

    return planned(plan, segment=block, block_q=block, block_k=block, chunked=True, **options)
