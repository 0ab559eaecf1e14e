"""FlowCache (ICLR 2026, arXiv 2602.10825): every chunk of an autoregressive video decides for itself whether to compute.

Each chunk, in each guidance branch, has its own accumulator on its own denoising counter: TeaCache's rule (arXiv 2411.19108)
per chunk. Keys and values of finished chunks can be reduced to the most useful ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxcomp.models.video_dit import ChunkKV
from jaxcomp.sampling.autoregressive.distance import Distance
from jaxcomp.sampling.autoregressive.policy import TokenPolicy, all_or_none


class FlowState(NamedTuple):
    """Distance since the last computed step, and what the measure keeps."""

    accumulated: Float[Array, ""]
    distance: Any


def flowcache(threshold: float | Array, distance: Distance, *, warmup: int = 4, force_last: bool = True) -> TokenPolicy:
    """Computes a chunk when the distances since its last computed step add up to `threshold`.

    Args:
      threshold: 0.1 (slow) and 0.15 (fast) with SkyReels-V2's time polynomial; 0.01 with MAGI-1's embedded distance.
      distance: of a chunk's step to the one before.
      warmup: the chunk's steps 0..warmup compute.
      force_last: its last step computes, too.

    Raises:
      ValueError: warmup < 0.
    """
    if warmup < 0:
        raise ValueError(f"warmup: step 0 always computes, so expected at least 0, found {warmup}")

    def decide(state, step, h):
        change, kept = distance.measure(state.distance, step, h)
        accumulated = state.accumulated + change
        compute = (step.index <= warmup) | (accumulated >= threshold)
        if force_last:
            compute |= step.last
        return all_or_none(compute, h), FlowState(jnp.where(compute, 0.0, accumulated), kept)

    return TokenPolicy(
        init=lambda h, seen: FlowState(jnp.zeros((), jnp.float32), distance.init(h)),
        decide=decide,
        observe=lambda state, step, computed, seen, before: state,
    )


def teacache(threshold: float | Array, distance: Distance) -> TokenPolicy:
    """TeaCache on every chunk: as `flowcache`, but only the first and the last step are sure to compute."""
    return flowcache(threshold, distance, warmup=0)


def uniform(interval: int | Array, *, warmup: int = 0) -> TokenPolicy:
    """Computes a chunk's steps 0..warmup and then every `interval`-th.

    Raises:
      ValueError: interval < 1 or warmup < 0.
    """
    if not isinstance(interval, jax.Array) and (interval < 1 or warmup < 0):
        raise ValueError(f"expected interval >= 1 and warmup >= 0, found {interval} and {warmup}")

    def decide(state, step, h):
        compute = (step.index <= warmup) | ((step.index - warmup) % interval == 0)
        return all_or_none(compute, h), state

    return TokenPolicy(
        init=lambda h, seen: (),
        decide=decide,
        observe=lambda state, step, computed, seen, before: state,
    )


def compress_cache(cache: ChunkKV, budget: int, importance: float = 0.07, window: int = 7) -> ChunkKV:
    """The `budget` keys and values per head of a finished chunk that matter most and repeat each other least.

    score = importance * maxpool(mean_q softmax(q k^T)) - (1 - importance) * softmax_i(mean_j cos(k_i, k_j)), with the queries
    of the chunk's own last forward; the mean cosine is taken through the sum of the normalised keys. Kept tokens stay in order.

    Args:
      cache: of all layers.
      budget: tokens kept.
      importance: weight of the attention that a key receives.
      window: of the max-pooling over tokens, odd.

    Raises:
      ValueError: a budget outside of 1..L, or an even window.
    """
    length = cache.key.shape[2]
    if not 1 <= budget <= length or window % 2 == 0:
        raise ValueError(f"expected a budget within 1..{length} and an odd window, found {budget} and {window}")

    def layer(kv: ChunkKV) -> ChunkKV:
        score = importance * _received(kv, window) - (1 - importance) * _redundancy(kv.key)  # [B H L]
        index = jnp.sort(jax.lax.top_k(score, budget)[1], axis=-1)
        take = lambda x: jnp.take_along_axis(x, jnp.moveaxis(index, 1, 2)[..., None], axis=1)
        return ChunkKV(take(kv.key), take(kv.value), kv.query[:, :0])

    return jax.lax.map(layer, cache)


def _received(kv: ChunkKV, window: int) -> Float[Array, "B H L"]:
    """Mean attention of the chunk's queries to each key, max-pooled over neighbouring tokens."""
    scale = kv.key.shape[-1] ** -0.5
    scores = jnp.einsum("bqhd,bkhd->bhqk", kv.query * jnp.asarray(scale, kv.query.dtype), kv.key)
    weight = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).mean(2)
    return jax.lax.reduce_window(weight, -jnp.inf, jax.lax.max, (1, 1, window), (1, 1, 1), "SAME")


def _redundancy(key: Float[Array, "B L H d"]) -> Float[Array, "B H L"]:
    """Softmax over tokens of a key's mean cosine to the other keys of its head."""
    key = key.astype(jnp.float32)
    unit = key / (jnp.linalg.norm(key, axis=-1, keepdims=True) + 1e-8)
    cosine = (jnp.einsum("blhd,bhd->bhl", unit, unit.sum(1)) - 1) / key.shape[1]
    return jax.nn.softmax(cosine, axis=-1)
