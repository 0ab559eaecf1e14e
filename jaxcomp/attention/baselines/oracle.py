"""Oracles that know the true attention: what block selection and list order could reach at best."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.attention.baselines.blocks import HIDDEN, blocked, expand, top_cdf
from jaxcomp.attention.method import SparseAttention, planned
from jaxcomp.attention.plan import Plan, from_blocks, history
from pallas_kernels.sparse_attention.rank import packed_order


def oracle_blocks(threshold: float = 0.9, *, block: int = 64, **options) -> SparseAttention:
    """Blocks by their true softmax mass: the ceiling of block sparsity under a cumulative threshold."""

    def plan(q, k, start):
        mass = true_mass(q, expand(k, q.shape[0]), block)
        mass = blocked(mass.swapaxes(1, 2), block).sum(2).swapaxes(1, 2)
        return from_blocks(top_cdf(mass, threshold), block, q.shape[1])

    return planned(plan, segment=block, block_q=block, block_k=block, **options)


def oracle_order(
    threshold: float = 0.01, *, segment: int = 128, block_q: int = 64, block_k: int = 64, **options
) -> SparseAttention:
    """S2O with every list sorted by the true mass that its segment gives to a key."""

    def plan(q, k, start):
        earlier = history(q.shape[1], segment, k.shape[1])[None]
        mass = true_mass(q, expand(k, q.shape[0]), segment)
        return Plan(packed_order(jnp.log(jnp.maximum(mass, 1e-30)), earlier))

    return planned(plan, segment=segment, block_q=block_q, block_k=block_k, threshold=threshold, **options)


def true_mass(q: Float[Array, "H N d"], k: Float[Array, "H N d"], block: int) -> Float[Array, "H M N"]:
    """Causal softmax probabilities summed over the rows of each block of queries."""
    keys, depth, length = k.astype(jnp.float32), q.shape[-1], q.shape[1]

    def rows(operands):
        queries, x = operands
        place = x * block + jnp.arange(block)
        logits = jnp.einsum("hid,hjd->hij", queries, keys) * depth**-0.5
        seen = (jnp.arange(length)[None] <= place[:, None])[None]
        share = jax.nn.softmax(jnp.where(seen, logits, HIDDEN), axis=-1)
        return jnp.sum(share, axis=1, where=(place < length)[None, :, None])

    queries = blocked(q.astype(jnp.float32), block).swapaxes(0, 1)
    return lax.map(rows, (queries, jnp.arange(len(queries)))).swapaxes(0, 1)
