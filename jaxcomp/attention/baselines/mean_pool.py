"""Mean pooling: blocks by the attention of mean queries to mean keys, the plainest block-sparse method."""

from __future__ import annotations

from jaxcomp.attention.baselines.blocks import expand, pooled_attention, top_cdf
from jaxcomp.attention.method import SparseAttention, planned
from jaxcomp.attention.plan import from_blocks


def mean_pool(threshold: float = 0.9, *, block: int = 128, **options) -> SparseAttention:
    """Blocks that cover `threshold` of the pooled attention of each block of queries, the first block, the diagonal."""

    def plan(q, k, start):
        mass = pooled_attention(q, expand(k, q.shape[0]), block)
        return from_blocks(top_cdf(mass, threshold).at[:, :, 0].set(True), block, q.shape[1])

    return planned(plan, segment=block, block_q=block, block_k=block, **options)
