"""Orders for `sparse_attention`: which rows of a segment share a tile, and which keys of the history come first.

Scores exist for a few segments at a time, so memory is O(N) but for the lists themselves, which `cap` shortens. Only the order of
whole blocks matters: a score becomes an integer of the bits that the key's position leaves free, and one sort of single words
orders both.
"""

from __future__ import annotations

import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.sparse_attention import cpu_ffi

Guide = Literal["anti_sink", "mean_key", "mean_query", "none"]
SINKS = 4  # first keys, which idle rows attend to
SEGMENTS_AT_ONCE = 8  # whose scores share one reading of the keys
BANDS = 4  # parts of the sequence whose histories are sorted at a common length


def query_order(
    q: Float[Array, "hq n d"], k: Float[Array, "hk t d"], *, segment: int, guide: Guide = "anti_sink"
) -> Int[Array, "hq m s"] | None:
    """Places of the rows of every segment by falling product with a guide: rows that need history share tiles; None for "none".

    "anti_sink": minus the mean of the first four keys, which rows without use for history attend to; needs nothing else of
    the prompt. "mean_key": the mean of all keys given. "mean_query": of the segment's queries. Padding comes last.

    Raises:
      ValueError: the guide is unknown.
    """
    if guide == "none":
        return None
    rows = _segments(q.astype(jnp.float32), segment)
    if guide == "anti_sink":
        direction = -k[:, :SINKS].astype(jnp.float32).mean(1)
    elif guide == "mean_key":
        direction = k.astype(jnp.float32).mean(1)
    elif guide != "mean_query":
        raise ValueError(f"guide={guide!r}: expected anti_sink, mean_key, mean_query or none")
    if guide == "mean_query":
        score = jnp.einsum("hmsd,hmd->hms", rows, _mean(rows, q.shape[1], segment))
    else:
        score = jnp.einsum("hmsd,hd->hms", rows, jnp.repeat(direction, q.shape[0] // k.shape[0], 0))
    inside = jnp.arange(rows.shape[1] * segment).reshape(1, -1, segment) < q.shape[1]
    return packed_order(score, inside)


def key_order(
    q: Float[Array, "hq n d"],
    k: Float[Array, "hk t d"],
    *,
    segment: int,
    start: int | Int[Array, ""] = 0,
    cap: int | None = None,
    pool: int | None = None,
    share_group: bool = False,
    causal: bool = True,
    rows: Int[Array, "hq m s"] | None = None,
) -> Int[Array, "h m l"]:
    """History of every segment by falling score with the segment's mean query; H = Hk lists with `share_group`, else Hq.

    Args:
      q: queries; row 0 stands at position `start` of the keys.
      k: keys.
      segment: rows S of a segment.
      start: position of the first query.
      cap: longest list; None keeps all of the history.
      pool: rows of a sub-mean; None pools the whole segment. With sub-means the score of a key is its mean probability.
      share_group: one list for the query heads of a group.
      causal: whether the history is what precedes a segment, or everything else.
      rows: `query_order`, so that sub-means are over rows that share tiles.
    """
    queries = pooled_queries(q, segment=segment, pool=pool, heads=k.shape[0] if share_group else q.shape[0], rows=rows)
    segments, keys = queries.shape[1], k.shape[1]
    traced = not isinstance(start, int)
    last = (segments - 1) * segment + (0 if traced else start)
    length = keys if traced or not causal else max(last, 1)
    length = length if cap is None else min(length, cap)
    parts = []
    for low, high, width in _bands(segments, keys, segment, start, causal):
        list_of = functools.partial(_list, segment=segment, start=start, causal=causal, rows=q.shape[1], length=length)
        one = lambda m, width=width, list_of=list_of: list_of(queries[:, m], k[:, :width], m)
        parts.append(lax.map(one, jnp.arange(low, high, dtype=jnp.int32), batch_size=SEGMENTS_AT_ONCE))
    return jnp.concatenate(parts).swapaxes(0, 1)


def prefix_blocks(
    q: Float[Array, "hq n d"],
    k: Float[Array, "hk t d"],
    order: Int[Array, "h m l"],
    *,
    segment: int,
    block_k: int,
    share: float | Float[Array, "#h 1"],
    start: int | Int[Array, ""] = 0,
    pool: int | None = None,
    causal: bool = True,
    rows: Int[Array, "hq m s"] | None = None,
) -> Int[Array, "h m"]:
    """Blocks fixed in advance: the shortest prefix whose rest has at most `share` of the mass that the pooled scores see.

    T_b <= share (T_0 + own), with T_b the mass listed behind block b and `own` that of the segment itself (Top-CDF).
    """
    queries = pooled_queries(q, segment=segment, pool=pool, heads=order.shape[0], rows=rows)

    def one(operands):
        pooled, listed, m = operands
        history, own = _places(m, k.shape[1], segment, start, causal, q.shape[1])
        score = key_scores(pooled, k, history | own)
        mass = jnp.exp(score - score.max(-1, keepdims=True))
        count = jnp.minimum(history.sum(), order.shape[-1])
        prefix = jnp.take_along_axis(mass, listed, -1)
        prefix = jnp.where((jnp.arange(prefix.shape[-1]) < count)[None], prefix, 0.0)
        blocks = jnp.pad(prefix, ((0, 0), (0, -prefix.shape[-1] % block_k))).reshape(prefix.shape[0], -1, block_k)
        seen = jnp.where((history | own)[None], mass, 0.0).sum(-1, keepdims=True)
        return (lax.cumsum(blocks.sum(-1), 1, reverse=True) > share * seen).sum(-1, dtype=jnp.int32)

    operands = queries.swapaxes(0, 1), order.swapaxes(0, 1), jnp.arange(order.shape[1], dtype=jnp.int32)
    return lax.map(one, operands).swapaxes(0, 1)


def pooled_queries(
    q: Float[Array, "hq n d"], *, segment: int, pool: int | None, heads: int, rows: Int[Array, "hq m s"] | None
) -> Float[Array, "h m p d"]:
    """Mean queries of every segment, or of its parts of `pool` rows, over the heads that share a list too; float32."""
    hq, n, d = q.shape
    grouped = _segments(q.astype(jnp.float32), segment)
    inside = jnp.broadcast_to((jnp.arange(grouped.shape[1] * segment) < n).reshape(-1, segment), grouped.shape[:3])
    if rows is not None and pool is not None:
        grouped = jnp.take_along_axis(grouped, rows[..., None], 2)
        inside = jnp.take_along_axis(inside, rows, 2)
    if segment % (pool or segment):
        raise ValueError(f"pool={pool} must divide segment={segment}")
    split = (heads, hq // heads, grouped.shape[1], segment // (pool or segment), pool or segment)
    inside = inside.reshape(split).astype(jnp.float32)
    total = (grouped.reshape(*split, d) * inside[..., None]).sum((1, 4))
    return total / jnp.maximum(inside.sum((1, 4)), 1.0)[..., None]


def key_scores(
    pooled: Float[Array, "h p d"], k: Float[Array, "hk t d"], visible: Bool[Array, "t"]
) -> Float[Array, "h t"]:
    """Pooled logits of every key, or the log of its mean probability over several pooled queries."""
    h, p, d = pooled.shape
    queries = pooled.reshape(k.shape[0], -1, d) * d**-0.5
    scores = lax.dot_general(
        queries.astype(k.dtype), k, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32
    )
    scores = jnp.where(visible[None, None], scores.reshape(h, p, -1), -jnp.inf)
    if p == 1:
        return scores[:, 0]
    probability = scores - jax.nn.logsumexp(scores, -1, keepdims=True)
    return jax.nn.logsumexp(probability, 1) - jnp.log(jnp.float32(p))


def packed_order(score: Float[Array, "*b t"], inside: Bool[Array, "*#b t"]) -> Int[Array, "*b t"]:
    """Positions by falling score, those not inside last; scores count in 2^(32 - log2 T) steps, at most 2^23."""
    t = score.shape[-1]
    bits = max(t - 1, 1).bit_length()
    steps = 2 ** min(32 - bits, 23) - 1  # exact in float32
    high = jnp.where(inside, score, -jnp.inf).max(-1, keepdims=True)
    low = jnp.where(inside, score, jnp.inf).min(-1, keepdims=True)
    unit = jnp.where(high > low, (steps - 2) / (high - low), 0.0)
    rank = jnp.where(inside, (high - score) * unit, steps).astype(jnp.uint32)
    words = (jnp.minimum(rank, jnp.uint32(steps)) << bits) | lax.broadcasted_iota(
        jnp.uint32, score.shape, score.ndim - 1
    )
    sort = lambda w: (lax.sort(w, dimension=-1, is_stable=False) & jnp.uint32(2**bits - 1)).astype(jnp.int32)
    if not cpu_ffi.is_built():
        return sort(words)
    return lax.platform_dependent(words, cpu=functools.partial(cpu_ffi.packed_order, bits=bits), default=sort)


def _list(pooled, k, m, *, segment, start, causal, rows, length):
    """The list of segment m for all heads, cut or filled to a length."""
    history, _ = _places(m, k.shape[1], segment, start, causal, rows)
    order = packed_order(key_scores(pooled, k, history), history[None])[:, :length]
    return jnp.pad(order, ((0, 0), (0, length - order.shape[-1])))


def _places(m, keys: int, segment: int, start, causal: bool, rows: int):
    """Which keys are history of segment m, and which are its own."""
    place, first = jnp.arange(keys), start + m * segment
    own = (place >= first) & (place < jnp.minimum(first + segment, start + rows))
    return (place < first) if causal else ~own, own


def _bands(segments: int, keys: int, segment: int, start, causal: bool) -> list[tuple[int, int, int]]:
    """(first segment, one behind the last, keys that hold their histories): whole keys where those are not known in advance."""
    if not causal or not isinstance(start, int):
        return [(0, segments, keys)]
    edges = sorted({-(-segments * i // BANDS) for i in range(BANDS + 1)})
    return [(low, high, max(start + (high - 1) * segment, 1)) for low, high in itertools.pairwise(edges)]


def _segments(x: jax.Array, segment: int) -> jax.Array:
    """[H, N, d] to [H, M, S, d], zeros behind the last row."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % segment), (0, 0)))
    return x.reshape(x.shape[0], -1, segment, x.shape[-1])


def _mean(rows: jax.Array, n: int, segment: int) -> jax.Array:
    """Mean of the rows of every segment that are no padding."""
    counts = jnp.minimum(segment, n - jnp.arange(rows.shape[1]) * segment)
    return rows.sum(2) / counts[None, :, None].astype(jnp.float32)
