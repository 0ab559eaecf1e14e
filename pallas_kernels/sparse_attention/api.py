"""`sparse_attention`: the public function, and the choice of an implementation."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Choice, as_names, backend, first_that_covers
from pallas_kernels.sparse_attention import cpu_ffi, gpu_mosaic, gpu_triton, reference, tpu, xla
from pallas_kernels.sparse_attention.rows import row_numbers
from pallas_kernels.sparse_attention.spec import Aggregate, Backend, Inputs, Spec, Stop

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        reference.BACKEND,
        xla.BACKEND,
        cpu_ffi.BACKEND,
        tpu.BACKEND,
        gpu_triton.BACKEND,
        gpu_mosaic.BACKEND,
    )
}


class Stats(NamedTuple):
    """What a call visited; see `density` and `omitted_bound`.

    Attributes:
      blocks: int32 [Hq, M, tiles], blocks of its list that a tile visited.
      total: int32 [Hq, M], blocks of the list.
      gain: float32 [Hq, M, tiles], share of the normaliser per block at the last look; 0 without history.
      lse: float32 [Hq, N], log of the sum of exp(score) over the visited keys of a row.
    """

    blocks: Int[Array, "hq m tiles"]
    total: Int[Array, "hq m"]
    gain: Float[Array, "hq m tiles"]
    lse: Float[Array, "hq n"]


def sparse_attention(
    q: Float[Array, "hq n d"],
    k: Float[Array, "hk t d"],
    v: Float[Array, "hk t d"],
    order: Int[Array, "h m l"],
    *,
    segment: int,
    block_q: int,
    block_k: int,
    threshold: float | Float[Array, "#h"],
    stop: Stop = "gain",
    aggregate: Aggregate = "mean",
    min_blocks: int = 1,
    check_every: int = 1,
    query_order: Int[Array, "hq m s"] | None = None,
    limit: Int[Array, "#h m"] | None = None,
    start: int | Int[Array, ""] = 0,
    causal: bool = True,
    implementation: str | Sequence[str] | None = None,
) -> tuple[Float[Array, "hq n d"], Stats]:
    """Exact softmax attention, scores divided by sqrt(d), over the keys that each tile of queries visits (S2O, arXiv 2602.22575).

    Rows see their own segment in full (up to themselves if causal); then the listed keys, blocks in order, until the gain
    of normaliser by a block falls below the threshold. With threshold 0 and full lists the result is dense attention.
    Batches fold into the heads. Forward only.

    Args:
      q: queries, the key that row 0 stands at being `start`.
      k: keys after the rotary embedding, all of the history first.
      v: values.
      order: of H = Hq lists, or of H = Hk that the query heads of a group share, tiles and all; a list of segment m ranks
        the history, positions [0, start + m S), or all other segments where not causal; shorter lists cap it. Entries
        behind the history are ignored.
      segment: rows S that share a list; M = ceil(N / S).
      block_q: rows of a tile per head; divides `segment`.
      block_k: keys of a block.
      threshold: gain in [0, 1), or for stop="budget" the bound on the omitted mass; one for all or one per list head.
      stop: "gain", or "budget": R g / (1 + R g) for R blocks left and gain g.
      aggregate: how gains of a tile's rows become one.
      min_blocks: blocks before the first stop.
      check_every: blocks between two looks; the gain is their mean.
      query_order: places of the rows of a segment, a permutation of 0..S-1 each; see `rank.query_order`.
      limit: blocks of every list that may be visited; see `rank.prefix_blocks`.
      start: position of the first query among the keys, as in chunked prefill.
      causal: whether segments see only what precedes them.
      implementation: a name of `BACKENDS`, names in order of preference, or None for the platform's own order.

    Raises:
      ValueError: shapes or numbers do not fit together, or an implementation is unknown.
      ExceptionGroup: every named implementation refused; one NotImplementedError each.
      NotImplementedError: a gradient is asked for.
    """
    spec = Spec(q.shape[1], segment, block_q, block_k, stop, aggregate, min_blocks, check_every, causal)
    _check(q, k, v, order, threshold, query_order, spec)
    if spec.length == 0:
        return q, _no_stats(q, spec)
    x = _inputs(q, k, v, order, threshold, query_order, limit, start, spec)
    out, lse, blocks, gain = _forward_only(x, spec, as_names(implementation))
    share = q.shape[0] // order.shape[0]
    each = lambda a: jnp.repeat(a, share, 0, total_repeat_length=q.shape[0])
    return out, Stats(each(blocks), each(-(-x.count // block_k)), each(gain), lse)


def density(
    stats: Stats, *, length: int, segment: int, block_q: int, block_k: int, start: int = 0, causal: bool = True
) -> Float[Array, "hq"]:
    """Computed pairs over those of dense attention in tiles of block_q x block_q, per head; both count whole tiles."""
    tiles, rows = segment // block_q, -(-length // block_q)
    pairs = (lambda t: t * (t + 1) // 2) if causal else (lambda t: t * t)
    window = rows // tiles * pairs(tiles) + pairs(rows % tiles)
    dense = pairs(rows) * block_q**2 + rows * block_q * start
    visited = stats.blocks.sum((1, 2)).astype(jnp.float32) * (block_q * block_k)
    return (visited + window * block_q**2) / dense


def omitted_bound(stats: Stats) -> Float[Array, "hq m tiles"]:
    """R g / (1 + R g) with R blocks left: bounds a tile's omitted softmax mass where later blocks gain no more than the last."""
    left = (stats.total[..., None] - stats.blocks).astype(jnp.float32) * stats.gain
    return left / (1.0 + left)


