"""SpargeAttn: pooled selection where blocks are self-similar, all of them elsewhere, then value skipping (arXiv 2502.18137)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxcomp.attention.baselines.blocks import HIDDEN, block_means, top_cdf
from jaxcomp.attention.baselines.skipping import skipping
from jaxcomp.attention.method import SparseAttention


def sparge(
    threshold: float = 0.96, *, similarity: float = 0.3, skip: float = 20.0, block_q: int = 128, block_k: int = 64
) -> SparseAttention:
    """Key blocks that cover `threshold` of the pooled attention; blocks less self-similar than `similarity` are computed anyway.

    Values are skipped where a block lies `skip` octaves below the running maximum. Scores stay in floating point: the authors'
    int8 is another axis.
    """
    mask_of = lambda q, k: selected(q, k, threshold, similarity, block_q, block_k)
    return skipping(mask_of, skip * math.log(2.0), block_q=block_q, block_k=block_k)


def self_similarity(x: Float[Array, "H N d"], block: int) -> Float[Array, "H M"]:
    """Mean cosine of all pairs of rows of each block."""
    unit = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return (block_means(unit, block) ** 2).sum(-1)


def selected(
    q: Float[Array, "H N d"], k: Float[Array, "H N d"], threshold: float, similarity: float, block_q: int, block_k: int
) -> Bool[Array, "H M n"]:
    """Key blocks that each block of queries visits; keys are centred first."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    k = k - k.mean(1, keepdims=True)
    logits = jnp.einsum("hxd,hyd->hxy", block_means(q, block_q), block_means(k, block_k)) * q.shape[-1] ** -0.5
    last = (jnp.arange(logits.shape[1])[:, None] + 1) * block_q
    visible = (jnp.arange(logits.shape[2])[None] * block_k < last)[None]
    pooled = self_similarity(k, block_k)[:, None] > similarity
    mass = jnp.where(visible & pooled, jax.nn.softmax(jnp.where(visible & pooled, logits, HIDDEN), axis=-1), 0.0)
    everything = self_similarity(q, block_q)[..., None] <= similarity
    return visible & (top_cdf(mass, threshold) | ~pooled | everything)
