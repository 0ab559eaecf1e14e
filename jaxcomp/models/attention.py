"""Grouped-query attention with a functional key-value cache, in Flax's `attention_fn` convention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def dot_product_attention(
    query: Float[Array, "*B T H d"],
    key: Float[Array, "*B S K d"],
    value: Float[Array, "*B S K d"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | Float[Array, "..."] | None = None,
    *,
    softcap: float | None = None,
    **unused: object,
) -> Float[Array, "*B T H d"]:
    """Softmax attention, scores divided by sqrt(d); H query heads share K key heads without copying them.

    A drop-in for `flax.linen.dot_product_attention`: `bias` and `mask` (True is visible) broadcast to
    [*B, H, T, S]. Scores and softmax are float32; `softcap` c bounds scores by c * tanh(score / c) before the
    mask. There is no dropout: the other keywords of Flax's function are accepted and ignored.

    Raises:
      ValueError: H is not a multiple of K.
    """
    del unused
    *batch, length, heads, depth = query.shape
    num_kv = key.shape[-2]
    if heads % num_kv:
        raise ValueError(f"{heads} query heads cannot share {num_kv} key heads; use a divisor of {heads}")
    query = query * jnp.asarray(depth**-0.5, query.dtype)
    grouped = query.reshape(*batch, length, num_kv, heads // num_kv, depth)
    scores = jnp.einsum("...tkgd,...skd->...kgts", grouped, key, preferred_element_type=jnp.float32)
    scores = scores.reshape(*batch, heads, length, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(*batch, num_kv, heads // num_kv, length, -1)
    return jnp.einsum("...kgts,...skd->...tkgd", weights, value).reshape(query.shape)


class Context(NamedTuple):
    """Where the tokens of one call stand; the same for every layer.

    `positions` turn the rotary embedding. `start` is the first token's slot among the keys, 0 without a
    cache. Tokens see keys of their own segment only; None is one segment.
    """

    positions: Int[Array, "#B T"]
    start: Int[Array, ""]
    segments: Int[Array, "B T"] | None = None
    key_segments: Int[Array, "B S"] | None = None


def visible(context: Context, window: Int[Array, ""], num_keys: int) -> Bool[Array, "#B 1 T S"]:
    """Causal mask: the last `window` slots up to the token's own, where they are of its segment."""
    query_slot = context.start + jnp.arange(context.positions.shape[1])
    distance = query_slot[:, None] - jnp.arange(num_keys)[None, :]
    mask = ((distance >= 0) & (distance < window))[None, None]
    if context.segments is None:
        return mask
    return mask & (context.segments[:, None, :, None] == context.key_segments[:, None, None, :])


class KVCache(NamedTuple):
    """Keys and values of all layers, filled up to `length` slots; a call with T tokens writes the next T.

    Writing past S slots is the caller's error: the last slots are overwritten.
    """

    key: Float[Array, "L B S K d"]
    value: Float[Array, "L B S K d"]
    segments: Int[Array, "B S"]
    length: Int[Array, ""]

    def append_segments(self, segments: Int[Array, "B T"]) -> "KVCache":
        """Records the segments of T new tokens and advances `length`."""
        slot = (jnp.zeros_like(self.length), self.length)
        written = jax.lax.dynamic_update_slice(self.segments, segments, slot)
        return self._replace(segments=written, length=self.length + segments.shape[1])
