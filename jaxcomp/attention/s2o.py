"""S2O: sparse attention over keys that are visited from important to unimportant until little is gained.

Zhang et al., 2026, arXiv 2602.22575 (ACL 2026). Its text was known to us in
summary: ranking of the whole history by a pooled query, a guide vector that permutes queries inside a segment, a dense window,
a stop by marginal mass. Ours: the choice of guides, `sub_means`, `runs`, the rules "budget" and "prefix_cdf", the bounds.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxcomp.attention.method import SparseAttention, per_list, planned
from jaxcomp.attention.plan import Plan
from pallas_kernels.sparse_attention import key_order, prefix_blocks, query_order

STOPS = ("gain", "budget", "prefix_cdf")
GUIDES = ("anti_sink", "mean_key", "mean_query", "none")
BUDGET = 0.3
GAIN, GAIN_KEYS = 1e-2, 8192


def default_threshold(stop: str, keys: int) -> float:
    """Threshold when none is given: a gain of 1e-2 per block at 8192 keys, falling as 1 / keys; else a budget of 0.3."""
    return min(GAIN * GAIN_KEYS / keys, 0.5) if stop == "gain" else BUDGET


def s2o(
    *,
    threshold: float | Float[Array, "H"] | None = None,
    stop: Literal["gain", "budget", "prefix_cdf"] = "gain",
    segment: int = 128,
    block_q: int = 64,
    block_k: int = 64,
    guide: Literal["anti_sink", "mean_key", "mean_query", "none"] = "anti_sink",
    sub_means: int = 1,
    runs: int = 1,
    cap: int | None = None,
    share_group: bool = False,
    causal: bool = True,
    **options: Any,
) -> SparseAttention:
    """S2O as an `attention_fn`; threshold 0 equals dense attention up to rounding.

    Args:
      threshold: of the stop rule, in [0, 1), one or one per head; larger is sparser. None: see `default_threshold`.
      stop: "gain" leaves a tile's list when a block adds less than the threshold to the softmax mass; "budget" when the bound on
        the mass left falls below it, whatever the length; "prefix_cdf" fixes the prefix by the scores beforehand.
      segment: queries that share a list; small segments rank better and cost more to rank.
      block_q: queries of a tile, which stops on its own.
      block_k: keys of a block.
      guide: permutes the queries of a segment: away from the first four keys ("anti_sink"), along the mean key (the order then
        looks ahead, values never do) or the mean query, or not at all.
      sub_means: pooled queries per segment; with more than one a key's score is its mean probability under them.
      runs: parts of consecutive rows that a sub-mean stays inside of; within a part sub-means follow the guide. Diagonals move
        with the rows and ask for runs, scattered rows that need history for the guide; `sub_means` = 2 `runs` serves both.
      cap: longest list, in keys.
      share_group: one list for the query heads of a key head; `threshold` per head is then per key head.
      causal: whether queries see only what precedes them.
      options: of `pallas_kernels.sparse_attention.sparse_attention` (aggregate, min_blocks, check_every, implementation).

    Raises:
      ValueError: a number or name is out of range.
    """
    _check(threshold, stop, segment, block_q, block_k, guide, sub_means, runs, cap)
    pool = None if sub_means == 1 else segment // sub_means

    def plan(q, k, start) -> Plan:
        start = start if causal else 0
        rows = query_order(q, k, segment=segment, guide=guide)
        shared = dict(segment=segment, start=start, pool=pool, causal=causal, rows=_inside_runs(rows, runs))
        order = key_order(q, k, cap=cap, share_group=share_group, **shared)
        if stop != "prefix_cdf":
            return Plan(order, None, rows)
        share = per_list(BUDGET if threshold is None else threshold, order.shape[0])[:, None]
        return Plan(order, prefix_blocks(q, k, order, block_k=block_k, share=share, **shared) * block_k, rows)

    def method(level) -> SparseAttention:
        rule, level = ("gain", 0.0) if stop == "prefix_cdf" else (stop, level)
        return planned(
            plan, segment=segment, block_q=block_q, block_k=block_k, stop=rule, threshold=level, causal=causal,
            chunked=guide != "mean_key", **options,
        )  # fmt: skip

    if threshold is not None:
        return method(threshold)
    core = lambda q, k, v, start: method(default_threshold(stop, k.shape[1])).core(q, k, v, start)
    return SparseAttention(core, segment, block_q, block_k, causal, guide != "mean_key", plan)


def _inside_runs(rows: Int[Array, "H M S"] | None, runs: int) -> Int[Array, "H M S"] | None:
    """The same order of rows inside each of `runs` parts of consecutive ones."""
    if rows is None or runs == 1:
        return rows
    part = rows // (rows.shape[-1] // runs)
    return jnp.take_along_axis(rows, jnp.argsort(part, axis=-1, stable=True), axis=-1)


def _check(threshold, stop, segment, block_q, block_k, guide, sub_means, runs, cap) -> None:
    for name, found, known in (("stop", stop, STOPS), ("guide", guide, GUIDES)):
        if found not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, found {found!r}")
    if min(segment, block_q, block_k, sub_means, runs, 1 if cap is None else cap) < 1:
        raise ValueError(
            f"expected sizes of at least 1, found {segment=}, {block_q=}, {block_k=}, {sub_means=}, {runs=}, {cap=}"
        )
    if sub_means % runs:
        raise ValueError(f"runs={runs} must divide sub_means={sub_means}, each of which lies in one run")
    for name, size in (("block_q", block_q), ("sub_means", sub_means)):
        if segment % size:
            raise ValueError(f"{name}={size} must divide segment={segment}, which must hold whole tiles and sub-means")
    if threshold is not None and not isinstance(threshold, jax.core.Tracer):
        values = np.asarray(threshold, np.float64)
        if not np.all((values >= 0) & (values < 1)):
            raise ValueError(
                f"threshold: expected a share of softmax mass in [0, 1), found {threshold}; 0 is dense attention"
            )
