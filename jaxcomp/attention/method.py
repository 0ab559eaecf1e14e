"""A sparse-attention method as an `attention_fn`: drops into our decoders and Flax's `MultiHeadDotProductAttention`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxcomp.attention.plan import Plan
from jaxcomp.attention.statistics import Statistics, density
from jaxcomp.models.attention import dot_product_attention
from pallas_kernels.sparse_attention import omitted_bound, sparse_attention

_ROWS = 256  # queries whose scores dense attention holds at once
Core = Callable[[Array, Array, Array, int | Array], tuple[Array, Statistics]]


@dataclasses.dataclass(frozen=True, eq=False)
class SparseAttention:
    """`(query, key, value, mask=...) -> output` for prefill. Sequences of at most two segments, and decoding, run dense.

    Causal methods take queries to stand at the end of the keys, or, with a mask, where its first row ends (a key-value cache with
    free slots). A mask that is not plainly causal (windows, packed or padded sequences) is honoured by dense attention.

    Attributes:
      core: `(q[Hq, T, d], k[Hk, S, d], v, start) -> (out, statistics)`.
      segment: queries that share a list of keys.
      block_q: queries of a tile.
      block_k: keys of a block.
      causal: whether queries see only what precedes them; otherwise all keys.
      chunked: whether queries may continue a cache; methods that score by the prompt's last queries cannot.
      plan: `(q, k, start) -> Plan`, for methods that have one.
    """

    core: Core
    segment: int
    block_q: int
    block_k: int
    causal: bool = True
    chunked: bool = False
    plan: Callable[[Array, Array, int | Array], Plan] | None = None

    def __call__(
        self,
        query: Float[Array, "*B T H d"],
        key: Float[Array, "*B S K d"],
        value: Float[Array, "*B S K d"],
        bias: Any = None,
        mask: Bool[Array, "..."] | None = None,
        **options: Any,
    ) -> Float[Array, "*B T H d"]:
        """Attention output; see `attend`."""
        return self.attend(query, key, value, bias, mask, **options)[0]

    def attend(
        self,
        query: Float[Array, "*B T H d"],
        key: Float[Array, "*B S K d"],
        value: Float[Array, "*B S K d"],
        bias: Any = None,
        mask: Bool[Array, "..."] | None = None,
        **options: Any,
    ) -> tuple[Float[Array, "*B T H d"], Statistics]:
        """(output, statistics). H query heads share K key heads; a batch never raises the work of its members.

        Raises:
          ValueError: a bias, soft cap or dropout is asked for; shapes do not fit; or queries, keys or values hold NaN (known only
            outside of jit; inside, rows that meet NaN are NaN, as in dense attention).
        """
        _check_options(bias, options)
        self._check(query, key, value)
        length, keys = query.shape[-3], key.shape[-3]
        dense = lambda q, k, v, start: self._dense(q, k, v, mask, start)
        if keys <= 2 * self.segment or length < self.segment:
            return dense(query, key, value, keys - length)
        if mask is None:
            return self._sparse(query, key, value, keys - length if self.causal else 0)
        start, plain = self._place(mask, length, keys)
        known = 0 if length == keys else None  # then the only plain mask is the lower triangle, or no mask at all
        sparse = lambda q, k, v, start: self._sparse(q, k, v, start if known is None else known)
        return lax.cond(plain, sparse, dense, query, key, value, start)

    def _place(self, mask: Bool[Array, "..."], length: int, keys: int) -> tuple[Int[Array, ""], Bool[Array, ""]]:
        """(slot of query 0, whether the mask says no more than that)."""
        seen = mask.astype(bool)
        if not self.causal:
            return jnp.int32(0), seen.all() & (length == keys)
        row = jnp.broadcast_to(seen, (*seen.shape[:-1], keys)).reshape(-1, keys)[0]
        start = row.sum(dtype=jnp.int32) - 1
        plain = jnp.arange(keys)[None] <= start + jnp.arange(length)[:, None]
        within = (start >= 0) & (start + length <= keys) & (self.chunked | (start == keys - length))
        return start, within & (seen == jnp.expand_dims(plain, range(seen.ndim - 2))).all()

    def _sparse(self, query: Array, key: Array, value: Array, start: int | Array) -> tuple[Array, Statistics]:
        batch = query.shape[:-3]
        fold = lambda x: jnp.moveaxis(x, -2, -3).reshape(-1, x.shape[-3], x.shape[-1])
        traced = () if isinstance(start, int) else (start,)
        core = lambda q, k, v, *at: self.core(q, k, v, at[0] if at else start)
        out, stats = jax.custom_batching.sequential_vmap(core)(fold(query), fold(key), fold(value), *traced)
        unfold = lambda x: x.reshape(*batch, query.shape[-2], *x.shape[1:])
        return jnp.moveaxis(unfold(out), -3, -2), jax.tree.map(unfold, stats)

    def _dense(
        self, query: Array, key: Array, value: Array, mask: Array | None, start: Any
    ) -> tuple[Array, Statistics]:
        if mask is None and self.causal:
            mask = jnp.arange(key.shape[-3])[None] <= start + jnp.arange(query.shape[-3])[:, None]
        heads, length = (*query.shape[:-3], query.shape[-2]), query.shape[-3]
        tiles = (*heads, -(-length // self.segment), self.segment // self.block_q)
        first = jnp.arange(tiles[-2], dtype=jnp.int32)[:, None] * self.segment
        history = start + first if self.causal else jnp.full_like(first, key.shape[-3])
        blocks = jnp.broadcast_to(-(-history // self.block_k), tiles).astype(jnp.int32)
        ones, zeros = jnp.ones(heads), jnp.zeros(heads)
        return dense_attention(query, key, value, mask), Statistics(ones, ones, blocks, jnp.zeros(tiles), zeros)

    def _check(self, query: Array, key: Array, value: Array) -> None:
        (length, heads, depth), (keys, kv_heads, _) = query.shape[-3:], key.shape[-3:]
        fits = key.shape == value.shape and query.shape[:-3] == key.shape[:-3] and key.shape[-1] == depth
        if not fits or heads % kv_heads or (self.causal and keys < length):
            raise ValueError(
                "query, key, value: expected [*B, T, H, d] and twice [*B, S, K, d] with K a divisor of H"
                f"{' and S >= T' if self.causal else ''}, found {query.shape}, {key.shape}, {value.shape}"
            )
        if length >= self.segment and keys > 2 * self.segment and length != keys and not (self.chunked and self.causal):
            raise ValueError(
                f"{length} queries for {keys} keys: this method plans by the whole prompt and cannot continue a cache; prefill "
                "in one call, or use s2o with guide 'anti_sink'"
            )
        for name, x in (("query", query), ("key", key), ("value", value)):
            with jax.ensure_compile_time_eval():
                missing = 0 if isinstance(x, jax.core.Tracer) else int(jnp.isnan(x).sum())
            if missing:
                raise ValueError(f"{name}: {missing} of {x.size} entries are NaN; no order of keys exists")


def _check_options(bias: Any, options: dict[str, Any]) -> None:
    """Raises ValueError for what changes the function; Flax's remaining keywords have no effect here."""
    dropout = options.get("dropout_rate", 0.0) and not options.get("deterministic", False)
    for name, found in (
        ("bias", bias is not None),
        ("softcap", options.get("softcap") is not None),
        ("dropout", dropout),
    ):
        if found:
            raise ValueError(f"sparse attention has no {name}; use dot_product_attention in the layers that need it")


