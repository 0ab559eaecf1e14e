"""XAttention: blocks by the sums of strided antidiagonals (Xu et al., 2025, arXiv 2503.16428)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxcomp.attention.baselines.blocks import HIDDEN, blocked, expand, lower_triangle, top_cdf
from jaxcomp.attention.method import SparseAttention, planned
from jaxcomp.attention.plan import from_blocks


def xattention(threshold: float = 0.9, *, stride: int = 8, block: int = 128, **options) -> SparseAttention:
    """The first block, the diagonal, then the largest blocks until `threshold` of a row's mass is covered.

    The authors' code keeps the first *query* block where it means the first key block; this one keeps the key block.

    Raises:
      ValueError: stride does not divide block.
    """
    if block % stride:
        raise ValueError(f"stride={stride} must divide block={block}: a block holds whole antidiagonals")

    def plan(q, k, start):
        mass = antidiagonal_mass(q, expand(k, q.shape[0]), stride, block)
        first = jnp.eye(mass.shape[1], dtype=bool).at[:, 0].set(True)
        kept = top_cdf(mass, threshold, jnp.broadcast_to(first, mass.shape))
        return from_blocks(kept & lower_triangle(mass.shape[1]), block, q.shape[1])

    return planned(plan, segment=block, block_q=block, block_k=block, **options)


def antidiagonal_mass(
    q: Float[Array, "H N d"], k: Float[Array, "H N d"], stride: int, block: int
) -> Float[Array, "H M M"]:
    """Sums per block of the softmax over the grid of strided, reversed concatenations: each cell sums antidiagonals."""
    heads, _, depth = q.shape
    per_block = block // stride
    grid = lambda x: blocked(x.astype(jnp.float32), block).reshape(heads, -1, stride, depth)
    queries = grid(q)[:, :, ::-1].reshape(heads, -1, per_block, stride * depth).swapaxes(0, 1)
    keys = grid(k).reshape(heads, -1, stride * depth)

    def row(operands):
        block_queries, x = operands
        logits = jnp.einsum("hid,hjd->hij", block_queries, keys) / (stride * depth**0.5)
        place = x * per_block + jnp.arange(per_block)
        logits = jnp.where((jnp.arange(keys.shape[1])[None] <= place[:, None])[None], logits, HIDDEN)
        return jax.nn.softmax(logits, axis=-1).reshape(heads, per_block, -1, per_block).sum((1, 3))

    return lax.map(row, (queries, jnp.arange(len(queries)))).swapaxes(0, 1)