def choose(spec: Spec, x: Inputs, names: Sequence[str]) -> Choice:
    """The first of the named implementations that covers the inputs (arrays, or their shapes and dtypes).

    Raises:
      ExceptionGroup: none does; one NotImplementedError each.
    """
    return first_that_covers(names, lambda name: backend(BACKENDS, name).refuse(spec, x), "attention")


def preference() -> dict[str, tuple[str, ...]]:
    """Platform -> implementations in the order in which they are tried without `implementation=`; 'xla' ends every list."""
    cpu = ("cpu_ffi", "xla") if cpu_ffi.is_built() else ("xla",)
    return {"cpu": cpu, "tpu": ("tpu", "xla"), "cuda": ("mosaic_gpu", "triton", "xla")}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _forward_only(x: Inputs, spec: Spec, implementation):
    attend = functools.partial(_finish, spec=spec)
    if implementation is not None:
        return attend(choose(spec, x, implementation).name, x)
    chosen = {platform: choose(spec, x, names).name for platform, names in preference().items()}
    branches = {platform: functools.partial(attend, name) for platform, name in chosen.items()}
    return lax.platform_dependent(x, **branches, default=functools.partial(attend, "xla"))


def _no_gradient(*_):
    raise NotImplementedError("sparse_attention is for prefill and has no gradient; train with dense attention")


_forward_only.defvjp(_no_gradient, _no_gradient)


def _finish(name: str, x: Inputs, spec: Spec):
    """The result of an implementation, divided, in the dtype of q and without padding."""
    state, blocks, gain = BACKENDS[name].attend(x, spec)
    out = (state.acc / state.norm[..., None]).astype(x.q.dtype)
    return out[:, : spec.length], (state.top + jnp.log(state.norm))[:, : spec.length], blocks, gain


def _inputs(q, k, v, order, threshold, query_order, limit, start, spec: Spec) -> Inputs:
    lists, _, listed = order.shape
    start = jnp.asarray(start, jnp.int32)
    first = jnp.arange(spec.segments, dtype=jnp.int32) * spec.segment
    own = jnp.minimum(spec.segment, spec.length - first)
    history = start + first if spec.causal else k.shape[1] - own
    count = jnp.broadcast_to(jnp.minimum(history, listed)[None], (lists, spec.segments))
    if limit is not None:
        count = jnp.minimum(count, jnp.asarray(limit, jnp.int32) * spec.block_k)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, -listed % spec.stride)))
    place = jnp.arange(order.shape[-1], dtype=jnp.int32)[None, None]
    order = jnp.where(place < count[..., None], order, 0)
    q = jnp.pad(q, ((0, 0), (0, spec.padded - spec.length), (0, 0)))
    rows = row_numbers(query_order, q.shape[0], lists, spec)
    return Inputs(q, k, v, order, count, jnp.broadcast_to(jnp.asarray(threshold, jnp.float32), (lists,)), rows, start)


def _check(q, k, v, order, threshold, query_order, spec: Spec) -> None:
    """Raises ValueError where arrays and numbers do not fit together."""
    (hq, _, d), (hk, length, _) = q.shape, k.shape
    if v.shape != k.shape or k.shape[2] != d or hq % hk:
        raise ValueError(
            f"q, k, v: expected [Hq, N, d] and twice [Hk, T, d] with Hk a divisor of Hq, found {q.shape}, {k.shape}, {v.shape}"
        )
    if length < spec.length:
        raise ValueError(f"k: {length} keys for {spec.length} queries; k holds the history and the queries' own keys")
    if spec.segment % spec.block_q or min(spec.block_q, spec.block_k, spec.check_every) < 1:
        raise ValueError(f"block_q={spec.block_q} must divide segment={spec.segment}, and blocks must not be empty")
    if order.ndim != 3 or order.shape[0] not in (hq, hk) or order.shape[1] != spec.segments or order.dtype != jnp.int32:
        raise ValueError(
            f"order: expected int32 [{hq} or {hk}, {spec.segments}, L], lists for ceil({spec.length} / {spec.segment}) segments, "
            f"found {order.dtype} {order.shape}; see `rank.key_order`"
        )
    if query_order is not None and query_order.shape != (hq, spec.segments, spec.segment):
        raise ValueError(f"query_order: expected {(hq, spec.segments, spec.segment)}, found {query_order.shape}")
    if spec.stop not in ("gain", "budget") or spec.aggregate not in ("mean", "max", "ratio"):
        raise ValueError(
            f"stop={spec.stop!r}, aggregate={spec.aggregate!r}: expected gain or budget; mean, max or ratio"
        )
    if isinstance(threshold, int | float) and not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold}: expected a share in [0, 1); 0 is dense attention")


def _no_stats(q, spec: Spec) -> Stats:
    tiles = (q.shape[0], 0, spec.tiles)
    return Stats(jnp.zeros(tiles, jnp.int32), jnp.zeros(tiles[:2], jnp.int32), jnp.zeros(tiles), jnp.zeros(q.shape[:2]))
