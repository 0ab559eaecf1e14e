"""MInference: a static pattern per head, found offline (Jiang et al., 2024, arXiv 2407.02490)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxcomp.attention.baselines.blocks import (
    diagonal_sums,
    expand,
    last_queries,
    lower_triangle,
    pooled_attention,
    ranks,
)
from jaxcomp.attention.method import SparseAttention, dense_attention, planned
from jaxcomp.attention.plan import from_mask

LAST = 64  # queries that choose lines
SINKS, RECENT = 30, 100  # columns and diagonals that are always kept
TOLERANCE = 5e-3


class Pattern(NamedTuple):
    """ "vertical_slash": columns and diagonals; "block_sparse": blocks per row (`first`); "streaming": first and recent keys."""

    kind: str
    first: int | Array
    second: int | Array = 0


DEFAULT = Pattern("vertical_slash", 1000, 6096)
CANDIDATES = (  # of the authors' offline search
    *(Pattern("vertical_slash", *lines) for lines in ((30, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096))),
    Pattern("streaming", 100, 800),
    Pattern("block_sparse", 100),
)


def minference(patterns: Pattern | Sequence[Pattern] = DEFAULT, *, block: int = 64, **options) -> SparseAttention:
    """One pattern for all heads or one per head (see `search`); diagonals are widened to blocks, columns gathered key by key."""
    patterns = (patterns,) if isinstance(patterns, Pattern) else tuple(patterns)

    def plan(q, k, start):
        k = expand(k, q.shape[0])
        if len(patterns) == 1:
            return from_mask(mask_of(patterns[0], q, k, block), block)
        heads = [mask_of(patterns[h % len(patterns)], q[h : h + 1], k[h : h + 1], block) for h in range(len(q))]
        return from_mask(jnp.concatenate(heads), block)

    return planned(plan, segment=block, block_q=block, block_k=block, **options)


def mask_of(pattern: Pattern, q: Float[Array, "H N d"], k: Float[Array, "H N d"], block: int) -> Bool[Array, "H M N"]:
    """Keys that each block of queries visits, before the causal cut."""
    length = q.shape[1]
    begin = jnp.arange(-(-length // block))[:, None] * block
    slot = jnp.arange(length)[None]
    if pattern.kind == "streaming":
        seen = (slot < pattern.first) | (slot > begin - pattern.second)
        return jnp.broadcast_to(seen[None], (q.shape[0], *seen.shape))
    if pattern.kind == "block_sparse":
        mass = pooled_attention(q, k, block)
        kept = (ranks(mass) < pattern.first) & lower_triangle(mass.shape[1])
        return jnp.repeat(kept, block, axis=2)[..., :length]
    if pattern.kind != "vertical_slash":
        raise ValueError(f"pattern {pattern.kind!r}: expected vertical_slash, block_sparse or streaming")
    columns, diagonals = lines(q, k, pattern.first, pattern.second)
    reach = jnp.cumsum(diagonals, axis=-1)
    covered = reach - jnp.pad(reach, ((0, 0), (block, 0)))[:, :length] > 0  # a kept distance within the block behind
    distance = begin + block - 1 - slot
    slashes = jnp.where((distance >= 0)[None], covered[:, jnp.clip(distance, 0, length - 1)], False)
    return columns[:, None] | slashes


def lines(q, k, columns: int | Array, diagonals: int | Array) -> tuple[Bool[Array, "H N"], Bool[Array, "H N"]]:
    """(columns, distances) with most of the last 64 queries' attention; the first 30 and the nearest 100 always."""
    attention = last_queries(q, k, LAST)
    place = jnp.arange(q.shape[1])
    vertical = jnp.where(place < SINKS, jnp.inf, attention.sum(1))
    slash = jnp.where(place < RECENT, jnp.inf, diagonal_sums(attention))
    return ranks(vertical) < jnp.maximum(columns, SINKS), ranks(slash) < jnp.maximum(diagonals, RECENT // 2)


def search(
    query: Float[Array, "N H d"],
    key: Float[Array, "N K d"],
    value: Float[Array, "N K d"],
    candidates: Sequence[Pattern] = CANDIDATES,
    **options,
) -> list[Pattern]:
    """Pattern of each head with the fewest output entries off by more than 5e-3 on one sequence; `options` of `minference`."""
    exact = dense_attention(query, key, value, jnp.tril(jnp.ones((len(query), len(query)), bool)))
    off = []
    for candidate in candidates:
        out = minference(candidate, **options)(query, key, value)
        off.append(np.asarray((jnp.abs(out - exact) > TOLERANCE).sum((0, 2))))
    return [candidates[i] for i in np.argmin(off, axis=0)]
