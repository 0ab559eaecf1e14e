"""BLASST: dense scores, but softmax and values only of blocks near the running maximum (arXiv 2512.12087)."""

from __future__ import annotations

import jax.numpy as jnp

from jaxcomp.attention.baselines.skipping import skipping
from jaxcomp.attention.method import SparseAttention


def blasst(threshold: float, *, block: int = 64) -> SparseAttention:
    """Skips a block whose largest probability, relative to the largest so far, is below `threshold` in (0, 1) for all rows.

    All scores are computed: `density` is 1, `value_density` is what it saves. For a fixed quality thresholds fall as 1 / N.
    """
    everything = lambda q, k: jnp.ones((q.shape[0], *[-(-q.shape[1] // block)] * 2), bool)
    return skipping(everything, -jnp.log(jnp.asarray(threshold, jnp.float32)), block_q=block, block_k=block)
