"""Problems for the tests of sparse attention, and dense attention in NumPy."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.sparse_attention import key_order, query_order


class Case(NamedTuple):
    """Shape and options of one call."""

    heads: int = 4
    key_heads: int = 2
    length: int = 150
    keys: int = 150
    dim: int = 16
    segment: int = 32
    block_q: int = 16
    block_k: int = 8
    start: int = 0
    causal: bool = True
    share_group: bool = False
    guide: str = "anti_sink"
    pool: int | None = None
    stop: str = "gain"
    aggregate: str = "mean"
    min_blocks: int = 1
    check_every: int = 1


CASES = {
    "ragged, lists per query head": Case(),
    "groups share lists and tiles, two blocks a look": Case(share_group=True, guide="mean_key", pool=16, check_every=2),
    "all other segments, budget": Case(causal=False, guide="mean_query", stop="budget", aggregate="max"),
    "prefill behind a cache, ratio": Case(2, 2, 70, 134, start=64, guide="none", aggregate="ratio", min_blocks=3),
    "one query head a key head, tile is the segment": Case(2, 2, 96, 96, block_q=32, block_k=16, stop="budget"),
}


def arrays(case: Case, dtype=np.float32, seed=0):
    """(q, k, v), with a sink and some strong keys so that gains fall."""
    rng = np.random.default_rng(seed)
    q = (rng.standard_normal((case.heads, case.length, case.dim)) + 0.5) * (16 / case.dim) ** 0.5
    k = rng.standard_normal((case.key_heads, case.keys, case.dim))
    k[:, :4] += 2.0
    k[:, rng.integers(0, case.keys, case.keys // 16)] *= 2.5
    v = rng.standard_normal(k.shape)
    return tuple(jnp.asarray(a, dtype) for a in (q, k, v))


def orders(q, k, case: Case):
    """(order, query_order) of a case."""
    places = query_order(q, k, segment=case.segment, guide=case.guide)
    options = {"start": case.start, "pool": case.pool, "share_group": case.share_group, "causal": case.causal}
    return key_order(q, k, segment=case.segment, rows=places, **options), places


def options(case: Case):
    """Keyword arguments of `sparse_attention` besides threshold, query_order and implementation."""
    names = ("segment", "block_q", "block_k", "start", "causal", "stop", "aggregate", "min_blocks", "check_every")
    return {name: getattr(case, name) for name in names}


def dense_attention(q, k, v, case: Case):
    """Softmax attention in float64: (output [Hq, N, d], log of the sum of exponentials [Hq, N])."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    k, v = (np.repeat(a, case.heads // case.key_heads, 0) for a in (k, v))
    scores = np.einsum("hid,hjd->hij", q, k) / np.sqrt(case.dim)
    if case.causal:
        scores = np.where(np.arange(case.keys)[None] <= np.arange(case.length)[:, None] + case.start, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    return np.exp(scores - top) / total @ v, (top + np.log(total))[..., 0]
