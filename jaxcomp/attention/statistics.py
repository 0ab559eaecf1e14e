"""What a sparse attention computed, what it left out at most, and the exact error of leaving keys out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.attention.plan import Plan, history


class Statistics(NamedTuple):
    """Per batch entry and query head.

    Attributes:
      density: pairs whose score was computed over those of dense attention, both in whole tiles; planning is not in it.
      value_density: the same of pairs whose value was read; lower only for methods that skip values after seeing scores.
      blocks: listed blocks that each tile of queries visited.
      omitted: R g / (1 + R g) of each tile, R blocks unvisited after a gain of g: bounds the softmax mass left out if no later
        block gains more than the last (exact for lists sorted by true mass).
      error_bound: 2 max(omitted) max |v|, then a bound on the Euclidean error of every row.
    """

    density: Float[Array, "*B H"]
    value_density: Float[Array, "*B H"]
    blocks: Int[Array, "*B H M tiles"]
    omitted: Float[Array, "*B H M tiles"]
    error_bound: Float[Array, "*B H"]


def tile_pairs(
    length: int, keys: int, segment: int, block_q: int, *, causal: bool, start: int | Int[Array, ""]
) -> tuple[float, float | Float[Array, ""]]:
    """(pairs of the own segments, pairs of dense attention), in whole tiles of block_q rows that hold a real row."""
    whole, rest = divmod(length, segment)
    tiles, last = segment // block_q, -(-rest // block_q)
    if not causal:
        rows = whole * tiles + last
        return float((whole * tiles**2 + last**2) * block_q**2), float(rows * block_q * -(-keys // block_q) * block_q)
    triangle = lambda n: n * (n + 1) // 2
    rows = -(-length // block_q)
    own = float((whole * triangle(tiles) + triangle(last)) * block_q**2)
    return own, float(triangle(rows) * block_q**2) + jnp.asarray(start, jnp.float32) * float(rows * block_q)


def density(
    pairs: Float[Array, "H"], length: int, keys: int, segment: int, block_q: int, *, causal: bool, start: int | Array
) -> Float[Array, "H"]:
    """Share of dense attention's pairs that the own segments and `pairs` listed ones make up."""
    own, dense = tile_pairs(length, keys, segment, block_q, causal=causal, start=start)
    return (pairs + own) / jnp.maximum(jnp.asarray(dense, jnp.float32), 1.0)


def certificate(
    query: Float[Array, "C d"],
    scores: Float[Array, "S"],
    order: Int[Array, "L"],
    visited: int,
    keys: Float[Array, "S d"],
    lse: Float[Array, "C"],
) -> Float[Array, "C"]:
    """Upper bound on the softmax mass that each row of a segment leaves out, with no assumption on the list.

    A row's score is at most its segment's mean score plus rho = |q - mean q| max|k| / sqrt(d), so the keys behind the first
    `visited` of the list weigh at most x = e^(rho - lse) sum e^(mean score), and the mass is at most x / (1 + x). Loose.

    Args:
      query: rows of one segment.
      scores: of the mean query with every key, divided by sqrt(d).
      order: the segment's list, its history only.
      visited: keys of the list that all rows have seen.
      keys: of the head.
      lse: log of the softmax denominator of each row over what it has seen.
    """
    reach = jnp.linalg.norm(query - query.mean(0, keepdims=True), axis=-1)
    rho = reach * jnp.linalg.norm(keys, axis=-1).max() * query.shape[-1] ** -0.5
    beyond = jax.nn.logsumexp(scores[order[visited:]]) if visited < order.shape[0] else -jnp.inf
    return jax.nn.sigmoid(rho + beyond - lse)


def visited_keys(
    plan: Plan,
    blocks: Int[Array, "Hq M tiles"],
    length: int,
    keys: int,
    *,
    block_q: int,
    block_k: int,
    causal: bool = True,
) -> Bool[Array, "Hq T S"]:
    """Which keys each row attended to, for pictures and tests of short sequences; queries begin at slot 0."""
    heads, _, tiles = blocks.shape
    segment = tiles * block_q
    earlier = history(length, segment, keys, causal=causal)
    place = jnp.repeat(_places(plan.order, keys), heads // plan.order.shape[0], axis=0)
    seen = (place[:, :, None] < blocks[..., None] * block_k) & earlier[None, :, None]  # [H M tiles S]
    seen = jnp.repeat(seen, block_q, axis=2)
    if plan.query_order is not None:
        seen = jnp.take_along_axis(seen, jnp.argsort(plan.query_order, axis=-1)[..., None], axis=2)
    seen = seen.reshape(heads, -1, keys)[:, :length]
    row, slot = jnp.arange(length)[:, None], jnp.arange(keys)[None]
    own = (row // segment == slot // segment) & ((slot <= row) if causal else True)
    return seen | own[None]


def _places(order: Int[Array, "H M L"], keys: int) -> Int[Array, "H M S"]:
    """First place of every key in its list (short lists are filled up); past the end where it is not listed."""
    lists, segments, listed = order.shape
    head, segment = jnp.arange(lists)[:, None, None], jnp.arange(segments)[None, :, None]
    place = jnp.broadcast_to(jnp.arange(listed, dtype=jnp.int32), order.shape)
    return jnp.full((lists, segments, keys), keys, jnp.int32).at[head, segment, order].min(place)
