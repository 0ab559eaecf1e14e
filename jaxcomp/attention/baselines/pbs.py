"""PBS-Attn: keys permuted inside segments so that blocks are denser (arXiv 2510.21270)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.attention.baselines.blocks import HIDDEN, block_means, expand, last_queries, top_cdf
from jaxcomp.attention.method import SparseAttention, planned
from jaxcomp.attention.plan import from_mask


def pbs(threshold: float = 0.9, *, segment: int = 256, block: int = 128, **options) -> SparseAttention:
    """Permuted blocks of earlier segments that cover `threshold` of the pooled attention, token 0's block, the own segment.

    As in the authors' code keys are scored by the last `block` queries without a causal mask, and queries keep their order.

    Raises:
      ValueError: block does not divide segment.
    """
    if segment % block:
        raise ValueError(f"block={block} must divide segment={segment}: keys move inside segments of whole blocks")

    def plan(q, k, start):
        k = expand(k, q.shape[0])
        place = places(last_queries(q, k, block, causal=False).mean(1), segment)
        kept = selected(q, k, place, threshold, segment, block)
        return from_mask(_tokens(kept, place, segment, block), block)

    return planned(plan, segment=block, block_q=block, block_k=block, **options)


def places(score: Float[Array, "H N"], segment: int) -> Int[Array, "H N"]:
    """Where each key goes: inside its segment, by falling score."""
    heads, keys = score.shape
    score = jnp.pad(score, ((0, 0), (0, -keys % segment)), constant_values=-1.0).reshape(heads, -1, segment)
    inside = jnp.argsort(jnp.argsort(-score, axis=-1), axis=-1)
    return (inside + segment * jnp.arange(score.shape[1])[None, :, None]).reshape(heads, -1)[:, :keys]


def selected(q, k, place: Int[Array, "H N"], threshold: float, segment: int, block: int) -> Bool[Array, "H M M"]:
    """Which permuted blocks of earlier segments each block of queries keeps."""
    moved = jnp.take_along_axis(k, jnp.argsort(place, axis=-1)[..., None], axis=1)
    logits = jnp.einsum("hxd,hyd->hxy", block_means(q, block), block_means(moved, block)) * q.shape[-1] ** -0.5
    group = jnp.arange(logits.shape[1]) * block // segment
    earlier = (group[None] < group[:, None])[None]
    mass = jnp.where(earlier, jax.nn.softmax(jnp.where(earlier, logits, HIDDEN), axis=-1), 0.0)
    return top_cdf(mass, threshold) & earlier


def _tokens(kept: Bool[Array, "H M M"], place: Int[Array, "H N"], segment: int, block: int) -> Bool[Array, "H M N"]:
    holder = place // block
    row = jnp.arange(kept.shape[1])[None, :, None] * block // segment
    own = row == (jnp.arange(place.shape[1]) // segment)[None, None]
    sink = holder[:, None] == holder[:, :1, None]
    return jnp.take_along_axis(kept, holder[:, None], axis=2) | own | sink
