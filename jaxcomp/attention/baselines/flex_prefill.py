"""FlexPrefill: a pattern and a budget per head from the last block of queries (Lai et al., 2025, arXiv 2502.20766)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomp.attention.baselines.blocks import (
    block_means,
    blocked,
    diagonal_sums,
    expand,
    last_queries,
    lower_triangle,
    pooled_attention,
    ranks,
    top_cdf,
)
from jaxcomp.attention.method import SparseAttention, planned
from jaxcomp.attention.plan import from_blocks


def flex_prefill(
    gamma: float = 0.9, *, tau: float = 0.1, min_budget: int = 512, block: int = 128, **options
) -> SparseAttention:
    """Vertical and slash blocks that cover `gamma` of the last queries' attention; query-aware heads add pooled blocks.

    A head is query-aware where the square root of the Jensen-Shannon divergence between pooled and true block attention of
    the last queries is below `tau`. `min_budget` is in keys. The authors divide by all blocks, this package by the causal ones.
    """

    def plan(q, k, start):
        k = expand(k, q.shape[0])
        attention = last_queries(q, k, block)
        lines = line_blocks(attention, gamma, min_budget, block)
        aware = divergence(q, k, attention, block) < tau
        pooled = pooled_attention(q, k, block)
        flat = pooled.reshape(len(pooled), -1)
        chosen = jnp.where(aware[:, None], top_cdf(flat, gamma), ranks(flat) < max(min_budget // block, 1))
        kept = (lines | chosen.reshape(pooled.shape)) & lower_triangle(pooled.shape[1])
        return from_blocks(kept, block, q.shape[1])

    return planned(plan, segment=block, block_q=block, block_k=block, **options)


def line_blocks(attention: Float[Array, "H R N"], gamma: float, min_budget: int, block: int) -> Bool[Array, "H M M"]:
    """Whole columns and diagonals of blocks, the first of each always."""
    vertical, slash = attention.mean(1), diagonal_sums(attention) / attention.shape[1]
    count = -(-vertical.shape[1] // block)
    keep = []
    for line in (vertical, slash):
        needed = jnp.maximum(top_cdf(line, gamma).sum(-1) // block + 1, min_budget // block)
        mass = blocked(line, block).sum(2).at[:, 0].set(jnp.inf)
        keep.append(ranks(mass) < needed[:, None])
    offset = jnp.arange(count)[:, None] - jnp.arange(count)[None]
    diagonal = jnp.where((offset >= 0)[None], keep[1][:, jnp.maximum(offset, 0)], False)
    return keep[0][:, None] | diagonal


def divergence(q, k, attention: Float[Array, "H R N"], block: int) -> Float[Array, "H"]:
    """sqrt of the Jensen-Shannon divergence (nats) of pooled and true attention of the last block of queries, over key blocks."""
    query = q[:, -block:].astype(jnp.float32).mean(1)
    estimate = jax.nn.softmax(jnp.einsum("hd,hyd->hy", query, block_means(k, block)) * q.shape[-1] ** -0.5, axis=-1)
    true = blocked(attention.mean(1), block).sum(2)
    middle = (estimate + true) / 2
    kl = lambda p: jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1.0) / middle), 0.0).sum(-1)
    return jnp.sqrt(jnp.maximum((kl(estimate) + kl(true)) / 2, 0.0))
