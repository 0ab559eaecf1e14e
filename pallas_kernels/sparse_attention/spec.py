"""What is static about a sparse attention, what goes in, what comes out, and what a back end is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # a score that no exponential survives, and no subtraction overflows

Stop = Literal["gain", "budget"]
Aggregate = Literal["mean", "max", "ratio"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static facts of one call.

    Attributes:
      length: query rows N; rows above, up to a whole number of segments, are padding.
      segment: rows S that share a list of keys, and see each other in the dense window.
      block_q: rows of a tile, which stops on its own; divides `segment`.
      block_k: keys of a block.
      stop: "gain" compares the relative gain of normaliser per block with the threshold, "budget" a bound on what is left.
      aggregate: over the rows of a tile: mean or maximum of their gains, or the ratio of sums.
      min_blocks: blocks before the first stop.
      check_every: blocks between two looks at the gain.
      causal: whether the history of a segment is what precedes it, or all other segments.
    """

    length: int
    segment: int
    block_q: int
    block_k: int
    stop: Stop = "gain"
    aggregate: Aggregate = "mean"
    min_blocks: int = 1
    check_every: int = 1
    causal: bool = True

    @property
    def segments(self) -> int:
        """Segments M, the last one ragged."""
        return -(-self.length // self.segment)

    @property
    def padded(self) -> int:
        """Rows of all segments."""
        return self.segments * self.segment

    @property
    def tiles(self) -> int:
        """Tiles of a segment."""
        return self.segment // self.block_q

    @property
    def stride(self) -> int:
        """Keys between two looks at the gain."""
        return self.check_every * self.block_k


class Inputs(NamedTuple):
    """Arrays of one call; H lists serve Hq query heads and read Hk key heads, H is Hq or Hk.

    Attributes:
      q: [Hq, padded, d], zeros behind row N.
      k: [Hk, T, d].
      v: [Hk, T, d].
      order: int32 [H, M, L], L a multiple of `Spec.stride`; rows of k, most important first.
      count: int32 [H, M], leading entries of a list that may be visited.
      threshold: float32 [H].
      rows: int32 [H, M, tiles, R], row of q seen as [Hq * padded, d]; R = block_q * Hq / H.
      start: int32 [], the key that row 0 of q stands at.
    """

    q: Float[Array, "hq n d"]
    k: Float[Array, "hk t d"]
    v: Float[Array, "hk t d"]
    order: Int[Array, "h m l"]
    count: Int[Array, "h m"]
    threshold: Float[Array, "h"]
    rows: Int[Array, "h m tiles r"]
    start: Int[Array, ""]


class State(NamedTuple):
    """Online softmax of every row: o = acc / norm.

    Attributes:
      top: running maximum of the scores.
      norm: sum of exp(score - top).
      acc: sum of exp(score - top) v.
    """

    top: Float[Array, "*rows"]
    norm: Float[Array, "*rows"]
    acc: Float[Array, "*rows d"]


class Outputs(NamedTuple):
    """What a back end returns.

    Attributes:
      state: of every row of q, [Hq, padded], before the division.
      blocks: int32 [H, M, tiles], blocks of the list that a tile visited.
      gain: float32 [H, M, tiles], relative gain per block at the last look; 0 without history.
    """

    state: State
    blocks: Int[Array, "h m tiles"]
    gain: Float[Array, "h m tiles"]


class Backend(NamedTuple):
    """One implementation.

    Attributes:
      name: as in `implementation=`.
      refuse: (spec, inputs) -> why it does not cover this problem, or None. Shapes and dtypes only.
      attend: (inputs, spec) -> `Outputs`.
    """

    name: str
    refuse: Callable[[Spec, Inputs], str | None]
    attend: Callable[[Inputs, Spec], Outputs]


def empty(q: Float[Array, "*rows d"]) -> State:
    """The state of rows that have seen no key."""
    return State(jnp.full(q.shape[:-1], MASKED), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape))


def merge(old: State, scores: jax.Array, values: jax.Array) -> State:
    """The state after more keys: scores [..., r, w], already scaled and masked, and values [..., w, d] (float32)."""
    top = jnp.maximum(old.top, scores.max(-1))
    alpha, p = jnp.exp(old.top - top), jnp.exp(scores - top[..., None])
    acc = alpha[..., None] * old.acc + jnp.matmul(p, values, precision=jax.lax.Precision.HIGHEST)
    return State(top, alpha * old.norm + p.sum(-1), acc)


def gain_of(old: State, new: State, valid: jax.Array, spec: Spec) -> jax.Array:
    """Share of the normaliser that came with the last `check_every` blocks, per block, over the rows of a tile (last axis)."""
    before = jnp.exp(old.top - new.top) * old.norm
    valid = valid.astype(jnp.float32)
    added = jnp.maximum(new.norm - before, 0.0)
    if spec.aggregate == "max":
        gain = (valid * (added / new.norm)).max(-1)
    elif spec.aggregate == "mean":
        gain = (valid * (added / new.norm)).sum(-1) / jnp.maximum(valid.sum(-1), 1.0)
    else:
        gain = (valid * added).sum(-1) / jnp.maximum((valid * new.norm).sum(-1), 1.0)
    return gain / spec.check_every


def goes_on(gain: jax.Array, visited: jax.Array, total: jax.Array, threshold: jax.Array, spec: Spec) -> jax.Array:
    """Whether a tile that has visited so many of its blocks goes on; the last look gave `gain`."""
    score = gain
    if spec.stop == "budget":
        left = gain * (total - visited).astype(jnp.float32)
        score = left / (1.0 + left)
    return (visited < total) & ((visited < spec.min_blocks) | (score >= threshold))
