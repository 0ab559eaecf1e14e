"""AnchorAttention: keys within a margin of an anchor score, gathered one by one, unordered (arXiv 2505.23520)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxcomp.attention.baselines.blocks import HIDDEN, block_means, blocked, expand
from jaxcomp.attention.method import SparseAttention, per_list, planned
from jaxcomp.attention.plan import from_mask


def anchor(threshold: float = 12.0, *, group: int = 16, block: int = 128, **options) -> SparseAttention:
    """The first block, the own group of `group` blocks, and keys at most `threshold` below the anchor of any block of the group.

    The anchor of a row is its largest score in the first block and its own group; means over a block stand for its rows.
    """

    def plan(q, k, start):
        k = expand(k, q.shape[0])
        near = jnp.repeat(stripes(q, k, anchors(q, k, group, block), threshold, group, block), group, axis=1)
        count = -(-q.shape[1] // block)
        slot, row = jnp.arange(q.shape[1])[None], jnp.arange(count)[:, None]
        own = (slot < block) | (slot // (block * group) == row // group)
        return from_mask(near[:, :count] | own[None], block)

    return planned(plan, segment=block, block_q=block, block_k=block, **options)


def anchors(q: Float[Array, "H N d"], k: Float[Array, "H N d"], group: int, block: int) -> Float[Array, "H M"]:
    """Mean over each block of queries of the rows' largest score in the first block and the own group."""
    length, depth = q.shape[1:]
    keys, width = k.astype(jnp.float32), group * block
    keys = jnp.pad(keys, ((0, 0), (0, -length % width), (0, 0)))

    def rows(operands):
        queries, x = operands  # [H B d]
        first = x // group * width
        local = lax.dynamic_slice_in_dim(keys, first, width, 1)
        slot = jnp.concatenate([jnp.arange(block), first + jnp.arange(width)])
        place = x * block + jnp.arange(block)
        score = jnp.einsum("hid,hjd->hij", queries, jnp.concatenate([keys[:, :block], local], 1)) * depth**-0.5
        top = jnp.where((slot[None] <= place[:, None])[None], score, HIDDEN).max(-1)
        real = (place < length)[None]
        return jnp.sum(top, axis=1, where=real) / real.sum().astype(jnp.float32)

    queries = blocked(q.astype(jnp.float32), block).swapaxes(0, 1)
    return lax.map(rows, (queries, jnp.arange(len(queries)))).swapaxes(0, 1)


def stripes(q, k, anchor: Float[Array, "H M"], threshold: float, group: int, block: int) -> Bool[Array, "H g N"]:
    """Keys near the anchor of at least one block of a group."""
    logits = jnp.einsum("hxd,hnd->hxn", block_means(q, block), k.astype(jnp.float32)) * q.shape[-1] ** -0.5
    near = logits + per_list(threshold, len(logits))[:, None, None] >= anchor[..., None]
    near = jnp.pad(near, ((0, 0), (0, -near.shape[1] % group), (0, 0)))
    return near.reshape(near.shape[0], -1, group, near.shape[2]).any(2)