def dense_attention(
    query: Float[Array, "*B T H d"], key: Float[Array, "*B S K d"], value: Array, mask: Bool[Array, "..."] | None = None
) -> Float[Array, "*B T H d"]:
    """`dot_product_attention` that holds the scores of 256 queries at a time."""
    length = query.shape[-3]
    if not query.size:
        return query
    if mask is not None:
        mask = mask.reshape((1,) * (query.ndim - mask.ndim) + mask.shape)
    if length <= _ROWS:
        return dot_product_attention(query, key, value, mask=mask)
    count = -(-length // _ROWS)
    fill = lambda x, axis: jnp.pad(
        x, [(0, count * _ROWS - length) if i == axis % x.ndim else (0, 0) for i in range(x.ndim)]
    )
    query = fill(query, -3)
    if mask is not None:
        mask = fill(jnp.broadcast_to(mask, (*mask.shape[:-2], length, mask.shape[-1])), -2)

    def rows(i):
        part = lambda x, axis: lax.dynamic_slice_in_dim(x, i * _ROWS, _ROWS, axis % x.ndim)
        return dot_product_attention(part(query, -3), key, value, mask=None if mask is None else part(mask, -2))

    chunks = jnp.moveaxis(lax.map(rows, jnp.arange(count)), 0, -4)  # [*B count rows H d]
    return chunks.reshape(query.shape)[..., :length, :, :]


def planned(
    plan: Callable[[Array, Array, int | Array], Plan],
    *,
    segment: int,
    block_q: int,
    block_k: int,
    stop: str = "gain",
    threshold: float | Float[Array, "H"] = 0.0,
    causal: bool = True,
    chunked: bool = False,
    **options: Any,
) -> SparseAttention:
    """The method that follows a plan until the stop rule ends it; threshold 0 visits all that is listed.

    `options`: of `pallas_kernels.sparse_attention.sparse_attention` (aggregate, min_blocks, check_every, implementation).
    """

    sizes = dict(segment=segment, block_q=block_q, block_k=block_k, causal=causal)

    def core(q, k, v, start):
        order, limit, rows = plan(q, k, start)
        limit = None if limit is None else -(-limit // block_k)
        level = per_list(threshold, order.shape[0])
        rule = dict(stop=stop, threshold=level, limit=limit, query_order=rows, start=start, **options)
        out, visit = sparse_attention(q, k, v, order, **sizes, **rule)
        pairs = visit.blocks.sum((1, 2)).astype(jnp.float32) * float(block_q * block_k)
        share = density(pairs, q.shape[1], k.shape[1], segment, block_q, causal=causal, start=start)
        omitted = omitted_bound(visit)
        largest = jnp.repeat(jnp.linalg.norm(v.astype(jnp.float32), axis=-1).max(-1), q.shape[0] // v.shape[0])
        return out, Statistics(share, share, visit.blocks, omitted, 2.0 * omitted.max((1, 2)) * largest)

    return SparseAttention(core, segment, block_q, block_k, causal, chunked, plan)


def per_list(threshold: float | Float[Array, "h"], lists: int) -> Float[Array, "#H"]:
    """Thresholds of the heads of one sequence for the lists of a batch; one for all stays one."""
    level = jnp.atleast_1d(jnp.asarray(threshold, jnp.float32))
    if lists % level.size:
        raise ValueError(f"threshold: expected one or one per list head, found {level.size} for {lists} lists")
    return level if level.size == 1 else jnp.tile(level, lists // level.size)
